"""The loss of the paper: both branches of Eq. 2, with the contrastive term on the dynamic dictionary."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from d2ls_infer.nn import TrainingOutput

STATIC_WEIGHT = 0.4  # lambda_static of Eq. 2
SMOOTHING = 0.05  # both the label smoothing of the cross entropy and the constant of the Dice term


def d2ls_loss(output: TrainingOutput, target: Tensor, *, ignore_index: int) -> dict[str, Tensor]:
    """Every term by name, and their weighted sum as `total` (Eq. 2-5).

    target: (B, H, W) int64 class indices or `ignore_index`. The terms are scalars in float32.
    """
    terms = {
        "dynamic_cross_entropy": cross_entropy(output.logits, target, ignore_index=ignore_index),
        "dynamic_dice": dice(output.logits, target, ignore_index=ignore_index),
        "contrastive": contrastive(output.dynamic_dictionary),
        "static_cross_entropy": cross_entropy(output.static_logits, target, ignore_index=ignore_index),
        "static_dice": dice(output.static_logits, target, ignore_index=ignore_index),
    }
    dynamic = terms["dynamic_cross_entropy"] + terms["dynamic_dice"] + terms["contrastive"]
    static = terms["static_cross_entropy"] + terms["static_dice"]
    return {**terms, "total": dynamic + STATIC_WEIGHT * static}


def cross_entropy(logits: Tensor, target: Tensor, *, ignore_index: int) -> Tensor:
    """Cross entropy with label smoothing 0.05, mean over labelled pixels; 0 where no pixel is labelled."""
    total = F.cross_entropy(
        logits.float(), target, ignore_index=ignore_index, label_smoothing=SMOOTHING, reduction="sum"
    )
    return total / (target != ignore_index).sum().clamp_min(1)


def dice(logits: Tensor, target: Tensor, *, ignore_index: int) -> Tensor:
    """1 - Dice per class over the batch, counted as 0 for classes that are not in the target, mean over all classes."""
    num_classes = logits.shape[1]
    labelled = (target != ignore_index)[:, None]  # (B, 1, H, W)
    probabilities = logits.float().softmax(1) * labelled
    truth = F.one_hot(target.where(labelled[:, 0], 0), num_classes).permute(0, 3, 1, 2) * labelled  # (B, N, H, W)
    over = (0, 2, 3)
    shared, size, present = (probabilities * truth).sum(over), (probabilities + truth).sum(over), truth.sum(over) > 0
    return ((1 - (2 * shared + SMOOTHING) / (size + SMOOTHING)) * present).mean()


def contrastive(dictionary: Tensor) -> Tensor:
    """Dynamic dictionary D0 (B, N, C') -> intra-class spread over inter-class distance (Eq. 5-8)."""
    dictionary = dictionary.float() if dictionary.dtype != torch.float64 else dictionary
    centers = dictionary.mean(0)  # (N, C')
    intra = (dictionary - centers).square().sum(-1).mean()
    pairs = torch.combinations(torch.arange(len(centers), device=centers.device))  # (N(N-1)/2, 2)
    inter = (centers[pairs[:, 0]] - centers[pairs[:, 1]]).square().sum(-1).sum() / max(len(pairs), 1)
    return intra / (inter + 1e-6)
