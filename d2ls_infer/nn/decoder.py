"""Decoder: interactor (Eq. 15), upsampler and dictionary head (Eq. 16)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEADS = 8


class Decoder(nn.Module):
    """Dictionary (B, N, C') and E0 (B, C', h, w) -> logits (B, N, 4h, 4w)."""

    def __init__(self, embed_dim: int, stages: int) -> None:
        super().__init__()
        self.position = PositionalEncoding(embed_dim)
        self.blocks = nn.ModuleList(InteractionBlock(embed_dim) for _ in range(stages))
        self.final_attention = Attention(embed_dim)
        self.final_norm = nn.LayerNorm(embed_dim)
        self.upsampler = Upsampler(embed_dim)
        self.dictionary_head = nn.Sequential(
            nn.Linear(embed_dim, embed_dim),
            nn.ReLU(),
            nn.Linear(embed_dim, embed_dim),
            nn.ReLU(),
            nn.Linear(embed_dim, embed_dim // 16),
        )

    def forward(self, dictionary: Tensor, features: Tensor) -> Tensor:
        height, width = features.shape[-2:]
        position = self.position(height, width).to(features.dtype)  # (h*w, C')
        image = features.flatten(2).transpose(1, 2)  # (B, h*w, C')
        tokens = dictionary
        for block in self.blocks:
            tokens, image = block(tokens, image, dictionary, position)
        tokens = self.final_norm(tokens + self.final_attention(tokens + dictionary, image + position, image))
        pixels = self.upsampler(image.transpose(1, 2).reshape(features.shape))
        return torch.einsum("bnc,bchw->bnhw", self.dictionary_head(tokens), pixels)


class InteractionBlock(nn.Module):
    """One stage: D queries E, then E queries D.

    tokens (B, N, C'), image (B, h*w, C'), token_position (B, N, C') = D0, position (h*w, C') -> new tokens and image.
    """

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.dictionary_queries_image = Attention(embed_dim)
        self.norm_dictionary = nn.LayerNorm(embed_dim)
        self.image_queries_dictionary = Attention(embed_dim)
        self.norm_image = nn.LayerNorm(embed_dim)

    def forward(self, tokens: Tensor, image: Tensor, token_position: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        placed = image + position
        update = self.dictionary_queries_image(tokens + token_position, placed, image)
        tokens = self.norm_dictionary(tokens + update)
        update = self.image_queries_dictionary(placed, tokens + token_position, tokens)
        return tokens, self.norm_image(image + update)


class Attention(nn.Module):
    """Dot-product attention of 8 heads and inner width C'/2: (B, Q, C'), (B, K, C'), (B, K, C') -> (B, Q, C')."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        inner = embed_dim // 2
        self.q = nn.Linear(embed_dim, inner)
        self.k = nn.Linear(embed_dim, inner)
        self.v = nn.Linear(embed_dim, inner)
        self.out = nn.Linear(inner, embed_dim)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (
            layer(x).reshape(*x.shape[:2], HEADS, -1).transpose(1, 2)  # (B, heads, tokens, C'/16)
            for layer, x in ((self.q, query), (self.k, key), (self.v, value))
        )
        attended = F.scaled_dot_product_attention(q, k, v)
        update: Tensor = self.out(attended.transpose(1, 2).flatten(2))
        return update


class PositionalEncoding(nn.Module):
    """Random Fourier features of the pixel centres of an (h, w) grid: (h*w, C') float32, whatever the compute type."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.gaussian: Tensor
        self.register_buffer("gaussian", torch.randn(2, embed_dim // 2))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PositionalEncoding:
        # `.half()` and `.double()` of the network move this buffer, but do not round it.
        self.gaussian = self.gaussian.to(fn(self.gaussian).device)
        return self

    def forward(self, height: int, width: int) -> Tensor:
        gaussian = self.gaussian
        rows = (torch.arange(height, device=gaussian.device, dtype=torch.float32) + 0.5) / height
        cols = (torch.arange(width, device=gaussian.device, dtype=torch.float32) + 0.5) / width
        y, x = torch.meshgrid(2 * rows - 1, 2 * cols - 1, indexing="ij")
        with torch.autocast(gaussian.device.type, enabled=False):
            phase = 2 * math.pi * (torch.stack((x, y), dim=-1) @ gaussian)  # (h, w, C'/2)
        return torch.cat((phase.sin(), phase.cos()), dim=-1).flatten(0, 1)


class Upsampler(nn.Module):
    """(B, C', h, w) -> (B, C'/16, 4h, 4w): two pixel shuffles, with a norm over channels after the first."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(embed_dim // 4, eps=1e-6)

    def forward(self, image: Tensor) -> Tensor:
        x = F.pixel_shuffle(image, 2)  # (B, C'/4, 2h, 2w)
        x = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return F.gelu(F.pixel_shuffle(F.gelu(x), 2))
