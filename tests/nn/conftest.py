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
def liven() -> Callable[[Any], Any]:
    """Norms, biases and layer scales of a module as training leaves them, not the ones and zeros they start with."""

    @torch.no_grad()
    def livened(network: nn.Module) -> nn.Module:
        draw = torch.Generator().manual_seed(7)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.normal_(0, 0.3, generator=draw)
                module.running_var.uniform_(0.5, 2, generator=draw)
            for name, value in module.named_parameters(recurse=False):
                if name == "gamma":
                    value.uniform_(0.2, 0.8, generator=draw)
                elif name == "bias":
                    value.normal_(0, 0.3, generator=draw)
                elif value.ndim == 1:
                    value.uniform_(0.5, 1.5, generator=draw)
        return network

    return livened
