"""The D2LS network and nothing else."""

from d2ls_infer.nn.d2ls import D2LS, D2LSConfig, TrainingOutput, autocast, pad_to_stride
from d2ls_infer.nn.folded import ByEmbeddings, FoldedD2LS, fold, inference_form
from d2ls_infer.nn.pixelwise import allow_packing
from d2ls_infer.nn.pretrained import count_parameters, load_weights, weights_of

__all__ = [
    "D2LS",
    "ByEmbeddings",
    "D2LSConfig",
    "FoldedD2LS",
    "TrainingOutput",
    "allow_packing",
    "autocast",
    "count_parameters",
    "fold",
    "inference_form",
    "load_weights",
    "pad_to_stride",
    "weights_of",
]
