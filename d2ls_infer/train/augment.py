"""Random crops of labelled images: scale, mosaic, rotations, flips, clouds, brightness and contrast."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from d2ls_infer.train.overcast import Sky, overcast
from d2ls_infer.train.pool import ImagePool


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """crop: side of a crop in pixels. scales: range of the random magnification (2 = objects twice as large).
    mosaic: how often a crop is put together from four. balance: how often a crop is placed on a pixel of a class that
    is drawn with all classes alike, in place of any pixel of any image. jitter: largest change of contrast (a factor)
    and of brightness (in standard deviations of the crop's band), drawn for all bands together and half as much for
    each. turn: how often a crop is turned by any angle, besides the rotations by 90 degrees that all have. clouds: how
    often the clouds of another crop are laid over it, see `overcast`. gamma: the power that values on 0..1 are raised
    to.
    """

    crop: int = 256
    scales: tuple[float, float] = (0.75, 1.5)
    mosaic: float = 0.25
    balance: float = 0.0
    jitter: float = 0.15
    turn: float = 0.0
    clouds: float = 0.0
    gamma: float = 1.0


def random_crop(
    pool: ImagePool,
    config: AugmentConfig,
    rng: np.random.Generator,
    *,
    value_range: tuple[float, float],
    sky: Sky | None = None,
) -> tuple[Tensor, Tensor]:
    """One augmented crop: (bands, crop, crop) float32, where 0..1 is the value range, and (crop, crop) int64.

    sky: what clouds are in these images; without it none are laid over crops. Images are drawn by their area, or by
    `balance`. Where a crop reaches past its image, image and labels are mirrored.
    """
    if rng.random() < config.mosaic:
        image, mask = mosaic(pool, config, rng)
    else:
        image, mask = turned_crop(pool, config.crop, config, rng)
    if sky is not None and rng.random() < config.clouds:
        image, mask = overcast(
            (image, mask), scaled_crop(pool, config.crop, config, rng, among=(sky.thin, sky.thick)), sky, rng
        )
    turns = int(rng.integers(4))
    image, mask = torch.rot90(image, turns, (1, 2)), torch.rot90(mask, turns, (0, 1))
    if rng.random() < 0.5:
        image, mask = image.flip(2), mask.flip(1)
    low, high = value_range
    return jitter(((image - low) / (high - low)).clamp(0, 1) ** config.gamma, config.jitter, rng), mask


def turned_crop(pool: ImagePool, size: int, config: AugmentConfig, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """A `scaled_crop`, of those that `turn` asks for the upright square in the middle of one that is turned."""
    if not config.turn or rng.random() >= config.turn:
        return scaled_crop(pool, size, config, rng)
    angle = rng.uniform(-math.pi / 4, math.pi / 4)
    wide = math.ceil(size * (math.cos(angle) + abs(math.sin(angle))))
    image, mask = scaled_crop(pool, wide, config, rng)
    cos, sin = (size / wide * value for value in (math.cos(angle), math.sin(angle)))
    grid = F.affine_grid(torch.tensor([[[cos, -sin, 0.0], [sin, cos, 0.0]]]), [1, 1, size, size], align_corners=False)
    image = F.grid_sample(image[None], grid, padding_mode="border", align_corners=False)[0]
    labels = F.grid_sample(mask[None, None].float(), grid, mode="nearest", padding_mode="border", align_corners=False)
    return image, labels[0, 0].long()


def scaled_crop(
    pool: ImagePool, size: int, config: AugmentConfig, rng: np.random.Generator, *, among: tuple[int, ...] = ()
) -> tuple[Tensor, Tensor]:
    """A square window of random place and scale, resized to `size`: bilinear for the image, nearest for the mask.

    among: classes one of which the window is to lie on, in place of what `balance` says.
    """
    on: tuple[int, int] | None = None
    if among or (config.balance and rng.random() < config.balance):
        (image, mask), on = pool.draw_class(rng, among)
    else:
        image, mask = pool.draw(rng)
    low, high = np.log(config.scales)
    side = max(8, round(size / float(np.exp(rng.uniform(low, high)))))
    rows, cols = (
        mirrored(start_of(extent, side, rng, on[axis] if on else None), side, extent)
        for axis, extent in enumerate(mask.shape)
    )
    pixels = torch.from_numpy(image[:, rows][..., cols]).float()
    labels = torch.from_numpy(mask[rows][:, cols]).float()
    pixels = F.interpolate(pixels[None], (size, size), mode="bilinear", align_corners=False, antialias=side > size)[0]
    labels = F.interpolate(labels[None, None], (size, size), mode="nearest-exact")[0, 0]
    return pixels, labels.long()


def mirrored(start: int, side: int, extent: int) -> slice | np.ndarray:
    """What takes `side` pixels from `start` on along an axis of `extent` pixels, mirrored where they lie outside."""
    if start >= 0 and start + side <= extent:
        return slice(start, start + side)
    places = np.arange(start, start + side) % (2 * extent)
    return np.minimum(places, 2 * extent - 1 - places)


def start_of(extent: int, side: int, rng: np.random.Generator, on: int | None) -> int:
    """Where a window of `side` pixels starts along an axis: inside the image, or around it where it is smaller, and
    over the pixel `on` where one is given.
    """
    first, last = min(0, extent - side), max(0, extent - side)
    if on is not None:
        first, last = max(first, on - side + 1), min(last, on)
    return int(rng.integers(first, last + 1))


def mosaic(pool: ImagePool, config: AugmentConfig, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Four crops that meet at a random point, each no larger than it is seen."""
    size = config.crop
    row, col = (int(value) for value in rng.integers(size // 4, size - size // 4 + 1, 2))
    pieces = []
    for height, width in ((row, col), (row, size - col), (size - row, col), (size - row, size - col)):
        image, mask = turned_crop(pool, max(height, width), config, rng)
        pieces.append((image[:, :height, :width], mask[:height, :width]))
    images, masks = zip(*pieces, strict=True)
    image = torch.cat([torch.cat(images[:2], 2), torch.cat(images[2:], 2)], 1)
    return image, torch.cat([torch.cat(masks[:2], 1), torch.cat(masks[2:], 1)], 0)


def jitter(image: Tensor, amount: float, rng: np.random.Generator) -> Tensor:
    """Contrast and brightness, first of all bands together, then of each band.

    What leaves 0..1 stays outside: clipped, dark things on bright images (the shadow of a cloud) would be gone.
    """
    bands = len(image)
    contrast = 1 + amount * (rng.uniform(-1, 1) + 0.5 * rng.uniform(-1, 1, bands))
    brightness = amount * (rng.uniform(-1, 1) + 0.5 * rng.uniform(-1, 1, bands))
    center = image.mean((1, 2), keepdim=True)
    # Of the crop's own spread, not of the value range: images of low contrast would lose what their colours say.
    shift = torch.from_numpy(brightness).float().view(-1, 1, 1) * image.std((1, 2), keepdim=True, correction=0)
    return (image - center) * torch.from_numpy(contrast).float().view(-1, 1, 1) + center + shift
