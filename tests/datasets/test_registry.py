"""The benchmarks by name, described whole; importing them loads neither torch nor GDAL."""

from __future__ import annotations

import subprocess
import sys

import pytest

from d2ls_infer.datasets import DATASETS, Dataset, find_dataset
from d2ls_infer.errors import UsageError

LIGHT = """
import sys
from d2ls_infer.datasets import DATASETS, LabelledImage, find_dataset, folder_dataset, read_classes
heavy = {"torch", "rasterio", "pyogrio", "timm"} & set(sys.modules)
sys.exit(f"loaded: {heavy}" if heavy else 0)
"""


def test_importing_loads_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_benchmark_of_the_paper_and_two_more_are_there() -> None:
    assert list(DATASETS) == ["loveda", "uavid", "potsdam", "vaihingen", "cloud", "grass", "naip", "dubai"]


@pytest.mark.parametrize("dataset", DATASETS.values(), ids=DATASETS)
def test_a_description_is_whole(dataset: Dataset) -> None:
    assert find_dataset(dataset.name) is dataset
    assert dataset.source.startswith("https://")
    assert dataset.terms
    assert dataset.layouts
    assert {"train", "val"} <= set(dataset.splits) <= {"train", "val", "test"}
    assert len(set(dataset.bands)) == len(dataset.bands) >= 3
    assert len(set(dataset.labels.colors)) == len(dataset.labels)
    assert all(dataset.labels.names[index] == "clutter" for index in dataset.left_out)
    assert dataset.value_range[0] < dataset.value_range[1]


def test_the_isprs_means_leave_clutter_out() -> None:
    assert [name for name in DATASETS if DATASETS[name].left_out] == ["potsdam", "vaihingen"]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("vaihigen", "no dataset 'vaihigen', perhaps vaihingen is meant; there"),
        ("LoveDA", "perhaps loveda is meant"),
        ("cityscapes", "no dataset 'cityscapes'.*there are loveda, uavid, .* and folder for your own"),
        ("folder", "needs its classes: --classes FILE"),
    ],
)
def test_an_unknown_name_is_told_with_the_nearest_ones(name: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        find_dataset(name)
