"""Clouds of one image laid over another, and the shadows that they cast: what a few marked shadows cannot teach."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from d2ls_infer.errors import UsageError
from d2ls_infer.labels import LabelMap

CLASSES = ("cloud shadow", "clear", "thin cloud", "thick cloud")
HAZE = {
    "blue": 0.075,
    "green": 0.045,
    "red": 0.028,
    "near infrared": 0.012,
    "shortwave infrared 1": 0.003,
    "shortwave infrared 2": 0.0015,
}
"""What the air itself sends up, as reflectance at the top of the atmosphere: no shadow is darker. Roughly what deep
clear water shows in Landsat 8's bands.
"""
SKYLIGHT = {
    "blue": 1.4,
    "green": 1.25,
    "red": 1.1,
    "near infrared": 1.0,
    "shortwave infrared 1": 0.9,
    "shortwave infrared 2": 0.85,
}
"""How bright the sky lights a shadow, of what it does in the near infrared: the blue sky lights it bluer."""
FARTHEST = 70
"""Pixels between a cloud and its shadow, at most."""
MOST = 0.7
"""Share of a crop that the clouds laid over it may have at most."""


@dataclass(frozen=True)
class Sky:
    """Indices of the four classes, and by band (bands, 1, 1) raw values and factors of what shadows are made of.

    Bands that are neither in `HAZE` nor in `SKYLIGHT` (cirrus, thermal infrared) show no shadow.
    """

    shadow: int
    clear: int
    thin: int
    thick: int
    haze: Tensor
    skylight: Tensor


def sky_of(labels: LabelMap, bands: tuple[str, ...], value_range: tuple[float, float]) -> Sky:
    """The sky of a dataset whose values are reflectances.

    Raises UsageError where it does not tell clouds apart, or has no band that shows shadows.
    """
    if missing := [name for name in CLASSES if name not in labels.names]:
        raise UsageError(f"clouds needs the classes {', '.join(CLASSES)}; there is no {missing[0]}")
    if not HAZE.keys() & set(bands):
        raise UsageError(f"clouds needs one at least of the bands {', '.join(HAZE)}; there are {', '.join(bands)}")
    low, high = value_range
    haze = torch.tensor([HAZE.get(band, math.inf) for band in bands]).view(-1, 1, 1)
    skylight = torch.tensor([SKYLIGHT.get(band, 1.0) for band in bands]).view(-1, 1, 1)
    shadow, clear, thin, thick = (labels.names.index(name) for name in CLASSES)
    return Sky(shadow, clear, thin, thick, haze=low + (high - low) * haze, skylight=skylight)


def overcast(
    ground: tuple[Tensor, Tensor], clouds: tuple[Tensor, Tensor], sky: Sky, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """The first crop under the clouds of the second, with their shadows on what was clear.

    Both are raw values (bands, S, S) float32 and classes (S, S) int64. Clouds that would hide nearly all are cut to
    patches of random shape. Where the first crop is hardly clear, or the second hardly cloudy, the first stays.
    """
    (image, mask), (above, kinds) = ground, clouds
    clear = mask == sky.clear
    depth = (kinds == sky.thick).float() + 0.5 * (kinds == sky.thin).float()
    if depth.mean() > MOST - 0.1 or rng.random() < 0.3:
        depth = depth * patches(len(depth), rng)
    if clear.float().mean() < 0.15 or not 0.003 < depth.mean() < MOST:
        return ground
    softness = rng.uniform(0.6, 2.0)
    # Fading out inwards: beyond their edges and in their holes, the second crop shows ground of its own.
    cover = (2 * blurred((depth > 0).float(), softness) - 1).clamp(min=0) * (depth > 0)
    depth = blurred(depth, softness)

    shade = blurred(moved(depth, rng), rng.uniform(0.6, 2.5))
    lit = (rng.uniform(0.15, 0.65) * sky.skylight).clamp(max=0.95)
    haze = sky.haze * rng.uniform(0.7, 1.2)
    shaded = haze + (image - haze) * (1 - shade * (1 - lit))
    image = torch.where(clear & (image > haze), shaded, image)
    mask = torch.where(clear & (shade > 0.35), sky.shadow, mask)

    hidden = torch.where(kinds == sky.thick, sky.thick, sky.thin)
    return torch.lerp(image, above, cover), torch.where(cover > 0.3, hidden, mask)


def patches(size: int, rng: np.random.Generator) -> Tensor:
    """(size, size) of 0 and 1: patches of random shapes, sizes and share, from three octaves of smooth noise."""
    cells, field = int(rng.integers(3, 20)), torch.zeros(size, size)
    for octave in range(3):
        noise = torch.from_numpy(rng.standard_normal((1, 1, cells + 1, cells + 1))).float()
        field += F.interpolate(noise, (size, size), mode="bicubic", align_corners=False)[0, 0] / 1.8**octave
        cells *= 2
    return ((field - field.mean()) / field.std() > rng.uniform(0.2, 1.8)).float()


def moved(depth: Tensor, rng: np.random.Generator) -> Tensor:
    """(S, S), moved by a random way; what comes in from outside is mirrored."""
    way, angle = FARTHEST ** rng.uniform(0.25, 1), rng.uniform(0, 2 * math.pi)
    rows, cols = round(way * math.sin(angle)), round(way * math.cos(angle))
    size = len(depth)
    margin = min(FARTHEST, size - 1)
    wide = F.pad(depth[None, None], (margin,) * 4, mode="reflect")[0, 0]
    top, left = (margin + max(-margin, min(margin, by)) for by in (rows, cols))
    return wide[top : top + size, left : left + size]


def blurred(values: Tensor, sigma: float) -> Tensor:
    """(S, S), smoothed by a Gaussian."""
    smooth: Tensor = gaussian_blur(values[None], 2 * math.ceil(3 * sigma) + 1, sigma)
    return smooth[0]
