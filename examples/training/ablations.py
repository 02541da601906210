"""What each part of D2LS adds: the paper's Tables 1 to 3 in small, and the backbone with a linear head.

    python examples/training/ablations.py naip vaihingen --data DATA --backbone FILE --output runs/ablations

    python examples/training/ablations.py dubai --data DATA --backbone FILE --output runs/linear-dubai \
        --config examples/training/dubai.toml --seeds 42 --variants "linear head, no dictionary"

DATA holds a folder for each dataset. Small means crops of 128 pixels, a light backbone and 320 steps; --config takes
other settings. Each run's score goes into OUTPUT/scores.json, and runs that stand there are not made again; the table
is printed from it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2ls_infer.datasets import find_dataset
from d2ls_infer.evaluate import evaluate
from d2ls_infer.nn import D2LS, D2LSConfig, TrainingOutput
from d2ls_infer.segmenter import D2LSSegmenter
from d2ls_infer.train import RunOptions, TrainConfig, read_config
from d2ls_infer.train.pool import ImagePool
from d2ls_infer.train.run import describe, fit, network_config
from d2ls_infer.train.start import load_backbone, quieten

SMALL = TrainConfig(
    backbone="tf_efficientnet_lite0",
    epochs=4,
    crops_per_epoch=640,
    batch_size=8,
    learning_rate=1e-3,
    backbone_rate=0.5,
    warmup_steps=40,
    clip_norm=5.0,
    crop=128,
    scales=(0.8, 1.25),
    mosaic=0.0,
    jitter=0.2,
)


class StaticBranch(D2LS):
    """The static dictionary alone, in training and after."""

    def forward(self, pixels: Tensor) -> Tensor | TrainingOutput:
        features, deepest = self.encoder(pixels)
        dictionary = self.dictionary(deepest)[0].expand(len(pixels), -1, -1)
        return one_branch(self, self.decoder(dictionary, features), dictionary)


class DynamicBranch(D2LS):
    """The dynamic dictionary alone."""

    def forward(self, pixels: Tensor) -> Tensor | TrainingOutput:
        features, deepest = self.encoder(pixels)
        dictionary = self.dictionary(deepest)[1]
        return one_branch(self, self.decoder(dictionary, features), dictionary)


class LinearHead(D2LS):
    """The backbone's four levels, a linear map of them to the classes at stride 4, and a resize. No dictionary."""

    def __init__(self, config: D2LSConfig, *, pretrained: bool = False) -> None:
        super().__init__(config, pretrained=pretrained)
        self.head = nn.Conv2d(config.embed_dim, config.num_classes, 1)

    def forward(self, pixels: Tensor) -> Tensor | TrainingOutput:
        features, _ = self.encoder(pixels)
        logits = F.interpolate(self.head(features), scale_factor=4, mode="bilinear", align_corners=False)
        return one_branch(self, logits, self.dictionary.static[None])


def one_branch(network: nn.Module, logits: Tensor, dictionary: Tensor) -> Tensor | TrainingOutput:
    """What a network with one branch gives; its loss leaves the other one out."""
    return TrainingOutput(logits, logits, dictionary) if network.training else logits


def without_modulator(config: D2LSConfig) -> D2LS:
    """All four variants of an embedding count the same, whatever the image."""

    class Uniform(nn.Module):
        def forward(self, deepest: Tensor) -> Tensor:
            shape = (len(deepest), config.num_classes, config.reduction)
            return torch.full(shape, 1 / config.reduction, device=deepest.device)

    network = D2LS(config)
    network.dictionary.modulator = Uniform()  # type: ignore[assignment]
    return network


def without_aggregator(config: D2LSConfig) -> D2LS:
    """The mapped levels are averaged, with no weights to learn."""
    network = D2LS(config)
    mean = torch.eye(config.embed_dim).repeat(1, 4)[..., None, None] / 4
    network.encoder.aggregator.weight = nn.Parameter(mean, requires_grad=False)
    return network


def without_interactor(config: D2LSConfig) -> D2LS:
    """Image and dictionary do not query each other: their product is taken as they come."""

    class Apart(nn.Module):
        def __init__(self, decoder: Any) -> None:
            super().__init__()
            self.upsampler, self.dictionary_head = decoder.upsampler, decoder.dictionary_head

        def forward(self, dictionary: Tensor, features: Tensor, *, shared: bool = False) -> Tensor:
            assert not shared, "without attention there is nothing that a batch could share"
            image = features.flatten(2).transpose(1, 2)
            logits: Tensor = self.upsampler(image, self.dictionary_head(dictionary), *features.shape[-2:])
            return logits

    network = D2LS(config)
    network.decoder = Apart(network.decoder)  # type: ignore[assignment]
    return network


ONE_BRANCH = {"static_weight": 0.0}
VARIANTS: dict[str, tuple[Callable[[D2LSConfig], D2LS], dict[str, Any]]] = {
    "linear head, no dictionary": (LinearHead, ONE_BRANCH | {"contrastive_weight": 0.0, "shared_dictionary": 0.0}),
    "static loss only": (StaticBranch, ONE_BRANCH | {"contrastive_weight": 0.0}),
    "dynamic loss only": (DynamicBranch, ONE_BRANCH),
    "both, without contrastive loss": (D2LS, {"contrastive_weight": 0.0}),
    "full (both, contrastive, L = 3)": (D2LS, {}),
    "full, attention from nothing": (D2LS, {"quiet_start": True, "interactor_rate": 0.1}),
    "L = 1": (D2LS, {"stages": 1}),
    "L = 2": (D2LS, {"stages": 2}),
    "without modulator": (without_modulator, {}),
    "without aggregator": (without_aggregator, {}),
    "without interactor": (without_interactor, {}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("datasets", nargs="+")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--backbone", type=Path, required=True, help="timm state dict of the backbone")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--config", type=Path, help="TOML file of settings in place of the small ones")
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("timm").setLevel(logging.ERROR)

    arguments.output.mkdir(parents=True, exist_ok=True)
    file = arguments.output / "scores.json"
    scores: dict[str, float] = json.loads(file.read_text()) if file.exists() else {}
    for seed, dataset, variant in itertools.product(arguments.seeds, arguments.datasets, arguments.variants):
        key = f"{dataset}/{variant}/{seed}"
        if key not in scores:
            scores[key] = measure(dataset, variant, seed, arguments)
            file.write_text(json.dumps(scores, indent=1) + "\n")
    print(table(scores, arguments.datasets))


def measure(name: str, variant: str, seed: int, arguments: argparse.Namespace) -> float:
    """mIoU in percent of one run, over the validation images; without clutter for the ISPRS sets."""
    dataset = find_dataset(name)
    images, validation = (dataset.images(arguments.data / name, split) for split in ("train", "val"))
    build, changes = VARIANTS[variant]
    settings = read_config(arguments.config, TrainConfig()) if arguments.config else SMALL
    config = settings.updated(changes | {"seed": seed})
    bands = config.bands or dataset.bands
    pool = ImagePool(lambda index: images[index].read(bands), len(images))
    pl.seed_everything(seed, verbose=False)
    network = build(network_config(config, len(dataset.labels), len(bands)))
    load_backbone(network, arguments.backbone)
    if config.quiet_start:
        quieten(network)
    about = describe(dataset, config, pool, bands=bands, value_range=dataset.value_range, start=None)
    run = arguments.output / "run"
    shutil.rmtree(run, ignore_errors=True)
    fit(network, about, pool, [], config, RunOptions(output=run, precision="bf16-mixed", workers=1, progress=False))
    segmenter = D2LSSegmenter(network, about, name="", sha256="", precision="float32", smooth=False)
    return 100 * float(evaluate(segmenter, validation).full.scores().mean("iou", without=dataset.left_out))


def table(scores: dict[str, float], datasets: list[str]) -> str:
    """Mean and standard deviation over the seeds, as Markdown."""
    lines = ["| Variant | " + " | ".join(datasets) + " |", "|---|" + "---|" * len(datasets)]
    for variant in VARIANTS:
        if not any(f"/{variant}/" in key for key in scores):
            continue
        cells = []
        for dataset in datasets:
            values = [value for key, value in scores.items() if key.startswith(f"{dataset}/{variant}/")]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}" if values else "-")
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
