"""Every term of the loss, worked out by loops in float64 on tiny tensors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from d2ls_infer.nn import TrainingOutput
from d2ls_infer.train.losses import SMOOTHING, STATIC_WEIGHT, consistency, contrastive, d2ls_loss, region_losses

IGNORE = 255
TERMS = ("dynamic_cross_entropy", "dynamic_dice", "contrastive", "static_cross_entropy", "static_dice", "total")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def logits() -> Tensor:
    return 2 * random(2, 4, 2, 3)


@pytest.fixture
def target() -> Tensor:
    # Class 3 occurs nowhere, and three pixels are not labelled.
    return torch.tensor([[[0, 1, IGNORE], [2, 2, 0]], [[IGNORE, 1, 1], [0, IGNORE, 2]]])


@pytest.fixture
def output(logits: Tensor) -> TrainingOutput:
    return TrainingOutput(logits, random(2, 4, 2, 3, seed=5), random(2, 4, 6, seed=6))


def labelled_pixels(logits: Tensor, target: Tensor) -> list[tuple[list[float], int]]:
    """Per labelled pixel, the softmax over classes and the class."""
    pixels = logits.double().permute(0, 2, 3, 1).reshape(-1, logits.shape[1]).tolist()
    softmax = [[math.exp(z) / sum(math.exp(other) for other in pixel) for z in pixel] for pixel in pixels]
    return [(p, t) for p, t in zip(softmax, target.flatten().tolist(), strict=True) if t != IGNORE]


def plain_cross_entropy(logits: Tensor, target: Tensor) -> float:
    losses = []
    for p, truth in labelled_pixels(logits, target):
        wanted = [0.05 / len(p) + 0.95 * (c == truth) for c in range(len(p))]
        losses.append(-sum(w * math.log(value) for w, value in zip(wanted, p, strict=True)))
    return sum(losses) / len(losses) if losses else 0.0


def plain_dice(logits: Tensor, target: Tensor) -> float:
    losses = []
    labelled = labelled_pixels(logits, target)
    for c in range(logits.shape[1]):
        shared = sum(p[c] for p, t in labelled if t == c)
        size = sum(p[c] + (t == c) for p, t in labelled)
        present = any(t == c for _, t in labelled)
        losses.append(1 - (2 * shared + 0.05) / (size + 0.05) if present else 0.0)
    return sum(losses) / len(losses)


def plain_contrastive(dictionary: Tensor) -> float:
    d = dictionary.double().numpy()
    batch, classes, _ = d.shape
    centers = [np.sum([d[b, i] for b in range(batch)], axis=0) / batch for i in range(classes)]
    intra = sum(np.sum((d[b, i] - centers[i]) ** 2) for b in range(batch) for i in range(classes))
    inter = sum(np.sum((centers[i] - centers[j]) ** 2) for i in range(classes - 1) for j in range(i + 1, classes))
    return float(intra / (batch * classes) / (2 / (classes * (classes - 1)) * inter + 1e-6))


def plain_terms(output: TrainingOutput, target: Tensor, **options: Any) -> dict[str, float]:
    dynamic, static = (
        (plain_cross_entropy(logits, target), plain_dice(logits, target))
        for logits in (output.logits, output.static_logits)
    )
    spread = plain_contrastive(output.dynamic_dictionary)
    static_total = static[0] + (static[1] if options.get("static_dice", True) else 0.0)
    dynamic_total = dynamic[0] + dynamic[1] + options.get("contrastive_weight", 1.0) * spread
    total = options.get("dynamic_weight", 1.0) * dynamic_total + options.get("static_weight", 0.4) * static_total
    return dict(zip(TERMS, (*dynamic, spread, *static, total), strict=True))


# Cross entropy and Dice


def test_constants_are_the_papers() -> None:
    assert (STATIC_WEIGHT, SMOOTHING) == (0.4, 0.05)


def test_region_losses_are_those_of_the_loops(logits: Tensor, target: Tensor) -> None:
    cross_entropy, dice = region_losses(logits, target, ignore_index=IGNORE)
    assert float(cross_entropy) == pytest.approx(plain_cross_entropy(logits, target), rel=1e-5)
    assert float(dice) == pytest.approx(plain_dice(logits, target), rel=1e-5)


def test_class_weights_weigh_pixels_in_the_cross_entropy_alone(logits: Tensor, target: Tensor) -> None:
    weights = [3.0, 1.0, 0.5, 7.0]
    cross_entropy, dice = region_losses(logits, target, ignore_index=IGNORE, class_weights=torch.tensor(weights))
    total = loss = 0.0
    for p, truth in labelled_pixels(logits, target):
        wanted = [0.05 / len(p) + 0.95 * (c == truth) for c in range(len(p))]
        loss -= weights[truth] * sum(w * math.log(value) for w, value in zip(wanted, p, strict=True))
        total += weights[truth]
    assert float(cross_entropy) == pytest.approx(loss / total, rel=1e-5)
    assert float(dice) == pytest.approx(plain_dice(logits, target), rel=1e-5)


def test_class_weights_reach_both_branches(output: TrainingOutput, target: Tensor) -> None:
    weights = torch.tensor([3.0, 1.0, 0.5, 7.0])
    terms = d2ls_loss(output, target, ignore_index=IGNORE, class_weights=weights)
    for name, logits in (("dynamic", output.logits), ("static", output.static_logits)):
        expected = region_losses(logits, target, ignore_index=IGNORE, class_weights=weights)[0]
        assert torch.equal(terms[f"{name}_cross_entropy"], expected)


def test_small_class_weights_are_a_mean_all_the_same(logits: Tensor, target: Tensor) -> None:
    tiny, plain = (
        region_losses(logits, target, ignore_index=IGNORE, class_weights=weights)[0]
        for weights in (torch.full((4,), 1e-4), None)
    )
    assert float(tiny) == pytest.approx(float(plain), rel=1e-5)


def test_region_losses_of_two_pixels_by_hand() -> None:
    # Probabilities 3/4 and 1/4 at the pixel of class 0, 1/2 and 1/2 at that of class 1; class 2 nearly none and absent.
    logits = torch.tensor([[[math.log(3.0), 0.0]], [[0.0, 0.0]], [[-60.0, -60.0]]])[None]
    target = torch.tensor([[[0, 1]]])
    _, dice = region_losses(logits, target, ignore_index=IGNORE)
    first = 1 - (2 * 0.75 + 0.05) / (0.75 + 0.5 + 1 + 0.05)
    second = 1 - (2 * 0.5 + 0.05) / (0.25 + 0.5 + 1 + 0.05)
    assert float(dice) == pytest.approx((first + second) / 3, rel=1e-5)
    cross_entropy, _ = region_losses(logits[:, :2], target, ignore_index=IGNORE)
    at_first = -(0.975 * math.log(0.75) + 0.025 * math.log(0.25))
    assert float(cross_entropy) == pytest.approx((at_first + math.log(2)) / 2, rel=1e-5)


def test_cross_entropy_is_torchs_with_smoothed_labels(logits: Tensor, target: Tensor) -> None:
    got, _ = region_losses(logits, target, ignore_index=IGNORE)
    torch.testing.assert_close(got, F.cross_entropy(logits, target, ignore_index=IGNORE, label_smoothing=0.05))


def test_gradients_are_those_of_a_one_hot_form(logits: Tensor, target: Tensor) -> None:
    logits.requires_grad_()
    labelled = (target != IGNORE)[:, None]
    truth = F.one_hot(target.where(target != IGNORE, 0), 4).permute(0, 3, 1, 2) * labelled
    p = logits.softmax(1) * labelled
    parts = (2 * (p * truth).sum((0, 2, 3)) + 0.05) / ((p + truth).sum((0, 2, 3)) + 0.05)
    plain = F.cross_entropy(logits, target, ignore_index=IGNORE, label_smoothing=0.05)
    plain = plain + ((1 - parts) * (truth.sum((0, 2, 3)) > 0)).mean()
    got = sum(region_losses(logits, target, ignore_index=IGNORE))
    assert isinstance(got, Tensor)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (got, plain)))


@pytest.mark.parametrize("absent", [(3,), (0, 3), (1, 2, 3)])
def test_dice_counts_classes_that_are_not_there_as_zero(logits: Tensor, absent: tuple[int, ...]) -> None:
    here = [c for c in range(4) if c not in absent]
    target = torch.tensor(here)[torch.arange(12) % len(here)].reshape(2, 2, 3)
    _, dice = region_losses(logits, target, ignore_index=IGNORE)
    assert float(dice) == pytest.approx(plain_dice(logits, target), rel=1e-5)
    assert float(dice) <= len(here) / 4


def test_dice_is_of_the_whole_batch_and_not_a_mean_over_images(logits: Tensor) -> None:
    target = torch.stack([torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.int64)])
    _, together = region_losses(logits, target, ignore_index=IGNORE)
    assert float(together) == pytest.approx(plain_dice(logits, target), rel=1e-5)
    apart = [region_losses(logits[b : b + 1], target[b : b + 1], ignore_index=IGNORE)[1] for b in range(2)]
    assert float(together) != pytest.approx(float(sum(apart)) / 2, rel=1e-2)


def test_dice_of_a_sure_and_right_prediction_is_nothing() -> None:
    target = torch.tensor([[[0, 1], [1, 0]]])
    logits = 50 * F.one_hot(target, 2).permute(0, 3, 1, 2).float()
    assert float(region_losses(logits, target, ignore_index=IGNORE)[1]) == pytest.approx(0, abs=1e-6)


def test_ignored_pixels_change_no_term(logits: Tensor, target: Tensor) -> None:
    noisy = torch.where((target == IGNORE)[:, None], 30 * random(2, 4, 2, 3, seed=9), logits)
    for ours, other in zip(
        region_losses(noisy, target, ignore_index=IGNORE),
        region_losses(logits, target, ignore_index=IGNORE),
        strict=True,
    ):
        assert torch.equal(ours, other)


@pytest.mark.parametrize("ignore_index", [IGNORE, 3, -1])
def test_any_value_can_be_the_ignored_one(logits: Tensor, target: Tensor, ignore_index: int) -> None:
    other = target.masked_fill(target == IGNORE, ignore_index)
    expected = region_losses(logits, target, ignore_index=IGNORE)
    assert region_losses(logits, other, ignore_index=ignore_index) == expected


def test_nothing_labelled_gives_zero_and_no_gradient(logits: Tensor) -> None:
    logits.requires_grad_()
    target = torch.full((2, 2, 3), IGNORE)
    loss = sum(region_losses(logits, target, ignore_index=IGNORE))
    assert isinstance(loss, Tensor)
    loss.backward()
    assert loss.detach() == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_very_sure_and_wrong_predictions_stay_finite() -> None:
    target = torch.tensor([[[0, 1], [1, 0]]])
    logits = (-1e4 * F.one_hot(target, 2).permute(0, 3, 1, 2).float()).requires_grad_()
    cross_entropy, dice = region_losses(logits, target, ignore_index=IGNORE)
    (cross_entropy + dice).backward()
    assert logits.grad is not None
    assert torch.stack([cross_entropy, dice]).isfinite().all()
    assert logits.grad.isfinite().all()


# Contrastive


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


# Consistency


def test_consistency_of_two_pixels_by_hand() -> None:
    """Sure and opposite in the one, the same in the other: 1² + 1², and nothing."""
    one, other = torch.tensor([[[[40.0, 3.0]], [[-40.0, 1.0]]]]), torch.tensor([[[[-40.0, 5.0]], [[40.0, 3.0]]]])
    assert float(consistency(one, other)) == pytest.approx(1.0)
    assert float(consistency(one, one.half())) == pytest.approx(0.0, abs=1e-6)


def test_consistency_is_the_loops(logits: Tensor) -> None:
    others = random(2, 4, 2, 3, seed=9)
    pairs = zip(*(labelled_pixels(both, torch.zeros(2, 2, 3)) for both in (logits, others)), strict=True)
    distances = [sum((p - q) ** 2 for p, q in zip(one, other, strict=True)) for (one, _), (other, _) in pairs]
    assert float(consistency(logits, others)) == pytest.approx(sum(distances) / len(distances), rel=1e-5)


# The whole


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"static_weight": 0.0},
        {"static_weight": 1.7},
        {"dynamic_weight": 0.3},
        {"dynamic_weight": 0.0, "static_weight": 1.0},
        {"contrastive_weight": 0.0},
        {"contrastive_weight": 5.0, "dynamic_weight": 0.5},
        {"static_dice": False},
        {"static_dice": False, "static_weight": 2.0, "dynamic_weight": 3.0, "contrastive_weight": 0.1},
    ],
)
def test_every_term_and_their_weighted_sum(output: TrainingOutput, target: Tensor, options: dict[str, Any]) -> None:
    got = {name: float(value) for name, value in d2ls_loss(output, target, ignore_index=IGNORE, **options).items()}
    assert got == pytest.approx(plain_terms(output, target, **options), rel=1e-5)


def test_total_alone_carries_the_gradient_to_both_branches_and_the_dictionary(
    output: TrainingOutput, target: Tensor
) -> None:
    leaves = [part.requires_grad_() for part in output]
    terms = d2ls_loss(output, target, ignore_index=IGNORE)
    assert all(grad.any() for grad in torch.autograd.grad(terms["total"], leaves))


def test_a_weight_of_zero_cuts_a_branch_off(output: TrainingOutput, target: Tensor) -> None:
    leaves = [part.requires_grad_() for part in output]
    total = d2ls_loss(output, target, ignore_index=IGNORE, static_weight=0.0, contrastive_weight=0.0)["total"]
    dynamic, static, dictionary = torch.autograd.grad(total, leaves)
    assert dynamic.any()
    assert not static.any()
    assert not dictionary.any()


def test_terms_of_half_precision_outputs_are_in_float32(logits: Tensor, target: Tensor) -> None:
    output = TrainingOutput(logits.bfloat16(), logits.bfloat16(), random(2, 4, 6).bfloat16())
    terms = d2ls_loss(output, target, ignore_index=IGNORE)
    assert {value.dtype for value in terms.values()} == {torch.float32}
    assert {value.shape for value in terms.values()} == {torch.Size([])}
    assert float(terms["dynamic_dice"]) == pytest.approx(plain_dice(logits.bfloat16(), target), rel=1e-5)
