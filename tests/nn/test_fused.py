"""The inference form on CUDA. Its kernels are tested without one in `test_kernels.py`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from d2ls_infer.backends import Replayed, runner
from d2ls_infer.nn import D2LS, ByEmbeddings, D2LSConfig, FoldedD2LS, as_cuda_runs_it, fold
from d2ls_infer.nn.fused import FusedBlocks, can_fuse, fuse

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CONVNEXT = D2LSConfig(backbone="test_convnext", num_classes=5, embed_dim=64, stages=2)


def make(config: D2LSConfig = CONVNEXT) -> D2LS:
    torch.manual_seed(0)
    network = D2LS(config).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith(("bias", "gamma")):
                parameter.uniform_(-1, 1)
    return network


def test_on_a_cpu_nothing_is_fused() -> None:
    network = fold(make(), torch.bfloat16)
    assert not can_fuse(network, torch.device("cpu"))
    assert as_cuda_runs_it(network) is network
    assert runner("torch", network) is network


def test_a_fused_network_shares_its_weights() -> None:
    pytest.importorskip("triton")
    network = fold(make(), torch.bfloat16)
    fused = fuse(network)
    stages = [module for module in fused.modules() if isinstance(module, FusedBlocks)]
    assert len(stages) == 4
    block = network.encoder.backbone.get_submodule("stages_0.blocks.0.mlp.fc1")
    assert stages[0].get_submodule("blocks.0.widen") is not block
    assert stages[0].get_submodule("blocks.0.widen").weight is block.weight
    assert fused.decoder.positions is not network.decoder.positions


def test_what_is_not_known_stays_as_it_is() -> None:
    pytest.importorskip("triton")
    network = fold(make(D2LSConfig(backbone="mobilenetv3_small_050", num_classes=20, embed_dim=48)), torch.bfloat16)
    fused = fuse(network)
    assert [type(module) for module in fused.modules()] == [type(module) for module in network.modules()]


@cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", [False, True])
def test_labels_are_those_of_float32_on_a_cpu(dtype: torch.dtype, given: bool) -> None:
    network, pixels = make(), torch.randn(3, 3, 96, 160)
    exact = fold(network)
    embeddings = exact.embeddings(pixels).mean(0) if given else None
    expected = exact(pixels, embeddings).argmax(1)
    folded = fold(network, dtype).cuda()
    form: nn.Module = folded if embeddings is None else ByEmbeddings(folded, embeddings.cuda())
    fused = as_cuda_runs_it(form)
    if isinstance(fused, ByEmbeddings):
        assert isinstance(fused.network, FoldedD2LS)
    assert any(isinstance(module, FusedBlocks) for module in fused.modules()), "its kernels do not work here"
    for run in (form, fused):
        same = float((run(pixels.cuda()).argmax(1).cpu() == expected).double().mean())
        assert same >= 0.99, same


@cuda
def test_graphs_give_what_the_network_gives() -> None:
    network = as_cuda_runs_it(fold(make(), torch.bfloat16).cuda())
    run = Replayed(network)
    for size in (64, 96, 64, 128, 64, 160, 96, 192, 64, 64):  # more sizes than positions are kept for
        for seed in range(3):
            pixels = torch.randn(2, 3, size, size, device="cuda", generator=torch.Generator("cuda").manual_seed(seed))
            expected: Tensor = network(pixels)
            assert torch.equal(run(pixels), expected)
    assert run.can_capture
    assert any(run.replays.values())
