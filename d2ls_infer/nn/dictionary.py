"""Dictionary generator: the static dictionary, and the modulator that makes it dynamic (Eq. 11-14)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Modulator(nn.Module):
    """F4 (B, C4, h, w) -> attention A (B, N, r), which sums to 1 over r (Eq. 12 and 13)."""

    def __init__(self, in_channels: int, num_classes: int, embed_dim: int, reduction: int) -> None:
        super().__init__()
        half = embed_dim // 2
        self.shape = (num_classes, reduction)
        self.project = nn.Conv2d(in_channels, embed_dim, 1)
        self.max_branch = nn.Linear(half, half)
        self.avg_branch = nn.Linear(half, half)
        self.head = nn.Sequential(
            nn.Linear(embed_dim, 2 * embed_dim), nn.ReLU(), nn.Linear(2 * embed_dim, num_classes * reduction)
        )

    def forward(self, deepest: Tensor) -> Tensor:
        for_max, for_avg = self.project(deepest).flatten(2).chunk(2, dim=1)  # each (B, C'/2, h*w)
        pooled = torch.cat((self.max_branch(for_max.amax(-1)), self.avg_branch(for_avg.mean(-1))), dim=1)
        attention: Tensor = self.head(pooled)
        return attention.reshape(-1, *self.shape).softmax(-1)


class DictionaryGenerator(nn.Module):
    """F4 (B, C4, h, w) -> static dictionary Ds (N, C'), dynamic dictionary D0 (B, N, C'), attention A (B, N, r)."""

    def __init__(self, in_channels: int, num_classes: int, embed_dim: int, reduction: int) -> None:
        super().__init__()
        self.static = nn.Parameter(torch.randn(num_classes, embed_dim))
        self.expand = nn.Linear(embed_dim, reduction * embed_dim)
        self.modulator = Modulator(in_channels, num_classes, embed_dim, reduction)

    def forward(self, deepest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        attention = self.modulator(deepest)
        variants = self.expand(self.static).reshape(*attention.shape[1:], -1)  # (N, r, C')
        dynamic = torch.einsum("bnr,nrc->bnc", attention, variants.to(attention.dtype))
        return self.static, dynamic, attention
