"""ISPRS Potsdam: 38 areas of 6000 x 6000 pixels, true orthophotos of 5 cm, six classes."""

from __future__ import annotations

from d2ls_infer.datasets import isprs
from d2ls_infer.datasets.base import BYTE, RGB, Dataset, Imagery
from d2ls_infer.datasets.layouts import Plain
from d2ls_infer.datasets.masks import Codes

TEST = ("2_13", "2_14", "3_13", "3_14", "4_13", "4_14", "4_15", "5_13", "5_14", "5_15", "6_13", "6_14", "6_15", "7_13")
VAL = ("2_10",)
TRAIN_COLUMNS = {
    2: (11, 12),
    3: (10, 11, 12),
    4: (10, 11, 12),
    5: (10, 11, 12),
    6: (7, 8, 9, 10, 11, 12),
    7: (7, 8, 9, 11, 12),
}
TRAIN = tuple(f"{row}_{column}" for row, columns in TRAIN_COLUMNS.items() for column in columns)
"""As in the papers (UNetFormer, https://arxiv.org/abs/2109.08937): 7_10 is left out, for its labels are wrong."""

LOSSY = ("4_12", "6_7")
"""The label files of 4_12 were stored with a loss (thousands of colours, none of them exact), and most cars of 6_7 are
(252, 255, 0). Every channel lies far from the middle of its range, so that nothing is left to doubt.
"""

POTSDAM = Dataset(
    name="potsdam",
    labels=isprs.LABELS,
    bands=RGB,
    value_range=BYTE,
    gsd_m=0.05,
    splits=("train", "val", "test"),
    left_out=(isprs.CLUTTER,),
    source=isprs.SOURCE,
    terms=isprs.TERMS,
    layouts=(
        isprs.Areas(
            pattern=r"top_potsdam_(?P<area>\d+_\d+)_(?P<kind>RGB|RGBIR|IRRG|label|label_noBoundary)\.tif",
            kinds=(
                ("rgb", Imagery(RGB, BYTE, isprs.COLORS)),
                ("rgbir", Imagery((*RGB, "near infrared"), BYTE, isprs.COLORS)),
                ("irrg", Imagery(("near infrared", "red", "green"), BYTE, isprs.COLORS)),
            ),
            split_areas=(("train", TRAIN), ("val", VAL), ("test", TEST)),
            expected=(
                "2_Ortho_RGB/top_potsdam_*_RGB.tif (or 4_Ortho_RGBIR, 3_Ortho_IRRG) with "
                "5_Labels_all/top_potsdam_*_label.tif and, eroded, *_label_noBoundary.tif"
            ),
            lossy=LOSSY,
        ),
        isprs.Patches(Imagery(RGB, BYTE, isprs.PATCH_CODES)),
        Plain(Imagery(RGB, BYTE, Codes.indices(len(isprs.LABELS)))),
    ),
)
