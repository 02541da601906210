"""ISPRS Vaihingen: imagery and labels of one file name, told apart by their folders; the papers' areas."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from d2ls_infer.datasets import find_dataset
from d2ls_infer.datasets.isprs import LABELS
from d2ls_infer.errors import MissingFileError

Plant = Callable[..., Path]
Picture = Callable[..., np.ndarray]
RowsOf = Callable[..., np.ndarray]

VAIHINGEN = find_dataset("vaihingen")
TEST = [2, 4, 6, 8, 10, 12, 14, 16, 20, 22, 24, 27, 29, 31, 33, 35, 38]
TRAIN = [1, 3, 5, 7, 11, 13, 15, 17, 21, 23, 26, 28, 32, 34, 37]
AREAS = sorted([*TEST, *TRAIN, 30])
BLACK = (0, 0, 0)


@pytest.fixture
def root(plant: Plant, picture: Picture, rows_of: RowsOf) -> Path:
    """All 33 areas: the archive of the benchmark, and those of the complete labels, full and eroded."""
    contest, full = "ISPRS_semantic_labeling_Vaihingen", "ISPRS_semantic_labeling_Vaihingen_ground_truth_COMPLETE"
    rasters = {}
    for area in AREAS:
        name = f"top_mosaic_09cm_area{area}"
        rasters[f"{contest}/top/{name}.tif"] = picture()
        rasters[f"{contest}/dsm/dsm_09cm_matching_area{area}.tif"] = picture(1)
        rasters[f"{full}/{name}.tif"] = rows_of(LABELS.colors)
        rasters[f"ISPRS_semantic_labeling_Vaihingen_ground_truth_eroded_COMPLETE/{name}_noBoundary.tif"] = rows_of(
            [BLACK]
        )
        if area not in TEST:
            rasters[f"{contest}/gts_for_participants/{name}.tif"] = rows_of(LABELS.colors)
    return plant(rasters)


def test_splits_are_those_of_the_papers(root: Path) -> None:
    names = {split: [int(image.name) for image in VAIHINGEN.images(root, split)] for split in ("train", "val", "test")}
    assert names == {"train": TRAIN, "val": [30], "test": TEST}
    assert sorted(int(image.name) for image in VAIHINGEN.images(root, "all")) == AREAS


def test_imagery_is_infrared_and_labels_are_decoded(root: Path) -> None:
    for image in VAIHINGEN.images(root, "test"):
        assert image.image.parent.name == "top"
    assert image.bands == ("near infrared", "red", "green")
    assert image.read_image(["green"])[:, 0, 0].tolist() == [12]
    assert image.read_mask().ravel().tolist()[:7] == [0, 1, 2, 3, 4, 5, 5]
    assert (image.read_eroded() == 255).all()


def test_labels_for_participants_alone(root: Path) -> None:
    for folder in root.glob("*COMPLETE"):
        folder.rename(root / f".{folder.name}")
    assert all(image.mask and not image.eroded for image in VAIHINGEN.images(root, "train"))
    assert all(image.mask is None for image in VAIHINGEN.images(root, "test"))


def test_labels_unpacked_into_the_root_itself(plant: Plant, picture: Picture, rows_of: RowsOf) -> None:
    root = plant({"top/top_mosaic_09cm_area1.tif": picture(), "top_mosaic_09cm_area1.tif": rows_of(LABELS.colors)})
    (image,) = VAIHINGEN.images(root, "train")
    assert image.mask == root / "top_mosaic_09cm_area1.tif"


def test_eroded_labels_alone_are_no_full_ones(plant: Plant, picture: Picture, rows_of: RowsOf) -> None:
    name = "top_mosaic_09cm_area30"
    root = plant({f"top/{name}.tif": picture(), f"gts_eroded_for_participants/{name}_noBoundary.tif": rows_of([BLACK])})
    (image,) = VAIHINGEN.images(root, "val")
    assert image.mask is None
    assert (image.read_eroded() == 255).all()


def test_geoseg_with_whole_areas_and_patches_gives_whole_areas(plant: Plant, picture: Picture, rows_of: RowsOf) -> None:
    name = "top_mosaic_09cm_area2"
    whole = {f"test_images/{name}.tif": picture(), f"test_masks/{name}.tif": rows_of(LABELS.colors)}
    whole |= {f"test_masks_eroded/{name}_noBoundary.tif": rows_of([BLACK])}
    repainted = {f"test/masks_1024_rgb/origin/{name}.tif": rows_of([(255, 204, 0)])}
    patches = {f"test/images_1024/{name}_0_0.tif": picture(), f"test/masks_1024/{name}_0_0.png": rows_of([6])}
    root = plant(whole | repainted | patches)
    (image,) = VAIHINGEN.images(root, "test")
    assert (image.name, image.mask) == ("2", root / f"test_masks/{name}.tif")
    for folder in root.glob("test_*"):
        folder.rename(root / f".{folder.name}")
    (image,) = VAIHINGEN.images(root, "test")
    assert image.name == f"{name}_0_0"
    assert (image.read_eroded() == 255).all()


def test_tiles_of_the_plain_arrangement(plant: Plant, picture: Picture) -> None:
    names = ["tileA", "tileB", "tileC", "tileD", "tileDD"]
    root = plant({f"images/{name}.jpg": picture() for name in names} | {f"masks/{n}.png": np.eye(4, 6) for n in names})
    found = {split: [image.name for image in VAIHINGEN.images(root, split)] for split in (*VAIHINGEN.splits, "all")}
    assert found == {"train": ["tileA", "tileC"], "val": ["tileD"], "test": ["tileB", "tileDD"], "all": names}


def test_a_missing_folder_names_the_source(tmp_path: Path) -> None:
    with pytest.raises(
        MissingFileError, match=r"looked for top/top_mosaic_09cm_area\*\.tif .* get vaihingen from https"
    ):
        VAIHINGEN.images(tmp_path, "train")


def test_the_real_tiles(shared: Path) -> None:
    root = shared / "data/vaihingen"
    assert [image.name for image in VAIHINGEN.images(root, "train")] == ["tileA", "tileC"]
    (image,) = VAIHINGEN.images(root, "val")
    pixels, mask = image.read()
    assert pixels.shape == (3, 1792, 1792)
    assert set(np.unique(mask)) <= {0, 1, 2, 3, 4, 5, 255}
