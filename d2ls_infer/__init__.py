"""D2LS for remote sensing images: from a scene to a georeferenced class map.

`load_model(name)` gives a segmenter, `predict_raster(model, scene)` writes a map. Importing this package loads neither
torch nor GDAL; they come with the first of these names that is used.
"""

import os
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from d2ls_infer.api import predict_dataarray, predict_many, predict_raster
    from d2ls_infer.batch import FailedScene
    from d2ls_infer.job import PredictResult
    from d2ls_infer.load import load_model
    from d2ls_infer.nn import D2LS
    from d2ls_infer.options import PredictOptions
    from d2ls_infer.outputs import ClassArea
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
    "PredictOptions",
    "PredictResult",
    "Segmenter",
    "__version__",
    "load_model",
    "predict_dataarray",
    "predict_many",
    "predict_raster",
]


HOMES = {
    "D2LS": "nn",
    "ClassArea": "outputs",
    "D2LSSegmenter": "segmenter",
    "FailedScene": "batch",
    "PredictOptions": "options",
    "PredictResult": "job",
    "Segmenter": "segmenter",
    "load_model": "load",
    "predict_dataarray": "api",
    "predict_many": "api",
    "predict_raster": "api",
}
"""The modules of the names above, which are imported when they are first asked for: they load torch or GDAL."""


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module 'd2ls_infer' has no attribute {name!r}")
    return getattr(import_module(f"d2ls_infer.{HOMES[name]}"), name)
