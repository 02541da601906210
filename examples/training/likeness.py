"""Vaihingen's and Potsdam's images side by side, those of the one with the look of the other.

    python examples/training/likeness.py vaihingen --data DATA --output DATA/infrared
    python examples/training/likeness.py potsdam --data DATA --output DATA/natural

writes a folder for `d2ls train --dataset folder`: the named set's images as they are, and beside those to train on the
other's. One set has near infrared, red and green, the other red, green and blue, so one band is made up: for each class
by the line along which it follows red and green in the named set, with soft edges between classes, and with noise as
large as what that line leaves unexplained. By the labels, near infrared thus tells plants from all else, as it does in
Vaihingen. Red and green get the named set's distribution, plants and the rest apart. Potsdam's patches (600) shrink to
Vaihingen's 9 cm; Vaihingen's tiles (A, C and D) grow by 1.3, half of the way to Potsdam's 5 cm. DATA holds `vaihingen`
and `potsdam`. Needs scipy and Pillow.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Source:
    """Another set's images as one needs them: splits, and how much larger they become."""

    name: str
    splits: tuple[str, ...]
    scale: float


@dataclass(frozen=True)
class Look:
    """What a set's images look like: where red and green are in it, and what its third band is; where to learn it.

    step: every so-many-th pixel is looked at.
    """

    red_green: tuple[int, int]
    third: int
    step: int
    other: Source


LOOKS = {
    "vaihingen": Look((1, 2), 0, 1, Source("potsdam", ("train",), 5 / 9)),
    "potsdam": Look((0, 1), 2, 17, Source("vaihingen", ("train", "val"), 1.3)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=LOOKS)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    images, masks = (arguments.output / name for name in ("images", "masks"))
    for folder in (images, masks):
        folder.mkdir(parents=True)

    names = {split: copied(arguments.data / arguments.name, split, images, masks) for split in ("train", "val")}
    look = LOOKS[arguments.name]
    like = Likeness(arguments.data, arguments.name)
    rng = np.random.default_rng(0)
    for split in look.other.splits:
        for pair in find_dataset(look.other.name).images(arguments.data / look.other.name, split):
            image, mask = pair.read()
            made = Image.fromarray(like(np.moveaxis(image, 0, -1).astype(float), mask, rng))
            size = round(made.width * look.other.scale), round(made.height * look.other.scale)
            name = f"{look.other.name[0]}{Path(pair.name).stem}"
            made.resize(size, Image.Resampling.LANCZOS).save(images / f"{name}.jpg", quality=95, subsampling=0)
            Image.fromarray(mask).resize(size, Image.Resampling.NEAREST).save(masks / f"{name}.png")
            names["train"].append(name)
    for split, listed in names.items():
        (arguments.output / f"{split}.txt").write_text("".join(f"{name}\n" for name in listed))
    labels = find_dataset(arguments.name).labels
    (arguments.output / "classes.json").write_text(json.dumps(labels.to_list(), indent=1) + "\n")


def copied(root: Path, split: str, images: Path, masks: Path) -> list[str]:
    """Copies a split of the set itself; the names of its images."""
    names = []
    for pair in find_dataset(root.name).images(root, split):
        assert pair.mask is not None
        shutil.copyfile(pair.image, images / pair.image.name)
        shutil.copyfile(pair.mask, masks / f"{pair.image.stem}{pair.mask.suffix}")
        names.append(pair.image.stem)
    return names


class Likeness:
    """(H, W, 3) of the other set with classes (H, W) -> (H, W, 3) uint8 as if of the named one."""

    def __init__(self, data: Path, name: str) -> None:
        self.look = LOOKS[name]
        self.source = LOOKS[self.look.other.name]
        pixels, classes = pixels_of(data / name, self.look.step)
        other, other_classes = pixels_of(data / self.look.other.name, self.source.step)
        self.curves = []  # of all else, of plants; each for red and green
        for plants in (False, True):
            source = other[np.isin(other_classes, PLANTS) == plants]
            target = pixels[np.isin(classes, PLANTS) == plants]
            self.curves.append(
                [
                    (np.quantile(source[:, theirs], SHARES), np.quantile(target[:, ours], SHARES))
                    for theirs, ours in zip(self.source.red_green, self.look.red_green, strict=True)
                ]
            )
        lines = []
        for index in range(6):
            of_class = pixels[classes == index].T
            third, red, green = of_class[self.look.third], *of_class[list(self.look.red_green)]
            terms = np.stack([np.ones_like(third), red, green], 1)
            line = np.linalg.lstsq(terms, third, rcond=None)[0]
            lines.append([*line, (third - terms @ line).std()])
        self.lines = np.array(lines)

    def __call__(self, image: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        plants = gaussian_filter(np.isin(mask, PLANTS).astype(float), SOFT)
        red, green = (
            (1 - plants) * np.interp(image[..., band], *self.curves[0][index])
            + plants * np.interp(image[..., band], *self.curves[1][index])
            for index, band in enumerate(self.source.red_green)
        )
        of_pixels = self.lines[np.where(mask == NODATA, 0, mask)]  # (H, W, 4); what has no label may look like anything
        level, by_red, by_green, spread = (gaussian_filter(of_pixels[..., term], SOFT) for term in range(4))
        noise = sum(gaussian_filter(rng.normal(size=mask.shape), size) * size * weight for size, weight in NOISE)
        noise = noise / noise.std() * rng.uniform(0.4, 0.9)
        bands = np.empty(image.shape)
        bands[..., self.look.third] = level + by_red * red + by_green * green + spread * noise
        bands[..., list(self.look.red_green)] = np.stack([red, green], -1)
        made: np.ndarray = bands.clip(0, 255).round().astype(np.uint8)
        return made


def pixels_of(root: Path, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Every so-many-th labelled pixel of a set's images to train on: (P, 3) and its classes (P)."""
    pixels, classes = [], []
    for image in find_dataset(root.name).images(root, "train"):
        values, mask = image.read()
        known = mask.ravel()[::step] != NODATA
        pixels.append(values.reshape(3, -1).T[::step][known].astype(float))
        classes.append(mask.ravel()[::step][known])
    return np.concatenate(pixels), np.concatenate(classes)


if __name__ == "__main__":
    main()
