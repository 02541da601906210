"""What is told of a scene at first sight."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from d2ls_infer.raster import Cut, Scene, middle_values, unmarked_collar, valid_share

Write = Callable[..., Path]

BYTE = (0, 255)


def test_the_middle_tells_its_least_and_largest_valid_value(tmp_path: Path, write_raster: Write) -> None:
    image = np.full((3, 600, 540), 0.5, np.float32)
    image[:, 300, 270], image[1, 301, 270], image[0, 302, 270] = 0.25, 0.875, np.nan
    image[:, 0, 0], image[:, -1, -1] = 9, -9  # beyond the middle
    path = write_raster(tmp_path / "scene.tif", image)
    with Scene.open(path, bands_needed=3, value_range=BYTE) as scene:
        assert middle_values(scene) == (0.25, 0.875)
    with Scene.open(path, bands_needed=3, value_range=BYTE, cut=Cut(window=(0, 0, 3, 2))) as scene:
        assert middle_values(scene) == (0.5, 9)
    empty = write_raster(tmp_path / "empty.tif", np.full((3, 4, 4), np.nan, np.float32))
    with Scene.open(empty, bands_needed=3, value_range=BYTE) as scene:
        assert middle_values(scene) is None


@pytest.mark.parametrize(
    ("dtype", "value", "told"),
    [("uint8", 0, True), ("uint8", 255, True), ("uint16", 65535, True), ("uint16", 255, False), ("float32", 0, True)],
)
def test_a_corner_of_a_collar_that_nothing_marks(
    tmp_path: Path, write_raster: Write, pixels: Callable[..., np.ndarray], dtype: str, value: int, told: bool
) -> None:
    image = pixels(3, 300, 280).astype(dtype)
    image[:, :64, -64:] = value
    path = write_raster(tmp_path / "scene.tif", image)

    def found(path: Path = path, **options: Any) -> int | None:
        with Scene.open(path, bands_needed=3, value_range=BYTE, **options) as scene:
            return unmarked_collar(scene)

    assert found() == (value if told else None)
    assert found(nodata=3) is None  # the user knows
    assert found(cut=Cut(window=(20, 0, 260, 300))) == found()
    assert found(cut=Cut(window=(0, 0, 270, 300))) is None  # another corner
    assert found(cut=Cut(window=(25, 0, 255, 300))) is None  # too small to tell
    assert found(write_raster(tmp_path / "marked.tif", image, nodata=value)) is None
    image[1, 0, -1] = 7  # one pixel of one band
    assert found(write_raster(path, image)) is None


@pytest.mark.parametrize(("nodata", "share"), [(0, 0.5), (None, 1)])
def test_the_valid_share_is_that_of_pixels_all_over(
    tmp_path: Path, write_raster: Write, pixels: Callable[..., np.ndarray], nodata: int | None, share: float
) -> None:
    image = np.maximum(pixels(3, 160, 96), 1)
    image[:, :80] = 0
    path = write_raster(tmp_path / "scene.tif", image, nodata=nodata)
    with Scene.open(path, bands_needed=3) as scene:
        assert scene.is_full() == (nodata is None)
        assert valid_share(scene, (5, 3)) == share
    with Scene.open(path, bands_needed=3, cut=Cut(window=(0, 0, 96, 80))) as scene:
        assert valid_share(scene, (1, 1)) == (nodata is None)
    with Scene.open(path, bands_needed=3, nodata="none") as scene:
        assert scene.is_full()


@pytest.mark.parametrize("kind", ["alpha", "mask", "float"])
def test_a_scene_that_may_have_invalid_pixels_is_not_full(
    tmp_path: Path, write_raster: Write, pixels: Callable[..., np.ndarray], kind: str
) -> None:
    image = pixels(4 if kind == "alpha" else 3, 20, 20).astype("float32" if kind == "float" else "uint8")
    image[3:] = 255
    mask = np.full((20, 20), 255, np.uint8) if kind == "mask" else None
    with Scene.open(write_raster(tmp_path / "scene.tif", image, mask=mask), bands_needed=3) as scene:
        assert not scene.is_full()
        assert valid_share(scene, (2, 2)) == 1
