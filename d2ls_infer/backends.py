"""What runs the network: torch, its compiler, or, from one exported graph, OpenVINO or ONNX Runtime."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from d2ls_infer.errors import D2LSError, UsageError, shortened
from d2ls_infer.files import cache_folder, write_whole
from d2ls_infer.nn import ByEmbeddings, FoldedD2LS, allow_packing, pad_to_stride

log = logging.getLogger(__name__)

Backend = Literal["torch", "compile", "openvino", "onnxruntime"]
BACKENDS: tuple[str, ...] = get_args(Backend)

EXTRAS = {"openvino": "openvino", "onnxruntime": "onnx"}
"""The backends that need more packages, and the extra that brings them."""

DTYPES = {"openvino": (torch.float32, torch.bfloat16), "onnxruntime": (torch.float32,)}
"""The types of products that a backend on the CPU knows."""

GRAPHS = 3
"""The sizes of images whose graphs are kept: as many as the test-time augmentation has magnifications."""

Run = Callable[[Tensor], Tensor]
"""(B, bands, H, W) float32 -> (B, N, H, W) float32, on the same device."""


def check_backend(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raise UsageError for a backend that is not known, not installed, or not for that device or type."""
    if backend not in BACKENDS:
        raise UsageError(f"unknown backend {shortened(backend)}; known are auto, {', '.join(BACKENDS)}")
    if backend not in EXTRAS:
        return
    if not is_installed(backend):
        raise UsageError(f"the backend {backend} needs more packages: pip install 'd2ls-infer[{EXTRAS[backend]}]'")
    if device.type != "cpu":
        raise UsageError(
            f"the backend {backend} runs on the CPU here, not on {device}; leave out --device, or try torch"
        )
    if dtype not in DTYPES[backend]:
        known = " and ".join(str(known).removeprefix("torch.") for known in DTYPES[backend])
        raise UsageError(f"the backend {backend} runs in {known} here, not in {str(dtype).removeprefix('torch.')}")


def is_installed(backend: str) -> bool:
    """Whether the packages of a backend are there."""
    needed = {"openvino": ["openvino"], "onnxruntime": ["onnxruntime", "onnx", "onnxscript"]}.get(backend, [])
    return all(find_spec(name) for name in needed)


def version_of(backend: str) -> str:
    """A backend as provenance names it, with its version: "openvino 2026.4"; torch has its own place there."""
    return f"{backend} {version(backend)}" if backend in EXTRAS else backend


def runner(backend: str, network: nn.Module) -> Run:
    """A network in its inference form, run by a backend that `check_backend` lets pass.

    Of those that share a network only the last one made is to run: see `allow_packing`.
    """
    allow_packing(network, backend != "compile")
    if backend == "torch":
        # Of another network nobody knows whether it does the same for every batch.
        is_known = isinstance(network, FoldedD2LS | ByEmbeddings)
        return Replayed(network) if is_known and next(network.parameters()).is_cuda else network
    if backend == "compile":
        return Compiled(network)
    make: dict[str, Callable[[ExportedProgram], Run]] = {"openvino": OpenVINO.of, "onnxruntime": ONNXRuntime.of}
    return Graphs(network, make[backend])


class Compiled:
    """A network by `torch.compile`. Raises D2LSError where it cannot be compiled, mostly for want of a C++ compiler."""

    def __init__(self, network: nn.Module) -> None:
        self.network, self.run = network, torch.compile(network)
        self.seen: set[tuple[int, ...]] = set()

    def __call__(self, pixels: Tensor) -> Tensor:
        if (size := tuple(pixels.shape[-2:])) not in self.seen:
            self.network(pixels)  # keeps its positional terms for a size: compiled before that, it would be so again
            self.seen.add(size)
        try:
            logits: Tensor = self.run(pixels)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = str(error).strip().splitlines()[0]
            raise D2LSError(f"the network cannot be compiled here: {reason}; try another --backend") from error
        return logits


class Replayed:
    """A network on CUDA whose hundreds of kernels are started as one: a CUDA graph for each of the last shapes.

    The first batch of a shape runs as it comes; from the second on, batches are replayed. A network that cannot be
    captured runs as it comes, and the log says so. Threads may share it: they take turns. capture: makes what replays a
    network for batches of one shape.
    """

    def __init__(self, network: nn.Module, capture: Callable[[nn.Module, Tensor], Run] | None = None) -> None:
        self.network, self.capture = network, capture or Capture()
        self.replays: dict[tuple[int, ...], Run | None] = {}
        self.can_capture = True
        self.alone = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return Replayed, (self.network,)  # graphs do not travel

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> Tensor:
        shape = tuple(pixels.shape)
        with self.alone:
            is_new = shape not in self.replays
            replay = self.replays.pop(shape, None)
            if replay is None and not is_new and self.can_capture:
                replay = self.captured(pixels)
            self.replays[shape] = replay  # as the latest
            while len(self.replays) > GRAPHS:
                del self.replays[next(iter(self.replays))]
            logits: Tensor = self.network(pixels) if replay is None else replay(pixels)
            return logits

    def captured(self, pixels: Tensor) -> Run | None:
        """What replays the network, if anything does."""
        try:
            return self.capture(self.network, pixels)
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0]
            log.warning("the network runs without CUDA graphs, which may be slower: %s", reason)
            self.can_capture = False
            return None


CAPTURING = threading.Lock()
"""torch makes one CUDA graph at a time in a process."""


@cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all graphs of a device: cuBLAS keeps a workspace, 32 MiB on an H200, for every stream it was used in."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class Capture:
    """Makes CUDA graphs on the device of the pixels.

    They share memory, and so they run one after the other: whoever calls them takes turns, and each waits for the last
    one, which may have been in another stream. What comes out is a copy.
    """

    def __init__(self) -> None:
        self.done: Any = None
        self.latest: torch.cuda.CUDAGraph | None = None  # their memory is there as long as one of them is

    def __call__(self, network: nn.Module, pixels: Tensor) -> Run:
        """What replays a network for one shape. Raises RuntimeError where that fails, or gives something else."""
        device = pixels.device
        with CAPTURING, torch.cuda.device(device):
            stream, self.done = capture_stream(device), self.done or torch.cuda.Event()  # type: ignore[no-untyped-call]
            given, graph = pixels.clone(), torch.cuda.CUDAGraph()
            pool = None if self.latest is None else self.latest.pool()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                # What the network or torch keeps must be there before: made in a graph, it would be the graph's.
                expected = network(given)
                # Other threads may go on with their work on the device in the meantime.
                with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                    found: Tensor = network(given)
            torch.cuda.current_stream().wait_stream(stream)
        # The graph reads them where they are now, and the network forgets them one day.
        kept = [list(getattr(module, "positions", {}).values()) for module in network.modules()]
        done = self.done

        def replay(pixels: Tensor) -> Tensor:
            assert kept is not None
            with torch.cuda.device(device):
                current = torch.cuda.current_stream()
                current.wait_event(done)
                given.copy_(pixels)
                graph.replay()
                logits = found.clone()
                done.record(current)
            return logits

        # It is made of the same kernels; and a run that goes on where it was stopped begins without it.
        if not torch.equal(replay(pixels), expected):
            raise RuntimeError("a graph gives other logits than the network it is made of")
        self.latest = graph
        return replay


class Graphs:
    """A network by another runtime: a graph for each size of images, through which they go one by one.

    On a CPU no batch was seen to be faster than its images, and so the last batch, a smaller one, needs no graph.
    """

    def __init__(self, network: nn.Module, make: Callable[[ExportedProgram], Run]) -> None:
        self.network, self.make = network, make
        self.graphs: dict[tuple[int, ...], Run] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return Graphs, (self.network, self.make)  # graphs do not travel

    def __call__(self, pixels: Tensor) -> Tensor:
        height, width = pixels.shape[-2:]
        pixels = pad_to_stride(pixels)  # as D2LS itself does; OpenVINO takes no graph with a reflection in it
        size = tuple(pixels.shape[-2:])
        run = self.graphs.pop(size, None)
        if run is None:
            program = exported(self.network, torch.zeros(1, *pixels.shape[1:]))
            try:
                run = self.make(program)
            except Exception as error:  # each runtime has its own
                reason = str(error).strip().partition("\n")[0]
                raise D2LSError(f"the network's graph cannot be taken over: {reason}; try --backend torch") from error
        self.graphs[size] = run  # as the latest
        while len(self.graphs) > GRAPHS:
            del self.graphs[next(iter(self.graphs))]
        return torch.cat([run(image)[..., :height, :width] for image in torch.split(pixels, 1)])


@torch.no_grad()
def exported(network: nn.Module, pixels: Tensor) -> ExportedProgram:
    """The graph of a network for images of the shape of `pixels`, types of products included.

    Raises D2LSError for a network that has no graph.
    """
    allow_packing(network, False)
    was = {name: parameter.data for name, parameter in network.named_parameters()}
    try:
        for parameter in network.parameters():
            # OpenVINO reads the memory of a bfloat16 tensor without regard to its strides.
            parameter.data = parameter.data.contiguous()
        network(pixels)  # positional terms are worked out for the size, and become constants
        program = torch.export.export(network, (pixels,), strict=False)
        for name, value in program.state_dict.items():
            if isinstance(value, nn.Parameter):  # the network's own, which gets its strides back
                program.state_dict[name] = nn.Parameter(value.data, requires_grad=False)
        return program
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise D2LSError(f"the network has no graph that could be exported: {reason}; try --backend torch") from error
    finally:
        for name, parameter in network.named_parameters():
            parameter.data = was[name]
        allow_packing(network, True)


@cache
def openvino_core() -> Any:
    """OpenVINO's runtime, one for the whole process.

    On Linux each one that is made gives its thread a stack for signals, and takes it away when it ends. Where several
    end in any order, the thread is left with one that is gone, and the next signal (Ctrl+C, or that a child has ended)
    kills the process without a word.
    """
    import openvino

    return openvino.Core()


class OpenVINO:
    """(1, bands, H, W) float32 -> (1, N, H, W) float32, by OpenVINO on as many threads as torch has."""

    def __init__(self, model: Any) -> None:
        self.compiled = openvino_core().compile_model(
            model,
            "CPU",
            {
                "INFERENCE_NUM_THREADS": torch.get_num_threads(),
                "PERFORMANCE_HINT": "LATENCY",
                # As the graph has it. By itself OpenVINO takes bfloat16 for everything: 0.3 % of the labels change.
                "INFERENCE_PRECISION_HINT": "f32",
            },
        )

    @classmethod
    def of(cls, program: ExportedProgram) -> OpenVINO:
        """Of an exported graph, without a file in between."""
        import openvino

        return cls(openvino.convert_model(program))

    def __call__(self, pixels: Tensor) -> Tensor:
        return torch.from_numpy(self.compiled(pixels.contiguous().numpy(), share_inputs=True)[0])


class ONNXRuntime:
    """(1, bands, H, W) float32 -> (1, N, H, W) float32, by ONNX Runtime on as many threads as torch has."""

    def __init__(self, model: bytes | str) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # errors; what could be faster is nothing for the user
        self.session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self.input = self.session.get_inputs()[0].name

    @classmethod
    def of(cls, program: ExportedProgram) -> ONNXRuntime:
        """Of an exported graph, without a file in between."""
        return cls(onnx_model(program).SerializeToString())

    def __call__(self, pixels: Tensor) -> Tensor:
        return torch.from_numpy(self.session.run(None, {self.input: pixels.contiguous().numpy()})[0])


def onnx_model(program: ExportedProgram) -> Any:
    """An exported graph as an `onnx.ModelProto`."""
    made = torch.onnx.export(program, dynamo=True, verbose=False, input_names=["pixels"], output_names=["scores"])
    assert made is not None
    return made.model_proto


def fastest_backend(make: Callable[[str], Run], pixels: Tensor, dtype: torch.dtype, about: Mapping[str, Any]) -> str:
    """The installed backend that takes the least time for `pixels` (1, bands, H, W); measured once and remembered.

    about: what else the choice depends on, such as the weights' sha256. The log tells of backends that cannot run.
    """
    candidates = []
    for backend in BACKENDS:
        try:
            check_backend(backend, pixels.device, dtype)
        except UsageError:
            continue
        candidates.append(backend)
    key = json.dumps(
        {
            **about,
            "shape": list(pixels.shape),
            "type": str(dtype),
            "device": str(pixels.device),
            "threads": torch.get_num_threads(),
            "backends": {name: version("torch" if name == "compile" else name) for name in candidates},
        },
        sort_keys=True,
    )
    file = choices_file()
    known = read_choices(file)
    if known.get(key) in candidates:
        log.info("backend %s, as measured before (%s)", known[key], file)
        return known[key]
    log.warning("measuring which backend is the fastest here, once: %s; that may take minutes", ", ".join(candidates))
    seconds = {}
    for backend in candidates:
        try:
            seconds[backend] = seconds_of(make(backend), pixels)
        except D2LSError as error:
            log.info("backend %s is left out: %s", backend, error)
    best = min(seconds, key=lambda name: seconds[name])
    told = ", ".join(f"{name} {1000 * taken:.0f} ms" for name, taken in seconds.items())
    log.info("backend %s is the fastest for tiles of %d x %d: %s", best, *pixels.shape[-2:], told)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # Read again: others may have measured meanwhile.
        write_whole(file, json.dumps(read_choices(file) | {key: best}, indent=1).encode())
    except OSError as error:
        log.warning("which backend is fastest cannot be remembered: %s", error)
    return best


def seconds_of(run: Run, pixels: Tensor) -> float:
    """The least seconds of three runs, after one that makes ready."""
    run(pixels)
    taken = []
    for _ in range(3):
        started = time.perf_counter()
        run(pixels).sum().item()  # waits for the device
        taken.append(time.perf_counter() - started)
    return min(taken)


def choices_file() -> Path:
    """Where measured choices are remembered: ~/.cache/d2ls/backends.json, or under XDG_CACHE_HOME."""
    return cache_folder() / "backends.json"


def read_choices(file: Path) -> dict[str, str]:
    """What is remembered; nothing where there is no such file or it holds something else."""
    try:
        values = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
