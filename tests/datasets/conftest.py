"""What the tests of datasets share: small trees of rasters, and masks in the colours or codes of a benchmark."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest

DRIVERS = {".png": "PNG", ".jpg": "JPEG", ".tif": "GTiff"}
Plant = Callable[..., Path]


@pytest.fixture
def plant(tmp_path: Path, write_raster: Callable[..., Path]) -> Plant:
    """Write rasters below a folder: names below it -> (bands, H, W), or (H, W) for a mask of one band."""

    def write(rasters: dict[str, np.ndarray], *, root: str = "data") -> Path:
        for name, array in rasters.items():
            path = tmp_path / root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            bands = array[None] if array.ndim == 2 else array
            write_raster(path, bands.astype(np.uint8), driver=DRIVERS[path.suffix], georeferenced=False)
        return tmp_path / root

    return write


@pytest.fixture(scope="session")
def picture() -> Callable[..., np.ndarray]:
    """(bands, 4, 6) uint8: band i is `first` + i everywhere, so that a band can be told from its values."""

    def make(bands: int = 3, *, first: int = 10) -> np.ndarray:
        return np.broadcast_to(np.arange(first, first + bands, dtype=np.uint8)[:, None, None], (bands, 4, 6)).copy()

    return make


@pytest.fixture(scope="session")
def rows_of() -> Callable[..., np.ndarray]:
    """One value or colour for each of the 24 pixels of a picture, the last one repeated: (4, 6), or (3, 4, 6)."""

    def make(values: Iterable[int | tuple[int, int, int]]) -> np.ndarray:
        table = np.array([*values], np.uint8)
        filled = table[np.minimum(np.arange(24), len(table) - 1)].reshape(4, 6, *table.shape[1:])
        return filled if table.ndim == 1 else filled.transpose(2, 0, 1)

    return make
