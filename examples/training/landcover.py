"""LoveDA's images, and NAIP's beside them under LoveDA's classes: for a model that knows more than 34 rural images.

    python examples/training/landcover.py --data DATA --output DATA/landcover

writes a folder for `d2ls train --dataset folder`: LoveDA's images (train and val as they are) and the tiles of NAIP to
train on, enlarged to 0.4 m, since crops are scaled besides. Of NAIP's classes, bare land is nearly all tilled fields,
which LoveDA calls agriculture; its background holds both meadows and crops and is not labelled here. With --all
everything is to be trained on. DATA holds `loveda` and `naip`. Needs Pillow.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

from d2ls_infer.datasets import LabelledImage, find_dataset
from d2ls_infer.labels import NODATA

MEANT = {"building": "building", "road": "road", "bare land": "agriculture", "forest": "forest", "water": "water"}
"""NAIP's classes, and LoveDA's."""
ENLARGED = 1.5
"""From 0.6 m."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--all", action="store_true")
    arguments = parser.parse_args()
    for folder in ("images", "masks"):
        (arguments.output / folder).mkdir(parents=True)

    loveda, naip = (find_dataset(name) for name in ("loveda", "naip"))
    codes = np.full(NODATA + 1, NODATA, np.uint8)
    for name, meant in MEANT.items():
        codes[naip.labels.names.index(name)] = loveda.labels.names.index(meant)
    listed: dict[str, list[str]] = {"train": [], "val": []}
    for split, names in listed.items():
        for image in loveda.images(arguments.data / "loveda", split):
            pixels, mask = image.read()
            names.append(save(arguments.output, f"loveda-{stem(image)}", pixels, mask))
        if split == "train" or arguments.all:
            for image in naip.images(arguments.data / "naip", split):
                pixels, mask = image.read()
                names.append(save(arguments.output, f"naip-{stem(image)}", pixels[:3], codes[mask], ENLARGED))
    if arguments.all:
        listed["train"] += listed.pop("val")
    for split, names in listed.items():
        (arguments.output / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
    (arguments.output / "classes.json").write_text(json.dumps(loveda.labels.to_list(), indent=1) + "\n")


def stem(image: LabelledImage) -> str:
    """A name for an image that no other of its set has: numbers come again from folder to folder."""
    return f"{image.image.parent.name}-{image.image.stem}"


def save(output: Path, name: str, pixels: np.ndarray, mask: np.ndarray, enlarged: float = 1.0) -> str:
    """Writes (3, H, W) uint8 and (H, W) uint8 as PNG, and gives the name back."""
    size = tuple(round(side * enlarged) for side in mask.shape[::-1])
    image, labels = Image.fromarray(np.moveaxis(pixels, 0, -1)), Image.fromarray(mask)
    image.resize(size, Image.Resampling.BICUBIC).save(output / "images" / f"{name}.png")
    labels.resize(size, Image.Resampling.NEAREST).save(output / "masks" / f"{name}.png")
    return name


if __name__ == "__main__":
    main()
