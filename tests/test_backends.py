"""What runs the network: every backend gives the labels of torch, and `auto` remembers its choice."""

from __future__ import annotations

import json
import logging
import pickle
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from torch import Tensor, nn

from d2ls_infer import backends, load_model
from d2ls_infer.backends import Compiled, Replayed, check_backend, exported, fastest_backend, runner, version_of
from d2ls_infer.errors import D2LSError, UsageError
from d2ls_infer.nn import D2LS, D2LSConfig, fold
from d2ls_infer.nn.pixelwise import PackedLinear, has_packed_products

SCENE = Path(__file__).parents[1] / "examples" / "naip_scene.tif"
CPU = torch.device("cpu")
GRAPHS = ("openvino", "onnxruntime")

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

# What the exporters and runtimes say of themselves is not ours to mend.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:onnxscript"),
]


def installed(backend: str) -> str:
    """The backend, or a test that is skipped."""
    if not backends.is_installed(backend):
        pytest.skip(f"needs {backend}: pip install 'd2ls-infer[{backends.EXTRAS[backend]}]'")
    return backend


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "d2ls" / "backends.json"


@pytest.fixture(scope="module")
def tile() -> Tensor:
    with rasterio.open(SCENE) as scene:
        pixels = scene.read(window=((0, 256), (0, 256)))
    return torch.from_numpy(pixels)[None]


@pytest.mark.parametrize("backend", GRAPHS)
def test_the_labels_of_a_real_scene_are_those_of_torch(backend: str, tile: Tensor) -> None:
    expected = load_model("naip", device="cpu", precision="float32").score(tile)
    found = load_model("naip", precision="float32", backend=installed(backend)).score(tile)
    assert found.shape == expected.shape
    assert found.dtype == torch.float32
    assert (found.argmax(1) == expected.argmax(1)).float().mean() >= 0.999
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


def test_bfloat16_stands_in_the_graph() -> None:
    """OpenVINO neither widens nor narrows what the network says."""
    pixels = torch.randn(1, 3, 64, 64)
    exact, rounded = small("mobilenetv3_small_050"), small("mobilenetv3_small_050", torch.bfloat16)
    found = runner(installed("openvino"), rounded)(pixels)
    difference = (found - exact(pixels)).abs().max()
    assert 0 < difference <= 2 * (rounded(pixels) - exact(pixels)).abs().max()


def small(backbone: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return fold(D2LS(D2LSConfig(backbone=backbone, num_classes=3, embed_dim=32, stages=1)), dtype)


@pytest.mark.parametrize("backend", GRAPHS)
def test_any_size_and_any_batch(backend: str) -> None:
    network = small("mobilenetv3_small_050")
    strides = [parameter.stride() for parameter in network.parameters()]
    run = runner(installed(backend), network)
    for shape in [(3, 3, 64, 64), (1, 3, 50, 41), (2, 3, 64, 64)]:
        pixels = torch.randn(shape).contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(run(pixels), network(pixels), rtol=0, atol=2e-4)
    assert [parameter.stride() for parameter in network.parameters()] == strides


@pytest.mark.parametrize("backend", GRAPHS)
def test_graphs_of_other_runtimes_do_not_travel_with_a_network(backend: str) -> None:
    run, pixels = runner(installed(backend), nn.Conv2d(3, 4, 1).eval()), torch.randn(1, 3, 32, 32)
    expected = run(pixels)
    other = pickle.loads(pickle.dumps(run))
    assert other.graphs == {}
    assert torch.equal(other(pixels), expected)


@pytest.mark.parametrize("backbone", ["convnext_atto", "convnext_tiny"])  # the second has linear layers
def test_the_graph_of_a_convnext_is_the_network(backbone: str) -> None:
    network, pixels = small(backbone), torch.randn(1, 3, 64, 64)
    expected = network(pixels)  # packs weights
    found = exported(network, pixels).module()(pixels)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert torch.equal(network(pixels), expected)


@pytest.mark.parametrize("backbone", ["convnext_tiny", "resnet18"])
def test_openvino_is_the_network_in_bfloat16_too(backbone: str) -> None:
    """Of backbones with convolutions of more than a pixel in bfloat16, whose weights are channels-last."""
    network, pixels = small(backbone, torch.bfloat16), torch.randn(1, 3, 64, 64)
    expected, plain = network(pixels), small(backbone)(pixels)
    found = runner(installed("openvino"), network)(pixels)
    tolerance = 4 * float((expected - plain).abs().max())
    assert tolerance < float(plain.std())
    torch.testing.assert_close(found, plain, rtol=0, atol=tolerance)


def test_weights_are_not_packed_for_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda network: network)
    network, pixels = small("convnext_tiny"), torch.randn(1, 3, 64, 64)

    def packed_weights() -> int:
        return sum(parameter.is_mkldnn for parameter in network.parameters())

    found = runner("torch", network)(pixels)
    assert packed_weights() == (36 if has_packed_products(torch.float32) else 0)
    torch.testing.assert_close(runner("compile", network)(pixels), found, rtol=0, atol=1e-4)
    assert packed_weights() == 0
    assert torch.equal(runner("torch", network)(pixels), found)


def test_the_compiler_is_given_the_network_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", torch._dynamo.optimize("eager"))
    network, pixels = nn.Conv2d(3, 4, 1), torch.randn(1, 3, 64, 64)
    run = runner("compile", network)
    for image in (pixels, pixels[..., :32]):
        torch.testing.assert_close(run(image), network(image))


SIGNALLED = """
import gc, signal, torch
from d2ls_infer.backends import OpenVINO, exported

program = exported(torch.nn.Conv2d(3, 2, 3).eval(), torch.zeros(1, 3, 16, 16))
first, second = OpenVINO.of(program), OpenVINO.of(program)
del first
gc.collect()
del second
gc.collect()
signal.signal(signal.SIGUSR1, lambda *_: print("heard"))
signal.raise_signal(signal.SIGUSR1)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="sends signals of POSIX")
def test_signals_are_heard_when_graphs_are_gone() -> None:
    installed("openvino")
    done = subprocess.run([sys.executable, "-c", SIGNALLED], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "heard"), done.stderr


def test_what_has_no_graph_is_told() -> None:
    class Undecided(nn.Module):
        def forward(self, pixels: Tensor) -> Tensor:
            return pixels if pixels.mean() > 0 else -pixels

    with pytest.raises(D2LSError, match=r"no graph that could be exported.*try --backend torch"):
        runner(installed("openvino"), Undecided())(torch.zeros(1, 3, 32, 32))


def test_what_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="unknown backend 'tensorflow'; known are auto, torch, compile, openvino"):
        check_backend("tensorflow", CPU, torch.float32)
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"openvino needs more packages: pip install 'd2ls-infer\[openvino\]'"):
        check_backend("openvino", CPU, torch.float32)
    with pytest.raises(UsageError, match=r"onnxruntime needs more packages: pip install 'd2ls-infer\[onnx\]'"):
        load_model("naip", backend="onnxruntime")
    monkeypatch.setattr(backends, "find_spec", lambda name: name)
    with pytest.raises(UsageError, match="onnxruntime runs in float32 here, not in bfloat16"):
        check_backend("onnxruntime", CPU, torch.bfloat16)
    with pytest.raises(UsageError, match="openvino runs on the CPU here, not on cuda"):
        check_backend("openvino", torch.device("cuda"), torch.float32)


def slow(times: int) -> Callable[[Tensor], Tensor]:
    def run(pixels: Tensor) -> Tensor:
        for _ in range(times):
            (torch.ones(200, 200) @ torch.ones(200, 200)).sum()
        return pixels

    return run


def test_auto_measures_once_and_remembers(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    made: list[str] = []

    def make(backend: str) -> Callable[[Tensor], Tensor]:
        made.append(backend)
        return slow({"torch": 300, "compile": 1}[backend])

    def choose(shape: tuple[int, ...] = (1, 3, 64, 64), sha256: str = "a") -> str:
        return fastest_backend(make, torch.zeros(shape), torch.float32, {"weights": sha256})

    with caplog.at_level(logging.INFO, logger="d2ls_infer"):
        assert choose() == "compile"
    assert made == ["torch", "compile"]
    assert [record.message for record in caplog.records if "is the fastest for tiles of 64 x 64" in record.message]
    assert list(json.loads(cache.read_text()).values()) == ["compile"]
    assert choose() == "compile"
    assert len(made) == 2
    choose((1, 3, 32, 64))
    choose(sha256="b")
    assert len(made) == 6
    assert len(json.loads(cache.read_text())) == 3


def test_what_others_have_measured_meanwhile_is_remembered_too(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "BACKENDS", ("torch",))

    def make(backend: str) -> Callable[[Tensor], Tensor]:
        cache.parent.mkdir(parents=True)
        cache.write_text('{"theirs": "compile"}')
        return slow(1)

    assert fastest_backend(make, torch.zeros(1, 3, 8, 8), torch.float32, {}) == "torch"
    assert list(json.loads(cache.read_text()).values()) == ["compile", "torch"]


@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff", b'{"a": 1}'])
def test_a_damaged_memory_is_no_memory(cache: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    cache.parent.mkdir(parents=True)
    cache.write_bytes(content)
    assert fastest_backend(lambda name: slow(1), torch.zeros(1, 3, 8, 8), torch.float32, {}) in ("torch", "compile")
    assert len(json.loads(cache.read_text())) >= 1


def test_auto_leaves_out_what_cannot_run(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(backends, "find_spec", lambda name: None)

    def make(backend: str) -> Callable[[Tensor], Tensor]:
        if backend == "compile":
            raise D2LSError("no compiler")
        return slow(1)

    with caplog.at_level(logging.INFO, logger="d2ls_infer"):
        assert fastest_backend(make, torch.zeros(1, 3, 8, 8), torch.float32, {}) == "torch"
    assert "compile is left out: no compiler" in caplog.text


def test_auto_settles_before_the_first_tile(tiny_weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "BACKENDS", ("torch",))
    model = load_model(tiny_weights, device="cpu", backend="auto")
    assert model.backend == "auto"
    labels = model.predict(np.zeros((3, 40, 40), np.uint8), tile_size=32)
    assert model.backend == "torch"
    assert labels.shape == (40, 40)


def test_auto_keeps_what_runs_as_long_as_it_is_the_fastest(tiny_weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "BACKENDS", ("torch", "compile"))
    monkeypatch.setattr(torch, "compile", lambda network: network)
    measured = []

    def seconds_of(run: Callable[[Tensor], Tensor], pixels: Tensor) -> float:
        measured.append(pixels.shape[-2:])
        return 2 if isinstance(run, Compiled) == (pixels.shape[-1] == 96) else 1

    monkeypatch.setattr(backends, "seconds_of", seconds_of)
    model = load_model(tiny_weights, device="cpu", backend="auto")
    layer = model.network.linear = PackedLinear(nn.Linear(2, 2))
    model.settle(64, 64)
    run = model.run
    assert isinstance(run, Compiled)
    assert not layer.may_pack
    for height in (64, 64, 32, 64):
        model.settle(height, 64)
        assert model.run is run
    model.settle(64, 96)
    assert (model.backend, model.run) == ("torch", model.network)
    assert layer.may_pack, "though the compiler was measured after torch"
    assert measured == [size for size in [(64, 64), (32, 64), (64, 96)] for _ in range(2)]


def test_names_have_versions() -> None:
    assert version_of("torch") == "torch"
    assert version_of(installed("openvino")).startswith("openvino 20")


@pytest.mark.parametrize("backend", GRAPHS)
def test_a_scenes_dictionary_gives_the_same_map_on_any_backend(backend: str, tiny_weights: Path) -> None:
    installed(backend)
    pixels = np.random.default_rng(3).integers(0, 255, (3, 160, 160), np.uint8)
    options: dict[str, Any] = {"tile_size": 96, "overlap": 32, "dictionary": "scene"}
    expected = load_model(tiny_weights, device="cpu", precision="float32").predict(pixels, **options)
    found = load_model(tiny_weights, precision="float32", backend=backend).predict(pixels, **options)
    own = load_model(tiny_weights, device="cpu", precision="float32").predict(pixels, tile_size=96, overlap=32)
    assert (found == expected).mean() >= 0.999
    assert (own != found).any(), "a dictionary that changes nothing was not used"


# CUDA graphs


def test_the_second_batch_of_a_shape_is_captured_and_all_others_replayed() -> None:
    captured = []

    def capture(network: nn.Module, pixels: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        captured.append(tuple(pixels.shape))
        return lambda pixels: 2 * pixels

    run = Replayed(nn.Identity(), capture)
    shapes = [(8, 3), (8, 3), (5, 3), (8, 3), (5, 3), (5, 3), (1, 3)]
    found = [run(torch.ones(shape)) for shape in shapes]
    assert [bool((logits == 2).all()) for logits in found] == [False, True, False, True, True, True, False]
    assert captured == [(8, 3), (5, 3)]


def test_only_the_graphs_of_the_last_shapes_are_kept() -> None:
    run = Replayed(nn.Identity(), lambda network, pixels: network)
    for size in (1, 1, 2, 2, 3, 3, 1, 4, 4, 1):
        run(torch.ones(size))
    assert list(run.replays) == [(3,), (4,), (1,)]


def test_a_network_that_cannot_be_captured_runs_as_it_comes(caplog: pytest.LogCaptureFixture) -> None:
    tried = []

    def capture(network: nn.Module, pixels: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        tried.append(1)
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    run = Replayed(nn.Identity(), capture)
    for size in (1, 1, 1, 2, 2):
        assert torch.equal(run(torch.ones(size)), torch.ones(size))
    assert len(tried) == 1
    assert "runs without CUDA graphs, which may be slower: operation not permitted" in caplog.text


def test_graphs_do_not_travel_with_a_network_nor_hold_on_to_anything() -> None:
    run = Replayed(nn.Identity(), lambda network, pixels: network)
    for _ in range(2):
        run(torch.ones(3))
    other = pickle.loads(pickle.dumps(run))
    assert other.replays == {}
    assert torch.equal(other(torch.ones(3)), torch.ones(3))
    gone = weakref.ref(run)
    del run
    assert gone() is None  # at once, and with it the memory of its graphs


@cuda
def test_graphs_give_what_the_network_gives() -> None:
    network = small("test_convnext").cuda()
    run, shapes = Replayed(network), [(2, 3, 64, 64), (1, 3, 64, 96), (2, 3, 32, 32)]
    before = None
    with torch.inference_mode():
        for index in range(12):
            pixels = torch.randn(shapes[index % len(shapes)], device="cuda")
            with torch.cuda.stream(torch.cuda.Stream()) if index % 2 else nullcontext():
                torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
                found = run(pixels)
                torch.cuda.current_stream().synchronize()
            assert torch.equal(found, network(pixels))
            if before is not None:  # the next batch writes over nothing
                assert torch.equal(before[0], before[1])
            before = found, found.clone()
    assert run.can_capture
    assert all(replay is not None for replay in run.replays.values())


@cuda
def test_the_memory_of_a_scenes_graphs_is_free_after_the_next_ones(tiny_weights: Path) -> None:
    segmenter = load_model(tiny_weights, device="cuda")
    batch = torch.zeros((4, len(segmenter.bands), 128, 128), dtype=torch.uint8)
    reserved = []
    for _ in range(4):
        context = segmenter.observe(batch)
        for _ in range(3):
            segmenter.score(batch, context)
        torch.cuda.empty_cache()
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[-1] <= reserved[1]
