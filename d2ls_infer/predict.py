"""The pipeline: scene -> tiles -> scores -> blended rows -> class map."""

from __future__ import annotations

import json
import logging
import operator
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from d2ls_infer import __version__
from d2ls_infer.errors import UsageError
from d2ls_infer.outputs import ClassArea, Finished, OutputOptions, Outputs, check_outputs
from d2ls_infer.raster import (
    Cut,
    ResampledScene,
    Scale,
    Scene,
    contradicts,
    home_of,
    parse_bands,
    parse_nodata,
    parse_scale,
)
from d2ls_infer.segmenter import TTA, AugmentedSegmenter, D2LSSegmenter, Precision, Segmenter
from d2ls_infer.tiling import WINDOWS, TileGrid, blend, parse_overlap
from d2ls_infer.weights import WeightsFile, find_weights, load_network, warn_of_terms

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called after each tile with the number of tiles done and of all tiles."""

T = TypeVar("T")

GSD_ROUNDING = 0.05
"""Pixels that are so little larger or smaller than asked for are left as they are: to resample them would only blur."""

GSD_TOLERANCE = 1.5
"""How many times larger or smaller than the model's a scene's pixels may be without a warning."""


@dataclass(frozen=True, kw_only=True)
class PredictOptions(OutputOptions):
    """How a scene is mapped, and into what (see `OutputOptions`). Raises UsageError for values that make no sense.

    tile_size: side of a tile in pixels. overlap: pixels (a whole number) or a share of the tile (below 1, or "25%").
    blend: hann, gaussian, linear, or none (the centres of the tiles, cut). batch_size: tiles scored at once; by default
    1 on a CPU and 8 elsewhere. bands: the scene's bands for the model's, as numbers from 1 or names, "4,1,2" or
    "nir,red,green"; by default those that the file marks as the model's, else the first ones that are not alpha. scale:
    raw values or percentiles that become the model's value range, "0,10000" or "p2,p98"; by default values are taken as
    they are. nodata: a value in place of the file's own, or "none": all finite values are valid.

    window, bbox with bbox_crs, or aoi: the part of the scene to map, see `Cut`. gsd: the ground sampling distance to
    read the scene at, metres or "auto" for the model's; the map is on the scene's own grid all the same. tta: test-time
    augmentation, see `TTA`.
    """

    tile_size: int = 512
    overlap: int | float | str = 0.25
    blend: str = "hann"
    batch_size: int | None = None
    bands: Sequence[int | str] | str | None = None
    scale: Scale | str | None = None
    nodata: float | str | None = None
    window: Sequence[int] | str | None = None
    bbox: Sequence[float] | str | None = None
    bbox_crs: str | None = None
    aoi: str | Path | None = None
    gsd: float | str | None = None
    tta: str = "none"
    cut: Cut = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
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
            bands = (band if isinstance(band, str) else operator.index(band) for band in self.bands)
            object.__setattr__(self, "bands", tuple(bands))
        if isinstance(self.scale, str):
            object.__setattr__(self, "scale", parse_scale(self.scale))
        if self.nodata is not None:
            object.__setattr__(self, "nodata", parse_nodata(self.nodata))
        if self.gsd is not None:
            object.__setattr__(self, "gsd", parse_gsd(self.gsd))
        if self.tta not in TTA:
            raise UsageError(f"unknown test-time augmentation {self.tta!r}; known are {', '.join(TTA)}")
        object.__setattr__(self, "cut", Cut.of(self.window, self.bbox, self.bbox_crs, self.aoi))

    @property
    def overlap_px(self) -> int:
        return parse_overlap(self.overlap, self.tile_size)

    def files(self, output: Path) -> dict[str, Path]:
        """Every file that is asked for, by what it holds. Raises UsageError for clashes, with what is read too."""
        files = super().files(output)
        if self.aoi is not None and (area := Path(self.aoi)).exists():
            for path in files.values():
                if path.exists() and path.samefile(area):
                    raise UsageError(f"the output is the area of interest itself: {path}; give another name")
        return files

    def open(self, source: str | Path, *, bands: Sequence[str], value_range: tuple[float, float] | None) -> Scene:
        """The scene as a model of those band names and that value range takes it."""
        assert not isinstance(self.bands, str)
        assert not isinstance(self.scale, str)
        return Scene.open(
            source,
            bands_needed=len(bands),
            bands=self.bands,
            band_names=bands,
            value_range=value_range,
            scale=self.scale,
            nodata=self.nodata,
            cut=self.cut,
        )

    def seen(self, scene: Scene, gsd_m: float | None) -> Scene | ResampledScene:
        """The scene at the distance that was asked for; gsd_m: the model's. Raises UsageError where it is not known."""
        if self.gsd is None:
            return scene
        if self.gsd == "auto" and gsd_m is None:
            raise UsageError("the model states no ground sampling distance; give it in metres: --gsd METRES")
        view = ResampledScene(scene, float(gsd_m if self.gsd == "auto" and gsd_m else self.gsd))
        return scene if all(abs(factor - 1) <= GSD_ROUNDING for factor in view.magnified) else view


@dataclass(frozen=True)
class PredictResult:
    """What came of one scene.

    tiles: tiles of the grid; skipped: those without a valid pixel. seconds: by stage ("read", "score", "write") and in
    "total", which also holds the blending. clipped: share (0..1) of the values outside the value range or the scale.
    files: what was written, by what it holds: "classes" (the output), "confidence", "vector", and so on.
    """

    source: str
    output: Path
    tiles: int
    skipped: int
    seconds: dict[str, float]
    areas: tuple[ClassArea, ...]
    clipped: float
    files: dict[str, Path]


def load_model(
    name_or_path: str | Path,
    device: str = "auto",
    precision: Precision = "auto",
    *,
    offline: bool = False,
    manifest: str | Path | None = None,
) -> D2LSSegmenter:
    """A model by the name or alias of the manifest, from a weights file, or "owner/repo[@revision][:file]" on the hub.

    device: auto, cpu, cuda, cuda:1, mps. precision: auto, float32, bfloat16, float16; the type of the network's
    products. offline: do not use the network. manifest: models of your own, over the package's. Raises UsageError for
    an unknown name or device, HubError for a hub that fails, WeightsError for a damaged file.
    """
    weights = find_weights(name_or_path, offline=offline, manifest=manifest)
    return load_segmenter(weights, device=device, precision=precision)


def load_segmenter(weights: WeightsFile, *, device: str = "auto", precision: Precision = "auto") -> D2LSSegmenter:
    """The segmenter of a weights file that was found."""
    warn_of_terms(weights)
    network = load_network(weights.path, weights.description)
    return D2LSSegmenter(
        network,
        weights.description,
        name=weights.name,
        sha256=weights.sha256,
        reference=weights.reference,
        device=device,
        precision=precision,
    )


def default_output(source: str | Path, model: str, folder: Path | None = None) -> Path:
    """Where a map goes when nobody says: STEM_d2ls-MODEL.tif beside the scene, or in a folder."""
    home, stem = home_of(source)
    return (folder or home) / f"{stem}_d2ls-{model}.tif"


def parse_gsd(text: str | float) -> float | str:
    """ "0.3" -> 0.3, "auto" -> "auto". Raises UsageError for anything but a number of metres above 0."""
    if text == "auto":
        return "auto"
    try:
        metres = float(text)
    except ValueError:
        metres = 0.0
    if not 0 < metres < float("inf"):
        raise UsageError(f"a ground sampling distance is metres above 0, or auto for the model's; got {text!r}")
    return metres


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
    default beside the source. options: see `PredictOptions`; what else is made of the scene, in the same pass, is among
    them: `confidence=True`, `vector=".gpkg"`, `report="page.html"`. Memory depends on the raster's width, not on its
    height.

    Raises UsageError (also a ValueError) for what makes no sense, OutputExistsError, MissingFileError, and RasterError
    (also an OSError) where reading or writing fails. Whatever happens, no half-written output is left.
    """
    settings = PredictOptions(**options)
    weights = find_weights(model) if isinstance(model, str | Path) else None
    known: Any = model if weights is None else weights.description
    name = str(getattr(model, "name", type(model).__name__)) if weights is None else weights.name
    if output is None or Path(output).is_dir():
        output = default_output(source, name, Path(output) if output else None)
    output = Path(output)
    check_outputs(output, settings, source=str(source), overwrite=overwrite)
    with settings.open(source, bands=known.bands, value_range=getattr(known, "value_range", None)) as scene:
        view = settings.seen(scene, getattr(known, "gsd_m", None))
        grid = TileGrid(view.height, view.width, settings.tile_size, settings.overlap_px)
        classes = len(known.labels)
        check_outputs(output, settings, source=str(source), overwrite=overwrite, scene=scene, classes=classes)
        segmenter: Any = model if weights is None else load_segmenter(weights)
        segmenter = segmenter if settings.tta == "none" else AugmentedSegmenter(segmenter, settings.tta)
        warn_of_type(scene)
        warn_of_bands(scene, segmenter.bands, chosen=settings.bands is not None)
        warn_of_alpha(scene)
        if settings.gsd is None:
            warn_of_gsd(scene, getattr(segmenter, "gsd_m", None))
        with Outputs(
            output,
            settings,
            scene=scene,
            labels=segmenter.labels,
            name=name,
            tags=provenance(segmenter, name, scene, settings),
            grid=grid,
            bands=tuple(segmenter.bands),
            overwrite=overwrite,
        ) as outputs:
            return map_scene(segmenter, scene, view, grid, outputs, settings, progress)


def map_scene(
    segmenter: Segmenter,
    scene: Scene,
    view: Scene | ResampledScene,
    grid: TileGrid,
    outputs: Outputs,
    options: PredictOptions,
    progress: Progress | None,
) -> PredictResult:
    """The loop itself. view: the scene, as the segmenter sees it; grid: its tiles."""
    device = getattr(segmenter, "device", "cpu")
    watch = Stopwatch()
    scored = 0

    def score(batch: Tensor) -> Tensor:
        nonlocal scored
        scored += len(batch)
        with watch("score"):
            return segmenter.score(batch)

    blended = blend(
        score,
        outputs.seeing(counted(watch.each("read", view.tiles(grid)), len(grid), progress)),
        grid,
        channels=len(segmenter.labels),
        window=options.blend,
        batch_size=options.batch_size or (1 if str(device) == "cpu" else 8),
        device=device,
        disagreement=options.disagreement,
    )
    for rows in view.restored(blended):
        with watch("write"):
            outputs.add(Finished(rows))
    warn_of_clipping(scene)
    outputs.notes |= {"tiles": len(grid), "skipped": len(grid) - scored, "seconds": watch.total()}
    return PredictResult(
        source=scene.path,
        output=outputs.path,
        tiles=len(grid),
        skipped=len(grid) - scored,
        seconds={**watch.seconds, "total": watch.total()},
        areas=outputs.tally.result(),
        clipped=scene.clipped_share,
        files=outputs.files,
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


def provenance(segmenter: Segmenter, name: str, scene: Scene, options: PredictOptions) -> dict[str, str]:
    """The tags that say how a map was made."""
    settings: dict[str, Any] = {
        "tile_size": options.tile_size,
        "overlap_px": options.overlap_px,
        "blend": options.blend,
        "bands": dict(zip(segmenter.bands, scene.bands, strict=True)),
        "scale": str(options.scale) if options.scale else None,
        "precision": str(getattr(segmenter, "dtype", "")).removeprefix("torch."),
    }
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
    return {
        "D2LS_MODEL": name,
        "D2LS_WEIGHTS_SHA256": str(getattr(segmenter, "sha256", "")),
        **({"D2LS_WEIGHTS": reference} if (reference := str(getattr(segmenter, "reference", ""))) else {}),
        "D2LS_VERSION": __version__,
        "D2LS_OPTIONS": json.dumps(settings),
        "TIFFTAG_SOFTWARE": f"d2ls-infer {__version__}",
    }


def warn_of_type(scene: Scene) -> None:
    """Say it when values of a wider type are read on the model's own range, which is right only if they are on it."""
    if not scene.as_it_is and scene.value_range is not None and scene.scale is None and scene.band_units is None:
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
        if not chosen and contradicts(mark, name)
    ]
    if wrong:
        log.warning(
            "%s: %s. That is right for false-colour images; else say which is which by --bands",
            scene.path, "; ".join(wrong),
        )  # fmt: skip


def warn_of_alpha(scene: Scene) -> None:
    """Say it when a band that the file calls alpha is not taken as a mask."""
    if bands := scene.not_alpha:
        log.warning(
            "%s: band %s is marked alpha, but holds an image and not what is transparent; it masks nothing",
            scene.path, ", ".join(map(str, bands)),
        )  # fmt: skip


def warn_of_gsd(scene: Scene, gsd_m: float | None) -> None:
    """Say it when the scene's pixels are far from the size that the model was trained at."""
    if gsd_m is None or (areas := scene.row_areas_m2()) is None:
        return
    pixel_m = float(np.median(areas)) ** 0.5
    if not 1 / GSD_TOLERANCE <= pixel_m / gsd_m <= GSD_TOLERANCE:
        log.warning(
            "%s has pixels of %.3g m, the model was trained at %.3g m: objects look to it %.3g times too %s; "
            "--gsd auto reads the scene at the model's distance",
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
