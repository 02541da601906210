"""A whole run: images, network, Lightning's trainer, the measured weights file and the curves."""

from __future__ import annotations

import json
import logging
import math
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import timm
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, TQDMProgressBar
from torch import Tensor

from d2ls_infer.datasets import Dataset, LabelledImage
from d2ls_infer.errors import MissingFileError, OutputExistsError, StoppedError, UsageError
from d2ls_infer.evaluate import evaluate
from d2ls_infer.files import write_whole
from d2ls_infer.licence import is_restricted, spdx_of
from d2ls_infer.load import load_model
from d2ls_infer.manifest import Metric, ModelDescription
from d2ls_infer.nn import D2LS, D2LSConfig, weights_of
from d2ls_infer.train.average import MovingAverage
from d2ls_infer.train.config import TrainConfig
from d2ls_infer.train.curves import Curves, draw
from d2ls_infer.train.data import CropDataModule, normalisation, sky_over, steps_per_epoch
from d2ls_infer.train.module import D2LSModule
from d2ls_infer.train.pool import ImagePool, without_gaps
from d2ls_infer.train.start import adopt, drop_paths, load_backbone, quieten
from d2ls_infer.weights import WeightsFile, find_weights, load_network, save_weights, warn_of_terms

log = logging.getLogger(__name__)

CHECKPOINT, CONFIG = "last.ckpt", "config.json"
SMALL_EPOCH = 1000
"""Steps of an epoch below which the weights are averaged unless the config says otherwise."""
EMA_DECAY = 0.995
VALIDATIONS = 10
"""How often a run is validated, at most once an epoch."""
PROTOCOL = "25 % overlap, Hann blending, no test-time augmentation, float32, scores smoothed"
IDLE_WARNINGS = (
    "Checkpoint directory .* exists and is not empty",  # the run's settings lie there
    "The '.*_dataloader' does not have many workers",  # the validation's loader gives numbers only
    "The AccumulateGrad node's stream does not match",  # torch's own graphs of a step are made in a stream of theirs
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning's own use of torch
)
"""What Lightning warns of and a user of this command can do nothing about."""
MEANS = 3
"""The first metrics of a weights file are those of all classes."""
IN_FLOAT32 = ("decoder.position.gaussian", "running_mean", "running_var")
"""Ends of the names of tensors that a file in half precision keeps whole."""


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How a run is carried out; nothing here changes what is learnt but rounding.

    output: folder for checkpoint, curves and the weights file. devices, accelerator, strategy, precision: as
    Lightning names them. workers: processes that make crops. resume: go on from the folder's last checkpoint, that of
    the last whole epoch.
    """

    output: Path
    devices: int | str = "auto"
    accelerator: str = "auto"
    strategy: str = "auto"
    precision: str = "32-true"
    workers: int = 2
    resume: bool = False
    progress: bool = True


def train(
    dataset: Dataset,
    images: Sequence[LabelledImage],
    validation: Sequence[LabelledImage],
    config: TrainConfig,
    options: RunOptions,
    *,
    backbone_file: Path | None = None,
    init: WeightsFile | str | Path | None = None,
    validated_on: str = "validation",
) -> Path:
    """Train on labelled images and write OUTPUT/NAME.safetensors, ready for `load_model`, with its curves beside it.

    validation: images to measure on, perhaps none. backbone_file: a timm state dict to start from; without one timm
    fetches its ImageNet weights from the hub. init: a model to start from instead, by name or path; its network's
    sizes and its gamma are taken over. validated_on: what to call the validation images beside the numbers. Raises
    OutputExistsError where the folder holds a run and `resume` is not set, MissingFileError where there is nothing to
    resume, UsageError for settings or images that do not fit.
    """
    source = init if isinstance(init, WeightsFile) or init is None else find_weights(init)
    if source is not None:
        sizes = D2LSConfig.from_dict(source.description.config).to_dict()
        taken = {name: sizes[name] for name in ("backbone", "embed_dim", "stages", "reduction")}
        config = config.updated(taken | {"gamma": source.description.gamma})
    file = options.output / f"{dataset.name}.safetensors"
    check_output(file, config, options)
    bands, value_range = bands_of(images, dataset, config)
    if config.class_weights and len(config.class_weights) != len(dataset.labels):
        raise UsageError(f"class_weights are {len(config.class_weights)} for {len(dataset.labels)} classes")
    if bare := [image.name for image in validation if image.mask is None]:
        raise UsageError(f"the {validated_on} image {bare[0]} comes without labels; name others, or none")

    pl.seed_everything(config.seed, verbose=False)
    fetch = backbone_file is None and source is None and not options.resume
    try:
        network = D2LS(network_config(config, len(dataset.labels), len(bands)), pretrained=fetch)
    except OSError as error:
        raise UsageError(f"no weights of {config.backbone} to be had: {error}; give --backbone-weights") from error
    if source is not None:
        warn_of_terms(source)
        former = load_network(source.path, source.description)
        kept = adopt(network, former, labels=dataset.labels, source_labels=source.description.labels)
        log.info("started from %s, which knows %s", source.name, ", ".join(kept) or "none of the classes")
    elif backbone_file is not None:
        load_backbone(network, backbone_file)
    if config.quiet_start and source is None:
        quieten(network)
    pool = ImagePool(lambda index: without_gaps(*images[index].read(bands)), len(images))
    about = describe(dataset, config, pool, bands=bands, value_range=value_range, start=source)
    sky_over(pool, config, about)  # raises before anything is written
    if source is not None and validation:
        log.warning(
            "%s, from which this starts, was trained on %s; if some of the %s images are among them, the scores say "
            "little of how it does on others",
            source.name, source.description.training_data, validated_on,
        )  # fmt: skip
    trainer = fit(network, about, pool, validation, config, options, left_out=dataset.left_out)

    if trainer.is_global_zero:
        state, device = halved(weights_of(network.cpu())), str(trainer.strategy.root_device)
        save_measured(
            file, state, about, validation, measured_on=validated_on, left_out=dataset.left_out, device=device
        )
    return file


def fit(
    network: D2LS,
    about: ModelDescription,
    pool: ImagePool,
    validation: Sequence[LabelledImage],
    config: TrainConfig,
    options: RunOptions,
    *,
    left_out: tuple[int, ...] = (),
) -> pl.Trainer:
    """Train a network in place; the folder gets the run's settings, its checkpoint and its curves.

    Raises StoppedError where the run was interrupted, UsageError for settings that the network cannot have.
    """
    if config.drop_path:
        drop_paths(network.encoder.backbone, config.drop_path)
    options.output.mkdir(parents=True, exist_ok=True)
    write_whole(options.output / CONFIG, (json.dumps(config.to_dict(), indent=2) + "\n").encode())
    curves = Curves(options.output)
    trainer = make_trainer(config, options, curves, steps=steps_per_epoch(pool, config), validated=bool(validation))
    checkpoint = options.output / CHECKPOINT
    try:
        with tamed():
            trainer.fit(
                D2LSModule(network.to(memory_format=torch.channels_last), about, config, validation, left_out=left_out),
                CropDataModule(pool, len(validation), config, about, workers=options.workers),
                ckpt_path=str(checkpoint) if options.resume else None,
                weights_only=True,
            )
    except SystemExit as stop:  # how Lightning ends after Ctrl+C and SIGTERM, without a word and perhaps as a success
        way_on = "go on with --resume" if checkpoint.exists() else "none was finished, so start anew"
        raise StoppedError(f"stopped in epoch {trainer.current_epoch + 1} of {config.epochs}; {way_on}") from stop
    if trainer.is_global_zero:
        draw(curves.points, options.output / "curves.png")
    return trainer


class ProgressBar(TQDMProgressBar):
    """Lightning's, which would leave its line open, and end it after the error's, when a run is interrupted."""

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        for bar in ("val_progress_bar", "train_progress_bar"):
            with suppress(TypeError):  # there is none yet
                getattr(self, bar).close()


@contextmanager
def tamed() -> Iterator[None]:
    """Lightning without its idle warnings, and with its progress bar on standard error, as all of ours are."""
    with warnings.catch_warnings(), redirect_stdout(sys.stderr):
        for message in IDLE_WARNINGS:
            warnings.filterwarnings("ignore", message)
        yield


def check_output(file: Path, config: TrainConfig, options: RunOptions) -> None:
    """Raise where there is a run and none is wanted, none where one is to go on, or one of other settings."""
    checkpoint, settings = options.output / CHECKPOINT, options.output / CONFIG
    if options.output.exists() and not options.output.is_dir():
        raise OutputExistsError(f"{options.output} is a file; name a folder for --output")
    if not options.resume:
        if checkpoint.exists():
            raise OutputExistsError(f"{options.output} holds a run; go on with --resume, or name another --output")
        if file.exists():
            raise OutputExistsError(f"{file} exists; name another --output")
        return
    if not (checkpoint.exists() and settings.exists()):
        raise MissingFileError(f"nothing to resume in {options.output}: no {CHECKPOINT} beside {CONFIG}")
    try:
        former = dict(json.loads(settings.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise UsageError(f"{settings} is damaged: {error}; start anew with another --output") from error
    now = json.loads(json.dumps(config.to_dict()))
    changed = [f"{name} was {former.get(name)}, is {now[name]}" for name in now if former.get(name) != now[name]]
    if changed:
        raise UsageError(
            f"the run in {options.output} had other settings: {'; '.join(changed)}. With its own it goes on; a new one "
            "in another --output may start from its weights by --init"
        )


def bands_of(
    images: Sequence[LabelledImage], dataset: Dataset, config: TrainConfig
) -> tuple[tuple[str, ...], tuple[float, float]]:
    """The bands to train on and the range of their values. Raises UsageError where images differ in them."""
    kinds = {(image.bands or dataset.bands, image.value_range or dataset.value_range) for image in images}
    if len(kinds) != 1:
        raise UsageError(f"training needs images of one kind; these differ in bands or values: {sorted(kinds)}")
    bands, value_range = kinds.pop()
    if missing := [band for band in config.bands if band not in bands]:
        raise UsageError(f"the images have no band {missing[0]!r}; they have {', '.join(bands)}")
    return config.bands or bands, value_range


def network_config(config: TrainConfig, num_classes: int, in_channels: int) -> D2LSConfig:
    """The network's part of the settings."""
    return D2LSConfig(
        backbone=config.backbone,
        num_classes=num_classes,
        embed_dim=config.embed_dim,
        stages=config.stages,
        reduction=config.reduction,
        in_channels=in_channels,
    )


def make_trainer(
    config: TrainConfig, options: RunOptions, curves: Curves, *, steps: int, validated: bool
) -> pl.Trainer:
    """Lightning's trainer with its own callbacks: a checkpoint each epoch, and averaged weights."""
    decay = config.ema_decay
    if isinstance(decay, str):
        decay = EMA_DECAY if steps < SMALL_EPOCH else 0.0
    callbacks: list[Callback] = [
        curves,
        ModelCheckpoint(
            options.output,
            filename=Path(CHECKPOINT).stem,
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        ),
    ]
    if decay:
        callbacks.append(MovingAverage(decay))
    if options.progress:
        callbacks.append(ProgressBar())
    precision: Any = options.precision
    try:
        return pl.Trainer(
            max_epochs=config.epochs,
            accelerator=options.accelerator,
            devices=options.devices,
            strategy=options.strategy,
            precision=precision,
            gradient_clip_val=config.clip_norm or None,
            callbacks=callbacks,
            logger=False,
            check_val_every_n_epoch=math.ceil(config.epochs / VALIDATIONS),
            limit_val_batches=None if validated else 0,
            num_sanity_val_steps=0,
            reload_dataloaders_every_n_epochs=1,
            enable_progress_bar=options.progress,
            enable_model_summary=False,
        )
    except (MisconfigurationException, ValueError, TypeError) as error:
        raise UsageError(f"devices {options.devices}, strategy {options.strategy}: {error}") from error


def describe(
    dataset: Dataset,
    config: TrainConfig,
    pool: ImagePool,
    *,
    bands: tuple[str, ...],
    value_range: tuple[float, float],
    start: WeightsFile | None,
) -> ModelDescription:
    """What the weights file will say; its metrics come later. Of the model it starts from it keeps what that had seen,
    and terms that do not allow every use.

    Three bands of bytes are normalised as timm trained the backbone, all others, and with a gamma those too, by their
    mean and deviation over the training images.
    """
    pretrained = timm.models.get_pretrained_cfg(config.backbone)
    if len(bands) == 3 and value_range == (0.0, 255.0) and config.gamma == 1 and pretrained is not None:
        mean, std = tuple(pretrained.mean), tuple(pretrained.std)
    else:
        mean, std = normalisation(pool, value_range, config.gamma)
    terms, seen = spdx_of(dataset.terms) or dataset.terms or "unknown", f"{dataset.name}, {len(pool)} images"
    origin = "backbone started from ImageNet weights"
    if start is not None:
        former, origin = start.description, f"started from the model {start.name}"
        seen += f"; started from {start.name}, which was trained on {former.training_data}"
        if is_restricted(former.license) and former.license != terms:
            terms += f"; and as it started from {start.name}: {former.license}"
    return ModelDescription(
        config=network_config(config, len(dataset.labels), len(bands)).to_dict(),
        labels=dataset.labels,
        bands=bands,
        value_range=value_range,
        gamma=config.gamma,
        mean=mean,
        std=std,
        gsd_m=dataset.gsd_m,
        metrics=(),
        license=terms,
        training_data=seen,
        source=f"d2ls train, {config.epochs} epochs; {origin}",
        shared_dictionary=config.shared_dictionary > 0,
    )


def halved(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in float16, but for those whose rounding would show."""
    return {key: value if key.endswith(IN_FLOAT32) else value.half() for key, value in state.items()}


def save_measured(
    file: Path,
    state: dict[str, Tensor],
    about: ModelDescription,
    images: Sequence[LabelledImage],
    *,
    measured_on: str,
    left_out: tuple[int, ...],
    device: str = "auto",
) -> None:
    """Write a weights file; what was written is measured, if there are images, and written again with the numbers."""
    save_weights(file, state, about)
    if images:
        split = f"{measured_on}, {len(images)} image{'s' * (len(images) > 1)}"
        metrics = measure(file, images, split=split, left_out=left_out, device=device)
        save_weights(file, state, replace(about, metrics=metrics))
        means = [f"{metric.name} {metric.value:.1f} %" for metric in metrics[:MEANS]]
        log.info("measured on %s: %s; `d2ls models show %s` has it all", split, ", ".join(means), file)


def measure(
    file: Path, images: Sequence[LabelledImage], *, split: str, left_out: tuple[int, ...], device: str = "auto"
) -> tuple[Metric, ...]:
    """Means, overall accuracy, and IoU and F1 by class, in percent, of a weights file."""
    model = load_model(file, device=device, precision="float32")
    scores = evaluate(model, images).full.scores()
    without = f" without {', '.join(model.labels.names[index] for index in left_out)}" if left_out else ""
    values = {
        f"mIoU{without}": scores.mean("iou", without=left_out),
        f"mean F1{without}": scores.mean("f1", without=left_out),
        "overall accuracy": scores.overall_accuracy,
    }
    for short, by_class in (("IoU", scores.iou), ("F1", scores.f1)):
        values |= {f"{short} {name}": value for name, value in zip(model.labels.names, by_class, strict=True)}
    scene = ", dictionary of the scene" if getattr(model, "observes", False) else ""
    protocol = f"tiles of {model.tile_size} px, {PROTOCOL}{scene}"
    return tuple(
        Metric(name=name, value=round(100 * float(value), 2), split=split, protocol=protocol)
        for name, value in values.items()
        if math.isfinite(value)
    )
