"""How a scene is mapped: every option of `predict_raster`, checked once."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from d2ls_infer.context import parse_dictionary
from d2ls_infer.errors import UsageError
from d2ls_infer.memory import parse_bytes
from d2ls_infer.outputs import OutputOptions
from d2ls_infer.raster import Cut, ResampledScene, Scale, Scene, parse_bands, parse_nodata, parse_scale
from d2ls_infer.segmenter import TTA, tiles_of
from d2ls_infer.tiling import WINDOWS, TileGrid

GSD_ROUNDING = 0.05
"""Pixels that are so little larger or smaller than asked for are left as they are: to resample them would only blur."""


@dataclass(frozen=True, kw_only=True)
class PredictOptions(OutputOptions):
    """How a scene is mapped, and into what (see `OutputOptions`). Raises UsageError for values that make no sense.

    tile_size: side of a tile in pixels; by default what the model is best mapped by. overlap: pixels (a whole number)
    or a share of the tile (below 1, or "25%"). blend: hann, gaussian, linear, or none (the centres of the tiles, cut).
    dictionary: whose class embeddings tiles are scored by: those of the "scene", seen in a few crops of it, each
    "tile"'s own, or "auto": the scene's, if the model was trained for that. batch_size: tiles scored at once; by
    default 1 on a CPU and 8 elsewhere, "auto" tries what is fastest. bands: the scene's bands for the model's, as
    numbers from 1 or names, "4,1,2" or "nir,red,green"; by default those that the file marks as the model's, else the
    first ones that are not alpha. scale: raw values or percentiles that become the model's value range, "0,10000" or
    "p2,p98"; by default values are taken as they are. nodata: a value in place of the file's own, or "none": all finite
    values are valid.

    window, bbox with bbox_crs, or aoi: the part of the scene to map, see `Cut`. gsd: the ground sampling distance to
    read the scene at, metres or "auto" for the model's; the map is on the scene's own grid all the same. tta: test-time
    augmentation, see `TTA`. max_memory: bytes that the process may take, "2G": fewer tiles are scored at once, and what
    does not fit is refused.
    """

    tile_size: int | None = None
    overlap: int | float | str = 0.25
    blend: str = "hann"
    dictionary: str = "auto"
    batch_size: int | str | None = None
    bands: Sequence[int | str] | str | None = None
    scale: Scale | str | None = None
    nodata: float | str | None = None
    window: Sequence[int] | str | None = None
    bbox: Sequence[float] | str | None = None
    bbox_crs: str | None = None
    aoi: str | Path | None = None
    gsd: float | str | None = None
    tta: str = "none"
    max_memory: int | str | None = None
    cut: Cut = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size is not None:
            object.__setattr__(self, "batch_size", parse_batch_size(self.batch_size))
        self.grid(1, 1, None)
        if self.tile_size is not None:
            object.__setattr__(self, "tile_size", operator.index(self.tile_size))
        if self.blend not in WINDOWS:
            raise UsageError(f"unknown blending window {self.blend!r}; known are {', '.join(WINDOWS)}")
        parse_dictionary(self.dictionary)
        if isinstance(self.bands, str):
            object.__setattr__(self, "bands", tuple(parse_bands(self.bands)))
        elif self.bands is not None:
            bands = (band if isinstance(band, str) else operator.index(band) for band in self.bands)
            object.__setattr__(self, "bands", tuple(bands))
        if isinstance(self.scale, tuple | list):
            object.__setattr__(self, "scale", parse_scale(",".join(map(str, self.scale))))
        elif not isinstance(self.scale, Scale | None):
            object.__setattr__(self, "scale", parse_scale(str(self.scale)))
        if self.nodata is not None:
            object.__setattr__(self, "nodata", parse_nodata(self.nodata))
        if self.gsd is not None:
            object.__setattr__(self, "gsd", parse_gsd(self.gsd))
        if self.max_memory is not None:
            object.__setattr__(self, "max_memory", parse_bytes(self.max_memory))
            if self.simplify_m is not None:
                raise UsageError("--simplify holds all outlines of the scene in memory; leave out it or --max-memory")
        if self.tta not in TTA:
            raise UsageError(f"unknown test-time augmentation {self.tta!r}; known are {', '.join(TTA)}")
        object.__setattr__(self, "cut", Cut.of(self.window, self.bbox, self.bbox_crs, self.aoi))

    def grid(self, height: int, width: int, about: Any) -> TileGrid:
        """The tiles of a scene for a segmenter, or its description."""
        return tiles_of(about, height, width, self.tile_size, self.overlap)

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


def parse_batch_size(value: int | str) -> int | str:
    """A whole number from 1, also as text, or "auto". Raises UsageError for anything else."""
    if value == "auto":
        return "auto"
    try:
        size = int(value) if isinstance(value, str) else operator.index(value)
    except ValueError:
        size = 0
    if size < 1:
        raise UsageError(f"batch size must be at least 1, or auto for what is fastest; got {value!r}")
    return size


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
