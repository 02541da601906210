"""Values and colours to class indices: each to its own, exactly, and whatever is not in the table is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from d2ls_infer.datasets import Codes, Colors
from d2ls_infer.errors import MissingFileError, UsageError

RED, GREEN, BLUE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0)
PAINT = Colors.of({RED: 0, GREEN: 1, BLUE: 2, BLACK: 255})

tables = st.dictionaries(st.integers(0, 70_000), st.integers(0, 255), min_size=1, max_size=8)
shapes = hnp.array_shapes(min_dims=2, max_dims=2, max_side=6)


@given(table=tables, data=st.data())
def test_every_value_of_the_table_becomes_its_index(table: dict[int, int], data: st.DataObject) -> None:
    values = data.draw(hnp.arrays(np.int32, shapes, elements=st.sampled_from(sorted(table))))
    indices = Codes.of(table).decode(values[None])
    assert indices.dtype == np.uint8
    assert indices.tolist() == [[table[value] for value in row] for row in values.tolist()]


@given(indices=hnp.arrays(np.uint8, shapes, elements=st.sampled_from([0, 1, 2, 255])))
def test_painting_indices_and_decoding_the_colours_gives_them_back(indices: np.ndarray) -> None:
    colors = np.zeros((256, 3), np.uint8)
    for color, index in PAINT.pairs:
        colors[index] = color
    assert (PAINT.decode(colors[indices].transpose(2, 0, 1)) == indices).all()


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "int32", "int64", "uint32"])
def test_codes_may_come_in_any_integer_type(dtype: str) -> None:
    values = np.array([[[0, 1], [2, 255 if dtype != "int8" else 2]]]).astype(dtype)
    assert Codes.indices(3).decode(values).tolist() == [[0, 1], [2, 255]]


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (np.array([[[0, 3]]], np.uint8), "it holds the values 3, which stand for no class; known are 0, 1, 2, 255"),
        (np.array([[[-1, 70_000]]], np.int32), "it holds the values -1, 70000, which"),
        (np.arange(3, 12, dtype=np.uint8)[None, None], "it holds the values 3, 4, 5, 6, 7 and 4 more, which"),
        (np.array([[[0.0]]], np.float32), "class codes are whole numbers, got float32"),
        (np.zeros((3, 1, 1), np.uint8), "class codes lie in one band, got 3"),
    ],
)
def test_what_is_no_code_is_told(values: np.ndarray, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        Codes.indices(3).decode(values)


def test_colours_match_exactly_or_not_at_all() -> None:
    almost = np.array(RED, np.uint8)[:, None, None] - np.array([1, 0, 0], np.uint8)[:, None, None]
    with pytest.raises(UsageError, match=r"it holds the colours \(254, 0, 0\), which stand for no class"):
        PAINT.decode(almost)


def test_corners_bring_lossy_colours_back_and_nothing_else() -> None:
    lossy = Colors.of(dict(PAINT.pairs), corners=True)
    values = np.array([(225, 27, 9), (127, 128, 0), (9, 22, 252), (4, 8, 2)], np.uint8).T[:, None]
    assert lossy.decode(values).tolist() == [[0, 1, 2, 255]]
    with pytest.raises(UsageError, match=r"\(255, 255, 255\)"):
        lossy.decode(np.full((3, 1, 1), 200, np.uint8))


def test_a_fourth_band_of_colours_is_alpha() -> None:
    assert PAINT.decode(np.array([*GREEN, 255], np.uint8)[:, None, None]).tolist() == [[1]]


@pytest.mark.parametrize("values", [np.zeros((1, 2, 2), np.uint8), np.zeros((3, 2, 2), np.uint16)])
def test_colours_need_three_bands_of_bytes(values: np.ndarray) -> None:
    with pytest.raises(UsageError, match=r"class colours lie in three bands of uint8, got \d of uint"):
        PAINT.decode(values)


def test_a_file_is_named_when_its_values_are_unknown(plant: Callable[..., Path]) -> None:
    root = plant({"codes.png": np.full((2, 2), 9), "colors.png": np.full((3, 2, 2), 7)})
    with pytest.raises(UsageError, match=r"codes\.png: it holds the values 9"):
        Codes.indices(3).read(root / "codes.png", image=root)
    with pytest.raises(UsageError, match=r"colors\.png: it holds the colours \(7, 7, 7\)"):
        PAINT.read(root / "colors.png", image=root)
    with pytest.raises(MissingFileError, match="none"):
        PAINT.read(root / "none.png", image=root)


def test_a_palette_does_not_change_what_the_codes_are(tmp_path: Path, write_raster: Callable[..., Path]) -> None:
    values = np.array([[[0, 1], [2, 0]]], np.uint8)
    palette = {0: (9, 9, 9), 1: (50, 60, 70), 2: (0, 1, 0)}
    path = write_raster(tmp_path / "mask.png", values, driver="PNG", georeferenced=False, colormap=palette)
    assert Codes.indices(3).read(path, image=path).tolist() == [[0, 1], [2, 0]]
