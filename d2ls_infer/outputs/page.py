"""The report of a map: one page that needs nothing outside itself."""

from __future__ import annotations

import base64
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from d2ls_infer.labels import LabelMap, format_color
from d2ls_infer.outputs.areas import ClassArea, ConfidenceTally, area_unit
from d2ls_infer.outputs.pictures import in_colors
from d2ls_infer.outputs.stac import TITLES
from d2ls_infer.raster import Scene, jpeg_bytes, png_bytes
from d2ls_infer.raster.footprint import crs_name, footprint

LIBRARIES = ("torch", "timm", "rasterio", "numpy")


@dataclass(frozen=True, kw_only=True)
class Page:
    """What a report shows. picture: (3, h, w) of the scene; classes: (h, w) of the map, made smaller."""

    scene: Scene
    labels: LabelMap
    areas: Sequence[ClassArea]
    confidence: ConfidenceTally
    picture: np.ndarray
    classes: np.ndarray
    files: Mapping[str, Path]
    tags: Mapping[str, str]
    notes: Mapping[str, Any]

    def render(self) -> str:
        """The page as HTML: no file, script or address outside itself."""
        from jinja2 import Environment, PackageLoader, StrictUndefined  # 0.15 s, in every process

        environment = Environment(
            loader=PackageLoader("d2ls_infer"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        unit, size_m2 = area_unit(self.areas)
        known = all(area.area_m2 is not None for area in self.areas)
        return environment.get_template("map.html").render(
            title=Path(self.scene.path).name,
            model=self.tags["D2LS_MODEL"],
            version=self.tags["D2LS_VERSION"],
            made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            image="data:image/jpeg;base64," + encoded(jpeg_bytes(self.picture)),
            map="data:image/png;base64," + encoded(png_bytes(in_colors(self.classes, self.labels))),
            height=self.scene.height,
            width=self.scene.width,
            colors=[format_color(color) for color in self.labels.colors],
            areas=self.areas,
            unit=unit,
            size_m2=size_m2,
            known=known,
            total_m2=sum(area.area_m2 or 0 for area in self.areas),
            pixels=sum(area.pixels for area in self.areas),
            histogram=self.confidence.histogram(),
            mean=self.confidence.mean(),
            facts=self.facts(),
            settings=self.settings(),
            files=[(TITLES.get(name, name), path.name) for name, path in self.files.items()],
        )

    def facts(self) -> list[tuple[str, str]]:
        """What is said of the scene, the model and the run."""
        size_m, place = self.scene.pixel_size_m(), footprint(self.scene)
        facts = [("Scene", self.scene.path), ("Size", f"{self.scene.width:,} x {self.scene.height:,} pixels")]
        facts += [("Pixels", f"{size_m[1]:.3g} m x {size_m[0]:.3g} m on the ground")] if size_m else []
        facts += [("Coordinate system", crs_name(self.scene))]
        if place:
            west, south, east, north = place.bbox
            sides = [(south, "SN"), (north, "SN"), (west, "WE"), (east, "WE")]
            facts += [("Place", "{} to {}, {} to {}".format(*(degrees(*side) for side in sides)))]
        facts += [("Model", self.tags["D2LS_MODEL"]), ("Weights", f"sha256 {self.tags['D2LS_WEIGHTS_SHA256'] or '-'}")]
        if "tiles" in self.notes:
            facts += [("Tiles", f"{self.notes['tiles']}, of which {self.notes['skipped']} without valid pixels")]
            facts += [("Time", f"{self.notes['seconds']:.1f} s")]
        libraries = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES)
        return [*facts, ("Software", f"d2ls-infer {self.tags['D2LS_VERSION']}; {libraries}")]

    def settings(self) -> list[tuple[str, str]]:
        """The options that made the map, as its tags have them."""
        options = json.loads(self.tags["D2LS_OPTIONS"])
        return [(name.replace("_", " "), told(value)) for name, value in options.items() if value not in (None, "")]


def degrees(value: float, sides: str) -> str:
    """A latitude ("SN") or longitude ("WE") as it stands on a map."""
    return f"{abs(value):.4f}° {sides[value >= 0]}"


def told(value: Any) -> str:
    """An option's value as a line."""
    if isinstance(value, dict):
        return ", ".join(f"{key}: {told(each)}" for key, each in value.items())
    if isinstance(value, list):
        return ", ".join(map(told, value))
    return str(value)


def encoded(data: bytes) -> str:
    """Bytes as an address can hold them."""
    return base64.b64encode(data).decode()
