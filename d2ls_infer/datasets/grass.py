"""Grass: Gaofen images of 256 x 256 pixels, 8 m, five degrees of grass cover (KTDA, https://arxiv.org/abs/2412.06664)."""

from __future__ import annotations

from d2ls_infer.datasets.base import BYTE, RGB, Dataset, Imagery
from d2ls_infer.datasets.layouts import AnnFolders, Plain
from d2ls_infer.datasets.masks import Codes
from d2ls_infer.labels import LabelMap

LABELS = LabelMap(
    ("low", "medium-low", "medium", "medium-high", "high"),
    ((185, 101, 71), (248, 202, 155), (211, 232, 158), (138, 191, 104), (92, 144, 77)),
)
IMAGERY = Imagery(RGB, BYTE, Codes.indices(len(LABELS)))

GRASS = Dataset(
    name="grass",
    labels=LABELS,
    bands=RGB,
    value_range=BYTE,
    gsd_m=8.0,
    splits=("train", "val"),
    source="https://huggingface.co/datasets/XavierJiezou/ktda-datasets",
    terms="as stated on that page",
    layouts=(AnnFolders(IMAGERY), Plain(IMAGERY)),
)
