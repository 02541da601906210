"""Labelled images to train on and to measure with."""

from d2ls_infer.datasets.folder import LabelledImage, read_folder

__all__ = ["LabelledImage", "read_folder"]
