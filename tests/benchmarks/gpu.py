"""How fast a network is on a GPU, of what that GPU can do; whether labels are those of float32; scenes end to end.

    python tests/benchmarks/gpu.py [matrix] [network] [labels] [pieces] [scene] [--batches 8,16,32] [--seconds 60]

matrix: products of 8192 x 8192 bfloat16 matrices, and copies, as the measure of all else. network: ConvNeXt-Base, seven
classes, 512 px, random weights, in several forms, their labels against float32. labels: the same of a bundled model.
pieces: each part of the network alone, in every way that was thought of. scene: `predict_raster` of a generated scene
of 16k x 16k pixels against the network's own time. By default the first three. What fails is told and the rest goes
on; exits with 1 then. Without a GPU all runs on the CPU, which only shows that it works: give --tiny.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from forward import published
from torch import Tensor, nn

from d2ls_infer.nn import D2LS, D2LSConfig, FoldedD2LS, autocast, fold
from d2ls_infer.nn.fused import can_fuse, fuse

GOAL_NETWORK, GOAL_SCENE, GOAL_LABELS = 0.55, 0.9, 0.999
ROOT = Path(__file__).parents[2]
CLASSES = 7

Work = Callable[[], object]


def say(*words: object, sep: str = " ") -> None:
    print(*words, sep=sep, flush=True)


class Bench:
    """What is measured, on which device, and what came of it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.is_cuda = self.device.type == "cuda"
        self.matrix_rate = float("nan")
        self.lines: list[str] = []
        self.failed: list[str] = []

    def keep(self, line: str) -> None:
        """A line of the result: told now, and again at the end."""
        self.lines.append(line)
        say(line)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Something that may fail without the rest."""
        try:
            yield
        except Exception as error:
            self.failed.append(f"{name}: {type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}")
            say("FAILED", self.failed[-1])
            if self.options.traces:
                traceback.print_exc()
            if self.is_cuda:
                with suppress(Exception):
                    torch.cuda.synchronize()

    def seconds(self, work: Work, *, runs: int = 5, times: int = 1) -> float:
        """The median of some runs; times: how often the work is done in each, so that starting it counts for little."""
        if not self.is_cuda:
            work()
            found = []
            for _ in range(min(runs, 2)):
                started = time.perf_counter()
                work()
                found.append(time.perf_counter() - started)
            return statistics.median(found)
        work()
        torch.cuda.synchronize()
        marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(runs)]
        for first, last in marks:
            first.record()
            for _ in range(times):
                work()
            last.record()
        torch.cuda.synchronize()
        return statistics.median(first.elapsed_time(last) for first, last in marks) / 1000 / times

    def replayed(self, work: Work, times: int = 1) -> Work:
        """The same as a CUDA graph."""
        if not self.is_cuda:
            return work
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            work()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        kept = []
        with torch.cuda.graph(graph):
            for _ in range(times):
                kept.append(work())

        def replay() -> None:
            assert kept
            graph.replay()

        return replay

    def kernel_seconds(self, work: Work) -> float:
        """Of something so short that starting it takes longer: many times in a graph."""
        times = 10 if self.is_cuda else 1
        return self.seconds(self.replayed(work, times)) / times


# The card


def matrix(bench: Bench) -> None:
    side = 256 if bench.options.tiny else 8192
    for dtype in (torch.bfloat16, torch.float16):
        with bench.part(f"matrix {dtype}"):
            a, b = torch.randn(2, side, side, device=bench.device).to(dtype)
            rate = 2 * side**3 / bench.seconds(lambda a=a, b=b: a @ b, runs=11, times=3)
            if dtype == torch.bfloat16:
                bench.matrix_rate = rate
            bench.keep(f"matrix {str(dtype)[6:]:9} {side}^3: {rate / 1e12:.1f} TFLOP/s")
            del a, b
    count = 1 << (20 if bench.options.tiny else 28)
    with bench.part("copies"):
        source = torch.empty(count, dtype=torch.float32, device=bench.device)
        target = torch.empty_like(source)
        rate = 8 * count / bench.seconds(lambda: target.copy_(source))
        text = f"copies: in the device {rate / 1e12:.2f} TB/s read and written"
        if bench.is_cuda:
            pinned = torch.empty(count // 4, pin_memory=True)
            up = count / bench.seconds(lambda: target[: count // 4].copy_(pinned, non_blocking=True))
            down = count / bench.seconds(lambda: pinned.copy_(source[: count // 4], non_blocking=True))
            pageable = torch.ones(count // 4)
            slow = count / bench.seconds(lambda: target[: count // 4].copy_(pageable))
            text += f"; pinned up {up / 1e9:.1f}, down {down / 1e9:.1f}, pageable up {slow / 1e9:.1f} GB/s"
        bench.keep(text)


# The network


@cache
def a_network(bench: Bench) -> D2LS:
    """ConvNeXt-Base with random weights; its blocks count as they do when it is trained."""
    torch.manual_seed(0)
    network = D2LS(D2LSConfig(backbone=bench.options.backbone, num_classes=CLASSES))
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("gamma"):
                parameter.uniform_(0.1, 0.5)
            elif name.startswith("encoder.backbone") and name.endswith("bias"):
                parameter.uniform_(-0.2, 0.2)
    return network.eval().to(bench.device)


def some_pixels(bench: Bench, batch: int) -> Tensor:
    """Something like images: smooth, with noise."""
    generator = torch.Generator().manual_seed(batch)
    size = bench.options.size
    coarse = torch.randn(batch, 3, size // 32, size // 32, generator=generator).to(bench.device)
    pixels = F.interpolate(coarse, (size, size), mode="bicubic")
    pixels += 0.3 * torch.randn(pixels.shape, generator=generator).to(bench.device)
    return pixels.contiguous(memory_format=torch.channels_last)


def variants(bench: Bench, network: D2LS) -> dict[str, Callable[[], Callable[[Tensor], Tensor]]]:
    """What makes each form, the quick to make first; "graph" in a name: replayed as one."""
    half = fold(network, torch.bfloat16)
    channels_last = network.to(memory_format=torch.channels_last)

    def plain(pixels: Tensor) -> Tensor:
        with autocast(pixels.device, torch.bfloat16):
            return published(channels_last, pixels).float()

    in_float16 = cache(lambda: fold(network, torch.float16))
    forms: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
        "published, autocast": lambda: plain,
        "folded": lambda: half,
        "folded, graph": lambda: half,
    }
    if can_fuse(half, bench.device):
        forms |= {
            "fused, graph": lambda: fuse(half),
            "fused encoder, graph": lambda: fuse(half, decoder=False),
            "fused float16, graph": lambda: fuse(in_float16()),
            "fused, sums bfloat16, graph": lambda: fuse(half, sums=torch.bfloat16),
            "fused float16, sums float16, graph": lambda: fuse(in_float16(), sums=torch.float16),
        }
    if bench.options.compile:
        forms |= {
            "fused encoder, compiled, graph": lambda: compiled_decoder(fuse(half, decoder=False)),
            "compiled, graph": lambda: torch.compile(half, dynamic=False),
            "compiled max-autotune, graph": lambda: torch.compile(
                half, dynamic=False, mode="max-autotune-no-cudagraphs"
            ),
        }
    if bench.options.only:
        forms = {name: form for name, form in forms.items() if any(word in name for word in bench.options.only)}
    return forms


def compiled_decoder(network: FoldedD2LS) -> FoldedD2LS:
    """Mapping and decoder by the compiler, the rest as it is."""
    network.mapping.compile(dynamic=False)
    network.decoder.compile(dynamic=False)
    return network


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in what takes longer; a call that never comes back to Python is not stopped."""
    import signal

    def stop(*_: object) -> None:
        raise TimeoutError(f"took more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(0.1, seconds))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@torch.no_grad()
def of_network(bench: Bench) -> None:
    network = a_network(bench)
    flop = arithmetic(bench, network)
    reference: Tensor | None = None
    few = some_pixels(bench, 4)
    with bench.part("float32"), in_full_float32():
        exact = fold(network)
        reference = torch.cat([exact(part) for part in few.split(1)])
        if bench.is_cuda:
            taken = bench.seconds(lambda exact=exact: exact(few), runs=2) / 4
            bench.keep(f"folded float32, batch 4: {1000 * taken:.2f} ms a tile")
        del exact
    titles = f"{'form':36}{'batch':>6}{'ms a tile':>11}{'TFLOP/s':>9}{'of matrix':>11}{'labels as float32':>19}"
    bench.keep(titles + f"{'made in':>18}")
    for name, make in variants(bench, network).items():
        left = bench.options.started + bench.options.seconds - time.perf_counter()
        if left < 3:
            say(f"{name}: left out, time is up")
            continue
        with bench.part(name), at_most(min(left, 60)):
            started = time.perf_counter()
            run = make()
            same = float("nan")
            batches = bench.options.batches
            if "compiled" in name:  # compiled again for each shape
                batches = batches[:1]
            first = run(some_pixels(bench, batches[0]))
            made = time.perf_counter() - started
            if reference is not None and "compiled" not in name:
                found = run(few)
                same = float((found.argmax(1) == reference.argmax(1)).double().mean())
                off = float((found - reference).abs().mean() / reference.std())
            for batch in batches:
                pixels = some_pixels(bench, batch)
                run(pixels)
                work = partial(run, pixels)
                taken = bench.seconds(bench.replayed(work) if "graph" in name else work) / batch
                line = f"{name:36}{batch:6}{1000 * taken:11.3f}{flop / taken / 1e12:9.1f}"
                line += f"{flop / taken / bench.matrix_rate:11.1%}{same:15.4%}"
                bench.keep(line + (f" ({off:.1e}){made:5.1f}s" if not math.isnan(same) else f"{made:13.1f}s"))
                del work
            del run, first
        if bench.is_cuda:
            torch.cuda.empty_cache()


def arithmetic(bench: Bench, network: D2LS) -> float:
    """Products and sums of a tile in the published order, which speeds go by."""
    from torch.utils.flop_counter import FlopCounterMode

    pixels = some_pixels(bench, 1)
    counts = []
    for work in (lambda: published(network, pixels), lambda: fold(network)(pixels)):
        with FlopCounterMode(display=False) as counter:
            work()
        counts.append(counter.get_total_flops())
    bench.keep(f"arithmetic of a tile: {counts[0] / 1e9:.1f} GFLOP as published, {counts[1] / 1e9:.1f} folded")
    return float(counts[0])


@contextmanager
def in_full_float32() -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


# Its parts


@torch.no_grad()
def pieces(bench: Bench) -> None:
    """Each part of the forward, and each kernel in several ways."""
    network = a_network(bench)
    batch = bench.options.batches[0]
    pixels = some_pixels(bench, batch)
    forms = {"folded": fold(network, torch.bfloat16)}
    if can_fuse(forms["folded"], bench.device):
        forms["fused"] = fuse(forms["folded"])
    for name, form in forms.items():
        with bench.part(f"parts, {name}"):
            parts(bench, name, form, pixels)
    if not bench.is_cuda and not bench.options.tiny:
        return
    stages = [stage for key, stage in network.encoder.backbone.named_children() if "stages" in key]
    for number in bench.options.stages:
        side, channels = bench.options.size // (2 << number), network.encoder.channels[number - 1]
        with bench.part(f"kernels of stage {number}"):
            block_pieces(bench, channels, side, batch, len(stages[number - 1].blocks))


def parts(bench: Bench, name: str, form: FoldedD2LS, pixels: Tensor) -> None:
    """Backbone, mapping and the decoder's steps, in microseconds a tile."""
    batch = len(pixels)
    levels = form.levels(pixels)
    features = form.mapping(levels)
    dictionary = form.dictionary(levels[-1])
    decoder = form.decoder
    height, width = features.shape[-2:]
    image = features.permute(0, 2, 3, 1).flatten(1, 2).contiguous()
    positions = decoder.positions_of(height, width)
    block, last = decoder.blocks[0], decoder.blocks[-1]
    place = positions[2 * len(decoder.blocks) - 2]
    works: dict[str, Work] = {
        "backbone": lambda: form.levels(pixels),
        "mapping": lambda: form.mapping(levels),
        "dictionary": lambda: form.dictionary(levels[-1]),
        "decoder, with a copy": lambda: decoder(dictionary, features.clone()),
        "first tokens query": lambda: block.dictionary_queries_image(dictionary, image, positions[0]),
        "other tokens query": lambda: last.dictionary_queries_image(dictionary, image, place),
        "image queries": lambda: block.answer(image, dictionary, dictionary, positions[1]),
        "upsampler": lambda: decoder.upsampler(image, decoder.dictionary_head(dictionary), height, width),
    }

    def add(part: str, module: nn.Module, x: Tensor) -> Tensor:
        def work() -> Tensor:
            with autocast(x.device, form.dtype):
                return module(x)

        works[part] = work
        return work()

    children = dict(form.encoder.backbone.named_children())
    x = add("stem", nn.Sequential(*(module for key, module in children.items() if "stem" in key)), pixels)
    for index, stage in enumerate(module for key, module in children.items() if "stages" in key):
        x = add(f"stage {index + 1}, downsample", stage.downsample, x)
        x = add(f"stage {index + 1}, blocks", stage.blocks, x)
    for part, work in works.items():
        with bench.part(f"{name}, {part}"):
            bench.keep(f"{name:8}{part:26}{1e6 * bench.kernel_seconds(work) / batch:9.1f} us a tile")


def block_pieces(bench: Bench, channels: int, side: int, batch: int, blocks: int) -> None:
    """The kernels of a block of ConvNeXt, in microseconds a tile for all blocks of the stage."""
    from d2ls_infer.nn.fused import add_product, widened

    device, half = bench.device, torch.bfloat16
    x = torch.randn(batch, side, side, channels, device=device)
    x_half = x.to(half)
    nchw = x_half.permute(0, 3, 1, 2)
    weight = (0.1 * torch.randn(channels, 1, 7, 7, device=device)).to(half)
    vector = torch.randn(channels, device=device)
    rows, hidden = x_half.flatten(0, 2), torch.randn(batch * side**2, 4 * channels, device=device).to(half)
    wide = torch.randn(4 * channels, channels, device=device).mul_(0.05).to(half)
    narrow = torch.randn(channels, 4 * channels, device=device).mul_(0.05).to(half)
    wide_bias, narrow_bias = torch.randn(4 * channels, device=device).to(half), vector.to(half)
    sums, sums_half = x.flatten(0, 2).clone(), rows.clone()
    planes, exacter = nchw.contiguous(), nchw.half()
    works: dict[str, Work] = {
        "depth-wise, channels last": lambda: F.conv2d(nchw, weight, narrow_bias, padding=3, groups=channels),
        "depth-wise, planes": lambda: F.conv2d(planes, weight, narrow_bias, padding=3, groups=channels),
        "depth-wise, float16": lambda: F.conv2d(exacter, weight.half(), padding=3, groups=channels),
        "norm float32 to float32": lambda: F.layer_norm(x, (channels,), vector, vector),
        "norm bfloat16": lambda: F.layer_norm(x_half, (channels,), narrow_bias, narrow_bias),
        "linear": lambda: F.linear(rows, wide, wide_bias),
        "linear, GELU": lambda: F.gelu(F.linear(rows, wide, wide_bias)),
        "linear and GELU in one": lambda: widened(rows, wide, wide_bias),
        "narrow linear": lambda: F.linear(hidden, narrow, narrow_bias),
        "narrow, added to float32": lambda: add_product(sums, hidden, narrow),
        "narrow, added to bfloat16": lambda: add_product(sums_half, hidden, narrow),
        "narrow, float32 added after": lambda: sums.add_(F.linear(hidden, narrow, narrow_bias)),
    }
    if bench.is_cuda:
        from d2ls_infer.nn.kernels import depthwise_norm

        taps = weight.flatten(1).T.contiguous()
        for source, rows_each, groups in ((x, 1, 4), (x, 2, 4), (x, 2, 2), (x, 2, 8), (x_half, 2, 4)):
            works[f"kernel {str(source.dtype)[6:]} {rows_each} x {groups}"] = (
                lambda source=source, rows_each=rows_each, groups=groups: depthwise_norm(
                    source, taps, vector, vector, vector, vector, 1e-6, rows=rows_each, groups=groups
                )
            )
        from products import added_product, gelu_product

        for block, warps, stages in (((128, 256, 64), 8, 3), ((128, 128, 64), 4, 4), ((128, 128, 64), 8, 4)):
            kind = f"{block[0]} x {block[1]}, {warps} warps"
            how: Any = {"block": block, "num_warps": warps, "num_stages": stages}
            works[f"linear in Triton, GELU {kind}"] = lambda how=how: gelu_product(rows, wide, wide_bias, **how)
            works[f"narrow in Triton, float32 {kind}"] = lambda how=how: added_product(sums, hidden, narrow, **how)
    for part, work in works.items():
        with bench.part(f"stage of {channels} channels, {part}"):
            taken = bench.kernel_seconds(work)
            is_product = part.startswith(("linear", "narrow"))
            rate = f"{8 * channels * x.numel() / taken / 1e12:8.0f} TFLOP/s" if is_product else ""
            about = f"{blocks:3} x {channels:4} ch {side:4} px"
            bench.keep(f"{about}  {part:36}{1e6 * taken * blocks / batch:9.1f} us a tile{rate}")


# Labels of a bundled model


@torch.no_grad()
def of_labels(bench: Bench) -> None:
    import rasterio

    from d2ls_infer.weights import find_weights, load_network

    weights = find_weights(bench.options.model)
    network = load_network(weights.path, weights.description).to(bench.device)
    with rasterio.open(ROOT / "examples" / "naip_scene.tif") as scene:
        image = scene.read([1, 2, 3])
    size = bench.options.size
    tiles = np.stack([
        image[:, row : row + size, col : col + size]
        for row in range(0, image.shape[1] - size + 1, size)
        for col in range(0, image.shape[2] - size + 1, size)
    ][:8])  # fmt: skip
    about = weights.description
    mean, std = (torch.tensor(values, device=bench.device).view(-1, 1, 1) for values in (about.mean, about.std))
    pixels = (torch.from_numpy(tiles).to(bench.device).float() / 255 - mean) / std
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    with in_full_float32():
        expected = fold(network)(pixels).argmax(1)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        folded = fold(network, dtype)
        forms: dict[str, nn.Module] = {"folded": folded}
        if can_fuse(folded, bench.device):
            forms["fused"] = fuse(folded)
        for name, form in forms.items():
            with bench.part(f"labels, {name} {dtype}"):
                same = float((form(pixels).argmax(1) == expected).double().mean())
                verdict = "" if same >= GOAL_LABELS else f"  MISSED, goal {GOAL_LABELS:.1%}"
                taken = bench.seconds(bench.replayed(lambda form=form: form(pixels))) / len(pixels)
                line = f"labels {bench.options.model}, {name:7}{str(dtype)[6:]:9} {same:.4%} of {expected.numel()}"
                bench.keep(f"{line} as float32, {1000 * taken:.3f} ms a tile{verdict}")


# A scene


def of_scene(bench: Bench) -> None:
    """The whole way, and what each of its parts takes alone."""
    from d2ls_infer.labels import LabelMap
    from d2ls_infer.manifest import ModelDescription
    from d2ls_infer.segmenter import D2LSSegmenter
    from d2ls_infer.tiling import TileGrid

    side, size, batch = bench.options.scene, bench.options.size, bench.options.batch
    network = a_network(bench)
    description = ModelDescription(
        config=network.config.to_dict(), labels=LabelMap.of([f"class {index}" for index in range(CLASSES)]),
        bands=("red", "green", "blue"), value_range=(0.0, 255.0), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225),
        gsd_m=None, metrics=(), license="CC0-1.0", training_data="none", source="random numbers",
    )  # fmt: skip
    started = time.perf_counter()
    segmenter = D2LSSegmenter(network, description, name="random", sha256="0" * 64)
    grid = TileGrid(side, side, size, size // 4)
    in_row = len(grid.col_starts)
    counts = {batch: len(grid.row_starts) * (in_row // batch)}
    counts[in_row % batch] = len(grid.row_starts) * (in_row % batch > 0)
    alone = 0.0
    pixels = np.stack([texture(size, index) for index in range(batch)])
    for tiles, batches in counts.items():
        if batches:
            some = segmenter.normalise(torch.from_numpy(pixels[:tiles]))
            with torch.inference_mode():
                for _ in range(3):
                    segmenter.run(some)
                alone += batches * bench.seconds(lambda some=some: segmenter.run(some), times=3)
    made = time.perf_counter() - started
    about = f"{side} x {side}, {len(grid)} tiles of {size} px, {batch} at once, {str(segmenter.dtype)[6:]}"
    bench.keep(f"scene {about}: the network alone {alone:.3f} s (made ready in {made:.1f} s)")
    with tempfile.TemporaryDirectory(dir=bench.options.folder) as name:
        folder = Path(name)
        try:
            import rasterio  # noqa: F401
        except ImportError:
            bench.keep("no rasterio: the scene is an array, and so is the map")
            of_array(bench, segmenter, alone)
            return
        scene = folder / "scene.tif"
        write_scene(scene, side, compress=bench.options.compress)
        with bench.part("reading alone"):
            seconds = read_alone(scene, grid)
            bench.keep(f"reading alone: {seconds:.2f} s")
        for kind, model in (("null network", Null(segmenter)), ("whole", segmenter), ("whole, again", segmenter)):
            with bench.part(f"scene, {kind}"):
                of_run(bench, kind, model, scene, alone)


class Null:
    """A segmenter that gives the same scores for any tile, on the same device. What is left is the pipeline."""

    def __init__(self, segmenter: Any) -> None:
        self.labels, self.bands, self.device = segmenter.labels, segmenter.bands, segmenter.device
        self.value_range, self.sha256, self.name = segmenter.value_range, "1" * 64, "null"
        self.uploads = segmenter.uploads
        self.scores = torch.zeros(0)

    def score(self, batch: Tensor) -> Tensor:
        sent = batch if self.uploads is None else self.uploads(batch)
        shape = (len(batch), CLASSES, *batch.shape[-2:])
        if self.scores.shape != shape:
            coarse = torch.randn(len(batch), CLASSES, 16, 16, generator=torch.Generator().manual_seed(0))
            self.scores = F.interpolate(coarse, shape[2:], mode="bicubic").to(self.device).softmax(1)
        return self.scores + sent[:, :1].float() * 1e-6


def of_run(bench: Bench, kind: str, model: Any, scene: Path, alone: float) -> None:
    from d2ls_infer import predict_raster

    output = scene.with_name("map.tif")
    options = {"tile_size": bench.options.size, "overlap": 0.25, "batch_size": bench.options.batch, "overwrite": True}
    if bench.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    result = predict_raster(model, scene, output, **options)
    taken = time.perf_counter() - started
    parts = ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in result.seconds.items())
    peak = f", {torch.cuda.max_memory_allocated() / 1e9:.1f} GB on the device" if bench.is_cuda else ""
    bench.keep(
        f"scene, {kind}: {taken:.2f} s end to end, {alone / taken:.1%} of the network's rate ({parts}; map "
        f"{output.stat().st_size / 1e6:.0f} MB{peak})"
    )


def of_array(bench: Bench, segmenter: Any, alone: float) -> None:
    from d2ls_infer.segmenter import predict_array

    side = bench.options.scene
    array = np.tile(texture(min(side, 2048), 0), (1, -(-side // 2048), -(-side // 2048)))[:, :side, :side]
    array = np.ascontiguousarray(array)
    for kind, model in (("null network", Null(segmenter)), ("whole", segmenter), ("whole, again", segmenter)):
        with bench.part(f"array, {kind}"):
            started = time.perf_counter()
            predict_array(model, array, tile_size=bench.options.size, batch_size=bench.options.batch)
            taken = time.perf_counter() - started
            bench.keep(f"array, {kind}: {taken:.2f} s from array to labels, {alone / taken:.1%} of the network's rate")


def read_alone(scene: Path, grid: Any) -> float:
    from d2ls_infer.raster import Scene

    with Scene.open(scene, bands_needed=3, value_range=(0.0, 255.0)) as opened:
        started = time.perf_counter()
        for _ in opened.tiles(grid):
            pass
        return time.perf_counter() - started


def texture(side: int, seed: int) -> np.ndarray:
    """(3, side, side) uint8: gradients, fields, and noise."""
    rng = np.random.default_rng(seed)
    fields = np.kron(rng.integers(0, 160, (3, -(-side // 64), -(-side // 64))), np.ones((1, 64, 64)))[:, :side, :side]
    ramp = np.linspace(0, 60, side)[None, :, None]
    image: np.ndarray = (fields + ramp + rng.integers(0, 36, (3, side, side))).astype(np.uint8)
    return image


def write_scene(path: Path, side: int, *, compress: str | None) -> None:
    """A GeoTIFF of side x side pixels, three bands, in blocks of 512."""
    import rasterio
    from rasterio.transform import from_origin
    from rasterio.windows import Window

    rows = min(side, 2048)
    pieces = [np.tile(texture(rows, seed), (1, 1, -(-side // rows)))[:, :, :side] for seed in range(2)]
    about = {"compress": compress} if compress else {}
    with rasterio.open(
        path, "w", driver="GTiff", dtype="uint8", count=3, height=side, width=side, crs="EPSG:32633", tiled=True,
        blockxsize=512, blockysize=512, interleave="pixel", photometric="RGB", bigtiff="if_safer",
        transform=from_origin(500000, 5000000, 0.6, 0.6), **about,
    ) as file:  # fmt: skip
        for index, row in enumerate(range(0, side, rows)):
            height = min(rows, side - row)
            file.write(pieces[index % 2][:, :height], window=Window(0, row, side, height))


PARTS: dict[str, Callable[[Bench], None]] = {
    "matrix": matrix,
    "network": of_network,
    "labels": of_labels,
    "pieces": pieces,
    "scene": of_scene,
}


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--batches", type=numbers, default=[8, 16, 32])
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument(
        "--seconds", type=float, default=60, help="after that many, no other form of the network is begun"
    )
    parser.add_argument("--only", type=lambda text: text.split(";"), help="forms with one of these words; parts by ;")
    parser.add_argument("--compile", action="store_true", help="torch.compile too, which takes a minute or more")
    parser.add_argument("--stages", type=numbers, default=[1, 3], help="whose kernels are timed alone, of 1 to 4")
    parser.add_argument("--backbone", default="convnext_base")
    parser.add_argument("--model", default="naip-rgb", help="of the manifest, for the labels")
    parser.add_argument("--scene", type=int, default=16384, help="side of the scene")
    parser.add_argument("--batch", type=int, default=8, help="tiles at once in the scene")
    parser.add_argument("--compress", help="of the scene, such as deflate")
    parser.add_argument("--folder", type=Path, help="where the scene and its map are made")
    parser.add_argument("--traces", action="store_true", help="show where errors come from")
    parser.add_argument("--tiny", action="store_true", help="everything small")
    options = parser.parse_args()
    if options.tiny:
        options.batches, options.size, options.backbone, options.scene, options.batch = [2], 64, "test_convnext", 256, 2
    options.started = time.perf_counter()
    os.environ.setdefault("TRITON_CACHE_DIR", str(Path(tempfile.gettempdir()) / "triton"))
    bench = Bench(options)
    name = torch.cuda.get_device_name() if bench.is_cuda else f"CPU, {torch.get_num_threads()} threads"
    bench.keep(f"{name}, torch {torch.__version__}, python {sys.version.split()[0]}")
    for part in options.parts or ("matrix", "network", "labels"):
        started = time.perf_counter()
        with bench.part(part):
            PARTS[part](bench)
        say(f"-- {part}: {time.perf_counter() - started:.1f} s")
    say("\n==", *bench.lines, sep="\n")
    say(*(["", "failed:", *bench.failed] if bench.failed else ["", "nothing failed"]), sep="\n")
    return bool(bench.failed)


if __name__ == "__main__":
    sys.exit(main())
