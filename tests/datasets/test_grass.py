"""Grass, as KTDA arranges it: five degrees of cover, train and val."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from d2ls_infer.datasets import find_dataset
from d2ls_infer.errors import MissingFileError, UsageError

GRASS = find_dataset("grass")


def test_codes_are_the_degrees_of_cover(
    plant: Callable[..., Path], picture: Callable[..., np.ndarray], rows_of: Callable[..., np.ndarray]
) -> None:
    names = {"train": ["0", "17"], "val": ["9"]}
    files = [f"{split}/{name}" for split in names for name in names[split]]
    images = {f"grass/img_dir/{name}.tif": picture() for name in files}
    root = plant(images | {f"grass/ann_dir/{name}.png": rows_of([*range(5), 255]) for name in files})
    assert {split: [image.name for image in GRASS.images(root, split)] for split in names} == names
    pixels, mask = GRASS.images(root, "val")[0].read()
    assert pixels[:, 0, 0].tolist() == [10, 11, 12]
    assert mask.ravel().tolist()[:7] == [0, 1, 2, 3, 4, 255, 255]
    assert GRASS.labels.names == ("low", "medium-low", "medium", "medium-high", "high")


def test_there_is_no_test_split(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="grass has the splits train, val and all, got 'test'"):
        GRASS.images(tmp_path, "test")
    with pytest.raises(MissingFileError, match=r"looked for img_dir/val/ beside ann_dir/val/; .*ktda-datasets"):
        GRASS.images(tmp_path, "val")
