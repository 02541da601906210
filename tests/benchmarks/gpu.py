"""How fast a network is on a GPU, of what that GPU can do; whether labels are those of float32; scenes end to end.

    python tests/benchmarks/gpu.py [matrix] [network] [labels] [scene] [--batches 8,32] [--compile]

matrix: products of 8192 x 8192 matrices, and copies, as the measure of all else. network: ConvNeXt-Base, seven classes,
512 px, random weights, in several forms, their labels against float32. labels: the same of a bundled model. scene:
`predict_raster` of a generated scene of 16k x 16k pixels against the network's own time. By default the first three.
What fails is told and the rest goes on; exits with 1 then. Without a GPU all runs on the CPU, which only shows that it
works: give --tiny.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from forward import published
from torch import Tensor

from d2ls_infer.backends import Replayed
from d2ls_infer.nn import D2LS, D2LSConfig, autocast, fold

ROOT = Path(__file__).parents[2]
CLASSES = 7

Work = Callable[[], object]
Form = Callable[[Tensor], Tensor]


class Bench:
    """What is measured, on which device, and what came of it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.is_cuda = self.device.type == "cuda"
        self.matrix_rate = float("nan")
        self.failed: list[str] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Something that may fail without the rest."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.failed.append(f"{name}: {type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}")

    def seconds(self, work: Work, *, runs: int = 5, times: int = 1) -> float:
        """The median of some runs; times: how often the work is done in each, so that starting it counts for little."""
        work()
        taken = []
        for _ in range(runs):
            self.wait()
            started = time.perf_counter()
            for _ in range(times):
                work()
            self.wait()
            taken.append((time.perf_counter() - started) / times)
        return statistics.median(taken)

    def wait(self) -> None:
        """Until the device is done."""
        if self.is_cuda:
            torch.cuda.synchronize()

    def graphed(self, network: Any) -> Form:
        """A network as the package runs it on CUDA."""
        return Replayed(network) if self.is_cuda else network


# The card


def matrix(bench: Bench) -> None:
    side = 256 if bench.options.tiny else 8192
    for dtype in (torch.bfloat16, torch.float16):
        a, b = torch.randn(2, side, side, device=bench.device).to(dtype)
        rate = 2 * side**3 / bench.seconds(partial(torch.matmul, a, b), runs=11, times=3)
        bench.matrix_rate = rate if dtype == torch.bfloat16 else bench.matrix_rate
        print(f"matrix {str(dtype)[6:]:9} {side}^3: {rate / 1e12:.1f} TFLOP/s")
    count = 1 << (20 if bench.options.tiny else 28)
    source = torch.empty(count, dtype=torch.float32, device=bench.device)
    target = torch.empty_like(source)
    rate = 8 * count / bench.seconds(lambda: target.copy_(source))
    print(f"copies in the device: {rate / 1e12:.2f} TB/s read and written")
    if bench.is_cuda:
        part = target[: count // 4]
        pinned, pageable = torch.empty(count // 4, pin_memory=True), torch.ones(count // 4)
        up = count / bench.seconds(lambda: part.copy_(pinned, non_blocking=True))
        down = count / bench.seconds(lambda: pinned.copy_(part, non_blocking=True))
        slow = count / bench.seconds(lambda: part.copy_(pageable))
        print(f"copies: pinned up {up / 1e9:.1f}, down {down / 1e9:.1f}, pageable up {slow / 1e9:.1f} GB/s")


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
    return network.eval().to(bench.device, memory_format=torch.channels_last)


def some_pixels(bench: Bench, batch: int) -> Tensor:
    """Something like images: smooth, with noise."""
    generator = torch.Generator().manual_seed(batch)
    size = bench.options.size
    coarse = torch.randn(batch, 3, size // 32, size // 32, generator=generator).to(bench.device)
    pixels = F.interpolate(coarse, (size, size), mode="bicubic")
    pixels += 0.3 * torch.randn(pixels.shape, generator=generator).to(bench.device)
    return pixels.contiguous(memory_format=torch.channels_last)


def forms(bench: Bench) -> dict[str, Callable[[], Form]]:
    """What makes each form, the quick to make first."""
    network = a_network(bench)
    half = fold(network, torch.bfloat16)

    def plain(pixels: Tensor) -> Tensor:
        with autocast(pixels.device, torch.bfloat16):
            return published(network, pixels).float()

    made: dict[str, Callable[[], Form]] = {
        "published, autocast": lambda: plain,
        "folded": lambda: half,
        "folded, graph": lambda: bench.graphed(half),
    }
    if bench.options.compile:
        made |= {
            "compiled": lambda: torch.compile(half, dynamic=False),
            "compiled, graph": lambda: bench.graphed(torch.compile(half, dynamic=False)),
        }
    return made


@torch.no_grad()
def of_network(bench: Bench) -> None:
    few = some_pixels(bench, 4)
    flop = arithmetic(bench)
    with in_full_float32():
        exact = fold(a_network(bench))
        expected = torch.cat([exact(tile) for tile in few.split(1)]).argmax(1)
        print(f"folded float32, batch 4: {1000 * bench.seconds(lambda: exact(few), runs=2) / 4:.2f} ms a tile")
    print(f"{'form':20}{'batch':>6}{'ms a tile':>11}{'TFLOP/s':>9}{'of matrix':>11}{'as float32':>12}{'ready in':>10}")
    for name, make in forms(bench).items():
        with bench.part(name):
            form = make()
            for batch in bench.options.batches:
                pixels = some_pixels(bench, batch)
                started = time.perf_counter()
                for _ in range(2):  # the second makes a graph
                    form(pixels)
                bench.wait()
                ready = time.perf_counter() - started
                taken = bench.seconds(partial(form, pixels), times=3) / batch
                line = f"{name:20}{batch:6}{1000 * taken:11.3f}{flop / taken / 1e12:9.1f}"
                print(f"{line}{flop / taken / bench.matrix_rate:11.1%}{'':12}{ready:8.1f} s", flush=True)
            for _ in range(3):  # the last by the graph
                found = form(few).argmax(1)
            print(f"{name:20}{'labels':>6}{'':31}{(found == expected).double().mean().item():12.3%}", flush=True)


def arithmetic(bench: Bench) -> float:
    """Products and sums of a tile in the published order, which speeds go by."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        published(a_network(bench), some_pixels(bench, 1))
    print(f"arithmetic of a tile: {counter.get_total_flops() / 1e9:.1f} GFLOP as published")
    return float(counter.get_total_flops())


@contextmanager
def in_full_float32() -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


# Labels of a bundled model


@torch.inference_mode()
def of_labels(bench: Bench) -> None:
    import rasterio

    from d2ls_infer.weights import find_weights, load_network

    weights = find_weights(bench.options.model)
    about, network = weights.description, load_network(weights.path, weights.description).to(bench.device)
    size = bench.options.size
    with rasterio.open(ROOT / "examples" / "naip_scene.tif") as scene:
        image = torch.from_numpy(scene.read([1, 2, 3]))
    tiles = image.unfold(1, size, size).unfold(2, size, size).flatten(1, 2).movedim(1, 0)[:8]
    mean, std = (torch.tensor(values, device=bench.device).view(-1, 1, 1) for values in (about.mean, about.std))
    pixels = (tiles.to(bench.device).float() / 255 - mean) / std
    with in_full_float32():
        expected = fold(network)(pixels).argmax(1)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        with bench.part(f"labels {dtype}"):
            form = bench.graphed(fold(network, dtype))
            for _ in range(3):
                found = form(pixels).argmax(1)
            same, taken = (found == expected).double().mean().item(), bench.seconds(partial(form, pixels))
            about_it = f"labels {bench.options.model} {str(dtype)[6:]:9} {same:.4%} as float32"
            print(f"{about_it}, {1000 * taken / len(pixels):.3f} ms a tile", flush=True)


# A scene


def of_scene(bench: Bench) -> None:
    """The whole way, what the network takes of it, and what is left without one."""
    from d2ls_infer import predict_raster
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
    segmenter = D2LSSegmenter(network, description, name="random", sha256="0" * 64)
    grid = TileGrid(side, side, size, size // 4)
    some = segmenter.normalise(torch.zeros(batch, 3, size, size, dtype=torch.uint8))
    segmenter.run(some)
    alone = len(grid) / batch * bench.seconds(lambda: segmenter.run(some), times=3)
    print(f"scene {side} x {side}, {len(grid)} tiles of {size} px, {batch} at once: the network alone {alone:.2f} s")
    with tempfile.TemporaryDirectory(dir=bench.options.folder) as folder:
        scene, output = Path(folder) / "scene.tif", Path(folder) / "map.tif"
        write_scene(scene, side)
        options: dict[str, Any] = {"tile_size": size, "overlap": 0.25, "batch_size": batch, "overwrite": True}
        for kind, model in (("no network", Null(segmenter)), ("whole", segmenter), ("whole, again", segmenter)):
            with bench.part(f"scene, {kind}"):
                result = predict_raster(model, scene, output, **options)  # type: ignore[arg-type]
                parts = ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in result.seconds.items())
                share = alone / result.seconds["total"]
                print(f"scene, {kind}: {parts} s, {share:.1%} of the network's rate", flush=True)


class Null:
    """A segmenter that gives the same scores for any tile, on the same device. What is left is the pipeline."""

    def __init__(self, segmenter: Any) -> None:
        self.labels, self.bands, self.device = segmenter.labels, segmenter.bands, segmenter.device
        self.value_range, self.sha256, self.name = segmenter.value_range, "1" * 64, "null"
        self.normalise, self.scores = segmenter.normalise, torch.zeros(0)

    def score(self, batch: Tensor) -> Tensor:
        pixels = self.normalise(batch)
        shape = (len(batch), CLASSES, *batch.shape[-2:])
        if self.scores.shape != shape:
            coarse = torch.randn(len(batch), CLASSES, 16, 16, generator=torch.Generator().manual_seed(0))
            self.scores = F.interpolate(coarse, shape[2:], mode="bicubic").to(self.device).softmax(1)
        return self.scores + pixels[:, :1] * 1e-6


def write_scene(path: Path, side: int) -> None:
    """A GeoTIFF of side x side pixels, three bands, in blocks of 512: gradients, fields, and noise."""
    import rasterio
    from rasterio.transform import from_origin
    from rasterio.windows import Window

    rows, rng = min(side, 2048), np.random.default_rng(0)
    fields = np.kron(rng.integers(0, 160, (3, -(-rows // 64), -(-side // 64))), np.ones((1, 64, 64)))[:, :rows, :side]
    ramp = np.linspace(0, 60, rows)[None, :, None]
    piece = (fields + ramp + rng.integers(0, 36, (3, rows, side))).astype(np.uint8)
    with rasterio.open(
        path, "w", driver="GTiff", dtype="uint8", count=3, height=side, width=side, crs="EPSG:32633", tiled=True,
        blockxsize=512, blockysize=512, interleave="pixel", photometric="RGB", bigtiff="if_safer",
        transform=from_origin(500000, 5000000, 0.6, 0.6),
    ) as file:  # fmt: skip
        for row in range(0, side, rows):
            height = min(rows, side - row)
            file.write(piece[:, :height], window=Window(0, row, side, height))


PARTS = {"matrix": matrix, "network": of_network, "labels": of_labels, "scene": of_scene}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--batches", type=lambda text: [int(part) for part in text.split(",")], default=[8, 32])
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--compile", action="store_true", help="torch.compile too, which takes a minute or more")
    parser.add_argument("--backbone", default="convnext_base")
    parser.add_argument("--model", default="naip-rgb", help="of the manifest, for the labels")
    parser.add_argument("--scene", type=int, default=16384, help="side of the scene")
    parser.add_argument("--batch", type=int, default=8, help="tiles at once in the scene")
    parser.add_argument("--folder", type=Path, help="where the scene and its map are made")
    parser.add_argument("--tiny", action="store_true", help="everything small")
    options = parser.parse_args()
    if options.tiny:
        options.batches, options.size, options.backbone, options.scene, options.batch = [2], 64, "test_convnext", 256, 2
    bench = Bench(options)
    name = torch.cuda.get_device_name() if bench.is_cuda else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}, python {sys.version.split()[0]}")
    for part in options.parts or ("matrix", "network", "labels"):
        with bench.part(part):
            PARTS[part](bench)
    print(*(["failed:", *bench.failed] if bench.failed else ["nothing failed"]), sep="\n")
    return bool(bench.failed)


if __name__ == "__main__":
    sys.exit(main())
