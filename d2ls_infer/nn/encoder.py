"""Encoder: timm backbone, feature mapping (Eq. 9), aggregator (Eq. 10)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2ls_infer.errors import UsageError, shortened
from d2ls_infer.nn.lite import VARIANTS, EfficientNetLite

STRIDES = (4, 8, 16, 32)

SLOW_IN_BFLOAT16 = ("efficientnet", "mobilenet")
"""Backbones whose depth-wise convolutions are many times slower in bfloat16 than in float32 on a CPU."""


class Encoder(nn.Module):
    """(B, C, H, W) pixels, H and W multiples of 32 -> E0 (B, C', H/4, W/4) and F4 (B, C4, H/32, W/32).

    `channels` are the backbone's widths C1..C4. `float32_on_cpu`: whether a CPU runs the backbone in float32 under
    autocast too, as those that are slow in bfloat16 there.
    """

    def __init__(self, backbone: str, embed_dim: int, *, in_channels: int = 3, pretrained: bool = False) -> None:
        super().__init__()
        self.backbone = create_backbone(backbone, in_channels=in_channels, pretrained=pretrained)
        strides, channels = strides_and_channels(self.backbone)
        self.levels = tuple(strides.index(stride) for stride in STRIDES)
        self.channels = tuple(channels[level] for level in self.levels)
        self.channels_last_output = str(getattr(self.backbone, "output_fmt", "")).endswith("NHWC")
        self.float32_on_cpu = any(family in backbone for family in SLOW_IN_BFLOAT16)
        self.mapping = nn.ModuleList(nn.Conv2d(width, embed_dim, 1) for width in self.channels)
        self.aggregator = nn.Conv2d(len(self.channels) * embed_dim, embed_dim, 1, bias=False)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        features = self.backbone_features(pixels)
        size = features[0].shape[-2:]
        mapped = [F.conv2d(feature, *weight) for feature, weight in zip(features, self.folded(), strict=True)]
        total = mapped[0]
        for level in mapped[1:]:
            total = total + F.interpolate(level, size, mode="bilinear", align_corners=False)
        return total, features[-1]

    def folded(self) -> list[tuple[Tensor, Tensor]]:
        """Mapping and aggregator as one 1x1 convolution per level: weights (C', Ci, 1, 1) and biases (C').

        Mapping, resizing and aggregator are linear, and resizing keeps constants, so `aggregator(concat(resize(map)))`
        is the sum over levels of `resize((aggregator . map)(feature))`. The parameters stay those of the paper; the
        tensor of width 4C' at stride 4, the widest of the network, never exists.
        """
        with torch.autocast(self.aggregator.weight.device.type, enabled=False):
            # The released implementation concatenates from the deepest level to the shallowest.
            parts = self.aggregator.weight.flatten(1).chunk(len(self.mapping), dim=1)[::-1]  # each (C', C')
            weights = (mapping.get_parameter("weight").flatten(1) for mapping in self.mapping)  # each (C', Ci)
            biases = (mapping.get_parameter("bias") for mapping in self.mapping)
            return [
                ((part @ weight)[..., None, None], part @ bias)
                for part, weight, bias in zip(parts, weights, biases, strict=True)
            ]

    def backbone_features(self, pixels: Tensor) -> list[Tensor]:
        """The raw stage outputs F1..F4, each (B, Ci, H/stride, W/stride)."""
        if self.float32_on_cpu and pixels.device.type == "cpu":
            with torch.autocast(pixels.device.type, enabled=False):
                features = self.backbone(pixels.to(next(self.backbone.parameters()).dtype))
        else:
            features = self.backbone(pixels)
        features = [features[level] for level in self.levels]
        if self.channels_last_output:
            features = [feature.permute(0, 3, 1, 2) for feature in features]  # (B, H, W, C) -> (B, C, H, W)
        return features


def create_backbone(name: str, *, in_channels: int, pretrained: bool | Path) -> nn.Module:
    """A timm `features_only` backbone with features at the strides 4, 8, 16 and 32 (and perhaps at others).

    pretrained: whether to fetch timm's ImageNet weights, or the file that holds them. Without, an EfficientNet-Lite is
    ours, which is timm's but for the time that importing timm takes. Raises UsageError for a name timm does not know
    and for a model without those strides.
    """
    if name in VARIANTS and not pretrained:
        return EfficientNetLite(name, in_channels)
    import timm  # takes seconds

    if not timm.is_model(name):
        raise UsageError(f"unknown backbone {shortened(name)}: timm {timm.__version__} has no model of that name")
    # Windowed transformers take any size only when they are told so; the other models do not know the option.
    options: dict[str, Any] = {"strict_img_size": False} if "swin" in name else {}
    if isinstance(pretrained, Path):
        options["pretrained_cfg_overlay"] = {"file": str(pretrained)}
    try:
        backbone: nn.Module = timm.create_model(
            name, pretrained=bool(pretrained), in_chans=in_channels, features_only=True, **options
        )
        strides, _ = strides_and_channels(backbone)
    except (RuntimeError, AttributeError) as error:
        raise UsageError(f"cannot make a feature pyramid of the backbone {name!r}: {error}") from error
    if not set(STRIDES) <= set(strides):
        raise UsageError(f"backbone {name!r} has strides {strides}, but {list(STRIDES)} are needed")
    return backbone


def strides_and_channels(backbone: nn.Module) -> tuple[list[int], list[int]]:
    """Of each of a backbone's features, in their order."""
    if isinstance(backbone, EfficientNetLite):
        return list(STRIDES), list(backbone.channels)
    info: Any = backbone.feature_info
    return info.reduction(), info.channels()
