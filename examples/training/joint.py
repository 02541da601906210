"""One encoder and decoder from several sets at once, each with classes of its own: a start for training on one of them.

    python examples/training/joint.py vaihingen potsdam naip:red,green,blue naip:near\\ infrared,red,green dubai \
        --data DATA --backbone FILE --config examples/training/joint.toml --output runs/joint

A set may come twice, by other bands; all come with three. The sets take turns, a batch each; their networks share all
weights but the static dictionary and the modulator's last layer. OUTPUT gets a weights file for each set, for --init.
Only the images that a set trains on are seen. The config's crops_per_epoch are those of each set.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader

from d2ls_infer.datasets import Dataset, find_dataset
from d2ls_infer.nn import D2LS, weights_of
from d2ls_infer.train import TrainConfig, read_config
from d2ls_infer.train.average import MovingAverage
from d2ls_infer.train.data import CropDataset
from d2ls_infer.train.module import D2LSModule
from d2ls_infer.train.pool import ImagePool, without_gaps
from d2ls_infer.train.run import describe, halved, network_config
from d2ls_infer.train.start import load_backbone
from d2ls_infer.weights import save_weights


class Joint(pl.LightningModule):
    """Networks with common weights, each trained on its own set, in turns."""

    def __init__(self, parts: list[D2LSModule]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def training_step(self, batch: tuple[Tensor, Tensor], number: int) -> Tensor:
        return self.parts[number % len(self.parts)].terms(*batch)["total"]

    def configure_optimizers(self) -> Any:
        first = self.parts[0]
        first.trainer = self.trainer
        made = first.configure_optimizers()
        known = {id(parameter) for group in made["optimizer"].param_groups for parameter in group["params"]}
        made["optimizer"].param_groups[-1]["params"] += [p for p in self.parameters() if id(p) not in known]
        return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="+", metavar="SET[:BANDS]")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--backbone", type=Path, required=True, help="timm state dict of the config's backbone")
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=2, help="processes that make crops")
    arguments = parser.parse_args()
    for name in ("timm", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)

    config = read_config(arguments.config, TrainConfig())
    pl.seed_everything(config.seed, verbose=False)
    parts: list[D2LSModule] = []
    crops: list[CropDataset] = []
    for name in arguments.sets:
        dataset, bands = named(name)
        images = dataset.images(arguments.data / dataset.name, "train")
        pool = ImagePool(
            lambda index, images=images, bands=bands: without_gaps(*images[index].read(bands)), len(images)
        )
        about = describe(dataset, config, pool, bands=bands, value_range=dataset.value_range, start=None)
        network = D2LS(network_config(config, len(dataset.labels), len(bands)))
        if parts:
            share(network, parts[0].network)
        else:
            load_backbone(network, arguments.backbone)
        parts.append(D2LSModule(network.to(memory_format=torch.channels_last), about, config))
        crops.append(CropDataset(pool, config, about, epoch=0))
    size, each = config.batch_size, len(crops[0])
    turns = [
        range(number * each + first, number * each + first + size)
        for first in range(0, each, size)
        for number in range(len(crops))
    ]

    arguments.output.mkdir(parents=True, exist_ok=True)
    trainer = pl.Trainer(
        max_epochs=1,
        precision="bf16-mixed",
        gradient_clip_val=config.clip_norm or None,
        callbacks=[MovingAverage(float(config.ema_decay))],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    loader = DataLoader(
        ConcatDataset(crops),
        batch_sampler=turns,
        num_workers=arguments.workers,
        pin_memory=torch.cuda.is_available(),
    )
    trainer.fit(Joint(parts), loader)
    for number, (name, part) in enumerate(zip(arguments.sets, parts, strict=True)):
        again = any(named(former)[0] is named(name)[0] for former in arguments.sets[:number])
        file = arguments.output / f"{named(name)[0].name}{f'-{number}' if again else ''}.safetensors"
        save_weights(file, halved(weights_of(part.network.cpu())), part.about)
        print(file)


def named(text: str) -> tuple[Dataset, tuple[str, ...]]:
    """ "naip:red,green,blue" -> the dataset and its bands."""
    name, _, bands = text.partition(":")
    dataset = find_dataset(name)
    return dataset, tuple(bands.split(",")) if bands else dataset.bands


def share(network: D2LS, first: D2LS) -> None:
    """Give a network all parts of another but those that have a part for each class."""
    network.encoder, network.decoder, network.dictionary.expand = first.encoder, first.decoder, first.dictionary.expand
    ours, theirs = network.dictionary.modulator, first.dictionary.modulator
    ours.project, ours.max_branch, ours.avg_branch = theirs.project, theirs.max_branch, theirs.avg_branch
    ours.head[0] = theirs.head[0]


if __name__ == "__main__":
    main()
