"""Labelled images read what their dataset says; a dataset finds one layout or says in one line what it looked for."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from d2ls_infer.datasets import Codes, Colors, Dataset, Imagery, LabelledImage
from d2ls_infer.datasets.layouts import AnnFolders, Plain, SplitFolders
from d2ls_infer.errors import MissingFileError, UsageError
from d2ls_infer.labels import LabelMap

Plant = Callable[..., Path]
Picture = Callable[..., np.ndarray]
BANDS = ("near infrared", "red", "green")
IMAGERY = Imagery(BANDS, (0.0, 255.0), Codes.indices(2))
SET = Dataset(
    name="toy",
    labels=LabelMap.of(["one", "two"]),
    bands=BANDS,
    value_range=(0.0, 255.0),
    gsd_m=0.5,
    splits=("train", "val", "test"),
    source="https://example.org/toy",
    terms="as you like",
    layouts=(SplitFolders(IMAGERY), AnnFolders(IMAGERY), Plain(IMAGERY)),
)


@pytest.fixture
def image(plant: Plant, picture: Picture) -> LabelledImage:
    root = plant({"a.tif": picture(), "a.png": np.eye(4, 6), "e.png": np.full((4, 6), 255)})
    return LabelledImage("a", root / "a.tif", root / "a.png", root / "e.png", IMAGERY)


def test_bands_come_by_name_in_the_order_asked_for(image: LabelledImage) -> None:
    assert image.read_image()[:, 0, 0].tolist() == [10, 11, 12]
    assert image.read_image(["green", "near infrared"])[:, 0, 0].tolist() == [12, 10]
    assert image.read_image().dtype == np.uint8
    with pytest.raises(UsageError, match=r"a\.tif has no band 'blue'; it has near infrared, red, green"):
        image.read_image(["red", "blue"])


def test_bands_beyond_the_named_ones_are_left_out(image: LabelledImage) -> None:
    two = replace(image, imagery=Imagery(("near infrared", "red")))
    assert two.read_image().shape == (2, 4, 6)


def test_too_few_bands_are_told(image: LabelledImage) -> None:
    four = replace(image, imagery=Imagery((*BANDS, "blue")))
    with pytest.raises(UsageError, match=r"a\.tif has 3 bands, but 4 are expected: near infrared, red, green, blue"):
        four.read_image()


def test_of_bands_without_names_the_first_are_taken(image: LabelledImage) -> None:
    unnamed = replace(image, imagery=Imagery())
    assert unnamed.read_image()[:, 0, 0].tolist() == [10, 11, 12]
    assert unnamed.read_image(["any", "names"])[:, 0, 0].tolist() == [10, 11]
    with pytest.raises(UsageError, match=r"a\.tif has 3 bands, but 4 are expected: 1, 2, 3, 4"):
        unnamed.read_image(["1", "2", "3", "4"])


def test_masks_are_read_as_the_imagery_says(image: LabelledImage) -> None:
    assert (image.read_mask() == np.eye(4, 6)).all()
    assert (image.read_eroded() == 255).all()
    assert image.bands == BANDS
    assert image.value_range == (0.0, 255.0)
    with pytest.raises(UsageError, match=r"e\.png: class colours lie in three bands"):
        replace(image, eroded_masks=Colors.of({(0, 0, 0): 0})).read_eroded()


def test_without_labels_there_is_nothing_to_read(image: LabelledImage) -> None:
    with pytest.raises(UsageError, match=r"a \(.*a\.tif\) comes without labels"):
        replace(image, mask=None).read_mask()
    with pytest.raises(UsageError, match="comes without eroded labels"):
        replace(image, eroded=None).read_eroded()


def test_image_and_mask_of_different_size_are_told(image: LabelledImage, plant: Plant) -> None:
    pixels, mask = image.read()
    assert pixels.shape[1:] == mask.shape
    small = plant({"small.png": np.zeros((3, 6))}) / "small.png"
    with pytest.raises(UsageError, match=r"\(4, 6\) rows and columns, but its mask \(3, 6\)"):
        replace(image, mask=small).read()


def test_images_can_go_to_another_process_and_into_a_set(image: LabelledImage) -> None:
    assert pickle.loads(pickle.dumps(image)) == image
    assert pickle.loads(pickle.dumps(SET)) == SET
    assert len({image, replace(image)}) == 1


@pytest.fixture
def root(plant: Plant, picture: Picture) -> Path:
    names = [f"{split}/{{}}/{split}{i}.png" for split in ("train", "val") for i in range(2)]
    rasters = {name.format("images"): picture() for name in names}
    return plant(
        rasters | {name.format("masks"): np.zeros((4, 6)) for name in names} | {"test/images/t.png": picture()}
    )


def test_splits_can_be_joined_and_all_takes_what_is_labelled(root: Path) -> None:
    def names(split: str) -> list[str]:
        return [image.name for image in SET.images(root, split)]

    assert names("val") == ["val0", "val1"]
    assert names("val+train") == ["val0", "val1", "train0", "train1"]
    assert names("train+train") == ["train0", "train1"]
    assert names("test") == ["t"]
    assert names("all") == ["train0", "train1", "val0", "val1"]


def test_test_images_may_come_without_labels_and_others_may_not(root: Path) -> None:
    (image,) = SET.images(str(root), "test")
    assert image.mask is None
    (root / "val/masks/val1.png").unlink()
    with pytest.raises(MissingFileError, match=r"no mask of the name 'val1' in .*masks"):
        SET.images(root, "val")


def test_what_was_looked_for_and_where_to_get_it_stand_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError) as caught:
        SET.images(tmp_path, "val")
    assert str(caught.value) == (
        f"no val images of toy in {tmp_path}: looked for val/images/ beside val/masks/; or img_dir/val/ beside "
        "ann_dir/val/; or images/ beside masks/ and val.txt; get toy from https://example.org/toy (terms: as you like)"
    )
    with pytest.raises(MissingFileError, match=r"no such folder: .*none; get toy from https://example\.org/toy"):
        SET.images(tmp_path / "none", "val")


def test_the_part_that_is_missing_is_named(root: Path) -> None:
    (root / "val/images").rename(root / "val/other")
    with pytest.raises(MissingFileError, match=r"no val images of toy .*looked for val/images/"):
        SET.images(root, "train+val")


def test_an_unknown_split_is_told(root: Path) -> None:
    with pytest.raises(UsageError, match="toy has the splits train, val, test and all, got 'tset'"):
        SET.images(root, "train+tset")


def test_the_first_layout_that_has_the_split_is_taken(root: Path, plant: Plant, picture: Picture) -> None:
    plant({"images/p.png": picture(), "masks/p.png": np.zeros((4, 6))})
    (root / "val.txt").write_text("p\n")
    assert [image.name for image in SET.images(root, "val")] == ["val0", "val1"]
    (root / "val/images").rename(root / "val/other")
    assert [image.name for image in SET.images(root, "val")] == ["p"]
