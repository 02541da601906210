"""Smoothing takes out what repeats every four pixels, and little else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from d2ls_infer.smoothing import CELL_PX, smoothed

TAPS = [1, 2, 3, 4, 3, 2, 1]


def plainly(values: np.ndarray) -> np.ndarray:
    """(H, W), each pixel a sum over the 49 around it, by loops in float64."""
    height, width = values.shape
    result = np.zeros((height, width))
    for row in range(height):
        for col in range(width):
            for down, vertical in enumerate(TAPS, -3):
                for right, horizontal in enumerate(TAPS, -3):
                    near = values[min(max(row + down, 0), height - 1), min(max(col + right, 0), width - 1)]
                    result[row, col] += vertical * horizontal / 256 * near
    return result


@given(height=st.integers(1, 12), width=st.integers(1, 12), seed=st.integers(0, 99))
def test_it_is_the_weighted_mean_of_the_pixels_around(height: int, width: int, seed: int) -> None:
    scores = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(seed))
    found = smoothed(scores)
    assert found.shape == scores.shape
    for plane, expected in zip(found.flatten(0, 1), scores.flatten(0, 1), strict=True):
        np.testing.assert_allclose(plane.numpy(), plainly(expected.double().numpy()), atol=1e-6)


def test_what_repeats_in_every_cell_is_gone() -> None:
    cell = torch.rand(CELL_PX, CELL_PX, generator=torch.Generator().manual_seed(0))
    inner = smoothed(cell.repeat(8, 8)[None, None])[0, 0, 3:-3, 3:-3]
    torch.testing.assert_close(inner, cell.mean().expand_as(inner))


def test_slopes_stay() -> None:
    slope = torch.arange(40.0).expand(30, 40) + 2 * torch.arange(30.0)[:, None]
    torch.testing.assert_close(smoothed(slope[None, None])[0, 0, 3:-3, 3:-3], slope[3:-3, 3:-3])


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_probabilities_still_sum_up_to_one(memory_format: torch.memory_format, dtype: torch.dtype) -> None:
    scores = torch.randn(2, 5, 33, 47, generator=torch.Generator().manual_seed(1)).softmax(1).to(dtype)
    sums = smoothed(scores.contiguous(memory_format=memory_format)).float().sum(1)
    torch.testing.assert_close(sums, torch.ones_like(sums), atol=1e-5 if dtype == torch.float32 else 0.05, rtol=0)


def test_images_of_a_batch_are_smoothed_alone() -> None:
    scores = torch.rand(3, 2, 17, 19, generator=torch.Generator().manual_seed(2))
    for one, image in zip(smoothed(scores), scores, strict=True):
        assert torch.equal(one, smoothed(image[None])[0])
