"""The network as it runs: D2LS with all that does not depend on the pixels worked out beforehand.

Its logits are those of the network it is made of, up to rounding. How much each part is worth is measured by
`tests/benchmarks/forward.py`.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2ls_infer.nn.d2ls import D2LS, autocast, pad_to_stride
from d2ls_infer.nn.decoder import Decoder
from d2ls_infer.nn.dictionary import DictionaryGenerator, Modulator
from d2ls_infer.nn.encoder import Encoder
from d2ls_infer.nn.folded_backbone import folded_backbone
from d2ls_infer.nn.folded_decoder import FoldedDecoder
from d2ls_infer.nn.pixelwise import at_once, convolved_pixels

PARTS = [Encoder, DictionaryGenerator, Decoder]
"""The kinds of a network's parts, in their order."""


@torch.no_grad()
def fold(network: D2LS, dtype: torch.dtype = torch.float32) -> FoldedD2LS:
    """The inference form of a network, on the same device, in eval mode. The network itself stays as it is.

    dtype: float32, bfloat16 or float16, which the products over the pixels run in.
    """
    return FoldedD2LS(copy.deepcopy(network).float().eval(), dtype)


def inference_form(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The form a network runs in: folded, if all its parts are those that folding knows, else the network as it is.

    A class made of D2LS, or one of its parts, may work otherwise; folded, it would be another network.
    """
    if isinstance(network, FoldedD2LS | Unfolded):
        return network
    if (
        type(network) is D2LS
        and [type(part) for part in network.children()] == PARTS
        and type(network.dictionary.modulator) is Modulator
    ):
        return fold(network, dtype)
    return Unfolded(network, dtype)


class Unfolded(nn.Module):
    """(B, C, H, W) normalised pixels -> (B, N, H, W) float32 logits, by a network as it is, in eval mode."""

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.network, self.dtype = network.eval().to(memory_format=torch.channels_last), dtype

    def forward(self, pixels: Tensor) -> Tensor:
        with autocast(pixels.device, self.dtype):
            logits: Tensor = self.network(pixels)
        return logits.float()


class FoldedD2LS(nn.Module):
    """(B, C, H, W) normalised pixels, any H, W >= 1 -> (B, N, H, W) float32 logits. Nothing in it learns.

    `dtype` is for products. What they are added up to stays in float32, and so do the dictionary and its tokens, a few
    vectors. Takes the network apart; `fold` gives it a copy.

    The class embeddings of an image, as they are after each step, are its `embeddings` (B, L + 2, N, C') float32: the
    dynamic dictionary D0, those that the L stages made of it by asking the image, and the last. Given from elsewhere,
    the image is not asked: every pixel is classified by what is around it alone, wherever in the image it lies (the
    positional encoding is left out), and it takes less time.
    """

    def __init__(self, network: D2LS, dtype: torch.dtype) -> None:
        super().__init__()
        self.config, self.dtype = network.config, dtype
        # Pixel shuffles take every fourth channel. In this order, kept throughout, those are neighbours.
        order = torch.arange(self.config.embed_dim).view(-1, 4).T.flatten()
        self.mapping = FoldedMapping(network.encoder, order)
        self.encoder = without_mapping(network.encoder, self.config.in_channels, dtype)
        self.dictionary = FoldedDictionary(network.dictionary)
        self.decoder = FoldedDecoder(network.decoder, order, dtype)
        self.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    @torch.no_grad()
    def forward(self, pixels: Tensor, embeddings: Tensor | None = None) -> Tensor:
        """embeddings: (L + 2, N, C') for all images of the batch; by default each has its own."""
        height, width = pixels.shape[-2:]
        levels = self.levels(pixels)
        with torch.autocast(pixels.device.type, enabled=False):  # from here on, types are said where they change
            features = self.mapping(levels)
            logits: Tensor
            if embeddings is None:
                logits = self.decoder(self.dictionary(levels[-1]), features)
            else:
                logits = self.decoder.classify(embeddings, features)
        return logits[..., :height, :width]

    @torch.no_grad()
    def embeddings(self, pixels: Tensor) -> Tensor:
        """(B, C, H, W) normalised pixels -> (B, L + 2, N, C') float32, those of each image."""
        levels = self.levels(pixels)
        with torch.autocast(pixels.device.type, enabled=False):
            _, tokens = self.decoder.interact(self.dictionary(levels[-1]), self.mapping(levels))
        return torch.stack(tokens, 1)

    def levels(self, pixels: Tensor) -> list[Tensor]:
        """F1..F4 float32 of the backbone."""
        pixels = pad_to_stride(pixels).contiguous(memory_format=torch.channels_last)
        with autocast(pixels.device, self.dtype):
            levels = self.encoder.backbone_features(pixels)
        return [level.float() for level in levels]


class ByEmbeddings(nn.Module):
    """(B, C, H, W) normalised pixels -> (B, N, H, W) float32 logits: a folded network by given embeddings."""

    def __init__(self, network: nn.Module, embeddings: Tensor) -> None:
        super().__init__()
        self.network, self.given = network, nn.Buffer(embeddings)

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.network(pixels, self.given)
        return logits


class FoldedMapping(nn.Module):
    """F1..F4 float32 -> E0 (B, C', h, w) float32, channels last: `Encoder.folded`, worked out.

    Resizing keeps constants, so one bias serves all levels.
    """

    def __init__(self, encoder: Encoder, order: Tensor) -> None:
        super().__init__()
        weights, biases = zip(*encoder.folded(), strict=True)
        self.weights = nn.ParameterList(weight[order] for weight in weights)
        self.bias = nn.Parameter(torch.stack(biases).sum(0)[order])

    def forward(self, levels: list[Tensor]) -> Tensor:
        total = convolved_pixels(levels[0], self.weights[0], self.bias)
        resized = None if at_once(total) else torch.empty_like(total)
        for level, weight in zip(levels[1:], self.weights[1:], strict=True):
            mapped = convolved_pixels(level, weight)
            if resized is None:
                total += F.interpolate(mapped, total.shape[-2:], mode="bilinear", align_corners=False)
            else:  # the same, into memory that is there already
                total += torch.ops.aten.upsample_bilinear2d.out(mapped, total.shape[-2:], False, out=resized)
        return total


class FoldedDictionary(nn.Module):
    """F4 (B, C4, h, w) -> dynamic dictionary D0 (B, N, C'). The variants are the same for every image."""

    def __init__(self, generator: DictionaryGenerator) -> None:
        super().__init__()
        self.modulator = generator.modulator
        self.variants = nn.Parameter(generator.expand(generator.static).reshape(*self.modulator.shape, -1))

    def forward(self, deepest: Tensor) -> Tensor:
        return torch.einsum("bnr,nrc->bnc", self.modulator(deepest), self.variants)


def without_mapping(encoder: Encoder, in_channels: int, dtype: torch.dtype) -> Encoder:
    """The encoder itself, without mapping and aggregator, and its backbone ready to run."""
    del encoder.mapping, encoder.aggregator
    encoder.backbone = folded_backbone(encoder.backbone, in_channels, None if encoder.float32_on_cpu else dtype)
    return encoder
