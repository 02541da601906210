"""One training step, the optimiser and the schedule, as Lightning calls them."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from timm.optim.lookahead import Lookahead
from torch import Tensor, nn

from d2ls_infer.datasets import LabelledImage
from d2ls_infer.errors import UsageError
from d2ls_infer.evaluate import evaluate
from d2ls_infer.manifest import ModelDescription
from d2ls_infer.metrics import ConfusionMatrix
from d2ls_infer.nn import D2LS
from d2ls_infer.nn.encoder import STRIDES
from d2ls_infer.segmenter import D2LSSegmenter
from d2ls_infer.train.config import TrainConfig
from d2ls_infer.train.losses import consistency, d2ls_loss

log = logging.getLogger(__name__)

TERMS = (
    "total", "dynamic_cross_entropy", "dynamic_dice", "contrastive",
    "static_cross_entropy", "static_dice", "consistency",
)  # fmt: skip
"""The weighted sum of the loss and its terms; the last is there only where it is asked for."""

BACKBONE = "encoder.backbone."
INTERACTOR = ("decoder.blocks.", "decoder.final_attention.", "decoder.final_norm.")
"""How the names of the parameters of either begin."""


class D2LSModule(pl.LightningModule):
    """A D2LS network in training.

    Batches are pixels (B, bands, S, S) float32, normalised, and target (B, S, S) int64. Validation takes the numbers of
    labelled images and maps them, whole, through the same tiler as `predict`; `left_out` are the classes that its means
    leave out.
    Logged: every term of the loss by its name as `train/TERM`, `train/learning_rate`, and `val/mean_iou`,
    `val/mean_f1`, `val/overall_accuracy` (percent).
    """

    def __init__(
        self,
        network: D2LS,
        about: ModelDescription,
        config: TrainConfig,
        validation: Sequence[LabelledImage] = (),
        *,
        left_out: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.network = network
        self.about, self.config, self.validation, self.left_out = about, config, validation, left_out
        self.matrix = ConfusionMatrix(about.labels)
        self.pool = torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None
        self.steps: dict[tuple[bool, int, torch.Size], Callable[[Tensor, Tensor], Tensor]] = {}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["about"] = self.about.to_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        now = self.about.to_dict()
        former = checkpoint.get("about", now)
        if changed := [f"{name} was {former[name]}, is {now[name]}" for name in now if former[name] != now[name]]:
            raise UsageError(f"the run to go on with was another: {'; '.join(changed)}")

    def on_train_batch_start(self, _: object, batch_idx: int) -> None:
        # A run that was resumed draws what it would have drawn. Not once an epoch: after its start Lightning draws a
        # number for the loader, but not in the first epoch of a run, resumed or not.
        torch.manual_seed(hash((self.config.seed, self.current_epoch, batch_idx, self.global_rank)) % 2**63)

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        pixels, target = batch
        config, shift = self.config, 0
        shared = bool(torch.rand(()) < config.shared_dictionary)
        if config.consistency:
            # Some pixels short of whole strides, which would show the part in the same place of the network's cells.
            steps = int(torch.randint(1, pixels.shape[-1] // (2 * STRIDES[-1]) + 1, ()))
            shift = STRIDES[-1] * steps - 1 - steps % (STRIDES[0] - 1)
        key = (shared, shift, pixels.shape)
        if key not in self.steps:
            step = Step(self.network, config, self.about.labels.ignore_index, shared=shared, shift=shift)
            self.steps[key] = replayed(step, pixels, target, self.pool)
        terms = self.steps[key](pixels, target)
        logged = {f"train/{name}": value for name, value in zip(TERMS, terms.detach(), strict=False)}
        logged["train/learning_rate"] = self.trainer.optimizers[0].param_groups[-1]["lr"]
        self.log_dict(logged, on_step=False, on_epoch=True, sync_dist=True)
        return terms[0]

    def on_validation_epoch_start(self) -> None:
        self.matrix = ConfusionMatrix(self.about.labels)
        # Of the averaged weights, where there are any: Lightning has put them in place by now.
        self.segmenter = D2LSSegmenter(
            self.network,
            self.about,
            name="",
            sha256="",
            device=str(self.device),
            precision="bfloat16" if "bf16" in str(self.trainer.precision) else "float32",
        )

    def validation_step(self, index: int, _: int) -> None:
        self.matrix.images += evaluate(self.segmenter, [self.validation[index]]).full.images

    def on_validation_epoch_end(self) -> None:
        del self.segmenter
        scores = self.matrix.scores()
        for name in ("iou", "f1"):
            self.log(f"val/mean_{name}", 100 * float(scores.mean(name, without=self.left_out)), sync_dist=True)
        self.log("val/overall_accuracy", 100 * float(scores.overall_accuracy), sync_dist=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        config = self.config
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            parameter_groups(self.network, config), weight_decay=config.weight_decay
        )
        if config.lookahead:
            optimizer = Lookahead(optimizer)  # type: ignore[no-untyped-call]
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, steps, config))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Step(nn.Module):
    """Pixels (B, bands, S, S) and target (B, S, S) of a batch -> the terms of the loss, in the order of `TERMS`.

    shared: one dictionary for the batch. shift: how far into its crop the part lies that `consistency` looks at
    besides; 0 for none, and no such term.
    """

    def __init__(self, network: D2LS, config: TrainConfig, ignore_index: int, *, shared: bool, shift: int) -> None:
        super().__init__()
        self.network, self.config, self.ignore_index, self.shift = network, config, ignore_index, shift
        # Made here: while a graph is recorded, nothing may come from the host.
        weights = config.class_weights
        self.class_weights = torch.tensor(weights, device=next(network.parameters()).device) if weights else None
        # Asked for only where it is wanted: a network made for a comparison may have no dictionary.
        self.how = {"shared": True} if shared else {}

    def forward(self, pixels: Tensor, target: Tensor) -> Tensor:
        config, shift = self.config, self.shift
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        output = self.network(pixels, **self.how)
        inner = slice(shift, shift + (pixels.shape[-1] - shift) // STRIDES[-1] * STRIDES[-1])
        part = self.network(pixels[..., inner, inner], **self.how) if shift else None
        with torch.autocast(pixels.device.type, enabled=False):  # sums over a batch's pixels need float32
            terms = d2ls_loss(
                output,
                target,
                ignore_index=self.ignore_index,
                static_weight=config.static_weight,
                dynamic_weight=config.dynamic_weight,
                contrastive_weight=config.contrastive_weight,
                static_dice=config.static_dice,
                class_weights=self.class_weights,
            )
            values = [terms[name] for name in TERMS[:-1]]
            if part is not None:
                values.append(consistency(output.logits[..., inner, inner], part.logits))
                values[0] = values[0] + config.consistency * values[-1]
            return torch.stack(values)


def replayed(step: Step, pixels: Tensor, target: Tensor, pool: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """A step as it is, or, on a single CUDA device, as graphs of its kernels, forward and backward.

    A light network's kernels are done sooner than the host can start them one by one. pool: memory that all graphs of a
    run share, one of which runs at a time.
    """
    if pixels.device.type != "cuda" or torch.distributed.is_initialized():
        return step
    dtype = torch.get_autocast_dtype("cuda")
    record: Any = torch.cuda.make_graphed_callables
    try:
        with torch.autocast("cuda", dtype, enabled=torch.is_autocast_enabled("cuda"), cache_enabled=False):
            return cast(
                Callable[[Tensor, Tensor], Tensor],
                record(step, (pixels, target), allow_unused_input=True, pool=pool),
            )
    except RuntimeError as error:
        log.warning("training goes on without CUDA graphs: %s", error)
        return step


def parameter_groups(network: D2LS, config: TrainConfig) -> list[dict[str, Any]]:
    """The backbone, the interactor with its last attention, and the rest, each with its own learning rate."""
    groups: tuple[list[nn.Parameter], ...] = [], [], []
    for name, parameter in network.named_parameters():
        groups[0 if name.startswith(BACKBONE) else 1 if name.startswith(INTERACTOR) else 2].append(parameter)
    rates = config.backbone_rate, config.interactor_rate, 1.0
    return [
        {"params": group, "lr": config.learning_rate * rate} for group, rate in zip(groups, rates, strict=True) if group
    ]


def rate_factor(step: int, steps: int, config: TrainConfig) -> float:
    """What the learning rate is times: linear warm-up, then half a cosine down to the final rate."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, steps - config.warmup_steps))
    low = config.final_learning_rate / config.learning_rate
    return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress))
