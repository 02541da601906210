"""Backbones as they run: norms, layer scales and paddings worked into what is beside them."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from d2ls_infer.nn.lite import EfficientNetLite

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
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.to(dtype)  # autocast would do so on every run
    return backbone


def fold_blocks(backbone: nn.Module) -> None:
    """The layer scales of ConvNeXt go into the layer before, and its blocks run piece by piece."""
    from timm.layers.mlp import Mlp
    from timm.models.convnext import ConvNeXtBlock

    for name, block in list(backbone.named_modules()):
        if not isinstance(block, ConvNeXtBlock) or type(block.mlp) is not Mlp or block.use_conv_mlp:
            continue
        if isinstance(block.shortcut, nn.Identity):  # as in every model that timm has
            backbone.set_submodule(name, PiecewiseBlock(block))


class PiecewiseBlock(nn.Module):
    """A ConvNeXt block: (B, C, h, w) -> the same in float32, which is what blocks add up to.

    On a CPU all but the depth-wise convolution is done for a few thousand pixels at a time, which stay in its cache.
    """

    def __init__(self, block: ConvNeXtBlock) -> None:
        from timm.layers import GELU

        super().__init__()
        self.conv_dw, self.norm = block.conv_dw, block.norm
        self.fc1, self.act, self.fc2 = block.mlp.fc1, block.mlp.act, block.mlp.fc2
        self.in_place = type(self.act) is GELU
        if block.gamma is not None:
            self.fc2.get_parameter("weight").mul_(block.gamma[:, None])
            self.fc2.get_parameter("bias").mul_(block.gamma)

    def forward(self, x: Tensor) -> Tensor:
        if at_once(x):
            pixels = self.conv_dw(x).permute(0, 2, 3, 1)
            whole: Tensor = x + self.fc2(self.act(self.fc1(self.norm(pixels)))).float().permute(0, 3, 1, 2)
            return whole
        with torch.autocast("cpu", enabled=False):  # it would run the norm in float32, between two copies
            return self.by_pieces(x)

    def by_pieces(self, x: Tensor) -> Tensor:
        layers = [[layer.get_parameter(name) for name in ("weight", "bias")] for layer in (self.fc1, self.fc2)]
        pixels = self.conv_dw(x.to(layers[0][0].dtype)).permute(0, 2, 3, 1)
        out = torch.empty(pixels.shape)
        size = max(1, PIECE_VALUES // len(layers[0][1]))  # the first bias is as wide as the widest tensor
        parts = (torch.split(rows.flatten(0, 2), size) for rows in (pixels, x.permute(0, 2, 3, 1), out))
        for piece, before, target in zip(*parts, strict=True):
            wide = pixelwise(self.norm(piece), *layers[0])
            wide = torch.ops.aten.gelu_(wide) if self.in_place else self.act(wide)
            torch.add(before, pixelwise(wide, *layers[1]), out=target)
        return out.permute(0, 3, 1, 2)


class PixelwiseConvolution(nn.Module):
    """(B, C, H, W) -> (B, K, H, W): a convolution of 1 x 1 by `pixelwise`."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return convolved_pixels(x, self.weight, self.bias)


def convolved_pixels(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(B, C, H, W) float32, weight (K, C, 1, 1) -> (B, K, H, W), channels last on a CPU."""
    if at_once(x):
        return F.conv2d(x, weight, bias)
    pixels = x.permute(0, 2, 3, 1)
    found = pixelwise(pixels.flatten(0, 2), weight.flatten(1), bias)
    return found.view(*pixels.shape[:3], -1).permute(0, 3, 1, 2)


def at_once(tensor: Tensor) -> bool:
    """Whether something is done in one piece: GPUs, compilers and other runtimes have their own ways with a cache."""
    return tensor.device.type != "cpu" or torch.compiler.is_compiling()


def convolves(tensor: Tensor) -> bool:
    """Whether products with a tensor are taken by `pixelwise` as convolutions: on a CPU, in float32."""
    return tensor.dtype == torch.float32 and not at_once(tensor)


def pixelwise(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer over rows (P, C), as `F.linear`, on a CPU.

    In float32 as a convolution: for that torch has oneDNN, for linear layers MKL, which leaves half of the registers
    of some processors unused. On a single thread it has MKL for both, unless there are 16 images.
    """
    if not convolves(weight):
        return F.linear(rows, weight, bias)
    images = torch.unflatten(rows, 0, (1 if len(rows) % 16 else 16, 1, -1)).permute(0, 3, 1, 2)  # channels last
    return F.conv2d(images, weight[..., None, None], bias).permute(0, 2, 3, 1).flatten(0, 2)


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
