"""The loss of the paper: both branches of Eq. 2, with the contrastive term on the dynamic dictionary."""

from __future__ import annotations

import torch
from torch import Tensor

from d2ls_infer.nn import TrainingOutput

STATIC_WEIGHT = 0.4  # lambda_static of Eq. 2
SMOOTHING = 0.05  # both the label smoothing of the cross entropy and the constant of the Dice term


def d2ls_loss(
    output: TrainingOutput,
    target: Tensor,
    *,
    ignore_index: int,
    static_weight: float = STATIC_WEIGHT,
    dynamic_weight: float = 1.0,
    contrastive_weight: float = 1.0,
    static_dice: bool = True,
    class_weights: Tensor | None = None,
) -> dict[str, Tensor]:
    """Every term by name, and their weighted sum as `total` (Eq. 2-5).

    target: (B, H, W) int64 class indices or `ignore_index`. The terms are scalars in float32. `contrastive_weight` is
    inside the dynamic branch; `static_dice` False leaves cross entropy alone on the static branch, as the released
    configurations have it. class_weights (N,): what a pixel of each class counts in the cross entropy of both branches.
    """
    (dynamic_cross_entropy, dynamic_dice), (static_cross_entropy, static_dice_loss) = (
        region_losses(logits, target, ignore_index=ignore_index, class_weights=class_weights)
        for logits in (output.logits, output.static_logits)
    )
    spread = contrastive(output.dynamic_dictionary)
    dynamic = dynamic_cross_entropy + dynamic_dice + contrastive_weight * spread
    static = static_cross_entropy + static_dice_loss if static_dice else static_cross_entropy
    return {
        "dynamic_cross_entropy": dynamic_cross_entropy,
        "dynamic_dice": dynamic_dice,
        "contrastive": spread,
        "static_cross_entropy": static_cross_entropy,
        "static_dice": static_dice_loss,
        "total": dynamic_weight * dynamic + static_weight * static,
    }


def region_losses(
    logits: Tensor, target: Tensor, *, ignore_index: int, class_weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """logits (B, N, H, W), target (B, H, W) -> cross entropy and Dice, in float32.

    Cross entropy: label smoothing 0.05, mean over labelled pixels, weighed by their classes; 0 where none is labelled.
    Dice: 1 - Dice per class over the batch, counted as 0 for classes that are not in the target, mean over all classes.
    Both come from one log-softmax, and nothing here makes the host wait for the device.
    """
    num_classes = logits.shape[1]
    labelled = target != ignore_index
    index = target.where(labelled, 0)
    log_probabilities = logits.float().log_softmax(1)  # (B, N, H, W)
    at_target = log_probabilities.gather(1, index[:, None])[:, 0]  # (B, H, W)
    smoothed = (1 - SMOOTHING) * at_target + SMOOTHING * log_probabilities.mean(1)
    counted = labelled.float() if class_weights is None else labelled * class_weights[index]
    total = counted.sum()
    cross_entropy = -(smoothed * counted).sum() / total.where(total > 0, 1)

    probabilities = log_probabilities.exp()
    classes = torch.arange(num_classes, device=target.device).view(-1, 1, 1)
    members = (index[:, None] == classes) & labelled[:, None]  # (B, N, H, W)
    truth = members.sum((0, 2, 3)).float()  # (N,)
    shared = (probabilities * members).sum((0, 2, 3))
    predicted = torch.einsum("bnhw,bhw->n", probabilities, labelled.float())
    overlap = (2 * shared + SMOOTHING) / (predicted + truth + SMOOTHING)
    return cross_entropy, ((1 - overlap) * (truth > 0)).mean()


def consistency(logits: Tensor, others: Tensor) -> Tensor:
    """Two (B, N, H, W) of the same pixels, seen in other tiles -> the mean squared distance of their probabilities."""
    return (logits.float().softmax(1) - others.float().softmax(1)).square().sum(1).mean()


def contrastive(dictionary: Tensor) -> Tensor:
    """Dynamic dictionary D0 (B, N, C') -> intra-class spread over inter-class distance (Eq. 5-8)."""
    dictionary = dictionary.float() if dictionary.dtype != torch.float64 else dictionary
    centers = dictionary.mean(0)  # (N, C')
    intra = (dictionary - centers).square().sum(-1).mean()
    first, second = torch.triu_indices(len(centers), len(centers), 1, device=centers.device)  # each (N(N-1)/2,)
    inter = (centers[first] - centers[second]).square().sum(-1).sum() / max(len(first), 1)
    return intra / (inter + 1e-6)
