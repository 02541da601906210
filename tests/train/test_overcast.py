"""Clouds that are laid over a crop: where they hide it, where they darken it, and what the mask says then."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from d2ls_infer.datasets import find_dataset
from d2ls_infer.errors import UsageError
from d2ls_infer.labels import LabelMap
from d2ls_infer.train.overcast import FARTHEST, HAZE, MOST, Sky, blurred, moved, overcast, patches, sky_of

SHADOW, CLEAR, THIN, THICK = range(4)
BANDS = find_dataset("cloud").bands
SIZE = 96
GROUND = 60_000.0
"""What lies under the clouds that are laid over a crop."""


@pytest.fixture(scope="module")
def sky() -> Sky:
    cloud = find_dataset("cloud")
    return sky_of(cloud.labels, cloud.bands, cloud.value_range)


def ground(value: float = 3000.0, kind: int = CLEAR) -> tuple[Tensor, Tensor]:
    return torch.full((len(BANDS), SIZE, SIZE), value), torch.full((SIZE, SIZE), kind)


def clouds(kind: int = THICK) -> tuple[Tensor, Tensor]:
    """A large cloud in the middle, with small holes, over bright ground that is never to be seen."""
    image, mask = torch.full((len(BANDS), SIZE, SIZE), GROUND), torch.full((SIZE, SIZE), CLEAR)
    image[:, 20:76, 20:76], mask[20:76, 20:76] = 9000.0, kind
    image[:, 24:70:6, 24:70:6], mask[24:70:6, 24:70:6] = GROUND, CLEAR
    return image, mask


def laid(seed: int, sky: Sky, below: tuple[Tensor, Tensor], above: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return overcast(below, above, sky, np.random.default_rng(seed))


def test_classes_and_bands_are_found_by_name(sky: Sky) -> None:
    assert (sky.shadow, sky.clear, sky.thin, sky.thick) == (SHADOW, CLEAR, THIN, THICK)
    assert sky.haze.flatten().tolist() == pytest.approx([*(10_000 * HAZE[name] for name in BANDS[:6]), np.inf, np.inf])
    colors = find_dataset("cloud").labels.colors
    names = ("thick cloud", "thin cloud", "clear", "cloud shadow")
    turned = sky_of(LabelMap(names, colors), ("red", "blue"), (0.0, 255.0))
    assert (turned.shadow, turned.clear, turned.thin, turned.thick) == (3, 2, 1, 0)
    assert turned.haze.flatten().tolist() == pytest.approx([255 * HAZE["red"], 255 * HAZE["blue"]])


def test_datasets_without_clouds_are_refused() -> None:
    dubai = find_dataset("dubai")
    with pytest.raises(UsageError, match=r"clouds needs the classes cloud shadow, clear, .* there is no cloud shadow"):
        sky_of(dubai.labels, dubai.bands, dubai.value_range)


def test_bands_that_show_no_shadow_are_refused() -> None:
    cloud = find_dataset("cloud")
    with pytest.raises(UsageError, match=r"clouds needs one at least of the bands blue, .*; there are cirrus, nir"):
        sky_of(cloud.labels, ("cirrus", "nir"), cloud.value_range)


@pytest.mark.parametrize("seed", range(12))
def test_mask_says_what_the_pixels_show(sky: Sky, seed: int) -> None:
    image, mask = laid(seed, sky, ground(), clouds())
    near_infrared = image[3]
    assert set(mask.unique().tolist()) == {SHADOW, CLEAR, THICK}
    assert near_infrared[mask == THICK].median() > 5000
    assert near_infrared[mask == SHADOW].median() < 2700
    assert near_infrared[mask == CLEAR].median() > 2800
    assert image.max() < 9001  # the other ground is not seen


@pytest.mark.parametrize("seed", range(12))
def test_shadows_are_darkest_in_the_infrared_and_leave_other_bands_alone(sky: Sky, seed: int) -> None:
    image, mask = laid(seed, sky, ground(), clouds())
    core = image[:, mask == SHADOW]
    darkest = core[:, core[3].argmin()]
    assert (darkest[:6].diff() < 0).all()  # blue, green, red, near infrared, shortwave infrared
    assert (image[6:] >= 3000).all()  # cirrus and thermal infrared


@pytest.mark.parametrize("seed", range(6))
def test_shadows_fall_on_clear_pixels_alone(sky: Sky, seed: int) -> None:
    below = ground()
    below[1][:, :48] = THIN
    image, mask = laid(seed, sky, below, clouds())
    assert not (mask[:, :48] == SHADOW).any()
    open_sky = mask[:, :30] == THIN  # away from the cloud that was laid over it
    assert (image[:, :, :30][:, open_sky] == 3000).float().mean() > 0.9


@pytest.mark.parametrize("seed", range(6))
def test_nothing_gets_darker_than_the_haze(sky: Sky, seed: int) -> None:
    image, _ = laid(seed, sky, ground(200.0), clouds())
    assert image[0].min() >= 200  # lies below the haze of blue already
    assert image[3].min() >= 0.7 * 10_000 * HAZE["near infrared"] - 1
    dark = torch.isclose(image[0], torch.tensor(200.0))
    assert dark.float().mean() > 0.3  # in blue, 200 lies below the haze: no shadow on it


def test_thin_clouds_stay_thin(sky: Sky) -> None:
    _, mask = laid(3, sky, ground(), clouds(THIN))
    assert (mask == THIN).any()
    assert not (mask == THICK).any()


@pytest.mark.parametrize("kind", [SHADOW, THIN, THICK, 255])
def test_ground_without_clear_pixels_stays(sky: Sky, kind: int) -> None:
    below = ground(kind=kind)
    image, mask = laid(0, sky, below, clouds())
    assert image is below[0]
    assert mask is below[1]


def test_clouds_hide_unlabelled_pixels_too(sky: Sky) -> None:
    below = ground()
    below[1][:48] = 255
    _, mask = laid(1, sky, below, clouds())
    assert (mask[:48] == THICK).any()
    assert (mask[:48] == 255).any()


def test_a_whole_cover_is_cut_to_patches(sky: Sky) -> None:
    whole = torch.full((len(BANDS), SIZE, SIZE), 9000.0), torch.full((SIZE, SIZE), THICK)
    shares = [(laid(seed, sky, ground(), whole)[1] == THICK).float().mean().item() for seed in range(20)]
    assert 0 < max(shares) < MOST + 0.1
    assert len(set(shares)) > 10


def test_neither_crop_is_written_into(sky: Sky) -> None:
    below, above = ground(), clouds()
    kept = [tensor.clone() for tensor in (*below, *above)]
    laid(2, sky, below, above)
    assert all(torch.equal(a, b) for a, b in zip((*below, *above), kept, strict=True))


@given(seed=st.integers(0, 2**32 - 1), size=st.sampled_from([32, 64, 160, 256]))
def test_moving_keeps_size_and_values(seed: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    depth = torch.rand((size, size), generator=torch.Generator().manual_seed(seed % 1000))
    assert moved(depth, rng).shape == (size, size)
    once = torch.zeros(size, size)
    once[size // 2, size // 2] = 1
    found = moved(once, rng).nonzero()
    if len(found) == 1 and size > 2 * FARTHEST:
        rows, cols = (found[0] - size // 2).tolist()
        assert 1 <= np.hypot(rows, cols) <= FARTHEST + 1


@given(seed=st.integers(0, 2**32 - 1), size=st.sampled_from([32, 64, 160]))
def test_patches_are_0_or_1(seed: int, size: int) -> None:
    field = patches(size, np.random.default_rng(seed))
    assert field.shape == (size, size)
    assert set(field.unique().tolist()) <= {0.0, 1.0}


def test_blur_keeps_what_is_even_and_spreads_the_rest() -> None:
    torch.testing.assert_close(blurred(torch.full((40, 40), 0.5), 2.0), torch.full((40, 40), 0.5))
    point = torch.zeros(41, 41)
    point[20, 20] = 1
    spread = blurred(point, 1.5)
    assert float(spread.sum()) == pytest.approx(1, abs=1e-4)
    assert float(spread[20, 20]) == pytest.approx(1 / (2 * np.pi * 1.5**2), rel=0.05)
