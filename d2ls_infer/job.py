"""One scene and the model that is to map it: what is checked before, what the map depends on, what came of it."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from d2ls_infer import __version__
from d2ls_infer.alone import alone
from d2ls_infer.at_once import fastest_batch, fitting_batch, sample, usual_batch
from d2ls_infer.context import Looks
from d2ls_infer.errors import OutputExistsError
from d2ls_infer.load import load_segmenter
from d2ls_infer.memory import rows_bytes
from d2ls_infer.notices import warn_before, warn_of_clipping, warn_of_others
from d2ls_infer.options import PredictOptions
from d2ls_infer.outputs import AreaTally, ClassArea, Finished, Outputs, check_outputs
from d2ls_infer.raster import Cut, ResampledScene, Scene, home_of, map_rows, stamps, was_made_of
from d2ls_infer.segmenter import (
    AugmentedSegmenter,
    D2LSSegmenter,
    Segmenter,
    backend_of,
    in_context,
    name_of,
    precision_of,
    whose_dictionary,
)
from d2ls_infer.store import all_named, at_hand, exists, named, place
from d2ls_infer.tiling import TileGrid
from d2ls_infer.weights import find_weights

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """A model and a scene that was opened. view: the scene, as the segmenter sees it; grid: its tiles."""

    segmenter: Any  # a `Segmenter`, with what else it may have, or what tells of one
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
        warn_before(self.scene, self.segmenter, bands_chosen=options.bands is not None, gsd=options.gsd)
        warn_of_others(self.output, options.others(self.output))

    def outputs(self, options: PredictOptions, tags: Mapping[str, str], **more: Any) -> Outputs:
        """The files to be made of it."""
        return Outputs(
            self.output,
            options,
            scene=self.scene,
            labels=self.segmenter.labels,
            name=self.name,
            tags=tags,
            grid=self.grid,
            bands=tuple(self.segmenter.bands),
            **more,
        )

    def concluded(
        self, outputs: Outputs, options: PredictOptions, *, skipped: int, seconds: dict[str, float], known: int
    ) -> PredictResult:
        """What came of it, when all rows are in the outputs; it is noted there and said, if the map is not as hoped."""
        warn_of_clipping(self.scene)
        if skipped == len(self.grid):
            there = "" if options.cut == Cut() else " there"
            log.warning("%s has no valid pixel%s: the map is empty", self.scene.path, there)
        outputs.notes |= {"tiles": len(self.grid), "skipped": skipped, "seconds": seconds["total"]}
        return PredictResult(
            source=self.scene.path,
            output=named(outputs.path),
            tiles=len(self.grid),
            skipped=skipped,
            seconds=seconds,
            areas=outputs.tally.result(),
            clipped=self.scene.clipped_share,
            files=all_named(outputs.files),
            resumed_rows=known,
        )


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


def default_output(source: str | Path, model: str, folder: Path | None = None) -> Path:
    """Where a map goes when nobody says: STEM_d2ls-MODEL.tif beside the scene, or in a folder."""
    home, stem = home_of(source)
    return (folder or home) / f"{stem}_d2ls-{model}.tif"


@contextmanager
def opened(about: Any, name: str, source: str | Path, output: Path, options: PredictOptions) -> Iterator[Job]:
    """A scene, opened, as a model sees it. about: a segmenter, or what tells of one."""
    with options.open(source, bands=about.bands, value_range=getattr(about, "value_range", None)) as scene:
        view = options.seen(scene, getattr(about, "gsd_m", None))
        yield Job(about, name, scene, view, options.grid(view.height, view.width, about), output)


@contextmanager
def checked(
    about: Any, name: str, source: str | Path, output: Path, options: PredictOptions, *, overwrite: bool
) -> Iterator[Job]:
    """The same of a scene whose map can be written."""
    with opened(about, name, source, output, options) as job:
        classes = len(about.labels)
        check_outputs(output, options, source=str(source), overwrite=overwrite, scene=job.scene, classes=classes)
        yield job


@contextmanager
def prepared(
    model: Segmenter | str | Path,
    source: str | Path,
    output: str | Path | None,
    options: PredictOptions,
    *,
    overwrite: bool,
    writes: bool = False,
) -> Iterator[Job]:
    """Everything that can go wrong before the first tile, the cheap first: names, scene, outputs, then the weights.

    writes: whether the map is then made, and by nobody else meanwhile.
    """
    weights = find_weights(model) if isinstance(model, str | Path) else None
    known: Any = model if weights is None else weights.description
    name = name_of(model if weights is None else weights)
    output = None if output is None else place(output)
    if output is None or output.is_dir():
        output = default_output(source, name, output)
    output = options.named(output)
    check_outputs(output, options, source=str(source), overwrite=overwrite)
    with ExitStack() as stack:
        if writes:
            stack.enter_context(alone(output))
        job = stack.enter_context(checked(known, name, source, output, options, overwrite=overwrite))
        segmenter: Any = model if weights is None else load_segmenter(weights)
        if isinstance(segmenter, D2LSSegmenter):
            segmenter.settle(job.grid.tile_height, job.grid.tile_width)
        segmenter = segmenter if options.tta == "none" else AugmentedSegmenter(segmenter, options.tta)
        yield replace(job, segmenter=segmenter)


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


def check_not_there(output: Path, options: PredictOptions, source: str) -> None:
    """Raise OutputExistsError where a run that goes on finds what it would not have made."""
    try:
        check_outputs(output, options, source=source, overwrite=False)
    except OutputExistsError as error:
        raise OutputExistsError(
            f"{error}; --resume keeps only what was made whole of this scene as it is now, by these weights and options"
        ) from error


def finished_before(job: Job, options: PredictOptions, tags: Mapping[str, str]) -> PredictResult | None:
    """What an earlier run has made, if all of it is there and the map has these tags, `run_tag` among them."""
    files = options.files(job.output)
    if not all(map(exists, files.values())):
        return None
    tally = AreaTally(job.scene, job.segmenter.labels)
    with at_hand(job.output), at_hand(Path(f"{job.output}.aux.xml")):
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


def asked_for(job: Job, options: PredictOptions) -> dict[str, Any]:
    """What was asked for: the scene as it is now, the weights, and every option that pixels or files depend on."""
    about = {field.name: str(getattr(options, field.name)) for field in fields(options)}
    for name in ("cut", "max_memory", "batch_size", "vrt"):  # what comes of them is told by others
        del about[name]
    about |= {"tile_size": str(job.grid.size), "overlap": str(job.grid.overlap_px)}
    return {
        "scene": [stamps(job.scene, options.aoi), job.scene.width, job.scene.height],
        "weights": str(getattr(job.segmenter, "sha256", "")),
        "options": about,
    }


def run_tag(job: Job, options: PredictOptions) -> dict[str, str]:
    """The tag that tells one run's files from another's: the sha256 of what was asked for.

    It stands in the map's sidecar: the map's own bytes do not depend on which files are made beside it.
    """
    return {"D2LS_RUN": hashlib.sha256(json.dumps(asked_for(job, options), sort_keys=True).encode()).hexdigest()}


def run_key(job: Job, options: PredictOptions) -> dict[str, Any]:
    """All that a map's bytes depend on, but for the number of threads."""
    asked = asked_for(job, options)
    return asked | {
        "options": asked["options"] | {"batch_size": str(options.batch_size), "vrt": str(options.vrt)},
        "device": job.device.type,
        "precision": job.precision,
        "backend": backend_of(job.segmenter),
        "smooth": getattr(job.segmenter, "smooth", None),
        "version": [__version__, torch.__version__],
    }


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
