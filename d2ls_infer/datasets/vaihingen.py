"""ISPRS Vaihingen: 33 areas, true orthophotos of 9 cm in near infrared, red, green, six classes."""

from __future__ import annotations

from d2ls_infer.datasets import isprs
from d2ls_infer.datasets.base import BYTE, Dataset, Imagery
from d2ls_infer.datasets.layouts import Plain
from d2ls_infer.datasets.masks import Codes

BANDS = ("near infrared", "red", "green")
TEST = tuple(map(str, (2, 4, 6, 8, 10, 12, 14, 16, 20, 22, 24, 27, 29, 31, 33, 35, 38)))
VAL = ("30",)
TRAIN = tuple(map(str, (1, 3, 5, 7, 11, 13, 15, 17, 21, 23, 26, 28, 32, 34, 37)))
"""As in the papers (UNetFormer, https://arxiv.org/abs/2109.08937)."""

VAIHINGEN = Dataset(
    name="vaihingen",
    labels=isprs.LABELS,
    bands=BANDS,
    value_range=BYTE,
    gsd_m=0.09,
    splits=("train", "val", "test"),
    left_out=(isprs.CLUTTER,),
    source=isprs.SOURCE,
    terms=isprs.TERMS,
    layouts=(
        isprs.Areas(
            pattern=r"top_mosaic_09cm_area(?P<area>\d+)(_(?P<kind>noBoundary))?\.tif",
            kinds=(("", Imagery(BANDS, BYTE, isprs.COLORS)),),
            split_areas=(("train", TRAIN), ("val", VAL), ("test", TEST)),
            expected=(
                "top/top_mosaic_09cm_area*.tif with files of the same names in gts_for_participants/ or "
                "ISPRS_semantic_labeling_Vaihingen_ground_truth_COMPLETE/ and, eroded, *_noBoundary.tif"
            ),
            image_folders=("top", "train_images", "val_images", "test_images", "images"),
        ),
        isprs.Patches(Imagery(BANDS, BYTE, isprs.PATCH_CODES)),
        Plain(
            Imagery(BANDS, BYTE, Codes.indices(len(isprs.LABELS))),
            rules=(("train", "tile[AC]"), ("val", "tileD"), ("test", "(?!tile[ACD]$).*")),
        ),
    ),
)
