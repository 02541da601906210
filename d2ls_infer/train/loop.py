"""A plain training loop: AdamW, warm-up and cosine, moving average of the weights, checkpoints that resume."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset

from d2ls_infer.errors import MissingFileError
from d2ls_infer.nn import D2LS, D2LSConfig, autocast
from d2ls_infer.nn.encoder import create_backbone
from d2ls_infer.train.augment import AugmentConfig, Pair, random_crop
from d2ls_infer.train.losses import d2ls_loss

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of one run. `mean` and `std` are per band on 0..1 of `value_range`, as in a weights description.

    `backbone_lr` is a factor on `learning_rate`. `ema_decay` is the decay per step of the averaged weights, the ones
    that are kept. Crop i of step s depends on (seed, s, i) alone, so that a resumed run sees the same crops.
    """

    network: D2LSConfig
    mean: tuple[float, ...]
    std: tuple[float, ...]
    value_range: tuple[float, float] = (0.0, 255.0)
    ignore_index: int = 255
    steps: int = 600
    batch_size: int = 8
    learning_rate: float = 1e-3
    backbone_lr: float = 0.5
    final_lr: float = 1e-6
    warmup: int = 40
    weight_decay: float = 0.01
    clip_norm: float = 5.0
    ema_decay: float = 0.995
    seed: int = 42
    decoder_dtype: torch.dtype = torch.bfloat16
    augment: AugmentConfig = field(default_factory=AugmentConfig)


def train(
    config: TrainConfig, pairs: Sequence[Pair], *, backbone_file: Path | None, checkpoint: Path, device: str = "cpu"
) -> D2LS:
    """Train on the pairs and give the averaged network, in eval mode. An existing `checkpoint` is gone on from.

    backbone_file: a timm state dict to start the backbone from; without one timm fetches its own from the hub.
    """
    torch.manual_seed(config.seed)
    fresh = not checkpoint.exists()
    network = (
        D2LS(config.network, pretrained=fresh and backbone_file is None)
        .to(device)
        .to(memory_format=torch.channels_last)
    )
    if fresh and backbone_file is not None:
        load_backbone(network, backbone_file)
    averaged = AveragedModel(
        network,
        multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay),  # type: ignore[no-untyped-call]
        use_buffers=True,
    )
    optimizer = torch.optim.AdamW(parameter_groups(network, config), weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, config))
    state = {"network": network, "averaged": averaged, "optimizer": optimizer, "schedule": schedule}
    first = resume(state, checkpoint)
    loader = DataLoader(Crops(pairs, config, first), batch_size=config.batch_size, num_workers=1)
    network.train()
    started = time.perf_counter()
    for step, (pixels, target) in enumerate(loader, start=first):
        terms = train_step(network, optimizer, pixels.to(device), target.to(device), config)
        schedule.step()
        averaged.update_parameters(network)
        if (step + 1) % 50 == 0 or step + 1 == config.steps:
            rate = (time.perf_counter() - started) / (step + 1 - first)
            shown = " ".join(f"{name} {value:.3f}" for name, value in terms.items())
            log.info("step %d/%d, %.2f s a step: %s", step + 1, config.steps, rate, shown)
            save_checkpoint(state, step + 1, checkpoint)
    result = averaged.module
    assert isinstance(result, D2LS)
    return result.eval()


def train_step(
    network: D2LS, optimizer: torch.optim.Optimizer, pixels: Tensor, target: Tensor, config: TrainConfig
) -> dict[str, float]:
    """One update from a batch of pixels (B, bands, S, S) and target (B, S, S). Gives the loss terms."""
    # Over 4 to 8 dictionary tokens the plain form of attention beats the fused one on CPUs, above all backwards.
    kernels = [SDPBackend.MATH] if pixels.device.type == "cpu" else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    with autocast(pixels.device, config.decoder_dtype), sdpa_kernel(kernels):
        output = network(pixels.contiguous(memory_format=torch.channels_last))
    terms = d2ls_loss(output, target, ignore_index=config.ignore_index)
    optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward(terms["total"])
    torch.nn.utils.clip_grad_norm_(network.parameters(), config.clip_norm)
    optimizer.step()
    return {name: value.item() for name, value in terms.items()}


class Crops(Dataset[tuple[Tensor, Tensor]]):
    """The normalised random crops of a run from step `first` on."""

    def __init__(self, pairs: Sequence[Pair], config: TrainConfig, first: int) -> None:
        self.pairs, self.config, self.offset = pairs, config, first * config.batch_size

    def __len__(self) -> int:
        return self.config.steps * self.config.batch_size - self.offset

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        config = self.config
        rng = np.random.default_rng((config.seed, *divmod(index + self.offset, config.batch_size)))
        image, mask = random_crop(
            self.pairs, config.augment, rng, value_range=config.value_range, ignore_index=config.ignore_index
        )
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (config.mean, config.std))
        return (image - mean) / std, mask


def load_backbone(network: D2LS, file: Path) -> None:
    """Put a timm state dict in, as timm does it: the stem adapted to the number of bands, the classifier left out."""
    if not file.is_file():
        raise MissingFileError(f"no such file: {file}")
    config = network.config
    backbone = create_backbone(config.backbone, in_channels=config.in_channels, pretrained=file)
    network.encoder.backbone.load_state_dict(backbone.state_dict())


def parameter_groups(network: D2LS, config: TrainConfig) -> list[dict[str, Any]]:
    """The backbone learns more slowly than the rest, which starts from nothing."""
    backbone = list(network.encoder.backbone.parameters())
    known = {id(parameter) for parameter in backbone}
    rest = [parameter for parameter in network.parameters() if id(parameter) not in known]
    return [
        {"params": backbone, "lr": config.learning_rate * config.backbone_lr},
        {"params": rest, "lr": config.learning_rate},
    ]


def learning_rate_factor(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then half a cosine down to `final_lr`."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    low = config.final_lr / config.learning_rate
    return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(progress, 1)))


def save_checkpoint(state: dict[str, Any], step: int, path: Path) -> None:
    """Write everything that a run needs to go on; the file under its name is always whole."""
    partial = path.with_name(path.name + ".partial")
    torch.save({"step": step, **{name: part.state_dict() for name, part in state.items()}}, partial)
    partial.replace(path)


def resume(state: dict[str, Any], path: Path) -> int:
    """Take up a checkpoint if there is one; the step to go on from."""
    if not path.exists():
        return 0
    saved = torch.load(path, map_location="cpu", weights_only=True)
    for name, part in state.items():
        part.load_state_dict(saved[name])
    step: int = saved["step"]
    return step
