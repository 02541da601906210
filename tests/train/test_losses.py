"""Every term of the loss, worked out by loops on tiny tensors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from d2ls_infer.nn import TrainingOutput
from d2ls_infer.train.losses import contrastive, cross_entropy, d2ls_loss, dice

IGNORE = 255


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def logits() -> Tensor:
    return 2 * random(2, 4, 2, 3)


@pytest.fixture
def target() -> Tensor:
    # Class 3 occurs nowhere, and three pixels are not labelled.
    return torch.tensor([[[0, 1, IGNORE], [2, 2, 0]], [[IGNORE, 1, 1], [0, IGNORE, 2]]])


def probabilities(logits: Tensor) -> list[list[float]]:
    """Per pixel, the softmax over classes."""
    pixels = logits.permute(0, 2, 3, 1).reshape(-1, logits.shape[1]).tolist()
    return [[math.exp(z) / sum(math.exp(other) for other in pixel) for z in pixel] for pixel in pixels]


def plain_cross_entropy(logits: Tensor, target: Tensor) -> float:
    total, count = 0.0, 0
    for p, truth in zip(probabilities(logits), target.flatten().tolist(), strict=True):
        if truth != IGNORE:
            uniform = sum(-math.log(value) for value in p) / len(p)
            total += 0.95 * -math.log(p[truth]) + 0.05 * uniform
            count += 1
    return total / count


def plain_dice(logits: Tensor, target: Tensor) -> float:
    losses = []
    labelled = [(p, t) for p, t in zip(probabilities(logits), target.flatten().tolist(), strict=True) if t != IGNORE]
    for c in range(logits.shape[1]):
        shared = sum(p[c] for p, t in labelled if t == c)
        size = sum(p[c] + (t == c) for p, t in labelled)
        present = any(t == c for _, t in labelled)
        losses.append(1 - (2 * shared + 0.05) / (size + 0.05) if present else 0.0)
    return sum(losses) / len(losses)


def plain_contrastive(dictionary: Tensor) -> float:
    batch, classes, _ = dictionary.shape
    d = dictionary.double()
    centers = [sum(d[b, i] for b in range(batch)) / batch for i in range(classes)]
    intra = sum(float((d[b, i] - centers[i]).square().sum()) for b in range(batch) for i in range(classes))
    inter = sum(
        float((centers[i] - centers[j]).square().sum()) for i in range(classes - 1) for j in range(i + 1, classes)
    )
    return intra / (batch * classes) / (2 / (classes * (classes - 1)) * inter + 1e-6)


def test_cross_entropy_is_smoothed_and_a_mean_over_labelled_pixels(logits: Tensor, target: Tensor) -> None:
    got = cross_entropy(logits, target, ignore_index=IGNORE)
    assert float(got) == pytest.approx(plain_cross_entropy(logits, target), rel=1e-5)


def test_dice_counts_classes_that_are_not_there_as_zero(logits: Tensor, target: Tensor) -> None:
    assert float(dice(logits, target, ignore_index=IGNORE)) == pytest.approx(plain_dice(logits, target), rel=1e-5)


def test_dice_of_a_sure_and_right_prediction_is_nothing() -> None:
    target = torch.tensor([[[0, 1], [1, 0]]])
    logits = 50 * torch.nn.functional.one_hot(target, 2).permute(0, 3, 1, 2).float()
    assert float(dice(logits, target, ignore_index=IGNORE)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("shape", [(3, 4, 5), (2, 2, 6), (1, 3, 4)])
def test_contrastive_is_spread_over_distance(shape: tuple[int, int, int]) -> None:
    dictionary = random(*shape, seed=1)
    assert float(contrastive(dictionary)) == pytest.approx(plain_contrastive(dictionary), rel=1e-5, abs=1e-12)


def test_contrastive_of_two_images_and_classes_by_hand() -> None:
    # Centres (1, 0) and (0, 2), each image 1 away: 1 / 5.
    dictionary = torch.tensor([[[0.0, 0.0], [0.0, 1.0]], [[2.0, 0.0], [0.0, 3.0]]])
    assert float(contrastive(dictionary)) == pytest.approx(1 / (5 + 1e-6))


def test_contrastive_of_one_class_has_no_distance_and_is_finite() -> None:
    assert contrastive(random(2, 1, 4)).isfinite()


def test_contrastive_keeps_float64() -> None:
    assert contrastive(random(2, 3, 4).double()).dtype == torch.float64


def test_ignored_pixels_change_no_term(logits: Tensor, target: Tensor) -> None:
    noisy = torch.where((target == IGNORE)[:, None], 30 * random(2, 4, 2, 3, seed=9), logits)
    for term in (cross_entropy, dice):
        assert torch.equal(term(noisy, target, ignore_index=IGNORE), term(logits, target, ignore_index=IGNORE))


@pytest.mark.parametrize("ignore_index", [IGNORE, 3, -1])
def test_any_value_can_be_the_ignored_one(logits: Tensor, target: Tensor, ignore_index: int) -> None:
    other = target.masked_fill(target == IGNORE, ignore_index)
    for term in (cross_entropy, dice):
        expected = term(logits, target, ignore_index=IGNORE)
        assert torch.equal(term(logits, other, ignore_index=ignore_index), expected)


def test_nothing_labelled_gives_zero_and_no_gradient(logits: Tensor) -> None:
    logits.requires_grad_()
    target = torch.full((2, 2, 3), IGNORE)
    loss = cross_entropy(logits, target, ignore_index=IGNORE) + dice(logits, target, ignore_index=IGNORE)
    loss.backward()
    assert loss.detach() == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_total_weighs_the_static_branch_by_0_4(logits: Tensor, target: Tensor) -> None:
    static_logits, dictionary = random(2, 4, 2, 3, seed=5), random(2, 4, 6, seed=6)
    terms = d2ls_loss(TrainingOutput(logits, static_logits, dictionary), target, ignore_index=IGNORE)
    expected = {
        "dynamic_cross_entropy": plain_cross_entropy(logits, target),
        "dynamic_dice": plain_dice(logits, target),
        "contrastive": plain_contrastive(dictionary),
        "static_cross_entropy": plain_cross_entropy(static_logits, target),
        "static_dice": plain_dice(static_logits, target),
    }
    expected["total"] = sum(
        (0.4 if name.startswith("static") else 1.0) * value for name, value in list(expected.items())
    )
    assert {name: float(value) for name, value in terms.items()} == pytest.approx(expected, rel=1e-5)


def test_terms_of_half_precision_outputs_are_in_float32(logits: Tensor, target: Tensor) -> None:
    output = TrainingOutput(logits.bfloat16(), logits.bfloat16(), random(2, 4, 6).bfloat16())
    terms = d2ls_loss(output, target, ignore_index=IGNORE)
    assert {value.dtype for value in terms.values()} == {torch.float32}
    assert {value.shape for value in terms.values()} == {torch.Size([])}
