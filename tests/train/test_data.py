"""The crops of an epoch: the same ones for the same seed, epoch and number, normalised as the model will be told."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from d2ls_infer.datasets import find_dataset
from d2ls_infer.errors import UsageError
from d2ls_infer.manifest import ModelDescription
from d2ls_infer.train.config import TrainConfig
from d2ls_infer.train.data import CropDataModule, CropDataset, normalisation, steps_per_epoch
from d2ls_infer.train.pool import ImagePool

MakeConfig = Callable[..., TrainConfig]
MakeAbout = Callable[..., ModelDescription]


def pool_of(*pairs: tuple[np.ndarray, np.ndarray]) -> ImagePool:
    return ImagePool(pairs.__getitem__, len(pairs))


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_crop_depends_on_seed_epoch_and_number_alone(
    toy_pool: ImagePool, make_config: MakeConfig, make_about: MakeAbout
) -> None:
    config, about = make_config(crop=64, jitter=0.2), make_about()
    crops = CropDataset(toy_pool, config, about, 3)
    np.random.seed(0)
    torch.manual_seed(0)
    first = crops[1]
    np.random.seed(1)
    torch.manual_seed(1)
    assert same(crops[1], first)
    assert same(CropDataset(toy_pool, config, about, 3)[1], first)
    for other in (
        crops[2],
        CropDataset(toy_pool, config, about, 4)[1],
        CropDataset(toy_pool, dataclasses.replace(config, seed=43), about, 3)[1],
    ):
        assert not same(other, first)


def test_clouds_are_laid_over_crops_where_that_is_asked_for(make_config: MakeConfig, make_about: MakeAbout) -> None:
    cloud = find_dataset("cloud")
    clear = np.full((2, 64, 64), 3000, np.uint16), np.full((64, 64), 1, np.uint8)
    cloudy = np.full((2, 64, 64), 9000, np.uint16), np.full((64, 64), 3, np.uint8)
    about = make_about(("blue", "near infrared"), labels=cloud.labels, value_range=cloud.value_range)
    without, laid = (
        CropDataset(
            pool_of(clear, cloudy), make_config(crop=64, crops_per_epoch=20, mosaic=0.0, clouds=share), about, 0
        )
        for share in (0.0, 1.0)
    )
    assert {len(crop[1].unique()) for crop in map(without.__getitem__, range(20))} == {1}
    shadows = [crop for crop in map(laid.__getitem__, range(20)) if (crop[1] == 0).any()]
    assert len(shadows) > 3
    assert all(image[1][mask == 0].mean() < image[1][mask == 1].mean() for image, mask in shadows if (mask == 1).any())
    with pytest.raises(UsageError, match="clouds finds no cloud in the images"):
        CropDataset(pool_of(clear), make_config(clouds=1.0), about, 0)


def test_crops_are_normalised(toy_pool: ImagePool, make_config: MakeConfig, make_about: MakeAbout) -> None:
    config, mean, std = make_config(), (0.1, 0.2, 0.3), (0.5, 1.0, 2.0)
    pixels, mask = CropDataset(toy_pool, config, make_about(mean=(0.0,) * 3, std=(1.0,) * 3), 0)[0]
    normalised, same_mask = CropDataset(toy_pool, config, make_about(mean=mean, std=std), 0)[0]
    assert pixels.shape == (3, 32, 32)
    assert pixels.dtype == normalised.dtype == torch.float32
    assert mask.shape == (32, 32)
    assert mask.dtype == torch.int64
    assert torch.equal(mask, same_mask)
    for band in range(3):
        torch.testing.assert_close(normalised[band], (pixels[band] - mean[band]) / std[band])


@pytest.mark.parametrize(
    ("crops", "batch", "steps"), [(0, 1, 4), (0, 4, 1), (0, 3, 1), (0, 100, 1), (10, 4, 2), (4, 4, 1), (3, 4, 1)]
)
def test_an_epoch_is_as_many_crops_as_fit_side_by_side_unless_told(
    toy_pool: ImagePool, make_config: MakeConfig, make_about: MakeAbout, crops: int, batch: int, steps: int
) -> None:
    # 96 x 120 and 80 x 70 pixels are 4.2 crops of 64 x 64.
    config = make_config(crop=64, crops_per_epoch=crops, batch_size=batch)
    assert steps_per_epoch(toy_pool, config) == steps
    assert len(CropDataset(toy_pool, config, make_about(), 0)) == steps * batch


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # Python 3.12 on: a fork beside torch's threads
def test_loader_gives_the_epochs_crops_in_order_whatever_the_number_of_workers(
    toy_pool: ImagePool, make_config: MakeConfig, make_about: MakeAbout
) -> None:
    config, about = make_config(), make_about()
    expected = CropDataset(toy_pool, config, about, 5)
    for workers in (0, 2):
        data = CropDataModule(toy_pool, 3, config, about, workers=workers)
        data.trainer = cast(pl.Trainer, SimpleNamespace(current_epoch=5))
        batches = list(data.train_dataloader())
        assert [len(mask) for _, mask in batches] == [2, 2]
        for number, (pixels, mask) in enumerate(batches):
            assert all(same((pixels[i], mask[i]), expected[2 * number + i]) for i in range(2))


def test_validation_is_the_numbers_of_its_images(
    toy_pool: ImagePool, make_config: MakeConfig, make_about: MakeAbout
) -> None:
    for count in (0, 1, 3):
        data = CropDataModule(toy_pool, count, make_config(), make_about(), workers=0)
        assert list(data.val_dataloader()) == list(range(count))


# Normalisation


def test_mean_and_deviation_are_those_of_the_labelled_pixels() -> None:
    rng = np.random.default_rng(0)
    pairs = [
        (rng.integers(0, 12000, (8, *shape)).astype(np.uint16), rng.choice([0, 1, 255], shape).astype(np.uint8))
        for shape in ((20, 30), (11, 7))
    ]
    mean, std = normalisation(pool_of(*pairs), (1000.0, 9000.0))
    values = np.concatenate([image[:, mask != 255] for image, mask in pairs], axis=1)
    expected = (np.clip(values, 1000, 9000) - 1000.0) / 8000
    np.testing.assert_allclose(mean, expected.mean(1), atol=5e-5)
    np.testing.assert_allclose(std, expected.std(1), atol=5e-5)
    assert all(type(value) is float for value in (*mean, *std))


def test_deviation_of_a_constant_band_is_not_zero() -> None:
    image = np.stack([np.full((4, 4), 51, np.uint8), np.arange(16, dtype=np.uint8).reshape(4, 4)])
    mean, std = normalisation(pool_of((image, np.zeros((4, 4), np.uint8))), (0.0, 255.0))
    assert mean[0] == 0.2
    assert std[0] == 0.001


def test_images_without_labels_count_for_nothing() -> None:
    pair = (np.full((2, 4, 4), 51, np.uint8), np.zeros((4, 4), np.uint8))
    bare = (np.full((2, 9, 9), 99, np.uint8), np.full((9, 9), 255, np.uint8))
    assert normalisation(pool_of(bare, pair), (0.0, 255.0)) == ((0.2, 0.2), (0.001, 0.001))
