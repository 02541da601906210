"""The dictionary generator, against a plain form of Eq. 11-14 with explicit loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from d2ls_infer.nn.dictionary import DictionaryGenerator, Modulator

CHANNELS, CLASSES, WIDTH, REDUCTION = 6, 3, 16, 4


@pytest.fixture
def deepest() -> Tensor:
    return torch.randn((2, CHANNELS, 3, 5), generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.fixture
def generator() -> DictionaryGenerator:
    torch.manual_seed(0)
    return DictionaryGenerator(CHANNELS, CLASSES, WIDTH, REDUCTION).double().eval()


def linear(layer: nn.Module, vector: list[float]) -> list[float]:
    weight, bias = layer.get_parameter("weight").flatten(1).tolist(), layer.get_parameter("bias").tolist()
    return [sum(w * v for w, v in zip(row, vector, strict=True)) + b for row, b in zip(weight, bias, strict=True)]


def plain_attention(modulator: Modulator, deepest: Tensor) -> list[list[float]]:
    """A of one image (C4, h, w): N lists of r."""
    pixels = [linear(modulator.project, column) for column in deepest.flatten(1).T.tolist()]
    half = WIDTH // 2
    largest = [max(pixel[c] for pixel in pixels) for c in range(half)]
    average = [sum(pixel[c] for pixel in pixels) / len(pixels) for c in range(half, WIDTH)]
    pooled = linear(modulator.max_branch, largest) + linear(modulator.avg_branch, average)
    hidden = [max(0.0, value) for value in linear(modulator.head[0], pooled)]
    flat = [math.exp(value) for value in linear(modulator.head[2], hidden)]
    rows = [flat[n * REDUCTION : (n + 1) * REDUCTION] for n in range(CLASSES)]
    return [[value / sum(row) for value in row] for row in rows]


@torch.no_grad()
def test_attention_pools_the_first_half_by_maximum_and_the_second_by_mean(
    generator: DictionaryGenerator, deepest: Tensor
) -> None:
    expected = torch.tensor([plain_attention(generator.modulator, image) for image in deepest], dtype=torch.float64)
    torch.testing.assert_close(generator.modulator(deepest), expected)


@torch.no_grad()
def test_attention_sums_to_one_over_the_variants(generator: DictionaryGenerator, deepest: Tensor) -> None:
    attention = generator.modulator(deepest)
    assert attention.shape == (2, CLASSES, REDUCTION)
    torch.testing.assert_close(attention.sum(-1), torch.ones(2, CLASSES, dtype=torch.float64))


@torch.no_grad()
def test_attention_does_not_depend_on_where_a_feature_is(generator: DictionaryGenerator, deepest: Tensor) -> None:
    shuffled = deepest.flatten(2)[..., torch.randperm(15)].reshape(deepest.shape)
    torch.testing.assert_close(generator.modulator(shuffled), generator.modulator(deepest))


@torch.no_grad()
def test_dynamic_dictionary_is_the_attended_sum_of_the_variants(
    generator: DictionaryGenerator, deepest: Tensor
) -> None:
    static, dynamic, attention = generator(deepest)
    assert dynamic.shape == (2, CLASSES, WIDTH)
    for n in range(CLASSES):
        flat = linear(generator.expand, static[n].tolist())
        variants = [flat[k * WIDTH : (k + 1) * WIDTH] for k in range(REDUCTION)]
        for b in range(2):
            expected = [sum(float(attention[b, n, k]) * variants[k][c] for k in range(REDUCTION)) for c in range(WIDTH)]
            torch.testing.assert_close(dynamic[b, n], torch.tensor(expected, dtype=torch.float64))


@torch.no_grad()
def test_static_dictionary_is_the_same_for_every_image(generator: DictionaryGenerator, deepest: Tensor) -> None:
    assert torch.equal(generator(deepest)[0], generator(2 * deepest)[0])
    assert generator.static.shape == (CLASSES, WIDTH)


@torch.no_grad()
def test_dynamic_dictionary_follows_the_image(generator: DictionaryGenerator, deepest: Tensor) -> None:
    _, dynamic, _ = generator(deepest)
    assert not torch.allclose(dynamic[0], dynamic[1])
