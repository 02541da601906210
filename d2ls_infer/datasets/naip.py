"""NAIP land cover: USDA aerial images of 256 x 256 pixels, 0.6 m, four bands, six classes, labelled by yinx111."""

from __future__ import annotations

from d2ls_infer.datasets.base import BYTE, RGB, Dataset, Imagery
from d2ls_infer.datasets.layouts import Plain, SplitFolders
from d2ls_infer.datasets.masks import Codes
from d2ls_infer.labels import LabelMap

LABELS = LabelMap(
    ("background", "building", "road", "bare land", "forest", "water"),
    ((214, 217, 161), (227, 26, 28), (115, 115, 115), (196, 154, 108), (27, 120, 55), (31, 120, 180)),
)
BANDS = (*RGB, "near infrared")
IMAGERY = Imagery(BANDS, BYTE, Codes.indices(len(LABELS)))

NAIP = Dataset(
    name="naip",
    labels=LABELS,
    bands=BANDS,
    value_range=BYTE,
    gsd_m=0.6,
    splits=("train", "val", "test"),
    source="https://github.com/yinx111/U-Net-Semantic-Segmentation-on-Multispectral-RGB-NIR-Imagery",
    terms="imagery in the public domain (USDA NAIP); labels by yinx111, to be acknowledged",
    layouts=(SplitFolders(IMAGERY, images="img", masks="mask"), Plain(IMAGERY)),
)
