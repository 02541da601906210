"""Kernels for CUDA, run by Triton's interpreter on the CPU: each gives what torch's operations give."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from d2ls_infer.nn import D2LS, D2LSConfig, fold
from d2ls_infer.nn.decoder import HEADS, Upsampler
from d2ls_infer.nn.folded import FoldedUpsampler
from d2ls_infer.nn.fused import FusedBlocks, FusedTokensQueryImage, fuse

triton = pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="run by the one test that is not skipped")
HALF = [torch.bfloat16, torch.float16]
PRODUCTS = [torch.float16, torch.float32]  # the interpreter's products of bfloat16 are wrong
LEAST = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 1e-3}  # of a product's inputs, relative


@pytest.mark.skipif(INTERPRETED, reason="runs the others")
def test_kernels_give_what_torch_gives() -> None:
    """In a process of its own: Triton decides when it is imported whether it interprets."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        command, check=False, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@interpreted
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(("height", "width", "channels"), [(5, 9, 24), (8, 8, 128), (3, 19, 320)])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("sums", [torch.float32, None])
def test_depthwise_norm(
    height: int, width: int, channels: int, rows: int, dtype: torch.dtype, sums: torch.dtype | None
) -> None:
    from d2ls_infer.nn.kernels import depthwise_norm

    x = torch.randn(2, height, width, channels).to(sums or dtype)
    weight, bias, gain, shift = torch.randn(channels, 1, 7, 7).to(dtype), *torch.randn(3, channels)
    outside = torch.randn(channels)
    taps = weight.flatten(1).T.contiguous()
    found = depthwise_norm(x, taps, bias, outside, gain, shift, 1e-6, rows=rows)
    image = F.pad((x.float() - outside).permute(0, 3, 1, 2), (3, 3, 3, 3)) + outside[:, None, None]
    expected = F.conv2d(image, weight.float(), bias, groups=channels).permute(0, 2, 3, 1)
    expected = F.layer_norm(expected, (channels,), gain, shift, 1e-6)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected.to(dtype), rtol=LEAST[dtype], atol=1e-4)


@interpreted
def test_resized_sum() -> None:
    from d2ls_infer.nn.kernels import resized_sum

    sizes = [(16, 24), (8, 12), (4, 6), (2, 3)]
    levels = [torch.randn(2, *size, 24) for size in sizes]
    expected = sum(
        F.interpolate(level.permute(0, 3, 1, 2), sizes[0], mode="bilinear", align_corners=False) for level in levels
    )
    found = resized_sum(levels[0].clone(), levels[1:])
    torch.testing.assert_close(found, expected.permute(0, 2, 3, 1), rtol=1e-5, atol=1e-5)


@interpreted
@pytest.mark.parametrize("classes", [1, 3, 7])
@pytest.mark.parametrize("dtype", PRODUCTS)
@pytest.mark.parametrize("pixels", [64, 1088])
def test_pooled(classes: int, dtype: torch.dtype, pixels: int) -> None:
    from d2ls_infer.nn.kernels import pooled

    queries = HEADS * classes
    probe, image = torch.randn(2, queries, 32).to(dtype), torch.randn(2, pixels, 32)
    placed = (3 * torch.randn(2, queries, pixels)).to(dtype)
    rounded = image if dtype == torch.float32 else image.to(dtype).float()
    scores = probe.float() @ rounded.transpose(1, 2) + placed.float()
    expected = scores.softmax(-1) @ rounded
    torch.testing.assert_close(pooled(probe, image, placed, torch.float16), expected, rtol=2e-2, atol=2e-2)


@interpreted
@pytest.mark.parametrize("classes", [1, 3, 7, 16])
@pytest.mark.parametrize("dtype", PRODUCTS[:1])
@pytest.mark.parametrize("everywhere", [False, True])
def test_answered(classes: int, dtype: torch.dtype, everywhere: bool) -> None:
    from d2ls_infer.nn.kernels import answered

    queries, pixels = HEADS * classes, 128
    probe, values = torch.randn(2, 2, queries, 32).to(dtype)
    image, (gain, shift) = torch.randn(2, pixels, 32), torch.randn(2, 32)
    placed = torch.randn(2, queries, 1 if everywhere else pixels).to(dtype)
    scores = probe.float() @ image.to(dtype).float().transpose(1, 2) + placed.float()
    shares = scores.unflatten(1, (HEADS, classes)).softmax(2).flatten(1, 2)
    expected = F.layer_norm(image + shares.transpose(1, 2) @ values.float(), (32,), gain, shift, 1e-5)
    found = answered(image.clone(), probe, placed, values, gain, shift, 1e-5, HEADS)
    torch.testing.assert_close(found, expected, rtol=2 * LEAST[dtype], atol=4 * LEAST[dtype])


@interpreted
@pytest.mark.parametrize("classes", [1, 5, 7])
def test_upsampled(classes: int) -> None:
    from d2ls_infer.nn.kernels import upsampled

    upsampler = FoldedUpsampler(Upsampler(64))
    with torch.no_grad():
        upsampler.norm.weight.normal_()
        upsampler.norm.bias.normal_()
        image, vectors = torch.randn(2, 8 * 16, 64), torch.randn(2, classes, 4)
        spread = torch.einsum("bnc,st->bnsct", vectors, torch.eye(4)).permute(0, 1, 3, 4, 2).flatten(2, 3)
        found = upsampled(
            image, spread.contiguous(), upsampler.norm.weight, upsampler.norm.bias, upsampler.norm.eps, 8, 16
        )
        torch.testing.assert_close(found, upsampler(image, vectors, 8, 16), rtol=1e-4, atol=1e-4)


@interpreted
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("sums", [torch.float32, torch.float16])
def test_a_network_of_kernels_is_the_folded_one(
    given: bool, sums: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FusedTokensQueryImage, "parts", torch.float16)
    network = D2LS(D2LSConfig(backbone="test_convnext", num_classes=5, embed_dim=64, stages=2)).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith(("bias", "gamma")):
                parameter.uniform_(-1, 1)
    pixels = torch.randn(1, 3, 45, 32)
    exact, folded = fold(network), fold(network, torch.float16)
    fused = fuse(folded, sums=sums)
    assert any(isinstance(module, FusedBlocks) for module in fused.modules())
    assert not any(isinstance(module, FusedBlocks) for module in folded.modules())
    embeddings = exact.embeddings(pixels).mean(0) if given else None
    expected = exact(pixels, embeddings)
    off = (fused(pixels, embeddings) - expected).abs().max()
    assert off <= 2 * (folded(pixels, embeddings) - expected).abs().max(), "much worse than half precision itself"
    assert off <= 0.05 * expected.std()
    torch.testing.assert_close(fused.embeddings(pixels), exact.embeddings(pixels), rtol=0.02, atol=0.02)
