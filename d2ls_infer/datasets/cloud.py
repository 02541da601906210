"""Cloud: the 96 Landsat 8 scenes of the USGS Biome set (doi 10.5066/F7251GDH), 30 m, four classes of sky."""

from __future__ import annotations

from d2ls_infer.datasets.base import BYTE, RGB, Dataset, Imagery
from d2ls_infer.datasets.layouts import AnnFolders, Plain
from d2ls_infer.datasets.masks import IGNORED, Codes
from d2ls_infer.labels import LabelMap

LABELS = LabelMap(
    ("cloud shadow", "clear", "thin cloud", "thick cloud"),
    ((85, 85, 85), (0, 0, 0), (170, 170, 170), (255, 255, 255)),
)
BANDS = (
    "blue",
    "green",
    "red",
    "near infrared",
    "shortwave infrared 1",
    "shortwave infrared 2",
    "cirrus",
    "thermal infrared",
)
"""In the order of Landsat 8's bands 2 to 7, 9 and 10, as the files show it: water is brightest in the first band, soils
grow brighter over the first three.
"""
REFLECTANCE = (0.0, 10_000.0)
"""uint16: reflectance at the top of the atmosphere x 10000; the thermal band holds kelvin x 10 on the same range."""
KTDA_CODES = Codes.of({0: 1, 1: 0, 2: 2, 3: 3, IGNORED: IGNORED})
"""KTDA counts clear, cloud shadow, thin cloud, thick cloud."""

CLOUD = Dataset(
    name="cloud",
    labels=LABELS,
    bands=BANDS,
    value_range=REFLECTANCE,
    gsd_m=30.0,
    splits=("train", "val", "test"),
    source="https://huggingface.co/datasets/XavierJiezou/ktda-datasets",
    terms="USGS scenes and masks are in the public domain; KTDA's patches of them as stated on that page",
    layouts=(
        AnnFolders(Imagery(RGB, BYTE, KTDA_CODES)),
        Plain(Imagery(BANDS, REFLECTANCE, Codes.indices(len(LABELS)))),
    ),
)
