"""Labelled images -> normalised random crops."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from d2ls_infer.errors import UsageError
from d2ls_infer.labels import NODATA
from d2ls_infer.manifest import ModelDescription
from d2ls_infer.train.augment import AugmentConfig, random_crop
from d2ls_infer.train.config import TrainConfig
from d2ls_infer.train.overcast import Sky, sky_of
from d2ls_infer.train.pool import ImagePool


class CropDataset(Dataset[tuple[Tensor, Tensor]]):
    """The crops of one epoch: (bands, S, S) normalised and (S, S) class indices.

    Crop i of an epoch depends on the seed, the epoch and i alone, whatever the number of workers or a resumption.
    """

    def __init__(self, pool: ImagePool, config: TrainConfig, about: ModelDescription, epoch: int) -> None:
        self.pool, self.config, self.about, self.epoch = pool, config, about, epoch
        self.augment = AugmentConfig(**{field.name: getattr(config, field.name) for field in fields(AugmentConfig)})
        self.sky = sky_over(pool, config, about)
        self.mean, self.std = (torch.tensor(values).view(-1, 1, 1) for values in (about.mean, about.std))

    def __len__(self) -> int:
        return steps_per_epoch(self.pool, self.config) * self.config.batch_size

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng((self.config.seed, self.epoch, index))
        image, mask = random_crop(self.pool, self.augment, rng, value_range=self.about.value_range, sky=self.sky)
        return (image - self.mean) / self.std, mask


class CropDataModule(pl.LightningDataModule):
    """Training crops, a new set each epoch, and the numbers of the images to validate on."""

    def __init__(
        self,
        pool: ImagePool,
        validated: int,
        config: TrainConfig,
        about: ModelDescription,
        *,
        workers: int,
    ) -> None:
        super().__init__()
        self.pool, self.validated, self.config, self.about, self.workers = pool, validated, config, about, workers

    def train_dataloader(self) -> DataLoader[Any]:
        assert self.trainer is not None
        crops = CropDataset(self.pool, self.config, self.about, self.trainer.current_epoch)
        # Not into pinned memory: a thread would take it while the module records its graphs, which CUDA forbids.
        return DataLoader(crops, batch_size=self.config.batch_size, num_workers=self.workers)

    def val_dataloader(self) -> DataLoader[Any]:
        # Numbers only: Lightning copies what a loader gives to the device, and the tiler reads the images itself.
        return DataLoader(range(self.validated), batch_size=None)  # type: ignore[arg-type]


def sky_over(pool: ImagePool, config: TrainConfig, about: ModelDescription) -> Sky | None:
    """What `clouds` needs to know of the images, where it is asked for. Raises UsageError where they have no clouds."""
    if not config.clouds:
        return None
    sky = sky_of(about.labels, about.bands, about.value_range)
    if not {sky.thin, sky.thick} & pool.classes.keys():
        raise UsageError("clouds finds no cloud in the images to lay over the others")
    return sky


def steps_per_epoch(pool: ImagePool, config: TrainConfig) -> int:
    """Whole batches in an epoch: of the crops that were asked for, or that fit side by side into the images."""
    crops = config.crops_per_epoch or round(pool.areas.sum() / config.crop**2)
    return max(1, crops // config.batch_size)


def normalisation(
    pool: ImagePool, value_range: tuple[float, float], gamma: float = 1.0
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each band over the labelled pixels, on 0..1 of the value range raised to gamma."""
    low, high = value_range
    sums = []
    for index in range(len(pool)):
        image, mask = pool[index]
        # Band by band: in this type a whole scene of many bands would take much memory.
        bands = (np.clip((band[mask != NODATA].astype(np.float64) - low) / (high - low), 0, 1) for band in image)
        bands = (values**gamma for values in bands)
        sums.append([(values.size, values.sum(), np.square(values).sum()) for values in bands])
    count, total, squares = np.sum(sums, axis=0).T  # each (bands,)
    mean = total / np.maximum(count, 1)
    std = np.sqrt(np.maximum(squares / np.maximum(count, 1) - mean**2, 1e-6))
    return tuple(mean.round(4).tolist()), tuple(std.round(4).tolist())
