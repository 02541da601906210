"""The pipeline: scene -> tiles -> scores -> blended rows -> class map."""

from __future__ import annotations

import json
import logging
import operator
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from d2ls_infer import __version__
from d2ls_infer.errors import UsageError
from d2ls_infer.labels import LabelMap
from d2ls_infer.raster import RasterWriter, Scale, Scene, check_output, parse_bands, parse_scale
from d2ls_infer.segmenter import D2LSSegmenter, Precision, Segmenter, decide
from d2ls_infer.tiling import WINDOWS, TileGrid, blend, parse_overlap
from d2ls_infer.weights import WeightsFile, find_weights, load_network

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called after each tile with the number of tiles done and of all tiles."""

T = TypeVar("T")

MARKS = ("red", "green", "blue", "near infrared", "alpha")
"""Names of bands that contradict each other."""

GSD_TOLERANCE = 1.5
"""How many times larger or smaller than the model's a scene's pixels may be without a warning."""


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """How a scene is mapped. Raises UsageError for values that make no sense.

    tile_size: side of a tile in pixels. overlap: pixels (a whole number) or a share of the tile (below 1, or "25%").
    blend: hann, gaussian, linear, or none (the centres of the tiles, cut). batch_size: tiles scored at once; by default
    1 on a CPU and 8 elsewhere. bands: the scene's bands for the model's, counted from 1, as numbers or "1,2,3"; by
    default the first ones that are not alpha. scale: raw values or percentiles that become the model's value range,
    "0,10000" or "p2,p98"; by default values are taken as they are.
    """

    tile_size: int = 512
    overlap: int | float | str = 0.25
    blend: str = "hann"
    batch_size: int | None = None
    bands: Sequence[int] | str | None = None
    scale: Scale | str | None = None

    def __post_init__(self) -> None:
        for name in ("tile_size", "batch_size"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, operator.index(value))
        if self.tile_size < 1:
            raise UsageError(f"tile size must be at least 1 pixel, got {self.tile_size}; try 512")
        TileGrid(self.tile_size, self.tile_size, self.tile_size, self.overlap_px)
        if self.blend not in WINDOWS:
            raise UsageError(f"unknown blending window {self.blend!r}; known are {', '.join(WINDOWS)}")
        if self.batch_size is not None and self.batch_size < 1:
            raise UsageError(f"batch size must be at least 1, got {self.batch_size}")
        if isinstance(self.bands, str):
            object.__setattr__(self, "bands", tuple(parse_bands(self.bands)))
        elif self.bands is not None:
            object.__setattr__(self, "bands", tuple(map(operator.index, self.bands)))
        if isinstance(self.scale, str):
            object.__setattr__(self, "scale", parse_scale(self.scale))

    @property
    def overlap_px(self) -> int:
        return parse_overlap(self.overlap, self.tile_size)

    def open(self, source: str | Path, *, bands: Sequence[str], value_range: tuple[float, float] | None) -> Scene:
        """The scene as a model of those band names and that value range takes it."""
        assert not isinstance(self.bands, str)
        assert not isinstance(self.scale, str)
        return Scene.open(source, bands_needed=len(bands), bands=self.bands, scale=self.scale, value_range=value_range)


@dataclass(frozen=True)
class ClassArea:
    """How much of a scene one class covers.

    share: of the valid pixels (0..1). area_m2: square metres, None where the scene has no place on the ground.
    """

    name: str
    pixels: int
    share: float
    area_m2: float | None


@dataclass(frozen=True)
class PredictResult:
    """What came of one scene.

    tiles: tiles of the grid; skipped: those without a valid pixel. seconds: by stage ("read", "score", "write") and in
    "total", which also holds the blending. clipped: share (0..1) of the values outside the value range or the scale.
    """

    source: str
    output: Path
    tiles: int
    skipped: int
    seconds: dict[str, float]
    areas: tuple[ClassArea, ...]
    clipped: float


def load_model(name_or_path: str | Path, device: str = "auto", precision: Precision = "auto") -> D2LSSegmenter:
    """A model by the name or alias of the manifest, or from a weights file.

    device: auto, cpu, cuda, cuda:1, mps. precision: auto, float32, bfloat16, float16; the type of the network's
    products. Raises UsageError for an unknown name or device, WeightsError for a damaged file.
    """
    return load_segmenter(find_weights(name_or_path), device=device, precision=precision)


def load_segmenter(weights: WeightsFile, *, device: str = "auto", precision: Precision = "auto") -> D2LSSegmenter:
    """The segmenter of a weights file that was found."""
    network = load_network(weights.path, weights.description)
    return D2LSSegmenter(
        network,
        weights.description,
        name=weights.name,
        sha256=weights.sha256,
        device=device,
        precision=precision,
    )


def default_output(source: str | Path, model: str, folder: Path | None = None) -> Path:
    """Where a map goes when nobody says: STEM_d2ls-MODEL.tif beside the scene, or in a folder."""
    place = Path(source)
    return (folder or place.parent) / f"{place.stem}_d2ls-{model}.tif"


def predict_raster(
    model: Segmenter | str | Path,
    source: str | Path,
    output: str | Path | None = None,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> PredictResult:
    """Map a raster of any size: a uint8 GeoTIFF of class indices on the raster's own grid, 255 = nodata.

    model: a segmenter, or a name or path for `load_model`. output: a file, or a folder for STEM_d2ls-MODEL.tif; by
    default beside the source. options: see `PredictOptions`. Memory depends on the raster's width, not on its height.

    Raises UsageError (also a ValueError) for what makes no sense, OutputExistsError, MissingFileError, and RasterError
    (also an OSError) where reading or writing fails. Whatever happens, no half-written output is left.
    """
    settings = PredictOptions(**options)
    weights = find_weights(model) if isinstance(model, str | Path) else None
    known: Any = model if weights is None else weights.description
    name = str(getattr(model, "name", type(model).__name__)) if weights is None else weights.name
    if output is None or Path(output).is_dir():
        output = default_output(source, name, Path(output) if output else None)
    check_output(Path(output), source=str(source), overwrite=overwrite)
    with settings.open(source, bands=known.bands, value_range=getattr(known, "value_range", None)) as scene:
        segmenter: Any = model if weights is None else load_segmenter(weights)
        warn_of_type(scene)
        warn_of_bands(scene, segmenter.bands, chosen=settings.bands is not None)
        warn_of_gsd(scene, getattr(segmenter, "gsd_m", None))
        with RasterWriter.create(
            Path(output),
            like=scene,
            labels=segmenter.labels,
            description=f"class (D2LS {name})",
            tags=provenance(segmenter, name, scene, settings),
            overwrite=overwrite,
        ) as writer:
            return map_scene(segmenter, scene, writer, settings, progress)


def map_scene(
    segmenter: Segmenter, scene: Scene, writer: RasterWriter, options: PredictOptions, progress: Progress | None
) -> PredictResult:
    """The loop itself."""
    grid = TileGrid(scene.height, scene.width, options.tile_size, options.overlap_px)
    device = getattr(segmenter, "device", "cpu")
    watch = Stopwatch()
    scored = 0

    def score(batch: Tensor) -> Tensor:
        nonlocal scored
        scored += len(batch)
        with watch("score"):
            return segmenter.score(batch)

    tally = AreaTally(scene, segmenter.labels)
    for rows in blend(
        score,
        counted(watch.each("read", scene.tiles(grid)), len(grid), progress),
        grid,
        channels=len(segmenter.labels),
        window=options.blend,
        batch_size=options.batch_size or (1 if str(device) == "cpu" else 8),
        device=device,
    ):
        labels = decide(rows.scores, rows.covered)
        tally.add(rows.first, labels)
        with watch("write"):
            writer.write(labels)
    warn_of_clipping(scene)
    return PredictResult(
        source=scene.path,
        output=writer.path,
        tiles=len(grid),
        skipped=len(grid) - scored,
        seconds={**watch.seconds, "total": watch.total()},
        areas=tally.result(),
        clipped=scene.clipped_share,
    )


class Stopwatch:
    """Seconds by stage, and in all since it was made."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.seconds: Counter[str] = Counter(read=0, score=0, write=0)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Count the time inside a `with` block."""
        started = time.perf_counter()
        yield
        self.seconds[stage] += time.perf_counter() - started  # type: ignore[assignment]

    def each(self, stage: str, items: Iterable[T]) -> Iterator[T]:
        """Count the time that the items take to come."""
        iterator = iter(items)
        while True:
            with self(stage):
                item = next(iterator, None)
            if item is None:
                return
            yield item

    def total(self) -> float:
        return time.perf_counter() - self.started


def counted(items: Iterable[T], total: int, progress: Progress | None) -> Iterator[T]:
    """The items, with word to `progress` after each is dealt with."""
    for index, item in enumerate(items):
        yield item
        if progress is not None:
            progress(index + 1, total)


class AreaTally:
    """Adds up how much of a scene each class covers."""

    def __init__(self, scene: Scene, labels: LabelMap) -> None:
        self.names = labels.names
        self.row_areas_m2 = scene.row_areas_m2()
        self.pixels = np.zeros(len(labels), np.int64)
        self.areas_m2 = np.zeros(len(labels))

    def add(self, first_row: int, labels: np.ndarray) -> None:
        """Count rows (rows, width) uint8."""
        counts = np.stack([np.bincount(row, minlength=256)[: len(self.names)] for row in labels])  # (rows, classes)
        self.pixels += counts.sum(0)
        if self.row_areas_m2 is not None:
            self.areas_m2 += self.row_areas_m2[first_row : first_row + len(labels)] @ counts

    def result(self) -> tuple[ClassArea, ...]:
        valid = max(1, int(self.pixels.sum()))
        return tuple(
            ClassArea(name, int(pixels), int(pixels) / valid, None if self.row_areas_m2 is None else float(area))
            for name, pixels, area in zip(self.names, self.pixels, self.areas_m2, strict=True)
        )


def provenance(segmenter: Segmenter, name: str, scene: Scene, options: PredictOptions) -> dict[str, str]:
    """The tags that say how a map was made."""
    settings = {
        "tile_size": options.tile_size,
        "overlap_px": options.overlap_px,
        "blend": options.blend,
        "bands": dict(zip(segmenter.bands, scene.bands, strict=True)),
        "scale": str(options.scale) if options.scale else None,
        "precision": str(getattr(segmenter, "dtype", "")).removeprefix("torch."),
    }
    return {
        "D2LS_MODEL": name,
        "D2LS_WEIGHTS_SHA256": str(getattr(segmenter, "sha256", "")),
        "D2LS_VERSION": __version__,
        "D2LS_OPTIONS": json.dumps(settings),
        "TIFFTAG_SOFTWARE": f"d2ls-infer {__version__}",
    }


def warn_of_type(scene: Scene) -> None:
    """Say it when values of a wider type are read on the model's own range, which is right only if they are on it."""
    if not scene.as_it_is and scene.value_range is not None and scene.scale is None:
        low, high = scene.value_range
        log.warning(
            "%s holds %s values; they are taken on the model's range %g to %g as they are. "
            "If they are on another, give --scale MIN,MAX or --scale p2,p98",
            scene.path, scene.dtype, low, high,
        )  # fmt: skip


def warn_of_bands(scene: Scene, names: Sequence[str], *, chosen: bool) -> None:
    """Say it when nobody chose the bands and the file marks one as another colour than the model takes it for."""
    wrong = [
        f"band {band} is marked {mark} and taken as {name}"
        for band, mark, name in zip(scene.bands, scene.band_marks(), names, strict=True)
        if not chosen and mark in MARKS and name.lower() in MARKS and mark != name.lower()
    ]
    if wrong:
        log.warning(
            "%s: %s. That is right for false-colour images; else say which is which by --bands",
            scene.path, "; ".join(wrong),
        )  # fmt: skip


def warn_of_gsd(scene: Scene, gsd_m: float | None) -> None:
    """Say it when the scene's pixels are far from the size that the model was trained at."""
    if gsd_m is None or (areas := scene.row_areas_m2()) is None:
        return
    pixel_m = float(np.median(areas)) ** 0.5
    if not 1 / GSD_TOLERANCE <= pixel_m / gsd_m <= GSD_TOLERANCE:
        log.warning(
            "%s has pixels of %.3g m, the model was trained at %.3g m: objects look to it %.3g times too %s",
            scene.path, pixel_m, gsd_m, max(pixel_m / gsd_m, gsd_m / pixel_m), "small" if pixel_m > gsd_m else "large",
        )  # fmt: skip


def warn_of_clipping(scene: Scene) -> None:
    """Say it when much lay outside the range, other than by a stretch between percentiles, which clips by intent."""
    if scene.clipped_share > 0.05 and (scene.scale is None or scene.scale.kind == "values"):
        log.warning(
            "%s: %.0f %% of the values lie outside the range and were clipped; the map may mean little. "
            "Give --scale MIN,MAX or --scale p2,p98",
            scene.path, 100 * scene.clipped_share,
        )  # fmt: skip
