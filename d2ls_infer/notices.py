"""What a user should know of a scene before its map is trusted: said once, as warnings."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from d2ls_infer.raster import MOST_MAGNIFIED, Scene, canonical, contradicts, middle_values, numbered, unmarked_collar
from d2ls_infer.segmenter import seems_on

log = logging.getLogger(__name__)

GSD_TOLERANCE = 1.5
"""How many times larger or smaller than the model's a scene's pixels may be without a warning."""


def warn_before(scene: Scene, segmenter: Any, *, bands_chosen: bool, gsd: float | str | None) -> None:
    """All that can be said before the first tile. bands_chosen: whether the user has said which. gsd: as the option."""
    warn_of_type(scene)
    warn_of_bands(scene, segmenter.bands, chosen=bands_chosen)
    warn_of_alpha(scene)
    warn_of_collar(scene)
    warn_of_points(scene)
    if gsd != "auto":
        warn_of_gsd(scene, getattr(segmenter, "gsd_m", None), None if gsd is None else float(gsd))


def warn_of_type(scene: Scene) -> None:
    """Say it when values of a wider type are read on the model's own range, and do not look as if they were on it."""
    if not scene.as_it_is and scene.value_range is not None and scene.scale is None and scene.band_units is None:
        found, tagged = middle_values(scene), scene.tagged_units() is not None
        if found and seems_on(scene.value_range, *found) and not tagged:
            return
        log.warning(
            "%s holds %s values%s; they are taken on the model's range %g to %g as they are%s. "
            "If they are on another, give --scale MIN,MAX or --scale p2,p98",
            scene.path, scene.dtype, f", in its middle {found[0]:g} to {found[1]:g}" if found else "",
            *scene.value_range,
            ", without regard to its tags of scale and offset" if tagged else "",
        )  # fmt: skip


def warn_of_bands(scene: Scene, names: Sequence[str], *, chosen: bool) -> None:
    """Say it when nobody chose the bands, and the file has more than the model takes and marks none, or calls them by
    a sensor's numbers, or marks one as another colour than the model takes it for.
    """
    image = [mark for mark in scene.marks if mark != "alpha"]
    taken = ", ".join(f"band {band} as {name}" for band, name in zip(scene.bands, names, strict=True))
    if not chosen and len(image) > len(names) and not any(image):
        log.warning(
            "%s has %d bands and does not say what they show; taken is %s. If that is wrong, give --bands",
            scene.path, len(image), taken,
        )  # fmt: skip
        return
    called = [scene.descriptions[band - 1] for band in scene.bands]
    own = numbered([text for text, name in zip(called, names, strict=True) if canonical(text) != canonical(name)])
    if not chosen and own:
        log.warning(
            "%s calls its bands %s, which mean another thing with each sensor; taken is %s. If that is wrong, give "
            "--bands",
            scene.path, ", ".join(own), taken,
        )  # fmt: skip
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


def warn_of_collar(scene: Scene) -> None:
    """Say it when a corner is all black or all white, and nothing says that there is no image."""
    if (value := unmarked_collar(scene)) is not None:
        log.warning(
            "%s: a corner is all %d, and nothing marks that as empty; if it is a collar around the image, give "
            "--nodata %d, else it is mapped too",
            scene.path, value, value,
        )  # fmt: skip


def warn_of_points(scene: Scene) -> None:
    """Say it when a scene's place on the ground is known by control points or coefficients alone."""
    if scene.transform.is_identity and (scene.gcps[0] or scene.rpcs):
        log.warning(
            "%s is not on a map's grid, it has %s only: areas are in pixels; to have them on the ground, bring it onto "
            "a grid first (gdalwarp)",
            scene.path, "ground control points" if scene.gcps[0] else "rational polynomial coefficients",
        )  # fmt: skip


def warn_of_gsd(scene: Scene, gsd_m: float | None, read_m: float | None = None) -> None:
    """Say it when pixels are far from the size that the model was trained at; read_m: as which they are read."""
    if gsd_m is None or (areas := scene.row_areas_m2()) is None:
        return
    native_m = float(np.median(areas)) ** 0.5
    pixel_m = read_m or native_m
    ratio = max(pixel_m / gsd_m, gsd_m / pixel_m)
    if ratio > GSD_TOLERANCE:
        log.warning(
            "%s %s %.3g m, the model was trained at %.3g m: objects look to it %s times too %s; %s",
            scene.path, "is read at" if read_m else "has pixels of", pixel_m, gsd_m,
            f"{ratio:.0f}" if ratio >= 100 else f"{ratio:.3g}", "small" if pixel_m > gsd_m else "large",
            "--gsd auto reads the scene at the model's distance" if native_m <= MOST_MAGNIFIED * gsd_m
            else "what it knows cannot be seen at that distance",
        )  # fmt: skip


def warn_of_others(output: Path, others: Sequence[Path]) -> None:
    """Say it when files of an earlier map of the same name will lie beside the new one as if they were of it."""
    if others:
        log.warning(
            "%s: beside it stays what an earlier map of this name had and this run does not make: %s",
            output, ", ".join(path.name for path in others),
        )  # fmt: skip


def warn_of_clipping(scene: Scene) -> None:
    """Say it when much lay outside the range, other than by a stretch between percentiles, which clips by intent."""
    if scene.clipped_share > 0.05 and (scene.scale is None or scene.scale.kind == "values"):
        log.warning(
            "%s: %.0f %% of the values lie outside the range and were clipped; the map may mean little. "
            "Give --scale MIN,MAX or --scale p2,p98",
            scene.path, 100 * scene.clipped_share,
        )  # fmt: skip
