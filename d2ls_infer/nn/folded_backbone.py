"""Backbones as they run: norms, layer scales and paddings worked into what is beside them."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from d2ls_infer.nn.lite import EfficientNetLite
from d2ls_infer.nn.pixelwise import PackedLinear, PixelwiseConvolution, at_once

if TYPE_CHECKING:
    from timm.models.convnext import ConvNeXtBlock

PIECE_VALUES = 2 << 20
"""How much of a block's widest tensor a CPU works on at once; more falls out of its cache."""


def folded_backbone(backbone: nn.Module, in_channels: int, dtype: torch.dtype | None) -> nn.Module:
    """A backbone in eval mode, ready to run; it may be taken apart. dtype: of its products, None to leave it alone."""
    backbone = with_folded_norms(backbone, in_channels)
    if isinstance(backbone, EfficientNetLite):
        backbone.turn()
        for name, layer in list(backbone.named_modules()):
            if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1):
                backbone.set_submodule(name, PixelwiseConvolution(layer))
    else:
        fold_blocks(backbone)
    if dtype is not None:
        for module in backbone.modules():
            if isinstance(module, nn.Conv2d | nn.Linear | PackedLinear):
                module.to(dtype)  # autocast would do so on every run
    return backbone


def fold_blocks(backbone: nn.Module) -> None:
    """The layer scales of ConvNeXt go into the layer before, and its blocks run piece by piece."""
    for blocks in backbone.modules():
        if isinstance(blocks, nn.Sequential):
            known = [False, *map(is_block, blocks)]  # nothing comes before the first
            for index, block in enumerate(blocks):
                if is_block(block):
                    blocks[index] = PiecewiseBlock(block, after_another=known[index])


def is_block(module: nn.Module) -> TypeGuard[ConvNeXtBlock]:
    """Whether it is a ConvNeXt block of linear layers that adds to its input, as in every model that timm has."""
    from timm.layers.mlp import Mlp
    from timm.models.convnext import ConvNeXtBlock

    if not isinstance(module, ConvNeXtBlock):
        return False
    return type(module.mlp) is Mlp and not module.use_conv_mlp and isinstance(module.shortcut, nn.Identity)


class PiecewiseBlock(nn.Module):
    """A ConvNeXt block: (B, C, h, w) -> the same in float32, which is what blocks add up to.

    On a CPU all but the depth-wise convolution is done for a few thousand pixels at a time, which stay in its cache.
    after_another: the input is what another one of these made, and nobody else's; the output takes its memory.
    """

    def __init__(self, block: ConvNeXtBlock, *, after_another: bool) -> None:
        from timm.layers import GELU

        super().__init__()
        self.conv_dw, self.norm = block.conv_dw, block.norm
        assert isinstance(block.mlp.fc1, nn.Linear)
        assert isinstance(block.mlp.fc2, nn.Linear)
        self.fc1, self.act, self.fc2 = PackedLinear(block.mlp.fc1), block.mlp.act, PackedLinear(block.mlp.fc2)
        self.in_place = type(self.act) is GELU
        self.after_another = after_another
        if block.gamma is not None:
            self.fc2.weight.mul_(block.gamma[:, None])
            self.fc2.bias.mul_(block.gamma)

    def forward(self, x: Tensor) -> Tensor:
        if at_once(x):
            pixels = self.conv_dw(x).permute(0, 2, 3, 1)
            whole: Tensor = x + self.fc2(self.act(self.fc1(self.norm(pixels)))).float().permute(0, 3, 1, 2)
            return whole
        with torch.autocast("cpu", enabled=False):  # it would run the norm in float32, between two copies
            return self.by_pieces(x)

    def by_pieces(self, x: Tensor) -> Tensor:
        pixels = self.conv_dw(x.to(self.fc1.bias.dtype)).permute(0, 2, 3, 1)
        out = x.permute(0, 2, 3, 1) if self.after_another else torch.empty(pixels.shape)
        size = max(1, PIECE_VALUES // len(self.fc1.bias))  # as wide as the widest tensor
        parts = (torch.split(rows.flatten(0, 2), size) for rows in (pixels, x.permute(0, 2, 3, 1), out))
        for piece, before, target in zip(*parts, strict=True):
            wide = self.fc1(self.norm(piece))
            wide = torch.ops.aten.gelu_(wide) if self.in_place else self.act(wide)
            torch.add(before, self.fc2(wide), out=target)
        return out.permute(0, 3, 1, 2)


def with_folded_norms(backbone: nn.Module, in_channels: int) -> nn.Module:
    """A backbone in eval mode with its batch norms folded into the convolutions right before them.

    Which those are, a run over a few pixels tells; where it then gives other features, a convolution's output went
    elsewhere too, and the backbone comes back as it was.
    """
    if not any(isinstance(module, nn.BatchNorm2d) for module in backbone.modules()):
        return backbone
    folded = copy.deepcopy(backbone)
    pixels = torch.linspace(-1, 1, in_channels * 64 * 64).view(1, in_channels, 64, 64)
    pixels = pixels.to(next(backbone.parameters()).device)
    produced: list[tuple[Tensor, nn.Conv2d]] = []
    followers: list[tuple[nn.Conv2d, nn.BatchNorm2d]] = []

    def after_convolution(module: nn.Conv2d, _: tuple[Tensor], output: Tensor) -> None:
        produced.append((output, module))

    def before_norm(module: nn.BatchNorm2d, inputs: tuple[Tensor]) -> None:
        followers.extend((convolution, module) for output, convolution in produced if output is inputs[0])

    with ExitStack() as hooks:
        for module in folded.modules():
            if isinstance(module, nn.Conv2d):
                hooks.enter_context(module.register_forward_hook(after_convolution))
            elif isinstance(module, nn.BatchNorm2d):
                hooks.enter_context(module.register_forward_pre_hook(before_norm))
        expected = folded(pixels)
    names = {module: name for name, module in folded.named_modules()}
    for convolution, norm in followers:
        mean, variance = norm.running_mean, norm.running_var
        if mean is None or variance is None:  # it goes by each batch
            continue
        convolution.weight, convolution.bias = fuse_conv_bn_weights(
            convolution.weight, convolution.bias, mean, variance, norm.eps, norm.weight, norm.bias
        )
        folded.set_submodule(names[norm], getattr(norm, "act", nn.Identity()))  # timm's norms hold an activation
    found = folded(pixels)
    same = all((a - b).abs().max() <= 1e-2 * b.abs().max() for a, b in zip(found, expected, strict=True))
    return folded if same else backbone
