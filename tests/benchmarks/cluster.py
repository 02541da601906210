"""What a cluster costs and gains: its overhead, two workers against one, bands per second, a row of tiles scored twice.

`OMP_NUM_THREADS=1 python tests/benchmarks/cluster.py all` takes about half an hour on two cores; a name in place of
`all` measures one thing. The figures are in README.md here and in examples/cluster/README.md.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import shutil
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import torch
from affine import Affine
from torch import Tensor

from d2ls_infer import load_model, predict_raster
from d2ls_infer.cluster import ClusterOptions, map_scenes
from d2ls_infer.cluster.clients import local_workers
from d2ls_infer.cluster.crew import Crew
from d2ls_infer.errors import D2LSError, RasterError
from d2ls_infer.labels import LabelMap

FAILING, DYING = 1e-3, 5e-5
"""In the simulation: how often a band fails to be read, and how often its worker dies of it."""


class Null:
    """Says that all is water, at once."""

    labels = LabelMap.of(["water", "land"])
    bands = ("red", "green", "blue")
    value_range = (0.0, 255.0)
    name, sha256, gsd_m = "null", "00" * 32, None

    def score(self, batch: Tensor) -> Tensor:
        scores = torch.zeros(len(batch), 2, *batch.shape[-2:])
        scores[:, 0] = 1
        return scores


def make_scene(path: Path, height: int, width: int, bands: int) -> Path:
    """Noise over slopes, written in strips."""
    chance = np.random.default_rng(1)
    profile = {"driver": "GTiff", "dtype": "uint8", "count": bands, "height": height, "width": width, "tiled": True}
    place = {"crs": "EPSG:32618", "transform": Affine(0.6, 0, 500_000, 0, -0.6, 4_600_000)}
    with rasterio.open(path, "w", **profile, **place) as dataset:
        for row in range(0, height, 512):
            rows = min(512, height - row)
            strip = chance.integers(1, 250, (bands, rows, width), dtype=np.uint8)
            dataset.write(strip, window=rasterio.windows.Window(0, row, width, rows))
    return path


def one_process(model: Any, scene: Path, folder: Path) -> float:
    """Seconds of a run in one process."""
    started = time.perf_counter()
    predict_raster(model, scene, folder / "one.tif", overwrite=True)
    return time.perf_counter() - started


def on_workers(count: int, model: Any, scene: Path, folder: Path, **options: Any) -> float:
    """Seconds of a run by so many workers of one thread, that are there and have loaded the model before."""
    how = ClusterOptions(threads=1, one_host=True, **options)
    with local_workers(count) as client:
        client.run(ready)
        started = time.perf_counter()
        (result,) = map_scenes(client, model, [scene], folder / "many.tif", overwrite=True, cluster=how)
        seconds = time.perf_counter() - started
    assert not hasattr(result, "error"), result
    return seconds


def ready() -> None:
    """Load on a worker what takes long to load."""
    import_module("d2ls_infer.cluster.worker")


def speed(folder: Path, side: int, name: str) -> None:
    """Overhead against one process, and two workers against one."""
    model = load_model(name, "cpu")
    scene = make_scene(folder / "scene.tif", 2 * side, side, len(model.bands))
    torch.set_num_threads(1)
    one = one_process(model, scene, folder)
    single, double = (on_workers(count, model, scene, folder) for count in (1, 2))
    same = (folder / "one.tif").read_bytes() == (folder / "many.tif").read_bytes()
    print(
        f"{2 * side} rows of {side} pixels, {name}: one process {one:.1f} s; "
        f"one worker {single:.1f} s, {single / one - 1:+.1%}"
    )
    print(f"two workers {double:.1f} s, {single / double:.2f} times as fast as one; the same bytes: {same}")


def limit(folder: Path, bands: int) -> None:
    """Bands a second of a null segmenter on a narrow scene, and of tasks that do nothing."""
    scene = make_scene(folder / "tall.tif", 64 * bands, 64, 3)
    seconds = on_workers(2, Null(), scene, folder, band_rows=64)
    print(f"{bands} bands of a null segmenter on two workers: {bands / seconds:.0f} bands/s")
    simulate(bands, 0.0, 0.0)


def nothing(run: str, task: tuple[int, float, float]) -> int:
    """A band of no pixels, that fails or kills its worker now and then."""
    number, failing, dying = task
    chance = random.Random()
    if chance.random() < dying:
        os._exit(1)
    if chance.random() < failing:
        raise RasterError(f"band {number} cannot be read")
    return number


def simulate(bands: int, failing: float, dying: float) -> None:
    """So many bands of no pixels, by the same crew as those of a scene, with failures."""
    logging.getLogger("d2ls_infer").setLevel(logging.ERROR)
    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    done: list[int] = []
    failed: list[int] = []
    with local_workers(2) as client, Crew(client, "simulated", nothing, stall_seconds=60) as crew:
        started, number = time.perf_counter(), 0
        while len(done) + len(failed) < bands:
            while number < bands and crew.room > 0:
                crew.add((number, failing, dying))
                number += 1
            for task, result in crew.step():
                if task is not None:
                    (failed if isinstance(result, D2LSError) else done).append(task[0])
        seconds = time.perf_counter() - started
        handed = crew.count
    assert sorted(done + failed) == list(range(bands)), "a band is lost, or was done twice"
    print(
        f"{bands} empty bands on two workers, {failing:g} failing and {dying:g} killing each time: {seconds:.0f} s, "
        f"{bands / seconds:.0f} bands/s; {handed - bands} handed out again, {len(failed)} given up"
    )


def shared(folder: Path, width: int, name: str) -> None:
    """A row of tiles between two bands: scored again, or its scores handed over."""
    model = load_model(name, "cpu")
    torch.set_num_threads(1)
    tile, overlap = model.tile_size, model.tile_size // 4
    columns = -(-(width - overlap) // (tile - overlap))
    batch = torch.randint(0, 250, (1, len(model.bands), tile, tile), dtype=torch.uint8)
    model.score(batch)
    started = time.perf_counter()
    for _ in range(4):
        scores = model.score(batch)
    again = (time.perf_counter() - started) / 4 * columns
    started = time.perf_counter()
    for _ in range(4):
        np.save(folder / "scores.npy", scores.numpy())
        np.load(folder / "scores.npy")
    moved = (time.perf_counter() - started) / 4 * columns
    size = scores.numel() * 4 * columns
    print(
        f"a row of {columns} tiles of {tile} px, {width} pixels wide, {name}: scored again {again:.1f} s of one core; "
        f"its scores {size / 1e6:.0f} MB, {moved:.2f} s through this disk, {2 * size / 125e6:.1f} s by 1 Gbit/s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["all", "speed", "limit", "shared", "simulate"])
    parser.add_argument("--model", default="naip-rgb")
    parser.add_argument(
        "--side", type=int, default=6144, help="Columns of the scene of `speed`; it has twice as many rows."
    )
    parser.add_argument("--bands", type=int, default=100_000, help="Bands of `simulate`; of `limit` a hundredth.")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="d2ls-cluster-"))
    try:
        if arguments.what in ("all", "shared"):
            shared(folder, 10_000, arguments.model)
        if arguments.what in ("all", "limit"):
            limit(folder, max(10, arguments.bands // 100))
        if arguments.what in ("all", "speed"):
            speed(folder, arguments.side, arguments.model)
        if arguments.what in ("all", "simulate"):
            simulate(arguments.bands, FAILING, DYING)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
