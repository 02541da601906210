"""Which files are made of a scene, and how they are called."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from d2ls_infer.errors import UsageError
from d2ls_infer.store import address_of, is_address, named

RASTERS = ("confidence", "probabilities", "entropy", "disagreement")
"""The maps besides the one of classes."""

NAMED = {"vector": (".gpkg", ".fgb", ".parquet"), "report": (".html",), "preview": (".png",)}
"""Outputs that are given a file, and the endings it may have."""

TAILS = {"vector": "polygons"}
"""What is hung on to the map's name where it is not the output's own name."""


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """What is made of a scene besides the map of classes, in the same pass. Raises UsageError for what makes no sense.

    confidence, probabilities, entropy, disagreement: uint8 rasters beside the map, see `Finished`. cog: all rasters as
    Cloud Optimized GeoTIFFs with overviews. vrt: all rasters in pieces, as the workers of a cluster write them, under a
    VRT each. vector: polygons; min_area_m2, simplify_m: see `PolygonWriter`. report: a
    page to read and to send. preview: a small picture of the map. stac: a STAC item that lists all files.

    vector, report and preview are files; or endings, such as ".gpkg", for a file beside the map with its name. Beside a
    map on an object store they are endings: what is made of a scene lies in one place.
    """

    confidence: bool = False
    probabilities: bool = False
    entropy: bool = False
    disagreement: bool = False
    cog: bool = False
    vrt: bool = False
    vector: str | Path | None = None
    min_area_m2: float | None = None
    simplify_m: float | None = None
    report: str | Path | None = None
    preview: str | Path | None = None
    stac: bool = False

    def __post_init__(self) -> None:
        if self.cog and self.vrt:
            raise UsageError("--cog makes whole files of the rasters, --vrt leaves them in pieces; give one of them")
        for name, endings in NAMED.items():
            value = getattr(self, name)
            if value is not None and ending_of(value) not in endings:
                raise UsageError(f"--{name} takes a file that ends in {' or '.join(endings)}, got {str(value)!r}")
        for name, option in (("min_area_m2", "--min-area"), ("simplify_m", "--simplify")):
            value = getattr(self, name)
            if value is None:
                continue
            if self.vector is None:
                raise UsageError(f"{option} is for polygons; give --vector too")
            if not (math.isfinite(value) and value > 0):
                raise UsageError(f"{option} must be more than 0, got {value:g}")

    def layers(self, classes: int) -> int:
        """How many bands all rasters have together."""
        return 1 + sum(classes if name == "probabilities" else 1 for name in RASTERS if getattr(self, name))

    def named(self, output: Path) -> Path:
        """The name of a map, which ends in .vrt where it is one."""
        return output.with_suffix(".vrt") if self.vrt and output.suffix.lower() in (".tif", ".tiff") else output

    def of_piece(self) -> Self:
        """For one of the pieces that a VRT shows: whole rasters, and nothing else."""
        return replace(
            self, vrt=False, vector=None, min_area_m2=None, simplify_m=None, report=None, preview=None, stac=False
        )

    def files(self, output: Path) -> dict[str, Path]:
        """Every file that is asked for, by what it holds; `classes` is the map itself. Raises UsageError for clashes.

        What lies beside a raster of itself, `.aux.xml` and `.qml`, is not among them.
        """
        if self.vrt and address_of(output):
            raise UsageError("--vrt leaves pieces where all workers see them as files, not on an object store")
        files = {"classes": output}
        files |= {name: beside(output, name, ".vrt" if self.vrt else ".tif") for name in RASTERS if getattr(self, name)}
        for name in NAMED:
            if (value := getattr(self, name)) is not None:
                has_name = Path(value).suffix != ""
                if is_address(value) or (has_name and address_of(output)):
                    ending = ending_of(value)
                    raise UsageError(
                        f"on an object store --{name} lies beside its map: give {ending} alone, not {value}"
                    )
                files[name] = Path(value) if has_name else beside(output, TAILS.get(name, name), str(value))
        if self.stac:
            files["stac"] = beside(output, "stac", ".json")
        places = [path.resolve() for path in files.values()]
        if twice := {
            str(named(path)) for path, place in zip(files.values(), places, strict=True) if places.count(place) > 1
        }:
            raise UsageError(f"several outputs would be written to {', '.join(sorted(twice))}")
        return files

    def others(self, output: Path) -> list[Path]:
        """What lies beside a map by the name of an output that is not asked for: of an earlier map of its name."""
        names = [(name, ending) for name in RASTERS for ending in (".tif", ".vrt")] + [("stac", ".json")]
        names += [(TAILS.get(name, name), ending) for name, endings in NAMED.items() for ending in endings]
        asked = self.files(output).values()
        paths = [path for path in (beside(output, *name) for name in names) if path not in asked]
        return [path for path in paths if os.path.exists(path)]  # noqa: PTH110 - False too for a name that is too long


def ending_of(value: str | Path) -> str:
    """The ending of a file, or of what is nothing but an ending; in small letters. Of what is neither, none."""
    if not isinstance(value, str | os.PathLike):
        return ""
    path = Path(value)
    if path.suffix == "" and str(value) == path.name and path.name.startswith("."):
        return path.name.lower()
    return path.suffix.lower()


def beside(output: Path, tail: str, ending: str) -> Path:
    """SCENE_d2ls-MODEL.tif -> SCENE_d2ls-MODEL_TAIL.ENDING."""
    return output.with_name(f"{output.stem}_{tail}{ending}")
