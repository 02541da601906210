"""Backbones as they run: norms, layer scales and paddings worked into what is beside them."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from d2ls_infer.nn.lite import EfficientNetLite

if TYPE_CHECKING:
    from timm.layers.mlp import Mlp

PIECE_BYTES = 8 << 20
"""How much of an MLP's widest tensor a CPU works on at once; more falls out of its cache."""


def folded_backbone(backbone: nn.Module, in_channels: int, dtype: torch.dtype | None) -> nn.Module:
    """A backbone in eval mode, ready to run; it may be taken apart. dtype: of its products, None to leave it alone."""
    backbone = with_folded_norms(backbone, in_channels)
    if isinstance(backbone, EfficientNetLite):
        backbone.turn()
    else:
        fold_mlps(backbone)
    if dtype is not None:
        for module in backbone.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.to(dtype)  # autocast would do so on every run
    return backbone


def fold_mlps(backbone: nn.Module) -> None:
    """The layer scales of ConvNeXt go into the layer before, and its MLPs run piece by piece."""
    from timm.layers.mlp import Mlp
    from timm.models.convnext import ConvNeXtBlock

    for block in backbone.modules():
        if isinstance(block, ConvNeXtBlock) and type(block.mlp) is Mlp and not block.use_conv_mlp:
            if block.gamma is not None:
                block.mlp.fc2.get_parameter("weight").mul_(block.gamma[:, None])
                block.mlp.fc2.get_parameter("bias").mul_(block.gamma)
                block.gamma = None
            block.mlp = PiecewiseMlp(block.mlp)  # type: ignore[assignment]


class PiecewiseMlp(nn.Module):
    """(B, h, w, C) -> the same in float32, for the sum over the blocks: an MLP over a few thousand pixels at a time."""

    def __init__(self, mlp: Mlp) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = mlp.fc1, mlp.act, mlp.fc2

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_exporting():  # runtimes have their own ways with a cache
            whole: Tensor = self.fc2(self.act(self.fc1(x))).float()
            return whole
        rows = x.flatten(0, 2)
        size = len(rows)
        if x.device.type == "cpu":
            bias = self.fc1.get_parameter("bias")  # as wide as the widest tensor, and of its type
            size = max(1, PIECE_BYTES // bias.nbytes)
        out = torch.empty(rows.shape, device=x.device)
        for piece, target in zip(torch.split(rows, size), torch.split(out, size), strict=True):
            target.copy_(self.fc2(self.act(self.fc1(piece))))
        return out.view(x.shape)


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
