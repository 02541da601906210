"""The files that test servers take."""

from __future__ import annotations

import numpy as np
import pytest

from d2ls_infer.datasets import find_dataset, submission_file
from d2ls_infer.errors import UsageError


def test_loveda_takes_indices_from_0() -> None:
    classes = np.array([[0, 6], [3, 1]], np.uint8)
    path, picture = submission_file(find_dataset("loveda"), "4191", classes)
    assert str(path) == "4191.png"
    assert picture.tolist() == [[[0, 6], [3, 1]]]


def test_uavid_takes_colours_in_folders_by_sequence() -> None:
    uavid = find_dataset("uavid")
    names = uavid.labels.names
    classes = np.array([[names.index("human"), names.index("moving car")]], np.uint8)
    path, picture = submission_file(uavid, "seq21_000300", classes)
    assert path.parts == ("seq21", "Labels", "000300.png")
    assert picture.transpose(1, 2, 0).tolist() == [[[64, 64, 0], [64, 0, 128]]]


def test_a_set_without_a_server_is_refused() -> None:
    with pytest.raises(UsageError, match=r"potsdam has no test server.*loveda and uavid"):
        submission_file(find_dataset("potsdam"), "2_13", np.zeros((1, 1), np.uint8))
