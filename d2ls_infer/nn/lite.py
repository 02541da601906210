"""EfficientNet-Lite, the backbone of the bundled models: timm's, tensor by tensor and name by name.

Importing timm takes longer than mapping a tile (`tests/benchmarks/README.md`), so these have a form of their own; every
other backbone, and pretrained weights of these too, come from timm.
Source: Tan and Le, "EfficientNet", ICML 2019, arXiv 1905.11946. Lite leaves out squeeze-and-excitation, its activation
is ReLU6, and a deeper one has no more blocks in its first and last stage and no wider a stem.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

VARIANTS = {
    "tf_efficientnet_lite0": (1.0, 1.0),
    "tf_efficientnet_lite1": (1.0, 1.1),
    "tf_efficientnet_lite2": (1.1, 1.2),
    "tf_efficientnet_lite3": (1.2, 1.4),
    "tf_efficientnet_lite4": (1.4, 1.8),
}
"""By timm's name, how many times as wide and as deep as the smallest."""

STAGES = (
    (1, 3, 1, 16, 1),
    (2, 3, 2, 24, 6),
    (2, 5, 2, 40, 6),
    (3, 3, 2, 80, 6),
    (3, 5, 1, 112, 6),
    (4, 5, 2, 192, 6),
    (1, 3, 1, 320, 6),
)
"""Blocks, kernel, stride, width and expansion of each stage, of the smallest."""

LEVELS = (1, 2, 4, 6)
"""The last stages of the strides 4, 8, 16 and 32."""

STEM = 32


class EfficientNetLite(nn.Module):
    """(B, C, H, W) pixels, H and W multiples of 32 -> F1..F4, each (B, Ci, H/stride, W/stride).

    `channels` are the widths C1..C4. `turned`: whether it works with images turned by half a circle, see `turn`.
    """

    def __init__(self, name: str, in_channels: int) -> None:
        super().__init__()
        wider, deeper = VARIANTS[name]
        self.turned = False
        self.conv_stem = nn.Conv2d(in_channels, STEM, 3, 2, bias=False)
        self.bn1 = norm(STEM)
        stages, width, widths = [], STEM, []
        for index, (count, kernel, stride, stage_width, expansion) in enumerate(STAGES):
            blocks: list[nn.Module] = []
            for block in range(math.ceil(count * deeper) if 0 < index < len(STAGES) - 1 else count):
                before, width = width, in_eights(stage_width * wider)
                blocks.append(Block(before, width, kernel, 1 if block else stride, expansion))
            stages.append(nn.Sequential(*blocks))
            widths.append(width)
        self.blocks = nn.Sequential(*stages)
        self.channels = tuple(widths[stage] for stage in LEVELS)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # as timm begins
                fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
                nn.init.normal_(module.weight, 0, math.sqrt(2 / fan_out))

    def forward(self, pixels: Tensor) -> list[Tensor]:
        x = relu6(self.bn1(convolved(turned(pixels) if self.turned else pixels, self.conv_stem)))
        features = []
        for index, stage in enumerate(self.blocks):
            x = stage(x)
            if index in LEVELS:
                features.append(turned(x) if self.turned else x)
        return features

    def turn(self) -> None:
        """Turn every kernel by half a circle, and from now on the pixels and the features too: the same, but faster.

        For TensorFlow pads strided convolutions by one more below and to the right, torch as much on both sides; for
        that, tensors as large as the widest were copied. Of an image that is turned, torch sees the same pixels.
        """
        assert not self.turned
        self.turned = True
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                module.weight = nn.Parameter(turned(module.weight))
                module.padding = tuple(side // 2 for side in module.kernel_size)


class Block(nn.Module):
    """An inverted residual (B, Ci, H, W) -> (B, Co, H/stride, W/stride): wider, by its own plane each, narrower.

    Without expansion the first convolution is left out. Layers are called as timm calls them.
    """

    def __init__(self, before: int, after: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner, padding = before * expansion, kernel // 2 if stride == 1 else 0
        self.expands, self.has_skip = expansion > 1, stride == 1 and before == after
        if self.expands:
            self.conv_pw = nn.Conv2d(before, inner, 1, bias=False)
            self.bn1 = norm(inner)
            self.conv_dw = nn.Conv2d(inner, inner, kernel, stride, padding, groups=inner, bias=False)
            self.bn2 = norm(inner)
            self.conv_pwl = nn.Conv2d(inner, after, 1, bias=False)
            self.bn3 = norm(after)
        else:
            self.conv_dw = nn.Conv2d(inner, inner, kernel, stride, padding, groups=inner, bias=False)
            self.bn1 = norm(inner)
            self.conv_pw = nn.Conv2d(inner, after, 1, bias=False)
            self.bn2 = norm(after)
        self.drop_path = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        inner: Tensor
        if self.expands:
            inner = relu6(self.bn1(self.conv_pw(x)))
            inner = relu6(self.bn2(convolved(inner, self.conv_dw)))
            inner = self.bn3(self.conv_pwl(inner))
        else:
            inner = relu6(self.bn1(convolved(x, self.conv_dw)))
            inner = self.bn2(self.conv_pw(inner))
        if self.has_skip:
            inner = self.drop_path(inner) + x
        return inner


def turned(x: Tensor) -> Tensor:
    """(..., H, W), turned by half a circle."""
    return x.flip(-2, -1)


def convolved(x: Tensor, convolution: nn.Module) -> Tensor:
    """A convolution; one of stride 2 on an even side pads as TensorFlow does, one more below and to the right."""
    assert isinstance(convolution, nn.Conv2d)
    if convolution.stride[0] == 2 and not convolution.padding[0]:
        short = convolution.kernel_size[0] // 2
        x = F.pad(x, (short - 1, short, short - 1, short))
    found: Tensor = convolution(x)
    return found


def relu6(x: Tensor) -> Tensor:
    """In place."""
    return F.relu6(x, inplace=True)


def norm(width: int) -> nn.BatchNorm2d:
    """A batch norm as TensorFlow has it."""
    return nn.BatchNorm2d(width, eps=1e-3)


def in_eights(width: float) -> int:
    """The nearest multiple of 8, but no less than nine tenths of it."""
    near = max(8, int(width + 4) // 8 * 8)
    return near if near >= 0.9 * width else near + 8
