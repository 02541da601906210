"""A STAC item of a map: where it lies, what its values mean, and which files belong to it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from d2ls_infer.labels import NODATA, LabelMap
from d2ls_infer.outputs.finished import STEPS
from d2ls_infer.raster import Scene
from d2ls_infer.raster.footprint import describe_crs, footprint
from d2ls_infer.store import address_of

EXTENSIONS = (
    "https://stac-extensions.github.io/projection/v2.0.0/schema.json",
    "https://stac-extensions.github.io/classification/v2.0.0/schema.json",
    "https://stac-extensions.github.io/raster/v2.0.0/schema.json",
    "https://stac-extensions.github.io/processing/v1.2.0/schema.json",
)

GEOTIFF = "image/tiff; application=geotiff"
TYPES = {
    ".gpkg": "application/geopackage+sqlite3",
    ".fgb": "application/vnd.flatgeobuf",
    ".parquet": "application/vnd.apache.parquet",
    ".html": "text/html",
    ".png": "image/png",
    ".vrt": "application/xml",
    ".xml": "application/xml",
    ".qml": "application/xml",
}
ROLES = {"preview": ["overview"], "report": ["metadata"], "style": ["style"], "sidecar": ["metadata"]}
TITLES = {
    "classes": "Map of classes",
    "confidence": "Probability of the class that was chosen",
    "probabilities": "Probability of each class",
    "entropy": "Entropy of the probabilities, as a share of the highest possible",
    "disagreement": "Largest difference between overlapping tiles in the probability of a class",
    "vector": "Polygons of the classes",
    "report": "Report",
    "preview": "Preview",
    "style": "QGIS style",
    "sidecar": "Class names and attribute table for GDAL",
}


def stac_item(
    files: Mapping[str, Path],
    *,
    scene: Scene,
    labels: LabelMap,
    tags: Mapping[str, str],
    cog: bool,
) -> dict[str, Any]:
    """A STAC 1.1 item of the written files, which lie beside it or are told by their way from it.

    Its geometry is null where the scene has no place on the ground. `datetime` is when the map was made: files seldom
    say when a scene was taken, and a wrong word would be worse; put it right where it is known.
    """
    home = files["stac"].parent
    made = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    place = footprint(scene)
    item: dict[str, Any] = {
        "type": "Feature",
        "stac_version": "1.1.0",
        "stac_extensions": list(EXTENSIONS),
        "id": files["classes"].stem,
        "geometry": place.geometry if place else None,
    }
    if place:
        item["bbox"] = list(place.bbox)
    item["properties"] = {
        "title": f"Class map of {Path(scene.path).name} by {tags['D2LS_MODEL']}",
        "datetime": made,
        "created": made,
        **describe_crs(scene),
        "processing:software": {"d2ls-infer": tags["D2LS_VERSION"]},
        "d2ls:model": tags["D2LS_MODEL"],
        "d2ls:weights_sha256": tags["D2LS_WEIGHTS_SHA256"],
        "d2ls:options": json.loads(tags["D2LS_OPTIONS"]),
    }
    source = scene.path if "://" in scene.path or scene.path.startswith("/vsi") else link(Path(scene.path), home)
    item["links"] = [{"rel": "derived_from", "href": source, "title": Path(scene.path).name}]
    item["assets"] = {name: asset(name, path, home, labels, cog=cog) for name, path in files.items() if name != "stac"}
    return item


def asset(name: str, path: Path, home: Path, labels: LabelMap, *, cog: bool) -> dict[str, Any]:
    """One file."""
    kind = TYPES.get(path.suffix.lower(), GEOTIFF + "; profile=cloud-optimized" * cog)
    about: dict[str, Any] = {
        "href": link(path, home),
        "title": TITLES[name],
        "type": kind,
        "roles": ROLES.get(name, ["data"]),
    }
    if kind.startswith("image/tiff") or path.suffix.lower() == ".vrt":
        bands = labels.names if name == "probabilities" else [name.removesuffix("es") if name == "classes" else name]
        scale = {} if name == "classes" else {"raster:scale": 1 / STEPS}
        about["bands"] = [{"name": band, "data_type": "uint8", "nodata": NODATA, **scale} for band in bands]
    if name == "classes":
        about["classification:classes"] = [
            {
                "value": value,
                "name": plain(label["name"], value),
                "title": label["name"],
                "description": label["name"],
                "color_hint": label["color"][1:].upper(),
            }
            for value, label in enumerate(labels.to_list())
        ] + [{"value": NODATA, "name": "nodata", "title": "no data", "description": "no data", "nodata": True}]
    return about


def plain(name: str, value: int) -> str:
    """A class's name in the letters that the extension allows."""
    return re.sub(r"[^0-9A-Za-z-]+", "_", name).strip("_") or f"class_{value}"


def link(path: Path, home: Path) -> str:
    """The way to a file from the item's folder; the whole way on another drive, and from an object store."""
    if address_of(home) and not address_of(path):
        return path.resolve().as_uri()
    try:
        way = Path(os.path.relpath(path, home)).as_posix()
    except ValueError:
        return path.resolve().as_uri()
    return way if way.startswith(".") else f"./{way}"
