"""The measurement: one scene, mapped with the plain tile grid and with shifted ones, and compared."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from d2ls_infer.at_once import usual_batch
from d2ls_infer.errors import UsageError
from d2ls_infer.labels import NODATA, LabelMap
from d2ls_infer.load import load_segmenter
from d2ls_infer.notices import warn_before
from d2ls_infer.options import PredictOptions
from d2ls_infer.outputs import OutputOptions
from d2ls_infer.outputs.pictures import ScenePicture
from d2ls_infer.predict import Progress
from d2ls_infer.raster import Cut, ResampledScene, Scene
from d2ls_infer.raster.scene import Pixels, read_tiles
from d2ls_infer.seams.counts import (
    BINS,
    Bin,
    Changes,
    Lines,
    Maps,
    count_bins,
    count_changes,
    count_lines,
    edge_distances,
    seam_lines,
    total,
    worst_square,
)
from d2ls_infer.segmenter import AugmentedSegmenter, Segmenter, decide, in_context, name_of, precision_of
from d2ls_infer.tiling import Tile, TileGrid, blend
from d2ls_infer.weights import find_weights

SHIFTS = (0.25, 0.5, 0.75)
"""How far grids are shifted, as shares of the way from tile to tile."""

OVERLAPS = (0.0, 0.0625, 0.125, 0.1875, 0.25, 0.375, 0.5, 0.625, 0.75)
"""What `try_overlaps` tries, as shares of a tile."""

LIMIT_PX = 2048
"""Rows and columns in a scene's middle that are measured where no part is named."""

EXAMPLE_PX = 384
"""Rows and columns of the example, at most."""


@dataclass(frozen=True)
class Example:
    """The square where the blended maps differ most. scene: a picture (3, h, w) uint8.

    blended, raw: the plain map and the one shifted by `shift_px`, (h, w) uint8 of classes. cuts: of either raw map, the
    rows and the columns that a cut runs before. col, row: of the first pixel in the scene.
    """

    col: int
    row: int
    shift_px: int
    scene: np.ndarray
    blended: tuple[np.ndarray, np.ndarray]
    raw: tuple[np.ndarray, np.ndarray]
    cuts: tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class SeamReport:
    """How far the map of a scene depends on where its tiles lie.

    scene_size: (width, height). part: (col, row, width, height) of what was mapped. shifts_px: of the grids, along rows
    and columns alike; they, as all distances and counts, are in pixels as the model sees them, which are the scene's
    own unless `gsd` was asked for.

    blended: the maps that were asked for; raw: those without overlap and blending. curve: of raw maps, the pixels that
    change class, by distance to the nearest edge of the two tiles that gave the two classes. options: how the scene was
    read and tiled. sha256: of the weights.
    """

    source: str
    model: str
    sha256: str
    options: dict[str, Any]
    labels: LabelMap
    scene_size: tuple[int, int]
    part: tuple[int, int, int, int]
    tile_size: int
    shifts_px: tuple[int, ...]
    blended: Maps
    raw: Maps
    curve: tuple[Bin, ...]
    example: Example

    def to_dict(self) -> dict[str, Any]:
        """Every number as plain values: shares as 0..1, None where there is none. Of the example only its place."""
        example = {name: getattr(self.example, name) for name in ("col", "row", "shift_px")}
        height, width = self.example.raw[0].shape
        return {
            **{f.name: getattr(self, f.name) for f in fields(self)},
            "labels": list(self.labels.names),
            "blended": plain(self.blended),
            "raw": plain(self.raw),
            "curve": [plain(item) for item in self.curve],
            "example": example | {"width": width, "height": height},
        }


def plain(counted: Changes | Lines | Maps) -> dict[str, Any]:
    """What was counted, with what follows from it."""
    values = asdict(counted)
    if isinstance(counted, Maps):
        shares = [changes.share for changes in counted.shifts]
        values |= {"mean_share": counted.mean_share, "least_share": min(shares), "most_share": max(shares)}
        values |= {"shifts": [plain(changes) for changes in counted.shifts]}
        values |= {"columns": plain(counted.columns), "rows": plain(counted.rows)}
    elif isinstance(counted, Lines):
        values |= {"seams": plain(counted.seams), "beside": plain(counted.beside)}
        values |= {"ratio": counted.ratio, "difference": counted.difference}
    else:
        values["share"] = counted.share
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in values.items()}


def measure_seams(
    model: Segmenter | str | Path,
    source: str | Path,
    *,
    shifts: Sequence[float] = SHIFTS,
    progress: Progress | None = None,
    **options: Any,
) -> SeamReport:
    """Map a scene with the plain tile grid and with shifted ones, and count what changes.

    model: a segmenter, or a name or path for `load_model`. shifts: of the grids, as shares of the way from tile to
    tile, along rows and columns at once. progress: called after each tile, of all maps. options: those of
    `PredictOptions` that say how a scene is read and tiled; without `window`, `bbox` or `aoi` the middle of the scene
    is measured, at most 2048 pixels high and wide. In memory is a byte per pixel and map: with 3 shifts, 8 maps.

    A shifted grid is the same grid over a part of the same size that begins some pixels later. Only pixels are
    compared that lie in all those parts, so far inside that none of the tiles that would cover them is missing.

    Raises UsageError for a part that is too small for two tiles and the shifts along either axis, and for one without
    data; besides, what `predict_raster` raises.
    """
    with measuring(model, source, **options) as (segmenter, name, scene, settings):
        view = settings.seen(scene, getattr(segmenter, "gsd_m", None))
        asked, cut = tilings(settings.grid(view.height, view.width, segmenter), settings.blend, shifts)
        tiles = len(asked.firsts) * sum(len(tiling.grid) for tiling in {asked, cut})
        mapper = Mapper(segmenter, scene, settings, progress, tiles=tiles)
        blended = mapper.maps(asked)
        raw = blended if cut == asked else mapper.maps(cut)
        check_data(blended, source)
        return SeamReport(
            source=str(source),
            model=name,
            sha256=str(getattr(segmenter, "sha256", "")),
            options=told(settings)
            | {
                "tile_size": asked.tile_size,
                "precision": precision_of(segmenter),
                **({"smooth": segmenter.smooth} if hasattr(segmenter, "smooth") else {}),
            },
            labels=segmenter.labels,
            scene_size=(int(scene.dataset.width), int(scene.dataset.height)),
            part=(scene.part.col, scene.part.row, scene.part.width, scene.part.height),
            tile_size=asked.tile_size,
            shifts_px=asked.firsts[1:],
            blended=count_maps(blended, asked),
            raw=count_maps(raw, cut),
            curve=count_curve(raw, cut, scene),
            example=mapper.example(blended, raw, asked, cut),
        )


@dataclass(frozen=True)
class Trial:
    """What an overlap costs, in pixels that are scored for each of the part, and what share of pixels changes class."""

    overlap_px: int
    cost: float
    share: float


def try_overlaps(
    model: Segmenter | str | Path,
    source: str | Path,
    reach: float,
    *,
    shifts: Sequence[float] = SHIFTS,
    progress: Progress | None = None,
    **options: Any,
) -> tuple[Trial, ...]:
    """Measure a scene with ever more overlap, until at most a share `reach` of its pixels changes class.

    So the last trial is the overlap that reaches it at the least cost; where its share is above `reach`, none of
    `OVERLAPS` does. Arguments, and what is raised, as for `measure_seams`, but for `overlap`. progress: of one trial.
    """
    trials: list[Trial] = []
    with measuring(model, source, **options, overlap=OVERLAPS[0]) as (segmenter, _, scene, settings):
        view = settings.seen(scene, getattr(segmenter, "gsd_m", None))
        for overlap in OVERLAPS:
            grid = replace(settings, overlap=overlap).grid(view.height, view.width, segmenter)
            try:
                asked, _ = tilings(grid, settings.blend, shifts)
            except UsageError:
                if not trials:
                    raise
                break  # the part is too small for more
            mapper = Mapper(segmenter, scene, settings, progress, tiles=len(asked.firsts) * len(asked.grid))
            maps = mapper.maps(asked)
            check_data(maps, source)
            cost = len(grid) * grid.tile_height * grid.tile_width / (grid.height * grid.width)
            trials.append(Trial(grid.overlap_px, cost, count_maps(maps, asked).mean_share))
            if trials[-1].share <= reach:
                break
    return tuple(trials)


@contextmanager
def measuring(
    model: Segmenter | str | Path, source: str | Path, **options: Any
) -> Iterator[tuple[Any, str, Scene, PredictOptions]]:
    """A segmenter and its name, and the part of the scene that is measured, opened as the options say."""
    settings = PredictOptions(**options)
    unused = ("max_memory", *(f.name for f in fields(OutputOptions)))
    if given := [name for name in unused if getattr(settings, name) != getattr(PredictOptions, name)]:
        raise UsageError(
            f"{', '.join(given)}: no map is written where seams are measured, and memory is not limited; leave that out"
        )
    if settings.batch_size == "auto":
        raise UsageError("batch_size is a number where seams are measured, got 'auto'; try 8")
    weights = find_weights(model) if isinstance(model, str | Path) else None
    about: Any = model if weights is None else weights.description
    name = name_of(model if weights is None else weights)
    takes = {"bands": about.bands, "value_range": getattr(about, "value_range", None)}
    with settings.open(source, **takes) as scene:
        size = int(scene.dataset.width), int(scene.dataset.height)
    if settings.cut == Cut() and max(size) > LIMIT_PX:
        settings = replace(settings, window=middle(*size))
    with settings.open(source, **takes) as scene:
        segmenter: Any = model if weights is None else load_segmenter(weights)
        segmenter = segmenter if settings.tta == "none" else AugmentedSegmenter(segmenter, settings.tta)
        warn_before(scene, segmenter, bands_chosen=settings.bands is not None, gsd=settings.gsd)
        yield segmenter, name, scene, settings


def check_data(maps: Sequence[np.ndarray], source: str | Path) -> None:
    """Raise UsageError where nothing is to be compared."""
    if not any((labels != NODATA).any() for labels in maps):
        raise UsageError(f"{source}: no pixel that is compared has data; choose another part by --window")


def told(settings: PredictOptions) -> dict[str, Any]:
    """How a scene is read and tiled, as JSON takes it."""
    products = {f.name for f in fields(OutputOptions)} | {"cut", "max_memory"}
    values = {f.name: getattr(settings, f.name) for f in fields(settings) if f.name not in products}
    return {name: value if value is None or isinstance(value, int) else str(value) for name, value in values.items()}


def middle(width: int, height: int) -> tuple[int, int, int, int]:
    """The window (col, row, width, height) in the middle of a scene that is measured where none is named."""
    cols, rows = min(width, LIMIT_PX), min(height, LIMIT_PX)
    return (width - cols) // 2, (height - rows) // 2, cols, rows


@dataclass(frozen=True)
class Tiling:
    """One way of tiling a part of `height` x `width` pixels, as the model sees them, by a plain grid and shifted ones.

    All grids are one, `grid`, laid over as many pixels of the part. firsts: the row at which each begins, and the
    column; 0 for the plain grid, which comes first.
    """

    height: int
    width: int
    tile_size: int
    overlap_px: int
    blend: str
    firsts: tuple[int, ...]

    @property
    def grid(self) -> TileGrid:
        farthest = max(self.firsts)
        return TileGrid(self.height - farthest, self.width - farthest, self.tile_size, self.overlap_px)

    @property
    def margin(self) -> int:
        """Pixels on every side of the part that are not compared.

        Some are missing in the one grid or the other. And a grid's outermost pixels, as many as tiles overlap, would
        have one more tile over them were there more of the part.
        """
        return max(self.firsts) + self.overlap_px

    def compared(self, first: int) -> tuple[slice, slice]:
        """The rows and the columns that are compared, of those that the grid tiles that begins there."""
        start = self.margin - first
        return slice(start, self.height - self.margin - first), slice(start, self.width - self.margin - first)

    def seams(self, first: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows and the columns that a seam of that grid runs before, counted from the first that is compared."""
        start, grid = self.margin - first, self.grid
        return (
            seam_lines(grid.row_starts, self.tile_size, self.blend) - start,
            seam_lines(grid.col_starts, self.tile_size, self.blend) - start,
        )


def tilings(whole: TileGrid, blend: str, shifts: Sequence[float]) -> tuple[Tiling, Tiling]:
    """A part's two ways of tiling: as it was asked for, by the tiles of the whole part, and without overlap.

    Raises UsageError where the part is too small, and for shifts that are none.
    """
    height, width, size, overlap_px = whole.height, whole.width, whole.size, whole.overlap_px
    step = size - overlap_px
    firsts = (0, *(round(value * step) for value in shifts if 0 < value < 1))
    if not len(set(firsts)) == len(firsts) == len(shifts) + 1 >= 2:
        raise UsageError(
            f"shifts are different shares, between 0 and 1, of the {step} pixels from tile to tile; "
            f"got {','.join(f'{value:g}' for value in shifts) or 'none'}; try 0.25,0.5,0.75"
        )
    asked = Tiling(height, width, size, overlap_px, blend, firsts)
    least = max(size + max(firsts), 2 * asked.margin) + 1
    if min(height, width) < least:
        raise UsageError(
            f"nothing to measure in {width} x {height} pixels: two tiles of {size} that overlap by {overlap_px}, with "
            f"grids shifted by up to {max(firsts)}, take {least} x {least} or more; "
            "try a larger part, or a smaller --tile-size"
        )
    return asked, replace(asked, overlap_px=0, blend="none")


class Mapper:
    """Maps of the compared pixels of a scene. tiles: how many there are in all, for `progress`."""

    def __init__(
        self, segmenter: Segmenter, scene: Scene, settings: PredictOptions, progress: Progress | None, *, tiles: int
    ) -> None:
        self.segmenter, self.scene, self.settings = segmenter, scene, settings
        self.progress, self.tiles, self.tiles_done = progress, tiles, 0

    def view(self) -> Scene | ResampledScene:
        """The scene as the model sees it, to be read from the top."""
        return self.settings.seen(self.scene, getattr(self.segmenter, "gsd_m", None))

    def maps(self, tiling: Tiling) -> list[np.ndarray]:
        """For each grid, (h, w) uint8 of the compared pixels: classes, 255 where there is none."""
        return [self.map(tiling.grid, first, tiling.blend)[tiling.compared(first)] for first in tiling.firsts]

    def map(self, grid: TileGrid, first: int, window: str) -> np.ndarray:
        """(h, w) uint8 of all that a grid tiles that begins there."""
        view, device = self.view(), getattr(self.segmenter, "device", "cpu")

        def rows(start: int, stop: int) -> Pixels:
            values, valid = view.rows(first + start, first + stop)
            cols = slice(first, first + grid.width)
            return Pixels(values[:, :, cols], valid[:, cols])

        segmenter = in_context(self.segmenter, rows, grid, self.settings.dictionary)
        view = self.view()
        dtype = np.uint8 if isinstance(view, Scene) and view.as_it_is else np.float32
        finished = blend(
            segmenter.score,
            self.counted(read_tiles(rows, grid, bands=len(self.scene.bands), dtype=dtype)),
            grid,
            channels=len(self.segmenter.labels),
            window=window,
            batch_size=int(self.settings.batch_size or usual_batch(device, grid)),
            device=device,
        )
        return np.concatenate([decide(part.scores, part.covered) for part in finished])

    def counted(self, tiles: Iterator[tuple[Tile, Pixels]]) -> Iterator[tuple[Tile, Pixels]]:
        """The tiles of one map, counted among those of all."""
        for tile in tiles:
            yield tile
            self.tiles_done += 1
            if self.progress is not None:
                self.progress(self.tiles_done, self.tiles)

    def example(self, blended: list[np.ndarray], raw: list[np.ndarray], asked: Tiling, cut: Tiling) -> Example:
        """Where the blended maps differ most, of all places and shifts. The two ways they were tiled come with them."""
        found = [worst_square(blended[0], shifted, EXAMPLE_PX) for shifted in blended[1:]]
        index = max(range(len(found)), key=lambda index: found[index])
        _, row, col = found[index]
        place = slice(row, row + EXAMPLE_PX), slice(col, col + EXAMPLE_PX)
        height, width = blended[0][place].shape
        row, col = row + asked.margin, col + asked.margin  # in the part
        top, left = row - cut.margin, col - cut.margin  # in the raw maps, which more is compared of
        raw_place = slice(top, top + height), slice(left, left + width)
        view, cols = self.view(), slice(col, col + width)
        values, valid = view.rows(row, row + height)
        picture = ScenePicture(TileGrid(height, width, EXAMPLE_PX, 0), self.segmenter.bands)
        picture.add(Tile(0, 0, height, width), values[:, :, cols], valid[:, cols])
        magnified = view.magnified if isinstance(view, ResampledScene) else (1.0, 1.0)
        shift_px = asked.firsts[1 + index]
        (rows_0, cols_0), (rows_1, cols_1) = cut.seams(0), cut.seams(shift_px)
        return Example(
            col=self.scene.part.col + int(col / magnified[1]),
            row=self.scene.part.row + int(row / magnified[0]),
            shift_px=shift_px,
            scene=picture.result(),
            blended=(blended[0][place], blended[1 + index][place]),
            raw=(raw[0][raw_place], raw[1 + index][raw_place]),
            cuts=((rows_0 - top, cols_0 - left), (rows_1 - top, cols_1 - left)),
        )


def count_maps(maps: list[np.ndarray], tiling: Tiling) -> Maps:
    """The maps of one way of tiling: each shifted one against the plain one, and each by itself."""
    rows, columns = [], []
    for first, labels in zip(tiling.firsts, maps, strict=True):
        row_seams, col_seams = tiling.seams(first)
        rows.append(count_lines(labels, row_seams))
        columns.append(count_lines(labels.T, col_seams))
    height, width = maps[0].shape
    return Maps(
        overlap_px=tiling.overlap_px,
        blend=tiling.blend,
        compared=(width, height),
        shifts=tuple(count_changes(maps[0], shifted) for shifted in maps[1:]),
        columns=together(columns),
        rows=together(rows),
    )


def together(lines: list[Lines]) -> Lines:
    """The lines of all maps."""
    return Lines(total([part.seams for part in lines]), total([part.beside for part in lines]))


def count_curve(maps: list[np.ndarray], tiling: Tiling, scene: Scene) -> tuple[Bin, ...]:
    """Raw maps, each shifted one against the plain one, by distance to the nearest edge of either tile."""
    grid, part = tiling.grid, scene.part
    touches_start = part.row == 0, part.col == 0
    touches_end = part.row + part.height == scene.dataset.height, part.col + part.width == scene.dataset.width

    def distances(first: int) -> list[np.ndarray]:
        """Of the compared rows and columns, in the tiles of the grid that begins there."""
        is_first, is_last = first == 0, first == max(tiling.firsts)
        axes = zip((grid.row_starts, grid.col_starts), tiling.compared(first), touches_start, touches_end, strict=True)
        return [
            edge_distances(starts, tiling.tile_size, at_border=(is_first and at_start, is_last and at_end))[where]
            for starts, where, at_start, at_end in axes
        ]

    counts = []
    for first, shifted in zip(tiling.firsts[1:], maps[1:], strict=True):
        rows, cols = (np.minimum(*pair) for pair in zip(distances(0), distances(first), strict=True))
        counts.append(count_bins(maps[0], shifted, rows, cols))
    sums = [total(parts) for parts in zip(*counts, strict=True)]
    return tuple(
        Bin(item.of, item.changed, low, high) for item, low, high in zip(sums, BINS, (*BINS[1:], None), strict=True)
    )
