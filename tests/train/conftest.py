from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from d2ls_infer.datasets import Codes, Dataset, Imagery, LabelledImage, folder_dataset
from d2ls_infer.labels import LabelMap
from d2ls_infer.manifest import ModelDescription
from d2ls_infer.nn import D2LSConfig
from d2ls_infer.train.config import TrainConfig
from d2ls_infer.train.pool import ImagePool

Pair = tuple[np.ndarray, np.ndarray]
BACKBONE = "mobilenetv3_small_050"
CLASSES = ("water", "field", "roof")


@pytest.fixture(scope="session", autouse=True)
def on_the_cpu(cpu_only: None) -> None:
    """For all tests of training."""


@pytest.fixture
def toy_pairs() -> list[Pair]:
    """Two images of different sizes whose brightness is their class: 20, 130 and 240 for the classes 0, 1 and 2."""
    rng = np.random.default_rng(0)
    pairs = []
    for height, width in ((96, 120), (80, 70)):
        mask = rng.integers(0, 3, (height // 10, width // 10), dtype=np.uint8).repeat(10, 0).repeat(10, 1)
        image = (20 + 110 * mask)[None].repeat(3, 0).astype(np.uint8)
        pairs.append((image, mask))
    return pairs


@pytest.fixture
def toy_pool(toy_pairs: list[Pair]) -> ImagePool:
    return ImagePool(toy_pairs.__getitem__, len(toy_pairs))


@pytest.fixture(scope="session")
def make_config() -> Callable[..., TrainConfig]:
    """Settings of a run that takes a second: four epochs of two steps of two crops of 32 pixels."""

    def make(**changes: Any) -> TrainConfig:
        tiny: dict[str, Any] = {
            "backbone": BACKBONE,
            "embed_dim": 32,
            "stages": 1,
            "epochs": 4,
            "crops_per_epoch": 4,
            "batch_size": 2,
            "crop": 32,
            "learning_rate": 1e-3,
        }
        return TrainConfig(**{**tiny, **changes})

    return make


@pytest.fixture(scope="session")
def make_about() -> Callable[..., ModelDescription]:
    """The description of a network of the tiny settings, for bytes unless told otherwise."""

    def make(bands: tuple[str, ...] = ("red", "green", "blue"), **changes: Any) -> ModelDescription:
        labels = changes.get("labels", LabelMap.of(CLASSES))
        config = D2LSConfig(
            backbone=BACKBONE, num_classes=len(labels), embed_dim=32, stages=1, in_channels=len(bands)
        ).to_dict()
        values: dict[str, Any] = {
            "config": config,
            "labels": labels,
            "bands": bands,
            "value_range": (0.0, 255.0),
            "mean": (0.5,) * len(bands),
            "std": (0.25,) * len(bands),
            "gsd_m": None,
            "metrics": (),
            "license": "unknown",
            "training_data": "toys",
            "source": "a test",
        }
        return ModelDescription(**{**values, **changes})

    return make


@pytest.fixture(scope="session")
def toy_dataset() -> Dataset:
    return folder_dataset(LabelMap.of(CLASSES), gsd_m=2.0)


@pytest.fixture(scope="session")
def unlabelled_image() -> LabelledImage:
    return LabelledImage("z", Path("z.tif"), imagery=Imagery(("red", "green", "blue"), (0.0, 255.0), Codes.indices(3)))
