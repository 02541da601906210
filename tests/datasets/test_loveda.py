"""LoveDA: urban and rural, the publisher's values with 0 ignored, GeoSeg's without the shift, the samples beside us."""

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

LOVEDA = find_dataset("loveda")
PLACES = {
    "Train/Urban": ["1366", "1367"],
    "Train/Rural": ["0", "10", "2"],
    "Val/Urban": ["3514"],
    "Val/Rural": ["2522", "2523"],
    "Test/Urban": ["5167"],
    "Test/Rural": ["4191"],
}


@pytest.fixture(params=["", "LoveDA/", "LoveDA/2021.Train/"])
def root(request: pytest.FixtureRequest, plant: Plant, picture: Picture, rows_of: RowsOf) -> Path:
    rasters = {}
    for place, names in PLACES.items():
        for name in names:
            rasters[f"{request.param}{place}/images_png/{name}.png"] = picture()
            if not place.startswith("Test"):
                rasters[f"{request.param}{place}/masks_png/{name}.png"] = rows_of(range(8))
    return plant(rasters)


def test_each_split_has_its_urban_and_rural_images(root: Path) -> None:
    for split in ("train", "val", "test"):
        images = LOVEDA.images(root, split)
        expected = PLACES[f"{split.capitalize()}/Urban"] + PLACES[f"{split.capitalize()}/Rural"]
        assert [image.name for image in images] == expected
        assert all((image.mask is None) == (split == "test") for image in images)
    assert len(LOVEDA.images(root, "train+val")) == len(LOVEDA.images(root, "all")) == 8


def test_no_data_is_ignored_and_classes_count_from_1(root: Path) -> None:
    for image in LOVEDA.images(root, "train"):
        assert image.read_mask().ravel().tolist()[:9] == [255, 0, 1, 2, 3, 4, 5, 6, 6]
        assert image.read_image().shape == (3, 4, 6)
    assert LOVEDA.labels.names[3] == "water"


def test_masks_that_geoseg_converts_stand_in_for_the_publishers(
    plant: Plant, picture: Picture, rows_of: RowsOf
) -> None:
    place = "Train/Rural"
    root = plant({f"{place}/images_png/1.png": picture(), f"{place}/masks_png_convert/1.png": rows_of([7, *range(7)])})
    (image,) = LOVEDA.images(root, "train")
    assert image.read_mask().ravel().tolist()[:8] == [255, 0, 1, 2, 3, 4, 5, 6]
    plant({f"{place}/masks_png/1.png": rows_of([0])})
    (image,) = LOVEDA.images(root, "train")
    assert (image.read_mask() == 255).all()


def test_values_beyond_the_classes_are_named(plant: Plant, picture: Picture) -> None:
    root = plant({"Val/Urban/images_png/9.png": picture(), "Val/Urban/masks_png/9.png": np.full((4, 6), 8)})
    with pytest.raises(UsageError, match=r"9\.png: it holds the values 8"):
        LOVEDA.images(root, "val")[0].read_mask()


def test_a_training_scene_without_masks_is_an_error(plant: Plant, picture: Picture) -> None:
    root = plant({"Train/Urban/images_png/9.png": picture()})
    with pytest.raises(MissingFileError, match=r"no mask of the name '9' in .*masks_png"):
        LOVEDA.images(root, "train")


def test_a_missing_folder_names_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(
        MissingFileError, match=r"looked for Val/\{Urban,Rural\}/images_png/ .*zenodo.*CC BY-NC-SA 4\.0"
    ):
        LOVEDA.images(tmp_path, "val")


def test_the_real_images(shared: Path) -> None:
    root = shared / "data/loveda"
    train, val = (LOVEDA.images(root, split) for split in ("train", "val"))
    assert sorted(int(image.name) for image in val) == [*range(20, 28), 2996]
    assert len(train) == 31 - 9 + 3 + 26
    assert not {image.image for image in train} & {image.image for image in val}
    assert len({image.name for image in train + val}) == len(train + val) == len(LOVEDA.images(root, "all"))
    assert {image.image.parent.parent.name for image in train} == {"loveda", "crops512", "figures"}
    pixels, mask = val[-1].read()
    assert pixels.shape == (3, 1024, 1024)
    assert set(np.unique(mask)) <= {*range(7), 255}
