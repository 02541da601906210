"""D2LS for remote sensing images: from a scene to a georeferenced class map.

`load_model(name)` gives a segmenter, `predict_raster(model, scene)` writes a map. Importing this package loads neither
torch nor GDAL; they come with the first of these names that is used.
"""

import os
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from d2ls_infer.api import predict_dataarray, predict_many, predict_raster
    from d2ls_infer.batch import FailedScene
    from d2ls_infer.nn import D2LS
    from d2ls_infer.outputs import ClassArea
    from d2ls_infer.predict import PredictResult, load_model
    from d2ls_infer.segmenter import D2LSSegmenter, Segmenter

# Torch's own switch for large pages, which it looks at with its first tensor: a third of the time of a tile on a CPU
# goes into pages of 4 KB that are mapped anew for each tensor. "0" in the environment leaves it off.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

__version__ = version("d2ls-infer")

__all__ = [
    "D2LS",
    "ClassArea",
    "D2LSSegmenter",
    "FailedScene",
    "PredictResult",
    "Segmenter",
    "__version__",
    "load_model",
    "predict_dataarray",
    "predict_many",
    "predict_raster",
]


def __getattr__(name: str) -> Any:
    if name in ("D2LSSegmenter", "Segmenter"):
        from d2ls_infer import segmenter as home
    elif name in ("predict_dataarray", "predict_many", "predict_raster"):
        from d2ls_infer import api as home  # type: ignore[no-redef]
    elif name == "FailedScene":
        from d2ls_infer import batch as home  # type: ignore[no-redef]
    elif name == "D2LS":
        from d2ls_infer import nn as home  # type: ignore[no-redef]
    elif name in __all__:
        from d2ls_infer import predict as home  # type: ignore[no-redef]
    else:
        raise AttributeError(f"module 'd2ls_infer' has no attribute {name!r}")
    return getattr(home, name)
