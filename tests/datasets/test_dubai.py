"""Dubai: tiles in folders, five colours and the grey of what is not labelled; tile 8 is held back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from d2ls_infer.datasets import find_dataset
from d2ls_infer.errors import MissingFileError, UsageError

Plant = Callable[..., Path]
Picture = Callable[..., np.ndarray]
RowsOf = Callable[..., np.ndarray]

DUBAI = find_dataset("dubai")
COLORS = [(60, 16, 152), (132, 41, 246), (110, 193, 228), (254, 221, 58), (226, 169, 41), (155, 155, 155)]


@pytest.fixture(params=[".", "Semantic segmentation dataset"])
def root(request: pytest.FixtureRequest, plant: Plant, picture: Picture, rows_of: RowsOf) -> Path:
    rasters = {}
    for tile in range(1, 9):
        for part in ("001", "002"):
            rasters[f"{request.param}/Tile {tile}/images/image_part_{part}.jpg"] = picture()
            rasters[f"{request.param}/Tile {tile}/masks/image_part_{part}.png"] = rows_of(COLORS)
    return plant(rasters)


def test_tile_8_is_for_validation_and_all_parts_are_on_one_side(root: Path) -> None:
    names = {split: [image.name for image in DUBAI.images(root, split)] for split in ("train", "val", "all")}
    assert names["val"] == ["tile8_image_part_001", "tile8_image_part_002"]
    assert names["train"][:3] == ["tile1_image_part_001", "tile1_image_part_002", "tile2_image_part_001"]
    assert len(names["train"]) == 14
    assert names["all"] == names["train"] + names["val"]


def test_colours_become_indices_and_grey_is_ignored(root: Path) -> None:
    image = DUBAI.images(root, "val")[0]
    assert image.read_mask().ravel().tolist()[:7] == [0, 1, 2, 3, 4, 255, 255]
    assert DUBAI.labels.names == ("building", "land", "road", "vegetation", "water")


def test_an_unknown_colour_is_named(plant: Plant, picture: Picture, rows_of: RowsOf) -> None:
    root = plant({"Tile 1/images/a.jpg": picture(), "Tile 1/masks/a.png": rows_of([(60, 16, 153)])})
    with pytest.raises(UsageError, match=r"a\.png: it holds the colours \(60, 16, 153\)"):
        DUBAI.images(root, "train")[0].read_mask()


def test_a_missing_folder_names_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"looked for Tile 8/images/ beside masks/; or .*humansintheloop.*CC0"):
        DUBAI.images(tmp_path, "val")


def test_the_real_images(shared: Path) -> None:
    root = shared / "data/dubai"
    train, val = (DUBAI.images(root, split) for split in ("train", "val"))
    assert (len(train), len(val)) == (54, 9)
    assert {image.name.split("_")[0] for image in val} == {"tile8"}
    assert "tile8" not in {image.name.split("_")[0] for image in train}
    pixels, mask = val[0].read()
    assert pixels.shape[1:] == mask.shape
    assert set(np.unique(mask)) <= {0, 1, 2, 3, 4, 255}
