"""UAVid: eight classes by their colours, sequences in their folders, GeoSeg's patches."""

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

UAVID = find_dataset("uavid")
COLORS = {
    "clutter": (0, 0, 0),
    "building": (128, 0, 0),
    "road": (128, 64, 128),
    "static car": (192, 0, 192),
    "tree": (0, 128, 0),
    "low vegetation": (128, 128, 0),
    "human": (64, 64, 0),
    "moving car": (64, 0, 128),
}
SEQUENCES = {"train": (1, 2, 10), "val": (16,), "test": (21, 22)}
RELEASE = "uavid_v1.5_official_release_image/uavid_v1.5_official_release_image"


@pytest.fixture(params=[".", RELEASE])
def root(request: pytest.FixtureRequest, plant: Plant, picture: Picture, rows_of: RowsOf) -> Path:
    rasters = {}
    for split, sequences in SEQUENCES.items():
        for sequence in sequences:
            for number in ("000000", "000100"):
                folder = f"{request.param}/uavid_{split}/seq{sequence}"
                rasters[f"{folder}/Images/{number}.png"] = picture()
                if split != "test":
                    rasters[f"{folder}/Labels/{number}.png"] = rows_of(COLORS.values())
    return plant(rasters)


def test_an_image_is_named_by_its_sequence_and_number(root: Path) -> None:
    for split, sequences in SEQUENCES.items():
        images = UAVID.images(root, split)
        expected = [f"seq{sequence}_{number}" for sequence in sequences for number in ("000000", "000100")]
        assert [image.name for image in images] == expected
        assert all((image.mask is None) == (split == "test") for image in images)


def test_every_class_has_its_colour_and_cars_are_two(root: Path) -> None:
    indices = UAVID.images(root, "val")[0].read_mask().ravel().tolist()
    assert [UAVID.labels.names[index] for index in indices[:8]] == list(COLORS)
    assert dict(zip(UAVID.labels.names, UAVID.labels.colors, strict=True)) == COLORS


def test_an_unknown_colour_is_named(plant: Plant, picture: Picture, rows_of: RowsOf) -> None:
    folder = "uavid_val/seq16"
    root = plant({f"{folder}/Images/0.png": picture(), f"{folder}/Labels/0.png": rows_of([(128, 0, 0), (129, 0, 0)])})
    with pytest.raises(UsageError, match=r"Labels/0\.png: it holds the colours \(129, 0, 0\)"):
        UAVID.images(root, "val")[0].read_mask()


def test_patches_that_geoseg_cuts_hold_indices_in_the_same_order(
    plant: Plant, picture: Picture, rows_of: RowsOf
) -> None:
    name = "seq16_000000_0_0.png"
    root = plant({f"val/images/{name}": picture(), f"val/masks/{name}": rows_of([*range(8), 255])})
    (image,) = UAVID.images(root, "val")
    assert image.read_mask().ravel().tolist()[:10] == [*range(8), 255, 255]
    assert UAVID.labels.names == (
        "building", "road", "tree", "low vegetation", "moving car", "static car", "human", "clutter"
    )  # fmt: skip


def test_a_sequence_without_labels_is_an_error(plant: Plant, picture: Picture) -> None:
    root = plant({"uavid_train/seq1/Images/000000.png": picture()})
    with pytest.raises(MissingFileError, match=r"no mask of the name '000000' in .*Labels"):
        UAVID.images(root, "train")


def test_a_missing_folder_names_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(
        MissingFileError, match=r"looked for uavid_test/seq\*/Images/ .*uavid\.nl \(terms: CC BY-NC-SA 4\.0\)"
    ):
        UAVID.images(tmp_path, "test")
