"""Cloud: KTDA's codes go to ours by their meaning; the eight bands beside us keep their values."""

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

CLOUD = find_dataset("cloud")
KTDA = ("clear", "cloud shadow", "thin cloud", "thick cloud")


def patch(split: str) -> str:
    return f"{split}/wetlands_LC81750732014035LGN00_patch_2048_2560_{split}.png"


@pytest.fixture(params=[".", "data/l8_biome"])
def root(request: pytest.FixtureRequest, plant: Plant, picture: Picture, rows_of: RowsOf) -> Path:
    rasters = {}
    for split in ("train", "val", "test"):
        rasters[f"{request.param}/img_dir/{patch(split)}"] = picture()
        rasters[f"{request.param}/ann_dir/{patch(split)}"] = rows_of([*range(4), 255])
    return plant(rasters)


def test_ktda_patches_are_red_green_blue_of_one_byte(root: Path) -> None:
    for split in ("train", "val", "test"):
        (image,) = CLOUD.images(root, split)
        assert image.name == Path(patch(split)).stem
        assert image.bands == ("red", "green", "blue")
        assert image.value_range == (0.0, 255.0)
        assert image.read_image()[:, 0, 0].tolist() == [10, 11, 12]


def test_ktda_codes_are_matched_by_their_meaning(root: Path) -> None:
    indices = CLOUD.images(root, "val")[0].read_mask().ravel().tolist()
    assert [CLOUD.labels.names[index] for index in indices[:4]] == list(KTDA)
    assert indices[4] == 255


def test_plain_masks_hold_our_indices(plant: Plant, picture: Picture, rows_of: RowsOf) -> None:
    root = plant({"images/a.tif": picture(8), "masks/a.tif": rows_of([*range(4), 255])})
    (root / "val.txt").write_text("a\n")
    (image,) = CLOUD.images(root, "val")
    assert image.read_mask().ravel().tolist()[:5] == [0, 1, 2, 3, 255]
    assert image.bands == CLOUD.bands
    assert image.read_image(["thermal infrared", "red"])[:, 0, 0].tolist() == [17, 12]


def test_values_of_the_publishers_scenes_are_not_taken_for_codes(
    plant: Plant, picture: Picture, rows_of: RowsOf
) -> None:
    root = plant({f"img_dir/{patch('val')}": picture(), f"ann_dir/{patch('val')}": rows_of([64, 128, 192])})
    with pytest.raises(UsageError, match="it holds the values 64, 128, 192"):
        CLOUD.images(root, "val")[0].read_mask()


def test_a_missing_folder_names_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(
        MissingFileError, match=r"looked for img_dir/val/ .*val\.txt; get cloud from .*ktda-datasets .*public"
    ):
        CLOUD.images(tmp_path, "val")


def test_the_real_patches(shared: Path) -> None:
    root = shared / "data/l8_biome"
    train, val = (CLOUD.images(root, split) for split in ("train", "val"))
    assert (len(train), len(val)) == (23, 8)
    assert not {image.name for image in train} & {image.name for image in val}
    assert len(CLOUD.images(root, "all")) == 31
    pixels, mask = val[0].read()
    assert pixels.shape == (8, 256, 256)
    assert pixels.dtype == np.uint16
    assert 2000 < val[0].read_image(["thermal infrared"]).mean() < 3300
    assert set(np.unique(mask)) <= {0, 1, 2, 3}
    assert CLOUD.value_range == (0.0, 10_000.0)
