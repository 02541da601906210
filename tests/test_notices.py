"""What a user is told before a scene is mapped. Of values and bands, and where a map is not as hoped: test_predict."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import rasterio
from rasterio.control import GroundControlPoint
from rasterio.rpc import RPC

from d2ls_infer import predict_raster

Write = Callable[..., Path]
Pixels = Callable[..., np.ndarray]


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Callable[..., list[str]]:
    """The warnings of a run."""

    def run(model: Any, scene: Path, **options: Any) -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.WARNING, "d2ls_infer"):
            predict_raster(model, scene, overwrite=True, **options)
        return caplog.messages

    return run


@pytest.mark.parametrize(
    ("gsd_m", "gsd", "words"),
    [
        (
            8.0,
            None,
            "has pixels of 2 m, the model was trained at 8 m: objects look to it 4 times too large; --gsd auto",
        ),
        (0.5, None, "4 times too small; --gsd auto"),
        (0.01, None, "200 times too small; what it knows cannot be seen at that distance"),
        (2.0, None, ""),
        (1.4, None, ""),
        (2.9, None, ""),
        (8.0, "auto", ""),
        (2.0, "7", "is read at 7 m, the model was trained at 2 m: objects look to it 3.5 times too small; --gsd auto"),
        (2.0, 1.9, ""),
        (8.0, 7.0, ""),
        (None, 7.0, ""),
    ],
)
def test_pixels_far_from_those_of_the_training(
    tmp_path: Path,
    write_raster: Write,
    pixels: Pixels,
    fakes: SimpleNamespace,
    told: Callable[..., list[str]],
    gsd_m: float | None,
    gsd: float | str | None,
    words: str,
) -> None:
    path = write_raster(tmp_path / "scene.tif", pixels(3, 40, 50))  # pixels of 2 m
    model = fakes.PerPixel()
    model.gsd_m = gsd_m
    messages = told(model, path, gsd=gsd)
    assert len(messages) == bool(words)
    assert words in " ".join(messages)


def test_a_corner_that_may_be_a_collar(
    tmp_path: Path, write_raster: Write, pixels: Pixels, fakes: SimpleNamespace, told: Callable[..., list[str]]
) -> None:
    image = pixels(3, 300, 300)
    image[:, :70, :90] = 255
    path = write_raster(tmp_path / "scene.tif", image)
    (message,) = told(fakes.PerPixel(), path)
    assert "a corner is all 255, and nothing marks that as empty" in message
    assert "give --nodata 255, else" in message
    assert told(fakes.PerPixel(), path, nodata=255) == told(fakes.PerPixel(), path, nodata="none") == []


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_a_place_that_is_known_by_points_alone(
    tmp_path: Path, write_raster: Write, pixels: Pixels, fakes: SimpleNamespace, told: Callable[..., list[str]]
) -> None:
    points = [GroundControlPoint(r, c, 10 + c / 100, 50 - r / 90) for r, c in ((0, 0), (0, 50), (40, 0), (40, 50))]
    path = write_raster(tmp_path / "scene.tif", pixels(3, 40, 50), georeferenced=False, gcps=points, crs="EPSG:4326")
    (message,) = told(fakes.PerPixel(), path)
    assert re.search(r"has ground control points only: areas are in pixels.*gdalwarp", message)
    plain = write_raster(tmp_path / "plain.tif", pixels(3, 40, 50), georeferenced=False)
    assert told(fakes.PerPixel(), plain) == []
    ones = [1.0] + [0.0] * 19
    with rasterio.open(plain, "r+") as dataset:
        dataset.rpcs = RPC(0, 1, 50, 1, ones, ones, 18, 20, 10, 1, ones, ones, 15, 15)
    (message,) = told(fakes.PerPixel(), plain)
    assert "has rational polynomial coefficients only" in message


@pytest.mark.parametrize(
    ("descriptions", "words"),
    [
        (
            ("B2", "B3", "B4"),
            "calls its bands B2, B3, B4, which mean another thing with each sensor; taken is band 1 as",
        ),
        (("SR_B4", "SR_B3", "SR_B2"), "calls its bands SR_B4, SR_B3, SR_B2"),
        (("490 nm", "560nm", "665 NM"), "calls its bands 490 nm, 560nm, 665 NM"),
        (("red", "green", "B02"), "calls its bands B02, which"),
        (("Red band", "green (560 nm)", "BLUE"), ""),
        (("band_1", "band_2", "band_3"), ""),
        ((None, None, None), ""),
    ],
)
def test_bands_called_by_a_sensors_numbers(
    tmp_path: Path,
    write_raster: Write,
    pixels: Pixels,
    fakes: SimpleNamespace,
    told: Callable[..., list[str]],
    descriptions: tuple[str, ...],
    words: str,
) -> None:
    path = write_raster(tmp_path / "scene.tif", pixels(3, 8, 8))
    with rasterio.open(path, "r+") as dataset:
        dataset.descriptions = descriptions
    model = fakes.PerPixel()
    model.bands = ("red", "green", "blue")
    messages = told(model, path)
    assert len(messages) == bool(words)
    assert words in " ".join(messages)
    assert told(model, path, bands="1,2,3") == []
    model.bands = tuple(text or f"any {number}" for number, text in enumerate(descriptions))  # a model of that sensor
    assert told(model, path) == []
