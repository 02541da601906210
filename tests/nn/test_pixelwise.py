"""Linear layers over pixels, plain and packed."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2ls_infer.nn import allow_packing, pixelwise
from d2ls_infer.nn.pixelwise import PackedLinear, has_packed_products


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_pixelwise_is_a_linear_layer(bias: bool, dtype: torch.dtype, tolerance: float) -> None:
    rows, weight, offset = random(7, 12), random(5, 12), random(5)
    expected = rows @ weight.T + (offset if bias else 0)
    found = pixelwise.pixelwise(rows.to(dtype), weight.to(dtype), offset.to(dtype) if bias else None)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, rtol=tolerance, atol=10 * tolerance)


def layer(dtype: torch.dtype = torch.float32) -> PackedLinear:
    torch.manual_seed(0)
    return PackedLinear(nn.Linear(48, 33).to(dtype)).requires_grad_(False)


def packing_layer() -> PackedLinear:
    """One whose weight is packed."""
    packing = layer()
    packing(random(16, 48))
    if not packing.weight.is_mkldnn:
        pytest.skip("torch has no packed products here")
    return packing


@pytest.mark.parametrize("count", [1, 15, 1024])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_a_packed_layer_is_the_layer_for_any_number_of_rows(count: int, dtype: torch.dtype, tolerance: float) -> None:
    packing, rows = layer(dtype), random(count, 48)
    expected = F.linear(rows, packing.weight.float(), packing.bias.float())
    packing(random(16, 48).to(dtype))  # it is packed for that many
    assert packing.weight.is_mkldnn == has_packed_products(dtype)
    found = packing(rows.to(dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, rtol=tolerance, atol=10 * tolerance)


def test_what_leaves_a_packed_layer_is_its_plain_weight() -> None:
    plain = layer().weight.clone()
    for leave in (copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module)), PackedLinear.double):
        packing = packing_layer()
        found = leave(packing)
        assert torch.equal(found.weight, plain.to(found.weight.dtype))
        torch.testing.assert_close(packing.float()(random(16, 48)), layer()(random(16, 48)))


def test_a_layer_that_may_not_pack_stays_plain() -> None:
    packing, plain, rows = packing_layer(), layer().weight.clone(), random(16, 48)
    expected = packing(rows)
    allow_packing(packing, False)
    assert torch.equal(packing.weight, plain)
    torch.testing.assert_close(packing(rows), expected)
    assert not packing.weight.is_mkldnn
    allow_packing(packing, True)
    assert torch.equal(packing(rows), expected)
    assert packing.weight.is_mkldnn


@pytest.mark.parametrize("error", [AttributeError, TypeError, RuntimeError])
def test_without_packed_products_the_layer_is_the_same(monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    def gone(weight: Tensor, count: int) -> Tensor:
        raise error("no such operator")

    monkeypatch.setattr(pixelwise, "packed", gone)
    monkeypatch.setattr(pixelwise, "has_packed_products", has_packed_products.__wrapped__)
    packing, rows = layer(), random(16, 48)
    torch.testing.assert_close(packing(rows), F.linear(rows, packing.weight, packing.bias))
    assert not packing.weight.is_mkldnn


def test_packed_products_that_are_others_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixelwise, "packed", lambda weight, count: weight)
    monkeypatch.setattr(pixelwise, "packed_product", lambda rows, weight, bias: 2 * F.linear(rows, weight, bias))
    assert not has_packed_products.__wrapped__(torch.float32)
