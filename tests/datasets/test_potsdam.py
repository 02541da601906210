"""ISPRS Potsdam as its publisher and as GeoSeg arrange it: the papers' areas, colours to indices, full and eroded."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from d2ls_infer.datasets import find_dataset
from d2ls_infer.datasets.isprs import LABELS
from d2ls_infer.errors import MissingFileError, UsageError

Plant = Callable[..., Path]
Picture = Callable[..., np.ndarray]
RowsOf = Callable[..., np.ndarray]

POTSDAM = find_dataset("potsdam")
AREAS = [
    f"{row}_{column}"
    for row, columns in {2: (10, 15), 3: (10, 15), 4: (10, 16), 5: (10, 16), 6: (7, 16), 7: (7, 14)}.items()
    for column in range(*columns)
]
TEST = set("2_13 2_14 3_13 3_14 4_13 4_14 4_15 5_13 5_14 5_15 6_13 6_14 6_15 7_13".split())  # noqa: SIM905
BLACK, YELLOW = (0, 0, 0), (255, 255, 0)


@pytest.fixture
def root(plant: Plant, picture: Picture, rows_of: RowsOf) -> Path:
    """All 38 areas, archives unpacked into folders of their own names."""
    rasters = {}
    for area in AREAS:
        rasters[f"2_Ortho_RGB/2_Ortho_RGB/top_potsdam_{area}_RGB.tif"] = picture()
        rasters[f"4_Ortho_RGBIR/top_potsdam_{area}_RGBIR.tif"] = picture(4, first=40)
        rasters[f"5_Labels_all/top_potsdam_{area}_label.tif"] = rows_of(LABELS.colors)
        rasters[f"5_Labels_all_noBoundary/top_potsdam_{area}_label_noBoundary.tif"] = rows_of([BLACK, *LABELS.colors])
    return plant(rasters, root="Potsdam")


def test_splits_are_those_of_the_papers(root: Path) -> None:
    names = {split: [image.name for image in POTSDAM.images(root, split)] for split in ("train", "val", "test", "all")}
    assert set(names["test"]) == TEST
    assert names["val"] == ["2_10"]
    assert len(names["train"]) == 22
    assert sorted(names["train"] + names["val"] + names["test"] + ["7_10"]) == sorted(AREAS)
    assert sorted(names["all"]) == sorted(set(AREAS) - {"7_10"})


def test_colours_become_indices_and_eroded_boundaries_are_ignored(root: Path) -> None:
    (image,) = POTSDAM.images(root, "val")
    assert image.bands == ("red", "green", "blue")
    assert image.read_image()[:, 0, 0].tolist() == [10, 11, 12]
    assert image.read_mask().ravel().tolist()[:7] == [0, 1, 2, 3, 4, 5, 5]
    assert image.read_eroded().ravel().tolist()[:7] == [255, 0, 1, 2, 3, 4, 5]


def test_other_imagery_is_taken_where_there_is_no_rgb(root: Path, plant: Plant, picture: Picture) -> None:
    (root / "2_Ortho_RGB").rename(root / ".hidden")
    (image,) = POTSDAM.images(root, "val")
    assert image.bands == ("red", "green", "blue", "near infrared")
    assert image.read_image(POTSDAM.bands)[:, 0, 0].tolist() == [40, 41, 42]
    (root / "4_Ortho_RGBIR").rename(root / ".hidden too")
    plant({"3_Ortho_IRRG/top_potsdam_2_10_IRRG.tif": picture()}, root="Potsdam")
    (image,) = POTSDAM.images(root, "val")
    assert image.read_image(["near infrared"])[:, 0, 0].tolist() == [10]
    plant({"2_Ortho_RGB/top_potsdam_2_13_RGB.tif": picture()}, root="Potsdam")
    assert [image.bands for image in POTSDAM.images(root, "test")] == [POTSDAM.bands]
    with pytest.raises(MissingFileError, match="no val images of potsdam"):
        POTSDAM.images(root, "val+test")


def test_labels_for_participants_alone_leave_the_test_areas_without(
    plant: Plant, picture: Picture, rows_of: RowsOf
) -> None:
    rasters = {f"2_Ortho_RGB/top_potsdam_{area}_RGB.tif": picture() for area in AREAS}
    full, eroded = "5_Labels_for_participants", "5_Labels_for_participants_no_Boundary"
    for area in set(AREAS) - TEST:
        rasters[f"{full}/top_potsdam_{area}_label.tif"] = rows_of(LABELS.colors)
        rasters[f"{eroded}/top_potsdam_{area}_label_noBoundary.tif"] = rows_of(LABELS.colors)
    root = plant(rasters)
    assert all(image.mask and image.eroded for image in POTSDAM.images(root, "train"))
    assert all(image.mask is None and image.eroded is None for image in POTSDAM.images(root, "test"))
    assert len(POTSDAM.images(root, "all")) == 23


@pytest.mark.parametrize(("area", "wrong"), [("4_12", (225, 227, 27)), ("6_7", (252, 255, 0))])
def test_two_published_areas_without_exact_colours_are_read_all_the_same(
    plant: Plant, picture: Picture, rows_of: RowsOf, area: str, wrong: tuple[int, int, int]
) -> None:
    rasters = {f"2_Ortho_RGB/top_potsdam_{area}_RGB.tif": picture()}
    root = plant(rasters | {f"5_Labels_all/top_potsdam_{area}_label.tif": rows_of([wrong, YELLOW])})
    (image,) = POTSDAM.images(root, "train")
    assert (image.read_mask() == LABELS.names.index("car")).all()


def test_an_unknown_colour_is_named_with_its_file(plant: Plant, picture: Picture, rows_of: RowsOf) -> None:
    rasters = {"2_Ortho_RGB/top_potsdam_2_11_RGB.tif": picture()}
    root = plant(rasters | {"5_Labels_all/top_potsdam_2_11_label.tif": rows_of([YELLOW, (252, 255, 0)])})
    (image,) = POTSDAM.images(root, "train")
    with pytest.raises(UsageError, match=r"top_potsdam_2_11_label\.tif: it holds the colours \(252, 255, 0\)"):
        image.read_mask()


def test_areas_that_are_not_there_are_told_in_the_log(
    plant: Plant, picture: Picture, rows_of: RowsOf, caplog: pytest.LogCaptureFixture
) -> None:
    rasters = {"top_potsdam_2_13_RGB.tif": picture(), "top_potsdam_2_13_label.tif": rows_of(LABELS.colors)}
    with caplog.at_level(logging.WARNING):
        assert [image.name for image in POTSDAM.images(plant(rasters), "test")] == ["2_13"]
    assert "has 1 of the 14 test areas; there is no 2_14, 3_13, " in caplog.text


def test_a_training_area_without_labels_is_an_error(plant: Plant, picture: Picture) -> None:
    root = plant({"2_Ortho_RGB/top_potsdam_2_11_RGB.tif": picture()})
    with pytest.raises(
        MissingFileError, match=r"no labels beside .*top_potsdam_2_11_RGB\.tif: looked for .*5_Labels_all"
    ):
        POTSDAM.images(root, "train")


def test_folders_that_geoseg_splits_are_the_same_areas(plant: Plant, picture: Picture, rows_of: RowsOf) -> None:
    rasters = {}
    for split, area in (("train", "2_11"), ("test", "2_13")):
        rasters[f"{split}_images/top_potsdam_{area}_RGB.tif"] = picture()
        rasters[f"{split}_masks/top_potsdam_{area}_label.tif"] = rows_of(LABELS.colors)
        rasters[f"{split}_masks_eroded/top_potsdam_{area}_label_noBoundary.tif"] = rows_of([BLACK])
    root = plant(rasters)
    for split, area in (("train", "2_11"), ("test", "2_13")):
        (image,) = POTSDAM.images(root, split)
        assert image.name == area
        assert image.read_mask().max() == 5
        assert (image.read_eroded() == 255).all()


def test_patches_that_geoseg_cuts_have_eroded_test_masks(plant: Plant, picture: Picture, rows_of: RowsOf) -> None:
    painted = [*LABELS.colors[:4], (255, 204, 0), LABELS.colors[5], BLACK]
    root = plant(
        {
            "train/images_1024/top_potsdam_2_11_0_0.tif": picture(),
            "train/masks_1024/top_potsdam_2_11_0_0.png": rows_of(range(7)),
            "test/images_1024/top_potsdam_2_13_0_0.tif": picture(),
            "test/masks_1024/top_potsdam_2_13_0_0.png": rows_of([6, 0]),
            "test/masks_1024_rgb/top_potsdam_2_13_0_0.png": rows_of(painted),
        }
    )
    (patch,) = POTSDAM.images(root, "train")
    assert (patch.name, patch.eroded) == ("top_potsdam_2_11_0_0", None)
    assert patch.read_mask().ravel().tolist()[:8] == [0, 1, 2, 3, 4, 5, 255, 255]
    (patch,) = POTSDAM.images(root, "test")
    assert patch.read_mask().ravel().tolist()[:8] == [0, 1, 2, 3, 4, 5, 255, 255]
    assert patch.read_eroded().ravel().tolist()[:3] == [255, 0, 0]
    (root / "test/masks_1024_rgb").rename(root / ".hidden")
    (patch,) = POTSDAM.images(root, "test")
    assert patch.mask is None
    assert patch.read_eroded()[0, 0] == 255


def test_patches_of_two_cities_are_not_mixed_up(plant: Plant, picture: Picture) -> None:
    root = plant({f"{city}/train/images_1024/a.tif": picture() for city in ("potsdam", "vaihingen")})
    with pytest.raises(
        UsageError, match=r"several folders look like it: .*potsdam/train/images_1024, .*vaihingen/train"
    ):
        POTSDAM.images(root, "train")


def test_a_missing_folder_names_what_was_looked_for_and_the_terms(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError) as caught:
        POTSDAM.images(tmp_path, "test")
    told = str(caught.value)
    assert "\n" not in told
    for part in (
        "2_Ortho_RGB/top_potsdam_*_RGB.tif",
        "test/images_1024/",
        "test.txt",
        "https://www.isprs.org",
        "research use",
    ):
        assert part in told


def test_the_real_patches(shared: Path) -> None:
    root = shared / "data/potsdam"
    train, val = (POTSDAM.images(root, split) for split in ("train", "val"))
    assert (len(train), len(val)) == (600, 75)
    assert not {image.name for image in train} & {image.name for image in val}
    assert len(POTSDAM.images(root, "all")) == 675
    pixels, mask = val[0].read()
    assert pixels.shape == (3, 224, 224)
    assert set(np.unique(mask)) <= {0, 1, 2, 3, 4, 5}
