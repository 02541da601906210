"""Decoder: interactor (Eq. 15), upsampler and dictionary head (Eq. 16)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEADS = 8


class Decoder(nn.Module):
    """Dictionary (B, N, C') and E0 (B, C', h, w) -> logits (B, N, 4h, 4w).

    shared: all images of the batch are one scene, whose dictionary and tokens are the means of theirs, and a pixel's
    place in its image is left out; so a scene's tiles are scored where they share its dictionary. Not in the paper.
    """

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

    def forward(self, dictionary: Tensor, features: Tensor, *, shared: bool = False) -> Tensor:
        height, width = features.shape[-2:]
        position = self.position(height, width).to(features.dtype)  # (h*w, C')
        image = features.flatten(2).transpose(1, 2)  # (B, h*w, C')
        if shared:
            dictionary, position = mean_of_all(dictionary), torch.zeros_like(position)
        tokens = dictionary
        for block in self.blocks:
            tokens, image = block(tokens, image, dictionary, position, shared=shared)
        update = self.final_attention.tokens_query_image(tokens + dictionary, image, position)
        tokens = self.final_norm(tokens + update)
        tokens = mean_of_all(tokens) if shared else tokens
        logits: Tensor = self.upsampler(image, self.dictionary_head(tokens), height, width)
        return logits


class InteractionBlock(nn.Module):
    """One stage: D queries E, then E queries D.

    tokens (B, N, C'), image (B, h*w, C'), token_position (B, N, C') = D0, position (h*w, C') -> new tokens and image.
    shared: the image is asked by the mean of all images' new tokens.
    """

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.dictionary_queries_image = Attention(embed_dim)
        self.norm_dictionary = nn.LayerNorm(embed_dim)
        self.image_queries_dictionary = Attention(embed_dim)
        self.norm_image = nn.LayerNorm(embed_dim)

    def forward(
        self, tokens: Tensor, image: Tensor, token_position: Tensor, position: Tensor, *, shared: bool = False
    ) -> tuple[Tensor, Tensor]:
        update = self.dictionary_queries_image.tokens_query_image(tokens + token_position, image, position)
        tokens = self.norm_dictionary(tokens + update)
        tokens = mean_of_all(tokens) if shared else tokens
        image = self.image_queries_dictionary.image_queries_tokens(image, position, tokens + token_position, tokens)
        return tokens, self.norm_image(image)


class Attention(nn.Module):
    """Dot-product attention of 8 heads and inner width C'/2, between a few tokens (N) and many pixels (M).

    Its products run in the order that is cheap there. With queries q of the tokens, `q . (Wk e)` is `(q Wk) . e`, so
    each head projects the N tokens, not the M pixels, and no tensor of width C'/2 exists per pixel: 8 N values do.
    """

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        inner = embed_dim // 2
        self.q = nn.Linear(embed_dim, inner)
        self.k = nn.Linear(embed_dim, inner)
        self.v = nn.Linear(embed_dim, inner)
        self.out = nn.Linear(inner, embed_dim)
        self.scale = (inner // HEADS) ** -0.5

    def tokens_query_image(self, query: Tensor, image: Tensor, position: Tensor) -> Tensor:
        """query (B, N, C'), image (B, M, C'), position (M, C') -> (B, N, C'); keys: image + position, values: image."""
        weights = self.scores(self.q(query), self.k, image, position).softmax(-1)  # (B, heads, N, M)
        mixed = per_head(torch.bmm(weights.flatten(1, 2), image), axis=1)  # (B, heads, N, C')
        values = torch.einsum("bhnc,hdc->bnhd", mixed, per_head(self.v.weight)).flatten(2) + self.v.bias
        update: Tensor = self.out(values)
        return update

    def image_queries_tokens(self, image: Tensor, position: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """image (B, M, C'), position (M, C'), key and value (B, N, C') -> image + update (B, M, C')."""
        weights = self.scores(self.k(key), self.q, image, position).softmax(-2).flatten(1, 2)  # (B, heads*N, M)
        values = torch.einsum("bnhd,hdc->bhnc", per_head(self.v(value), axis=2), per_head(self.out.weight.T))
        # The weights of a head sum to 1, so a bias shared out over the heads comes through whole.
        values = values + self.out.bias / HEADS
        return torch.baddbmm(image, weights.transpose(1, 2), values.flatten(1, 2))

    def scores(self, tokens: Tensor, layer: nn.Linear, image: Tensor, position: Tensor) -> Tensor:
        """Products of projected tokens (B, N, C'/2) with `layer(image + position)`: (B, heads, N, M)."""
        tokens = per_head(tokens, axis=2) * self.scale  # (B, N, heads, d)
        probe = torch.einsum("bnhd,hdc->bhnc", tokens, per_head(layer.weight)).flatten(1, 2)  # (B, heads*N, C')
        bias = torch.einsum("bnhd,hd->bhn", tokens, per_head(layer.bias)).flatten(1)[..., None]
        placed = torch.matmul(probe, position.T) + bias
        return per_head(torch.baddbmm(placed, probe, image.transpose(1, 2)), axis=1)


def mean_of_all(tokens: Tensor) -> Tensor:
    """(B, N, C') -> the same for all images of the batch."""
    return tokens.mean(0, keepdim=True).expand_as(tokens)


def per_head(values: Tensor, axis: int = 0) -> Tensor:
    """An axis of heads * d values as two, (heads, d)."""
    return torch.unflatten(values, axis, (HEADS, -1))


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
        """(h*w, C')."""
        y, x = torch.meshgrid(self.centres(height), self.centres(width), indexing="ij")
        with torch.autocast(self.gaussian.device.type, enabled=False):
            phase = 2 * math.pi * (torch.stack((x, y), dim=-1) @ self.gaussian)  # (h, w, C'/2)
        return torch.cat((phase.sin(), phase.cos()), dim=-1).flatten(0, 1)

    def projected(self, weight: Tensor, height: int, width: int) -> Tensor:
        """(D, C') float32 -> (heads, D/heads, h*w), what a linear layer makes of every place, without the encoding.

        A phase is the sum of its row's and its column's, so by the sums of angles it is a product of both.
        """
        across, down = (
            2 * math.pi * self.centres(side)[:, None] * axis
            for side, axis in zip((width, height), self.gaussian, strict=True)
        )  # (w, C'/2), (h, C'/2)
        columns = torch.cat((across.sin(), across.cos()), dim=1).T  # (C', w)
        sin, cos = down.sin(), down.cos()
        heads = per_head(weight)
        found = weight.new_empty(*heads.shape[:2], height * width)
        for head, places in zip(heads, found, strict=True):  # one by one: less memory to touch, and faster for it
            of_sines, of_cosines = head[:, None].chunk(2, dim=-1)  # each (D/heads, 1, C'/2)
            sines = of_sines * cos - of_cosines * sin  # (D/heads, h, C'/2)
            cosines = of_sines * sin + of_cosines * cos
            torch.mm(torch.cat((sines, cosines), dim=2).flatten(0, 1), columns, out=places.view(-1, width))
        return found

    def centres(self, side: int) -> Tensor:
        """(side,) from -1 to 1: where the centres of as many pixels lie."""
        places = (torch.arange(side, device=self.gaussian.device, dtype=torch.float32) + 0.5) / side
        return 2 * places - 1


class Upsampler(nn.Module):
    """Image tokens (B, h*w, C') and class vectors (B, N, C'/16) -> logits (B, N, 4h, 4w) (Eq. 16).

    Two pixel shuffles with a norm over channels and a GELU after the first and a GELU after the second, then the
    product with the class vectors. All but the norm's grouping commutes with the shuffles, so pixels move once, at the
    end and as logits, which are fewer than channels.
    """

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(embed_dim // 4, eps=1e-6)

    def forward(self, image: Tensor, classes: Tensor, height: int, width: int) -> Tensor:
        x = torch.unflatten(image, -1, (-1, 4)).transpose(-1, -2)  # (B, h*w, 4, C'/4): a pixel's four parts
        x = F.gelu(F.gelu(self.norm(x.contiguous()))).flatten(1, 2)  # (B, h*w*4, C'/4), each with four parts again
        parts = torch.eye(4, dtype=classes.dtype, device=classes.device)
        spread = torch.einsum("bnc,st->bcsnt", classes, parts).flatten(3).flatten(1, 2)  # (B, C'/4, N*4)
        logits = torch.unflatten(torch.bmm(x, spread), 1, (height, width, 2, 2))
        logits = torch.unflatten(logits, -1, (-1, 2, 2))
        logits = logits.permute(0, 5, 1, 3, 6, 2, 4, 7)  # (B, N, h, 2, 2, w, 2, 2)
        return logits.flatten(5).flatten(2, 4)
