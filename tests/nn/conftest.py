from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from d2ls_infer.nn import D2LS, D2LSConfig

# Small, without batch norm, dropout or drop path: what it computes does not depend on the mode it is in.
PLAIN_BACKBONE = "convnext_atto"


@pytest.fixture
def make_network() -> Callable[..., D2LS]:
    """A small random network in eval mode, always the same for the same settings."""

    def make(**settings: Any) -> D2LS:
        torch.manual_seed(0)
        defaults = {"backbone": PLAIN_BACKBONE, "num_classes": 5, "embed_dim": 32, "stages": 2}
        return D2LS(D2LSConfig(**{**defaults, **settings})).eval()

    return make


@pytest.fixture
def random_pixels() -> Callable[..., torch.Tensor]:
    """Standard normal pixels of a shape, always the same for the same shape."""

    def pixels(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(1))

    return pixels


@pytest.fixture
def random_norms() -> Callable[[nn.Module], nn.Module]:
    """The module itself, its batch norms as training leaves them."""

    def randomised(module: nn.Module) -> nn.Module:
        draw = torch.Generator().manual_seed(7)
        for norm in module.modules():
            if isinstance(norm, nn.BatchNorm2d):
                assert norm.running_mean is not None
                assert norm.running_var is not None
                norm.weight.data.uniform_(0.5, 1.5, generator=draw)
                norm.bias.data.normal_(0, 0.3, generator=draw)
                norm.running_mean.normal_(0, 0.3, generator=draw)
                norm.running_var.uniform_(0.5, 2, generator=draw)
        return module

    return randomised
