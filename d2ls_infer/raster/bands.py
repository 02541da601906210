"""Which bands of a raster are the model's, and which is a mask."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from rasterio.enums import ColorInterp
from rasterio.windows import Window

from d2ls_infer.errors import UsageError

SYNONYMS = {
    "r": "red",
    "g": "green",
    "b": "blue",
    "nir": "near infrared",
    "near ir": "near infrared",
    "swir": "shortwave infrared",
    "swir 1": "shortwave infrared 1",
    "swir 2": "shortwave infrared 2",
    "mwir": "middle wave infrared",
    "lwir": "long wave infrared",
    "tir": "thermal infrared",
    "tir 1": "thermal infrared 1",
    "tir 2": "thermal infrared 2",
    "pan": "panchromatic",
}
"""Other names of bands. Numbers as in B04 are no names: they mean another band with each sensor."""

NUMBERED = r"(SR_|ST_)?B\d{1,2}A?|\d{3,5} ?nm"
"""What sensors call their bands, by a number or a wavelength: they show other things with each sensor."""


def squeezed(name: str) -> str:
    """A name without what people write differently: capitals, blanks, dashes."""
    return re.sub(r"[\W_]", "", name.lower())


def numbered(names: Sequence[str]) -> list[str]:
    """Those of the names that are a sensor's own, such as B04, and do not tell what a band shows."""
    return [name for name in names if re.fullmatch(NUMBERED, name.strip(), re.IGNORECASE)]


CANONICAL = {squeezed(other): squeezed(name) for other, name in SYNONYMS.items()}
COLOURS = set(CANONICAL.values()) | {"coastal", "yellow", "rededge"}
"""What a band may be said to show, squeezed."""

SAMPLE_SIDE, SAMPLES = 128, 3
"""An alpha band is looked at in so many pieces of that side along each axis."""


def canonical(name: str) -> str:
    """A band's name in the form in which names are compared: "NIR", "near-infrared", "Near Infrared" are one.

    Those of colours also with "band" and anything in brackets: "Blue (490 nm)", "Red_band".
    """
    whole, bare = (squeezed(text) for text in (name, re.sub(r"\(.*?\)|\bband\b", "", name.lower().replace("_", " "))))
    known = CANONICAL.get(bare, bare)
    return known if known in COLOURS else CANONICAL.get(whole, whole)


def parse_bands(text: str) -> list[int | str]:
    """ "4,1,2" -> [4, 1, 2], "nir,red,green" -> those names. Raises UsageError for anything else."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() or re.match(r"[^\W\d_]", part) for part in parts):
        raise UsageError(
            f"bands are whole numbers from 1 or names, with commas between, as 4,1,2 or nir,red,green; got {text!r}"
        )
    bands = [int(part) if part.isdecimal() else part for part in parts]
    if 0 in bands:
        raise UsageError(f"bands are counted from 1, got {text!r}")
    return bands


def choose_bands(
    dataset: Any,
    needed: int,
    marks: Sequence[str],
    *,
    wanted: Sequence[int | str] | None = None,
    names: Sequence[str] | None = None,
) -> list[int]:
    """The bands to read, counted from 1, for a model of `needed` bands, called `names`. marks: see `band_marks`.

    `wanted` bands are taken by number, or by description or colour. Without them, the bands that the file describes or
    colours as the model's, if it does so for each of them; else the first ones that are no alpha band.

    Raises UsageError for a number of bands the model does not take, a band that the file does not have, and where it
    is for the user to say: two bands go by one name, or the file has bands to choose from, marks some of them as the
    model's in another order than it has them, and others not at all.
    """
    what = f"{dataset.name} has {dataset.count} band" + ("s" if dataset.count != 1 else "")
    if wanted is not None:
        if len(wanted) != needed:
            raise UsageError(f"the model takes {needed} bands, but --bands names {len(wanted)}")
        return [find_band(dataset, marks, band, what) for band in wanted]
    data = [band for band in dataset.indexes if marks[band - 1] != "alpha"]
    in_order = data[:needed]
    if len(in_order) < needed:
        hint = " (a palette; expand it to RGB first)" if ColorInterp.palette in dataset.colorinterp else ""
        if len(data) < dataset.count:
            hint = " (one of them alpha, a mask"
            hint += f"; --bands {','.join(map(str, dataset.indexes))} takes it too)" if dataset.count == needed else ")"
        raise UsageError(f"{what}{hint}, but the model needs {needed}")
    known = [bands_marked(marks, name) for name in names or ()]
    if known and all(len(bands) == 1 for bands in known):
        return [band for (band,) in known]
    twice = [(name, bands) for name, bands in zip(names or (), known, strict=True) if len(bands) > 1]
    out_of_order = any(bands and band not in bands for bands, band in zip(known, in_order, strict=False))
    if twice or (out_of_order and len(data) > needed):
        told = ", ".join(f"{band} {marks[band - 1] or 'unmarked'}" for band in dataset.indexes)
        raise UsageError(
            f"which bands of {dataset.name} are the model's {', '.join(names or ())}? It has {told}; "
            f"say it by --bands, such as {','.join(map(str, in_order))} for the first ones in the file's order"
        )
    return in_order


def contradicts(mark: str, name: str) -> bool:
    """Whether a band's mark and the name it is taken by cannot both be right."""
    known = COLOURS | {"alpha"}
    return {canonical(mark), canonical(name)} <= known and canonical(mark) != canonical(name)


def find_band(dataset: Any, marks: Sequence[str], band: int | str, what: str) -> int:
    """The number of a band that was asked for by number or name."""
    if not isinstance(band, str):
        if not 1 <= band <= dataset.count:
            raise UsageError(f"{what}, there is no band {band}; bands are counted from 1")
        return band
    described = [squeezed(text or "") for text in dataset.descriptions]
    found = bands_marked(marks, band) or [n for n in dataset.indexes if described[n - 1] == squeezed(band)]
    if len(found) != 1:
        told = ", ".join(
            f"{number} {mark or text or 'unmarked'}"
            for number, mark, text in zip(dataset.indexes, marks, dataset.descriptions, strict=True)
        )
        count = f"{len(found)} of them are" if found else "none of them is"
        raise UsageError(f"{what}, and {count} {band!r}: {told}; give its number in --bands")
    return found[0]


def bands_marked(marks: Sequence[str], name: str) -> list[int]:
    """The bands, from 1, that go by a name; of several, those that are called just so, if there are any."""
    bands = [band for band, mark in enumerate(marks, 1) if mark and canonical(mark) == canonical(name)]
    return [band for band in bands if squeezed(marks[band - 1]) == squeezed(name)] or bands


def band_marks(dataset: Any, names: Sequence[str]) -> list[str]:
    """What the file says that each of its bands shows: a model's band of those `names`, a colour, alpha, or "".

    A description goes before the colour interpretation, which many programs set without thinking. An alpha band that
    holds an image is not one.
    """
    terms = COLOURS | {canonical(name) for name in names}
    marks = []
    for band in dataset.indexes:
        described, colour = dataset.descriptions[band - 1] or "", dataset.colorinterp[band - 1]
        if canonical(described) in terms or canonical(described) == "alpha":
            marks.append(described.lower())
        elif colour == ColorInterp.alpha:
            marks.append("" if holds_image(dataset, band) else "alpha")
        else:
            marks.append(colour.name if canonical(colour.name) in terms else "")
    return marks


def holds_image(dataset: Any, band: int) -> bool:
    """Whether a band that is tagged as alpha shows the ground: of its values above 0, none is that of every second.

    GDAL tags the fourth band of any 8-bit file as alpha unless told otherwise, near infrared as well. Of an alpha band
    most of what is not transparent is opaque. Looked at is an overview, or nine small pieces of the raster.
    """
    if dataset.overviews(band):
        shape = tuple(min(side, SAMPLES * SAMPLE_SIDE) for side in dataset.shape)
        return has_many_values(dataset.read(band, out_shape=shape))
    height, width = (min(side, SAMPLE_SIDE) for side in dataset.shape)
    values = np.concatenate(
        [
            dataset.read(band, window=Window(col, row, width, height)).ravel()
            for row in sorted(set(np.linspace(0, dataset.height - height, SAMPLES, dtype=int).tolist()))
            for col in sorted(set(np.linspace(0, dataset.width - width, SAMPLES, dtype=int).tolist()))
        ]
    )
    return has_many_values(values)


def has_many_values(values: np.ndarray) -> bool:
    """Whether no value is that of half of those above 0."""
    _, counts = np.unique(values[values > 0], return_counts=True)
    return bool(counts.size) and bool(counts.max() < counts.sum() / 2)
