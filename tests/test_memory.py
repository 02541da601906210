"""What a run takes in memory: kept within what is allowed, refused where it cannot be."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from d2ls_infer import memory, predict_raster
from d2ls_infer.errors import UsageError
from d2ls_infer.memory import forget_peak, parse_bytes, peak_bytes
from d2ls_infer.options import PredictOptions

Write = Callable[..., Path]
Pixels = Callable[..., np.ndarray]
posix = pytest.mark.skipif(sys.platform == "win32", reason="asks for the peak memory by POSIX means")


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("2G", 2 * 10**9), ("1500M", 15 * 10**8), ("1500mb", 15 * 10**8), ("1.5 GB", 15 * 10**8),
        ("2GiB", 2 * 1024**3), ("512Mi", 512 * 1024**2), ("64k", 64_000), ("123456789", 123_456_789), (1000, 1000),
    ],
)  # fmt: skip
def test_sizes_are_read(text: str | int, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "much", "2X", "-1G", "0", "0.1", "G", "2 i", "1e9", "nan"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="number of bytes such as"):
        parse_bytes(text)


@pytest.mark.skipif(not memory.CLEAR_REFS.exists(), reason="only Linux lets the peak memory fall again")
def test_what_was_freed_is_not_in_the_peak_once_it_is_forgotten() -> None:
    taken = np.ones(200 * 10**6, np.uint8)
    before = peak_bytes()
    del taken
    assert peak_bytes() > before - 10**7
    forget_peak()
    assert peak_bytes() < before - 100 * 10**6


@posix
@pytest.mark.parametrize("told", [None, "Name: python\nVmRSS: 1 kB\n"], ids=["nothing", "no peak"])
def test_where_nothing_is_told_of_the_process_the_peak_is_that_since_it_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: str | None
) -> None:
    import resource

    if told:
        (tmp_path / "STATUS").write_text(told)
    monkeypatch.setattr(memory, "STATUS", tmp_path / "STATUS")
    monkeypatch.setattr(memory, "CLEAR_REFS", tmp_path / "missing" / "CLEAR_REFS")
    forget_peak()
    unit = 1 if sys.platform == "darwin" else 1024
    assert peak_bytes() == resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit > 10**7


@posix
def test_the_map_is_the_same_with_and_without_a_limit(
    tmp_path: Path, write_raster: Write, pixels: Pixels, fakes: SimpleNamespace
) -> None:
    scene = write_raster(tmp_path / "scene.tif", pixels(3, 60, 50))
    free, bound = fakes.TileMean(), fakes.TileMean()
    one = predict_raster(free, scene, tmp_path / "free.tif", tile_size=16, batch_size=4)
    two = predict_raster(
        bound, scene, tmp_path / "bound.tif", tile_size=16, batch_size=4, max_memory=peak_bytes() + 4 * 10**9
    )
    assert (tmp_path / "free.tif").read_bytes() == (tmp_path / "bound.tif").read_bytes()
    assert one.areas == two.areas
    assert bound.batches[:3] == [1, 2, 4]  # tried first


@posix
def test_what_cannot_fit_is_refused_before_anything_is_written(
    tmp_path: Path, write_raster: Write, pixels: Pixels, fakes: SimpleNamespace
) -> None:
    scene = write_raster(tmp_path / "scene.tif", pixels(3, 60, 50))
    with pytest.raises(UsageError, match=r"need about \d\.\d\d GB, .*; --max-memory allows 0\.1 GB"):
        predict_raster(fakes.TileMean(), scene, max_memory="100M")
    assert [path.name for path in tmp_path.iterdir()] == ["scene.tif"]


def test_what_cannot_be_bound_is_refused() -> None:
    with pytest.raises(UsageError, match="--simplify holds all outlines"):
        PredictOptions(vector=".gpkg", simplify_m=2, max_memory="2G")
    assert PredictOptions(vector=".gpkg", max_memory="2G").max_memory == 2 * 10**9


BOUND = """
import sys, warnings
import numpy as np, rasterio, torch
from d2ls_infer import predict_raster
from d2ls_infer.errors import UsageError
from d2ls_infer.labels import LabelMap
from d2ls_infer.memory import peak_bytes

class Heavy:
    labels, bands = LabelMap.of(["a", "b", "c", "d"]), ("red", "green", "blue")
    def score(self, batch):
        scores = torch.full((len(batch), 64, *batch.shape[-2:]), 0.25)  # 67 MB for a tile of 512 x 512
        return scores[:, :4].contiguous()

warnings.simplefilter("ignore")
folder, options = sys.argv[1], {"tile_size": 512, "confidence": True, "disagreement": True}
profile = {"driver": "GTiff", "width": 8192, "height": 1500, "count": 3, "dtype": "uint8", "tiled": True}
with rasterio.open(f"{folder}/wide.tif", "w", compress="deflate", **profile) as dataset:
    dataset.write(np.tile(np.arange(256, dtype=np.uint8), (3, 1500, 32)))
limit = 10**9 // 20
while True:
    limit += 10**9 // 20
    try:
        predict_raster(Heavy(), f"{folder}/wide.tif", batch_size=8, max_memory=limit, **options)
    except UsageError:
        continue
    break
print(limit, peak_bytes())
"""


@posix
def test_a_run_stays_within_what_it_is_allowed(tmp_path: Path) -> None:
    """The least that is accepted, in steps of 50 MB: it suffices, and is not far more than what is needed."""
    done = subprocess.run([sys.executable, "-c", BOUND, str(tmp_path)], capture_output=True, text=True, check=True)
    limit, peak = map(int, done.stdout.split())
    assert peak <= limit, f"{peak / 1e6:.0f} MB, {limit / 1e6:.0f} MB were allowed"
    assert peak > 0.6 * limit
