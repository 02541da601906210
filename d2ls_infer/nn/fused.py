"""The inference form on CUDA in half precision: the same arithmetic in fewer passes over memory.

A GPU multiplies so fast that what is left of a network is reading and writing: norms, GELUs, sums and copies took more
time than the products. Here they are part of the kernels before or after them. How much each is worth is measured by
`tests/benchmarks/gpu.py`.
"""

from __future__ import annotations

import copy
import logging
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import GELU, GELUTanh
from timm.models.convnext import ConvNeXtBlock
from torch import Tensor, nn

from d2ls_infer.nn.decoder import HEADS, per_head
from d2ls_infer.nn.folded import (
    ByEmbeddings,
    FoldedBlock,
    FoldedD2LS,
    FoldedMapping,
    FoldedUpsampler,
    ImageQueriesTokens,
    PiecewiseMlp,
    TokensQueryImage,
)

log = logging.getLogger(__name__)

HALF = (torch.bfloat16, torch.float16)

PIXELS = 64
"""Side of what the kernels are tried on."""


def as_cuda_runs_it(network: nn.Module) -> nn.Module:
    """A network on CUDA in the form it is fastest in: fused, if it is known here and its kernels work."""
    if isinstance(network, ByEmbeddings):
        return ByEmbeddings(as_cuda_runs_it(network.network), network.given)
    device = next(network.parameters()).device
    if not can_fuse(network, device):
        return network
    assert isinstance(network, FoldedD2LS)
    try:
        fused = fuse(network)
        fused(torch.zeros(1, network.config.in_channels, PIXELS, PIXELS, device=device))
        torch.cuda.synchronize(device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # Triton has many, first of all for want of a C compiler
        reason = str(error).strip().partition("\n")[0]
        log.warning("the network runs without kernels of its own, which is slower: %s", reason)
        return network
    return fused


def can_fuse(network: nn.Module, device: torch.device) -> bool:
    """Whether a network is one that this knows, on a device for it."""
    return (
        device.type == "cuda"
        and torch.version.cuda is not None
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and find_spec("triton") is not None
        and isinstance(network, FoldedD2LS)
        and network.dtype in HALF
    )


@torch.no_grad()
def fuse(
    network: FoldedD2LS, *, sums: torch.dtype = torch.float32, encoder: bool = True, decoder: bool = True
) -> FoldedD2LS:
    """A network in its inference form for CUDA; both share their weights.

    sums: what the blocks of a ConvNeXt are added up in. encoder, decoder: which of both; the other stays as it is. What
    is not known here stays as it is too.
    """
    network = copy.deepcopy(network, {id(parameter): parameter for parameter in network.parameters()})
    if encoder:
        for stage in network.encoder.backbone.modules():
            blocks = getattr(stage, "blocks", None)
            if isinstance(blocks, nn.Sequential) and len(blocks) and all(map(is_usual, blocks)):
                stage.blocks = FusedBlocks(list(blocks), sums)
    width = network.config.embed_dim
    if decoder and network.config.num_classes <= most_classes() and width & (width - 1) == 0 and width >= 64:
        for module in network.modules():
            if kind := FUSED.get(type(module)):
                module.__class__ = kind  # the same weights, run otherwise
    return network


def most_classes() -> int:
    """For how many classes there are kernels."""
    from d2ls_infer.nn.kernels import MOST_CLASSES

    return MOST_CLASSES


def is_usual(block: nn.Module) -> bool:
    """Whether a module is a folded block of ConvNeXt without further options."""
    return (
        isinstance(block, ConvNeXtBlock)
        and isinstance(block.mlp, PiecewiseMlp)
        and isinstance(block.mlp.act, nn.GELU | GELU | GELUTanh)
        and isinstance(block.shortcut, nn.Identity)
        and isinstance(block.norm, nn.LayerNorm)
        and not block.use_conv_mlp
        and (block.conv_dw.kernel_size, block.conv_dw.padding) == ((7, 7), (3, 3))
        and (block.conv_dw.stride, block.conv_dw.dilation) == ((1, 1), (1, 1))
        and block.conv_dw.groups == block.conv_dw.in_channels == block.conv_dw.out_channels
    )


class FusedBlocks(nn.Module):
    """(B, C, h, w) -> the same after all blocks of a stage, in the type of the sums, channels last.

    The last bias of a block is not added to the sum, which is written by the product itself: it is the same for all
    pixels, and what a convolution makes of a constant is a constant, if the same constant stands around the image too.
    Only the end of the stage gets them all.
    """

    def __init__(self, blocks: list[Any], sums: torch.dtype) -> None:
        super().__init__()
        self.sums = sums
        owed = torch.zeros_like(blocks[0].conv_dw.bias, dtype=torch.float32)
        made = []
        for block in blocks:
            made.append(FusedConvNeXtBlock(block, owed))
            owed = owed + block.mlp.fc2.bias.float()
        self.blocks = nn.ModuleList(made)
        self.owed = nn.Buffer(owed)

    def forward(self, x: Tensor) -> Tensor:
        # A copy, since the sum is written over.
        total = x.permute(0, 2, 3, 1).to(self.sums, memory_format=torch.contiguous_format, copy=True)
        with torch.autocast(x.device.type, enabled=False):
            for block in self.blocks:
                block(total)
            total += self.owed
        return total.permute(0, 3, 1, 2)


class FusedConvNeXtBlock(nn.Module):
    """Adds to a sum (B, h, w, C), of which `owed` (C,) is still to be added, what a block makes of it."""

    def __init__(self, block: Any, owed: Tensor) -> None:
        super().__init__()
        weight = block.conv_dw.weight.flatten(1).T.contiguous()  # (49, C)
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(block.conv_dw.bias.float() + owed * weight.float().sum(0))
        self.outside = nn.Buffer(-owed)
        self.gain, self.shift, self.eps = block.norm.weight, block.norm.bias, block.norm.eps
        self.widen, self.narrow = block.mlp.fc1, block.mlp.fc2

    def forward(self, total: Tensor) -> None:
        from d2ls_infer.nn.kernels import depthwise_norm

        normed = depthwise_norm(total, self.weight, self.bias, self.outside, self.gain, self.shift, self.eps)
        hidden = widened(normed.flatten(0, 2), self.widen.weight, self.widen.bias)
        add_product(total.flatten(0, 2), hidden, self.narrow.weight)


def widened(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`gelu(linear(rows))` as one kernel of cuBLAS, which has GELU's usual approximation, off by less than 0.0005."""
    return torch._addmm_activation(bias, rows, weight.T, use_gelu=True)


def add_product(total: Tensor, hidden: Tensor, weight: Tensor) -> None:
    """`total += hidden @ weight.T`, with the sum in the type of the total."""
    if total.dtype == hidden.dtype:
        total.addmm_(hidden, weight.T)
    elif total.is_cuda and adds_in_float32(hidden.dtype):
        torch.addmm(total, hidden, weight.T, out_dtype=total.dtype, out=total)
    else:
        total += hidden @ weight.T


@cache
def adds_in_float32(dtype: torch.dtype) -> bool:
    """Whether this torch adds a product in half precision to a sum in float32 in one kernel; 2.7 does not."""
    total, hidden = torch.zeros(16, 16, device="cuda"), torch.ones(16, 16, device="cuda", dtype=dtype)
    try:
        torch.addmm(total, hidden, hidden, out_dtype=total.dtype, out=total)
    except (RuntimeError, TypeError) as error:
        log.info("products are added to float32 by a kernel of its own: %s", error)
        return False
    return bool((total == 16).all())


class FusedMapping(FoldedMapping):
    """`FoldedMapping` whose resized levels are added in one pass."""

    def forward(self, levels: list[Tensor]) -> Tensor:
        from d2ls_infer.nn.kernels import resized_sum

        finest, *others = (
            F.conv2d(level, weight, self.bias if index == 0 else None).permute(0, 2, 3, 1).contiguous()
            for index, (level, weight) in enumerate(zip(levels, self.weights, strict=True))
        )
        return resized_sum(finest, others).permute(0, 3, 1, 2)


class FusedBlock(FoldedBlock):
    """`FoldedBlock` whose answer, sum and norm are one pass over the image."""

    def answer(self, image: Tensor, tokens: Tensor, token_position: Tensor, of_image: Tensor | None) -> Tensor:
        from d2ls_infer.nn.kernels import answered

        attention, norm = self.image_queries_dictionary, self.norm_image
        assert isinstance(attention, ImageQueriesTokens)
        of_image = attention.nowhere if of_image is None else of_image
        probe, placed = asked(attention.key(tokens + token_position), attention.probe, of_image)
        values = torch.einsum("bnhd,hdc->bhnc", per_head(attention.value(tokens), axis=2), attention.out)
        values = (values + attention.bias).flatten(1, 2).to(attention.dtype)
        return answered(image, probe.to(attention.dtype), placed, values, norm.weight, norm.bias, norm.eps, HEADS)


class FusedTokensQueryImage(TokensQueryImage):
    """`TokensQueryImage` that looks at the image once, and keeps no scores of all its pixels."""

    parts = torch.bfloat16  # of the products that are not rounded to half precision

    def forward(self, query: Tensor, image: Tensor, position: Tensor) -> Tensor:
        from d2ls_infer.nn.kernels import pooled

        probe, placed = asked(self.query(query), self.probe, position)
        mixed = per_head(pooled(probe.to(self.dtype), image, placed, self.parts), axis=1)  # (B, heads, N, C')
        update: Tensor = self.out(torch.einsum("bhnc,hdc->bnhd", mixed, self.value).flatten(2))
        return update


def asked(tokens: Tensor, probe: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """The two terms of `scores`: what the pixels are multiplied by, (B, heads*N, C'), and what their places add."""
    tokens = per_head(tokens, axis=2)  # (B, N, heads, d)
    probes = torch.einsum("bnhd,hdc->bhnc", tokens, probe).flatten(1, 2)
    placed = torch.einsum("bnhd,hdm->bhnm", tokens.to(position.dtype), position).flatten(1, 2)
    return probes.contiguous(), placed.contiguous()


class FusedUpsampler(FoldedUpsampler):
    """`FoldedUpsampler` in one pass from the image to the logits."""

    def forward(self, image: Tensor, classes: Tensor, height: int, width: int) -> Tensor:
        from d2ls_infer.nn.kernels import upsampled

        parts = torch.eye(4, device=classes.device)
        # Of each of a pixel's four parts, every fourth channel is of the same one of its four parts again.
        spread = torch.einsum("bnc,ts->bncts", classes, parts).flatten(2, 3)  # (B, N, C'/4, 4)
        norm = self.norm
        return upsampled(image, spread, norm.weight, norm.bias, norm.eps, height, width)


FUSED: dict[type[nn.Module], type[nn.Module]] = {
    FoldedMapping: FusedMapping,
    FoldedBlock: FusedBlock,
    TokensQueryImage: FusedTokensQueryImage,
    FoldedUpsampler: FusedUpsampler,
}
"""The parts of the inference form, and what they become."""
