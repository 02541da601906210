"""NAIP land cover: four bands of which any may be chosen by name, splits in folders or in files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from d2ls_infer.datasets import find_dataset
from d2ls_infer.errors import MissingFileError

NAIP = find_dataset("naip")


def test_the_publishers_folders(
    plant: Callable[..., Path], picture: Callable[..., np.ndarray], rows_of: Callable[..., np.ndarray]
) -> None:
    rasters = {}
    for split in ("train", "val", "test"):
        rasters[f"dataset_split/{split}/img/{split}.tif"] = picture(4)
        rasters[f"dataset_split/{split}/mask/{split}.tif"] = rows_of(range(6))
    root = plant(rasters)
    for split in ("train", "val", "test"):
        (image,) = NAIP.images(root, split)
        assert image.name == split
        assert image.read_image(["red", "green", "blue"])[:, 0, 0].tolist() == [10, 11, 12]
        assert image.read_image(["near infrared"])[:, 0, 0].tolist() == [13]
        assert image.read_mask().ravel().tolist()[:6] == [0, 1, 2, 3, 4, 5]


def test_a_missing_folder_names_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"looked for val/img/ beside val/mask/; or .*yinx111.*acknowledged"):
        NAIP.images(tmp_path, "val")


def test_the_real_tiles(shared: Path) -> None:
    root = shared / "data/naip"
    train, val = (NAIP.images(root, split) for split in ("train", "val"))
    assert (len(train), len(val)) == (169, 29)
    assert len({image.name for image in train + val}) == 198
    pixels, mask = val[0].read()
    assert pixels.shape == (4, 256, 256)  # the fourth is near infrared, though the file calls it alpha
    assert set(np.unique(mask)) <= set(range(6))
