"""Folders are searched to a bounded depth; pairs, split files and rules say which images belong to a split."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from d2ls_infer.datasets import Imagery, LabelledImage
from d2ls_infer.datasets.layouts import AnnFolders, Plain, SplitFolders, folders, index_files, pair_files, read_names
from d2ls_infer.errors import MissingFileError, UsageError

Plant = Callable[..., Path]
MASK = np.zeros((2, 2))
IMAGE = np.zeros((3, 2, 2))


def names(images: list[LabelledImage]) -> list[str]:
    return [image.name for image in images]


def test_folders_come_nearest_first_and_not_deeper_than_asked(tmp_path: Path) -> None:
    (tmp_path / "b/c/d").mkdir(parents=True)
    (tmp_path / "a").mkdir()
    (tmp_path / ".git/x").mkdir(parents=True)
    (tmp_path / "__MACOSX/b").mkdir(parents=True)
    (tmp_path / "file").touch()
    found = [path.relative_to(tmp_path).as_posix() for path in folders(tmp_path, depth=2)]
    assert found == [".", "a", "b", "b/c"]


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to the administrator")
def test_a_folder_that_may_not_be_opened_counts_as_empty(tmp_path: Path) -> None:
    (tmp_path / "lost+found").mkdir(mode=0)
    assert list(folders(tmp_path)) == [tmp_path, tmp_path / "lost+found"]


@pytest.mark.parametrize("above", [".", "Downloads/toy", "toy/toy/toy"])
def test_layouts_may_lie_deeper(plant: Plant, above: str) -> None:
    root = plant({f"{above}/val/images/a.png": IMAGE, f"{above}/val/masks/a.png": MASK})
    assert names(SplitFolders(Imagery()).read(root, "val")) == ["a"]
    assert SplitFolders(Imagery()).read(root, "train") == []
    root = plant({f"{above}/img_dir/val/a.png": IMAGE, f"{above}/ann_dir/val/a.png": MASK}, root="other")
    assert names(AnnFolders(Imagery()).read(root, "val")) == ["a"]
    assert AnnFolders(Imagery()).read(root, "train") == []


def test_several_places_are_refused_for_one_may_be_of_another_dataset(plant: Plant) -> None:
    root = plant({f"{name}/{kind}/val/a.png": IMAGE for name in ("cloud", "grass") for kind in ("img_dir", "ann_dir")})
    with pytest.raises(
        UsageError, match=r"several folders look like it: .*data/cloud, .*data/grass; give the one above"
    ):
        AnnFolders(Imagery()).read(root, "val")
    assert names(AnnFolders(Imagery()).read(root / "grass", "val")) == ["a"]


def test_split_files_go_before_rules_and_rules_match_whole_names(plant: Plant) -> None:
    pairs = {f"{folder}/{name}.png": array for name in "ab" for folder, array in (("images", IMAGE), ("masks", MASK))}
    root = plant(pairs)
    layout = Plain(Imagery(), rules=(("train", "a|b"), ("val", "")))
    assert names(layout.read(root, "train")) == ["a", "b"]
    assert layout.read(root, "val") == []
    assert layout.read(root, "test") == []
    assert names(layout.read(root, "all")) == ["a", "b"]
    (root / "train.txt").write_text("b.png\n")
    assert names(layout.read(root, "train")) == ["b"]


def test_extra_folders_are_for_training_alone(plant: Plant) -> None:
    root = plant({"images/a.png": IMAGE, "masks/a.png": MASK, "more/images/b.png": IMAGE, "more/masks/b.png": MASK})
    layout = Plain(Imagery(), rules=(("train", ".*"), ("val", ".*")), extra=("more", "absent"))
    assert names(layout.read(root, "train")) == ["a", "b"]
    assert names(layout.read(root, "val")) == ["a"]


def test_two_files_of_one_name_are_refused_when_the_name_is_asked_for(plant: Plant) -> None:
    root = plant({"images/a.png": IMAGE, "images/a.tif": IMAGE, "masks/a.png": MASK})
    with pytest.raises(UsageError, match=r"two files of the name 'a' in .*images: a\.png, a\.tif"):
        pair_files(root / "images", root / "masks", Imagery())
    (pair,) = pair_files(root / "images", root / "masks", Imagery(), names=["a.tif"], unlabelled=True)
    assert pair.image.name == "a.tif"


def test_a_split_file_names_each_image_once(tmp_path: Path) -> None:
    file = tmp_path / "train.txt"
    file.write_text("\ufeffa\r\n\r\n b c \r\n", encoding="utf-8")
    assert read_names(file) == ["a", "b c"]
    file.write_text("a\nb\na\n")
    with pytest.raises(UsageError, match=r"train\.txt names 'a' twice"):
        read_names(file)


def test_a_missing_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"no such folder: .*images"):
        index_files(tmp_path / "images")
