"""Potsdam's patches as if they were Vaihingen's: near infrared, red, green at 9 cm, beside Vaihingen's own tiles.

    python examples/training/infrared.py --data DATA --output DATA/infrared

writes a folder for `d2ls train --dataset folder`: tiles A, C (train) and D (val) as they are, and Potsdam's 600 patches
to train on, which have no near infrared. It is made up: for each class by the line along which it follows red and green
in tiles A and C, with soft edges between classes, and with noise as large as what that line leaves unexplained. So, by
the labels, it tells plants from all else, as it does in Vaihingen. Red and green get Vaihingen's distribution, plants
and the rest apart. DATA holds `vaihingen` and `potsdam`. Needs scipy and Pillow.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

from d2ls_infer.datasets import find_dataset
from d2ls_infer.labels import NODATA

PLANTS = (2, 3)
"""Low vegetation and tree."""
SOFT = 1.5
"""Standard deviation in pixels of what softens the edges between classes."""
NOISE = ((2, 1.2), (8, 1.6), (30, 1.8))
"""Sizes in pixels of the noise's grains, and what each counts."""
SHARES = np.linspace(0, 1, 129)
SCALE = 5 / 9
"""Of Potsdam's ground sampling distance and Vaihingen's."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    images, masks = (arguments.output / name for name in ("images", "masks"))
    for folder in (images, masks):
        folder.mkdir(parents=True)

    names = {split: tiles(arguments.data / "vaihingen", split, images, masks) for split in ("train", "val")}
    like = Likeness(*pixels_of(arguments.data / "vaihingen", 1), *pixels_of(arguments.data / "potsdam", 17))
    rng = np.random.default_rng(0)
    for patch in find_dataset("potsdam").images(arguments.data / "potsdam", "train"):
        image, mask = patch.read()
        made, side = like(np.moveaxis(image, 0, -1).astype(float), mask, rng), round(len(mask) * SCALE)
        name = f"p{Path(patch.name).stem}"
        Image.fromarray(made).resize((side, side), Image.Resampling.LANCZOS).save(
            images / f"{name}.jpg", quality=95, subsampling=0
        )
        Image.fromarray(mask).resize((side, side), Image.Resampling.NEAREST).save(masks / f"{name}.png")
        names["train"].append(name)
    for split, listed in names.items():
        (arguments.output / f"{split}.txt").write_text("".join(f"{name}\n" for name in listed))
    labels = find_dataset("vaihingen").labels
    (arguments.output / "classes.json").write_text(json.dumps(labels.to_list(), indent=1) + "\n")


def tiles(root: Path, split: str, images: Path, masks: Path) -> list[str]:
    """Copies Vaihingen's tiles of a split; their names."""
    names = []
    for tile in find_dataset("vaihingen").images(root, split):
        assert tile.mask is not None
        shutil.copyfile(tile.image, images / tile.image.name)
        shutil.copyfile(tile.mask, masks / f"{tile.image.stem}{tile.mask.suffix}")
        names.append(tile.image.stem)
    return names


def pixels_of(root: Path, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Every so-many-th labelled pixel of a set's images to train on: (P, 3) and its classes (P)."""
    pixels, classes = [], []
    for image in find_dataset(root.name).images(root, "train"):
        values, mask = image.read()
        known = mask.ravel()[::step] != NODATA
        pixels.append(values.reshape(3, -1).T[::step][known].astype(float))
        classes.append(mask.ravel()[::step][known])
    return np.concatenate(pixels), np.concatenate(classes)


class Likeness:
    """(H, W, 3) red, green, blue with classes (H, W) -> (H, W, 3) uint8 near infrared, red, green."""

    def __init__(self, pixels: np.ndarray, classes: np.ndarray, other: np.ndarray, other_classes: np.ndarray) -> None:
        self.curves = []  # of all else, of plants; each for red and green
        for plants in (False, True):
            source = other[np.isin(other_classes, PLANTS) == plants]
            target = pixels[np.isin(classes, PLANTS) == plants]
            self.curves.append(
                [(np.quantile(source[:, band], SHARES), np.quantile(target[:, band + 1], SHARES)) for band in (0, 1)]
            )
        lines = []
        for index in range(6):
            infrared, *seen = pixels[classes == index].T
            terms = np.stack([np.ones_like(infrared), *seen], 1)
            line = np.linalg.lstsq(terms, infrared, rcond=None)[0]
            lines.append([*line, (infrared - terms @ line).std()])
        self.lines = np.array(lines)

    def __call__(self, image: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        plants = gaussian_filter(np.isin(mask, PLANTS).astype(float), SOFT)
        red, green = (
            (1 - plants) * np.interp(image[..., band], *self.curves[0][band])
            + plants * np.interp(image[..., band], *self.curves[1][band])
            for band in (0, 1)
        )
        of_pixels = self.lines[np.where(mask == NODATA, 0, mask)]  # (H, W, 4); what has no label may look like anything
        level, by_red, by_green, spread = (gaussian_filter(of_pixels[..., term], SOFT) for term in range(4))
        noise = sum(gaussian_filter(rng.normal(size=mask.shape), size) * size * weight for size, weight in NOISE)
        noise = noise / noise.std() * rng.uniform(0.4, 0.9)
        infrared = level + by_red * red + by_green * green + spread * noise
        made: np.ndarray = np.stack([infrared, red, green], -1).clip(0, 255).round().astype(np.uint8)
        return made


if __name__ == "__main__":
    main()
