"""What a run would do and take, before it is begun."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from d2ls_infer.at_once import Halving, sample
from d2ls_infer.context import CROP_PX, places
from d2ls_infer.errors import UsageError
from d2ls_infer.job import Job, choose_batch, prepared, rows_memory
from d2ls_infer.memory import peak_bytes
from d2ls_infer.options import PredictOptions
from d2ls_infer.raster import valid_share
from d2ls_infer.segmenter import Segmenter, whose_dictionary
from d2ls_infer.store import all_named, named


@dataclass(frozen=True)
class Plan:
    """What mapping a scene would do.

    files: what would be written, by what it holds. width, height: pixels of the scene, or of the part to map. pixel_m:
    their side in metres, None without a place on the ground; read_m: the same as the model sees them. bands: the
    model's names, and the scene's bands, from 1, that are taken for them. scale: what becomes the model's value range.
    tiles: down and across. memory_bytes: most of the process, measured for the network and worked out for the rest;
    None where the system does not tell. disk_bytes: of all rasters before compression. seconds: see `network_seconds`.
    """

    source: str
    output: Path | str
    files: dict[str, Path | str]
    width: int
    height: int
    crs: str | None
    pixel_m: float | None
    read_m: float | None
    bands: dict[str, int]
    dtype: str
    scale: str
    tile_size: int
    overlap_px: int
    tiles: tuple[int, int]
    batch_size: int
    device: str
    precision: str
    memory_bytes: int | None
    disk_bytes: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self) | {
            "output": str(self.output),
            "files": {name: str(path) for name, path in self.files.items()},
        }


def plan_raster(
    model: Segmenter | str | Path,
    source: str | Path,
    output: str | Path | None = None,
    *,
    overwrite: bool = False,
    **options: Any,
) -> Plan:
    """What `predict_raster` would do with the same arguments; nothing is written. Raises what that does."""
    settings = PredictOptions(**options)
    with prepared(model, source, output, settings, overwrite=overwrite) as job:
        job.warn(settings)
        batch_size = choose_batch(job, settings)
        seconds = network_seconds(job, settings, batch_size)
        try:
            memory = peak_bytes() + rows_memory(job, settings, batch_size)
        except UsageError:
            memory = None
        down, across = len(job.grid.row_starts), len(job.grid.col_starts)
        size_m = job.scene.pixel_size_m()
        pixel_m = None if size_m is None else (size_m[0] * size_m[1]) ** 0.5
        shrunk = (job.scene.height * job.scene.width / (job.view.height * job.view.width)) ** 0.5
        return Plan(
            source=job.scene.path,
            output=named(job.output),
            files=all_named(settings.files(job.output)),
            width=job.scene.width,
            height=job.scene.height,
            crs=str(job.scene.crs) if job.scene.crs else None,
            pixel_m=pixel_m,
            read_m=None if pixel_m is None else pixel_m * shrunk,
            bands=dict(zip(job.segmenter.bands, job.scene.bands, strict=True)),
            dtype=str(job.scene.dtype),
            scale=job.scene.scaling(),
            tile_size=job.grid.size,
            overlap_px=job.grid.overlap_px,
            tiles=(down, across),
            batch_size=batch_size,
            device=str(job.device),
            precision=job.precision,
            memory_bytes=memory,
            disk_bytes=settings.layers(len(job.segmenter.labels)) * job.scene.width * job.scene.height,
            seconds=seconds,
        )


def network_seconds(job: Job, options: PredictOptions, batch_size: int) -> float:
    """What the network takes, about: by one batch of tiles, one crop that is looked at, and the scene's valid share."""
    segmenter, grid = job.segmenter, job.grid
    score = Halving(segmenter.score)
    tiles = sample(grid, len(segmenter.bands), batch_size)
    share = valid_share(job.scene, (len(grid.row_starts), len(grid.col_starts)))
    seconds = timed(lambda: score(tiles), job.device) / batch_size * max(1.0, len(grid) * share)
    if whose_dictionary(getattr(segmenter, "observes", None), grid, options.dictionary) == "scene":
        crop = tiles[:1, :, :CROP_PX, :CROP_PX]
        seconds += timed(lambda: segmenter.observe(crop), job.device) * math.prod(places(grid.height, grid.width))
    return seconds


def timed(call: Callable[[], object], device: torch.device) -> float:
    """The seconds that a call takes the second time: the first one makes ready."""
    for _ in range(2):
        started = time.perf_counter()
        call()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        seconds = time.perf_counter() - started
    return seconds
