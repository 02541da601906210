"""The pipeline: scene -> tiles -> scores -> blended rows -> class map."""

from __future__ import annotations

import copy
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from d2ls_infer import __version__
from d2ls_infer.at_once import Halving, fastest_batch, fitting_batch, sample, usual_batch
from d2ls_infer.background import Behind, ahead
from d2ls_infer.context import Looks
from d2ls_infer.errors import UsageError
from d2ls_infer.exported import ExportedSegmenter
from d2ls_infer.graphs import RUNTIMES
from d2ls_infer.journal import Journal, journal_path, key_of, remove_journal
from d2ls_infer.memory import rows_bytes
from d2ls_infer.notices import warn_before, warn_of_clipping
from d2ls_infer.options import PredictOptions
from d2ls_infer.outputs import AreaTally, ClassArea, Finished, Outputs, check_outputs
from d2ls_infer.raster import (
    Cut,
    ResampledScene,
    Scene,
    home_of,
    map_rows,
    stamps,
    was_made_of,
)
from d2ls_infer.segmenter import (
    AugmentedSegmenter,
    D2LSSegmenter,
    Precision,
    Segmenter,
    backend_of,
    in_context,
    precision_of,
    whose_dictionary,
)
from d2ls_infer.store import all_named, at_hand, check_writable, exists, named, place
from d2ls_infer.tiling import Around, Rows, Tile, TileGrid, blend, rows_sharing_batches
from d2ls_infer.transfers import Beside
from d2ls_infer.weights import WeightsFile, find_weights, load_network, warn_of_terms

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called after each tile with the number of tiles done and of all tiles."""

T = TypeVar("T")

WRITTEN_BEHIND = 4
"""Pieces of finished rows that may wait to be written while the next tiles are scored."""

DEVICE_WRITTEN_BEHIND = 2
"""The same off the CPU, where pieces are larger."""

COMPRESSING = 4
"""Threads that compress a map where the network does not need the cores: one is slower than a network on a GPU."""


def most_waiting(device: torch.device) -> int:
    """Pieces of finished rows made on a device that may wait for a thread beside the network."""
    return WRITTEN_BEHIND if device.type == "cpu" else DEVICE_WRITTEN_BEHIND


@dataclass(frozen=True)
class PredictResult:
    """What came of one scene.

    tiles: tiles of the grid; skipped: those without a valid pixel. seconds: by stage ("read", "score", "write") and in
    "total", which also holds the blending. clipped: share (0..1) of the values outside the value range or the scale.
    files: what was written, by what it holds: "classes" (the output), "confidence", "vector", and so on; addresses, if
    on an object store. resumed_rows: rows of the scene that an earlier run had finished; all of them where nothing was
    left to do.
    """

    source: str
    output: Path | str
    tiles: int
    skipped: int
    seconds: dict[str, float]
    areas: tuple[ClassArea, ...]
    clipped: float
    files: dict[str, Path | str]
    resumed_rows: int = 0

    @property
    def was_there(self) -> bool:
        """Whether an earlier run had made everything."""
        return self.tiles == 0

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self) | {
            "output": str(self.output),
            "files": {name: str(path) for name, path in self.files.items()},
        }


def load_model(
    name_or_path: str | Path,
    device: str = "auto",
    precision: Precision = "auto",
    *,
    backend: str = "torch",
    smooth: bool = True,
    offline: bool = False,
    manifest: str | Path | None = None,
) -> D2LSSegmenter | ExportedSegmenter:
    """A model by the name or alias of the manifest, from a file, or "owner/repo[@revision][:file]" on the hub.

    A file holds weights, or is one of `d2ls export`. device: auto, cpu, cuda, cuda:1, mps. precision: auto, float32,
    bfloat16, float16; the type of the network's products. backend: what runs it: torch, compile, openvino, onnxruntime,
    or auto for the fastest. smooth: even out the pattern that the network leaves in its scores, see `smoothed`.
    offline: do not use the network. manifest: models of your own, over the package's. Raises
    UsageError for an unknown name, device or backend, HubError for a hub that fails, WeightsError for a damaged file.
    """
    weights = find_weights(name_or_path, offline=offline, manifest=manifest)
    return load_segmenter(weights, device=device, precision=precision, backend=backend, smooth=smooth)


def load_segmenter(
    weights: WeightsFile,
    *,
    device: str = "auto",
    precision: Precision = "auto",
    backend: str = "torch",
    smooth: bool = True,
) -> D2LSSegmenter | ExportedSegmenter:
    """The segmenter of a weights file that was found, or of an exported one, which its own runtime runs."""
    warn_of_terms(weights)
    if weights.path.suffix in RUNTIMES:
        return ExportedSegmenter(weights, device=device, precision=precision, backend=backend, smooth=smooth)
    network = load_network(weights.path, weights.description)
    return D2LSSegmenter(
        network,
        weights.description,
        name=weights.name,
        sha256=weights.sha256,
        reference=weights.reference,
        device=device,
        precision=precision,
        backend=backend,
        smooth=smooth,
    )


def default_output(source: str | Path, model: str, folder: Path | None = None) -> Path:
    """Where a map goes when nobody says: STEM_d2ls-MODEL.tif beside the scene, or in a folder."""
    home, stem = home_of(source)
    return (folder or home) / f"{stem}_d2ls-{model}.tif"


def predict_raster(
    model: Segmenter | str | Path,
    source: str | Path,
    output: str | Path | None = None,
    *,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> PredictResult:
    """Map a raster of any size: a uint8 GeoTIFF of class indices on the raster's own grid, 255 = nodata.

    model: a segmenter, or a name or path for `load_model`. output: a file, or a folder for STEM_d2ls-MODEL.tif; by
    default beside the source. Either may be an address of an object store ("s3://bucket/maps/map.tif"; what does not
    end in .tif is a folder): the files are made here and uploaded when all are whole. options: see `PredictOptions`;
    what else is made of the scene, in the same pass, is among them: `confidence=True`, `vector=".gpkg"`,
    `report="page.html"`. Memory depends on the raster's width, not on its height.

    A run that stops early leaves no half-written output, but a journal of its finished rows beside it. `resume` goes on
    there, and the result is the same to the last byte; files that an earlier run has finished stay as they are. The
    journal of a map on an object store is on the machine that made it, see `d2ls_infer.store.place`. A segmenter
    without `sha256`, which says what it is, has no journal, and its maps are not taken for finished.

    Raises UsageError (also a ValueError) for what makes no sense, OutputExistsError, MissingFileError, RasterError
    (also an OSError) where reading or writing fails, and StoreError (likewise) where an object store does.
    """
    settings = PredictOptions(**options)
    check_whole_rasters(settings)
    if output is not None:
        check_writable(place(output))
    with prepared(model, source, output, settings, overwrite=overwrite or resume) as job:
        tags = provenance(job, settings)
        identified = bool(getattr(job.segmenter, "sha256", ""))
        if resume and not overwrite:
            if identified and (found := finished_before(job, settings, tags)):
                remove_journal(journal_path(job.output))  # of a run that was killed right after its last file
                return found
            check_outputs(job.output, settings, source=str(source), overwrite=False)
        job.warn(settings)
        if resume and settings.batch_size == "auto" and (before := key_of(job.output)):
            settings = replace(settings, batch_size=before["options"]["batch_size"])  # other batches, other last bits
        settings = replace(settings, batch_size=choose_batch(job, settings))
        log.info(
            "%s: %d x %d pixels, %d tiles, %d at once, on %s",
            source, job.scene.width, job.scene.height, len(job.grid), settings.batch_size, job.device,
        )  # fmt: skip
        with ExitStack() as stack:
            journal = None
            if identified:
                key = run_key(job, settings)
                journal = stack.enter_context(Journal(job.output, key, height=job.scene.height, resume=resume))
            outputs = Outputs(
                job.output,
                settings,
                scene=job.scene,
                labels=job.segmenter.labels,
                name=job.name,
                tags=tags,
                grid=job.grid,
                bands=tuple(job.segmenter.bands),
                overwrite=overwrite,
                threads=1 if job.device.type == "cpu" else COMPRESSING,
            )
            return map_scene(job.observed(settings), stack.enter_context(outputs), settings, journal, progress)


def check_whole_rasters(options: PredictOptions) -> None:
    """Raise UsageError where rasters shall stay in pieces, and nobody makes pieces."""
    if options.vrt:
        raise UsageError("--vrt is for work on a cluster, which makes a map in pieces; in Python, give a client too")


@dataclass(frozen=True)
class Job:
    """A model and a scene that were checked and opened. view: the scene, as the segmenter sees it; grid: its tiles."""

    segmenter: Any  # a `Segmenter`, with what else it may have
    name: str
    scene: Scene
    view: Scene | ResampledScene
    grid: TileGrid
    output: Path

    @property
    def device(self) -> torch.device:
        return torch.device(getattr(self.segmenter, "device", "cpu"))

    @property
    def precision(self) -> str:
        return precision_of(self.segmenter)

    def observed(self, options: PredictOptions, looks: Looks = map) -> Job:
        """The same, with a segmenter that has seen what it wants to of the scene. looks: see `context.observed`."""
        scene = copy.copy(self.scene)  # what is read here is not counted
        view = options.seen(scene, getattr(self.segmenter, "gsd_m", None))
        return replace(self, segmenter=in_context(self.segmenter, view.rows, self.grid, options.dictionary, looks))

    def warn(self, options: PredictOptions) -> None:
        """Say what the user should know before the map is trusted."""
        warn_before(
            self.scene, self.segmenter, bands_chosen=options.bands is not None, gsd_given=options.gsd is not None
        )


@contextmanager
def prepared(
    model: Segmenter | str | Path,
    source: str | Path,
    output: str | Path | None,
    options: PredictOptions,
    *,
    overwrite: bool,
) -> Iterator[Job]:
    """Everything that can go wrong before the first tile, the cheap first: names, scene, outputs, then the weights."""
    weights = find_weights(model) if isinstance(model, str | Path) else None
    known: Any = model if weights is None else weights.description
    name = str(getattr(model, "name", type(model).__name__)) if weights is None else weights.name
    output = None if output is None else place(output)
    if output is None or output.is_dir():
        output = default_output(source, name, output)
    output = options.named(output)
    check_outputs(output, options, source=str(source), overwrite=overwrite)
    with checked(known, source, output, options, overwrite=overwrite) as (scene, view):
        grid = options.grid(view.height, view.width, known)
        segmenter: Any = model if weights is None else load_segmenter(weights)
        if isinstance(segmenter, D2LSSegmenter):
            segmenter.settle(grid.tile_height, grid.tile_width)
        segmenter = segmenter if options.tta == "none" else AugmentedSegmenter(segmenter, options.tta)
        yield Job(segmenter, name, scene, view, grid, output)


@contextmanager
def checked(
    about: Any, source: str | Path, output: Path, options: PredictOptions, *, overwrite: bool
) -> Iterator[tuple[Scene, Scene | ResampledScene]]:
    """A scene, opened, and as the model sees it, whose map can be written. about: a segmenter, or its description."""
    with options.open(source, bands=about.bands, value_range=getattr(about, "value_range", None)) as scene:
        view = options.seen(scene, getattr(about, "gsd_m", None))
        classes = len(about.labels)
        check_outputs(output, options, source=str(source), overwrite=overwrite, scene=scene, classes=classes)
        yield scene, view


def map_scene(
    job: Job, outputs: Outputs, options: PredictOptions, journal: Journal | None, progress: Progress | None
) -> PredictResult:
    """The loop itself."""
    scene, grid = job.scene, job.grid
    watch = Stopwatch()
    known = journal.rows if journal else 0  # rows that an earlier run has finished

    def write(rows: Rows) -> None:
        with watch("write"):
            if journal and rows.first < known:
                outputs.add(journal.at(rows.first))
                return
            finished = Finished(rows)
            outputs.add(finished)
            if journal:  # it gets arrays: what lies on a device is this thread's alone
                keeper.give(Finished.of(finished.first, finished.values()))

    keep = journal.add if journal else lambda _: None
    with Behind(keep, most_waiting(job.device)) as keeper:
        empty = finish_rows(job, options, write, watch=watch, known=known, seeing=outputs.seeing, progress=progress)
    warn_of_clipping(scene)
    if empty == len(grid):
        log.warning("%s has no valid pixel%s: the map is empty", scene.path, "" if options.cut == Cut() else " there")
    outputs.notes |= {"tiles": len(grid), "skipped": empty, "seconds": watch.total()}
    return PredictResult(
        source=scene.path,
        output=named(outputs.path),
        tiles=len(grid),
        skipped=empty,
        seconds={**watch.seconds, "total": watch.total()},
        areas=outputs.tally.result(),
        clipped=scene.clipped_share,
        files=all_named(outputs.files),
        resumed_rows=known,
    )


def finish_rows(
    job: Job,
    options: PredictOptions,
    write: Callable[[Rows], None],
    *,
    watch: Stopwatch,
    first: int = 0,
    last: int | None = None,
    known: int = 0,
    seeing: Callable[[Iterable[Any]], Iterable[Any]] = iter,
    progress: Progress | None = None,
    around: Around | None = None,
) -> int:
    """Hand the scene's finished rows from `first` to `last`, all by default, to `write`, from top to bottom.

    A few rows above and below may come too, and mean nothing, as do those above `known`, which an earlier run has
    finished. The others are the same to the last bit, whichever part they are made in; only tiles that touch the part
    are read. seeing: looks at the tiles as they are read. around: see `blend`.

    Gives how many tiles had no valid pixel: of those that begin in the part, so that each tile counts in one alone.
    """
    view, grid, batch_size = job.view, job.grid, int(options.batch_size or 1)
    last = job.scene.height if last is None else last
    low, high = view.needs(first, last)
    below = view.needs(last, last + 1)[0] if last < job.scene.height else grid.height
    tile_rows = slice(*grid.touching(low, high, rows_sharing_batches(grid, batch_size)))
    starts = grid.row_starts[tile_rows]
    job.scene.counted_rows = slice(first, last)
    empty = 0

    def read() -> Iterator[tuple[Tile, tuple[np.ndarray, np.ndarray]]]:
        nonlocal empty
        # All of it, also what is known: pictures and counts want the pixels, and reading takes little time.
        for tile, (values, valid) in seeing(watch.each("read", view.tiles(grid, tile_rows))):
            empty += low <= tile.row < below and not valid.any()
            yield tile, (values, valid)

    in_parts = Halving(job.segmenter.score)

    def score(batch: Tensor) -> Tensor:
        with watch("score"):
            return in_parts(batch)

    beside = Beside(job.device)

    def write_handed(handed: Any) -> None:
        with beside.taking(handed) as rows:
            write(rows)

    # Closed before the scene is, whatever happens: what reads ahead reads it.
    with closing(ahead(read(), batch_size + 1)) as tiles, Behind(write_handed, most_waiting(job.device)) as writer:
        blended = blend(
            score,
            counted(tiles, len(starts) * len(grid.col_starts), progress),
            grid,
            channels=len(job.segmenter.labels),
            window=options.blend,
            batch_size=batch_size,
            device=job.device,
            disagreement=options.disagreement,
            first_row=view.needs(max(first, known), last)[0],
            around=around,
        )
        read_rows = rows_above(starts[-1] + grid.tile_height, blended)
        for rows in view.restored(read_rows, first_row=max(first, known)):
            if rows.first >= last:
                break
            if rows.first + len(rows.covered) > first:
                writer.give(beside.hand(rows))
    return empty


def rows_above(row: int, parts: Iterable[Rows]) -> Iterator[Rows]:
    """The finished rows above a row of the field."""
    for part in parts:
        if part.first >= row:
            return
        kept = slice(0, row - part.first)
        told = part.disagreement
        yield Rows(part.first, part.scores[:, kept], part.covered[kept], None if told is None else told[kept])


def finished_before(job: Job, options: PredictOptions, tags: Mapping[str, str]) -> PredictResult | None:
    """What an earlier run has made, if all of it is there, of the same scene, model, options and version."""
    files = options.files(job.output)
    if not all(map(exists, files.values())):
        return None
    tally = AreaTally(job.scene, job.segmenter.labels)
    with at_hand(job.output):
        if not was_made_of(job.output, job.scene, tags):
            return None
        for first, rows in map_rows(job.output):
            tally.add(Finished.of(first, {"labels": rows}))
    return PredictResult(
        source=job.scene.path,
        output=named(job.output),
        tiles=0,
        skipped=0,
        seconds={"read": 0.0, "score": 0.0, "write": 0.0, "total": 0.0},
        areas=tally.result(),
        clipped=0.0,
        files=all_named(files),
        resumed_rows=job.scene.height,
    )


def choose_batch(job: Job, options: PredictOptions) -> int:
    """How many tiles to score at once: what was asked for, fewer where memory is limited."""
    if options.batch_size == "auto":
        wanted = fastest_batch(job.segmenter.score, job.grid, len(job.segmenter.bands))
    else:
        wanted = int(options.batch_size or usual_batch(job.device, job.grid))
    if options.max_memory is None:
        return wanted
    batch = sample(job.grid, len(job.segmenter.bands), wanted)
    return fitting_batch(job.segmenter.score, batch, int(options.max_memory), rows_memory(job, options, wanted))


def rows_memory(job: Job, options: PredictOptions, batch_size: int) -> int:
    """Bytes that everything but the network takes while a scene is mapped, so many tiles at once."""
    classes = len(job.segmenter.labels)
    return rows_bytes(
        job.grid,
        job.scene,
        classes=classes,
        disagreement=options.disagreement,
        layers=options.layers(classes),
        batch_size=batch_size,
    )


def run_key(job: Job, options: PredictOptions) -> dict[str, Any]:
    """All that a map's bytes depend on, but for the number of threads."""
    about = {field.name: str(getattr(options, field.name)) for field in fields(options)}
    del about["cut"], about["max_memory"]  # what comes of them is told by others
    about |= {"tile_size": str(job.grid.size), "overlap": str(job.grid.overlap_px)}
    return {
        "scene": [stamps(job.scene, options.aoi), job.scene.width, job.scene.height],
        "weights": str(getattr(job.segmenter, "sha256", "")),
        "options": about,
        "device": job.device.type,
        "precision": job.precision,
        "backend": backend_of(job.segmenter),
        "smooth": getattr(job.segmenter, "smooth", None),
        "version": [__version__, torch.__version__],
    }


class Stopwatch:
    """Seconds by stage, each of which is one thread's, and in all since it was made; stages go on side by side."""

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


def provenance(job: Job, options: PredictOptions) -> dict[str, str]:
    """The tags that say how a map was made."""
    segmenter, scene = job.segmenter, job.scene
    settings: dict[str, Any] = {
        "tile_size": job.grid.size,
        "overlap_px": job.grid.overlap_px,
        "blend": options.blend,
        "dictionary": whose_dictionary(getattr(segmenter, "observes", None), job.grid, options.dictionary),
        "bands": dict(zip(segmenter.bands, scene.bands, strict=True)),
        "scale": str(options.scale) if options.scale else None,
        "precision": job.precision,
    }
    if (smooth := getattr(segmenter, "smooth", None)) is not None:
        settings["smooth"] = smooth
    if options.cut != Cut():
        part = scene.part
        settings["window"] = [part.col, part.row, part.width, part.height]
    for key in ("aoi", "gsd", "nodata"):
        if (value := getattr(options, key)) is not None:
            settings[key] = str(value)
    if options.gsd == "auto":
        settings["gsd"] = str(getattr(segmenter, "gsd_m", ""))
    if options.tta != "none":
        settings["tta"] = options.tta
    if (backend := backend_of(segmenter)) != "torch":
        settings["backend"] = backend
    return {
        "D2LS_MODEL": job.name,
        "D2LS_WEIGHTS_SHA256": str(getattr(segmenter, "sha256", "")),
        **({"D2LS_WEIGHTS": reference} if (reference := str(getattr(segmenter, "reference", ""))) else {}),
        "D2LS_VERSION": __version__,
        "D2LS_OPTIONS": json.dumps(settings),
        "TIFFTAG_SOFTWARE": f"d2ls-infer {__version__}",
    }
