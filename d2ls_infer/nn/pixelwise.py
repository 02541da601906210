"""Linear layers over pixels as a CPU does them fastest, see `tests/benchmarks/README.md`."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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


def convolved_pixels(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(B, C, H, W) float32, weight (K, C, 1, 1) -> (B, K, H, W), channels last on a CPU."""
    if at_once(x):
        return F.conv2d(x, weight, bias)
    pixels = x.permute(0, 2, 3, 1)
    found = pixelwise(pixels.flatten(0, 2), weight.flatten(1), bias)
    return found.view(*pixels.shape[:3], -1).permute(0, 3, 1, 2)


class PixelwiseConvolution(nn.Module):
    """(B, C, H, W) -> (B, K, H, W): a convolution of 1 x 1 by `pixelwise`."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return convolved_pixels(x, self.weight, self.bias)


class PackedLinear(nn.Module):
    """A linear layer over rows (P, C) -> (P, K), whose weight a CPU keeps in oneDNN's own order.

    A plain weight is put into that order at every product. Here it is once, at the first, and takes the place of the
    plain one, which `unpack` brings back: copies, pickles and other devices get that.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.may_pack = True

    def forward(self, rows: Tensor) -> Tensor:
        weight = self.weight  # another thread may pack it meanwhile
        if at_once(rows):
            return F.linear(rows, weight, self.bias)
        if not weight.is_mkldnn:
            if not self.may_pack or not has_packed_products(weight.dtype):
                return pixelwise(rows, weight, self.bias)
            weight = self.weight = fixed(packed(weight, len(rows)))
        return packed_product(rows, weight, self.bias)

    def unpack(self) -> None:
        weight = self.weight
        if weight.is_mkldnn:
            with torch.inference_mode(False):
                self.weight = fixed(weight.to_dense())

    def _apply(self, *arguments: Any, **options: Any) -> Any:
        self.unpack()
        return super()._apply(*arguments, **options)  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        self.unpack()
        return self.__dict__.copy()


def allow_packing(network: nn.Module, allowed: bool) -> None:
    """Whether the linear layers of a network may keep packed weights, which compilers and exports do not know."""
    for module in network.modules():
        if isinstance(module, PackedLinear):
            module.may_pack = allowed
            if not allowed:
                module.unpack()


def fixed(weight: Tensor) -> nn.Parameter:
    """A weight that does not learn."""
    return nn.Parameter(weight, requires_grad=False)


def packed(weight: Tensor, count: int) -> Tensor:
    """A weight (K, C) in oneDNN's order for products with `count` rows; with other numbers of rows it works too."""
    with torch.inference_mode(False):
        found: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), count)
    return found


def packed_product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As `F.linear`, by a packed weight."""
    found: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return found


@cache
def has_packed_products(dtype: torch.dtype) -> bool:
    """Whether torch can do this here. Its compiler makes these of linear layers; by themselves they are not public."""
    rows, weight, bias = (torch.linspace(-1, 1, size).to(dtype) for size in (32 * 48, 64 * 48, 64))
    rows, weight = rows.view(32, 48), weight.view(64, 48)
    try:
        if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False  # it may be there all the same, but slow
        found = packed_product(rows, packed(weight, len(rows)), bias)
    except (AttributeError, TypeError, RuntimeError):
        return False
    return torch.allclose(found.float(), F.linear(rows, weight, bias).float(), rtol=1e-2, atol=1e-2)
