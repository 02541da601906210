"""D2LS, whole: encoder -> dictionary generator -> decoder. The parts are in the files beside this one.

Source: "Dynamic Dictionary Learning for Remote Sensing Image Segmentation", ICCV 2025, arXiv 2503.06683.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from d2ls_infer.errors import UsageError, shortened
from d2ls_infer.nn.decoder import HEADS, Decoder
from d2ls_infer.nn.dictionary import DictionaryGenerator
from d2ls_infer.nn.encoder import STRIDES, Encoder
from d2ls_infer.nn.pretrained import Pretrained


@dataclass(frozen=True, kw_only=True)
class D2LSConfig:
    """What a D2LS network is made of.

    backbone: a timm model name that gives features at strides 4, 8, 16 and 32; num_classes: N; embed_dim: C', the
    width of the class embeddings; stages: L, the number of interaction blocks; reduction: r; in_channels: bands.
    Raises UsageError for values the network cannot have.
    """

    backbone: str
    num_classes: int
    embed_dim: int = 256
    stages: int = 3
    reduction: int = 4
    in_channels: int = 3

    def __post_init__(self) -> None:
        if not isinstance(self.backbone, str) or not self.backbone:
            raise UsageError(f"backbone must be the name of a timm model, got {shortened(self.backbone)}")
        for name in ("num_classes", "embed_dim", "stages", "reduction", "in_channels"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise UsageError(f"{name} must be a whole number of at least 1, got {shortened(value)}")
        if self.embed_dim % (2 * HEADS):
            raise UsageError(f"embed_dim must be a multiple of {2 * HEADS}, got {self.embed_dim}; try 256")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> D2LSConfig:
        """The reverse of `to_dict`. Raises UsageError that names unknown or missing keys."""
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise UsageError(f"unknown keys in the network's config: {', '.join(unknown)[:200]}")
        if missing := sorted({"backbone", "num_classes"} - set(values)):
            raise UsageError(f"missing keys in the network's config: {', '.join(missing)}")
        return cls(**values)


class TrainingOutput(NamedTuple):
    """What the network gives in training mode: both branches of Eq. 1, and what the contrastive loss looks at."""

    logits: Tensor  # (B, N, H, W), from the dynamic dictionary
    static_logits: Tensor  # (B, N, H, W), from the static dictionary
    dynamic_dictionary: Tensor  # (B, N, C'), D0


class D2LS(Pretrained):
    """(B, C, H, W) normalised pixels, any H, W >= 1 -> (B, N, H, W) logits; in training mode a `TrainingOutput`.

    `pretrained` fetches the backbone's ImageNet weights through timm; otherwise every weight is random.
    `D2LS.from_pretrained(folder or "owner/repo")`, `save_pretrained` and `push_to_hub` are in `Pretrained`.
    """

    def __init__(self, config: D2LSConfig, *, pretrained: bool = False) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config.backbone, config.embed_dim, in_channels=config.in_channels, pretrained=pretrained)
        self.dictionary = DictionaryGenerator(
            self.encoder.channels[-1], config.num_classes, config.embed_dim, config.reduction
        )
        self.decoder = Decoder(config.embed_dim, config.stages)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, room: int) -> D2LS:
        made = D2LSConfig.from_dict(config)
        # The aggregator, the variants of the dictionary, and two attentions a stage.
        needed = (4 + made.reduction + 4 * made.stages) * made.embed_dim**2
        if needed > room:
            raise UsageError(f"the config asks for a network of at least {needed} values, the file holds {room}")
        return cls(made)

    def forward(self, pixels: Tensor, *, shared: bool = False) -> Tensor | TrainingOutput:
        """shared: the logits are by one dictionary for all images of the batch, see `Decoder`."""
        height, width = pixels.shape[-2:]
        features, deepest = self.encoder(pad_to_stride(pixels))
        static, dynamic, _ = self.dictionary(deepest)
        logits: Tensor = self.decoder(dynamic, features, shared=shared)[..., :height, :width]
        if not self.training:
            return logits
        static_logits = self.decoder(static.expand_as(dynamic), features)[..., :height, :width]
        return TrainingOutput(logits, static_logits, dynamic)


def pad_to_stride(pixels: Tensor) -> Tensor:
    """(B, C, H, W) -> the same with H and W rounded up to a multiple of 32.

    New rows and columns go below and to the right: a reflection, or copies of the edge where the side is too short.
    """
    stride = STRIDES[-1]
    for axis, side in ((-2, pixels.shape[-2]), (-1, pixels.shape[-1])):
        if pad := -side % stride:
            amounts = (0, 0, 0, pad) if axis == -2 else (0, pad, 0, 0)
            pixels = F.pad(pixels, amounts, mode="reflect" if pad < side else "replicate")
    return pixels


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """A context in which the network's products run in `dtype`; one that changes nothing for float32."""
    return torch.autocast(device.type, dtype=dtype if dtype != torch.float32 else None, enabled=dtype != torch.float32)
