"""Ours against other sliding windows: the same network, weights, scene, tile and overlap, each in its own process.

    python tests/benchmarks/peers.py --environments DIR [--scene FILE] [--size 2048] [--model dubai] [NAME ...]

Each peer has a virtual environment under --environments, made on the first call, that sees the packages of this Python
besides its own; --keep leaves it. Without --scene the scene is made of noise: it takes the same time, its labels mean
nothing. "process" is the whole one, with imports, weights, reading and writing; "in process" is from the opened network
to the written map. The network of the forms "null" costs nothing: what is left is reading, blending and writing. Memory
is the most that the process had.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import rasterio
import torch
from torch import Tensor, nn

TILE, OVERLAP = 512, 0.5
PACKAGES = {"monai": ["monai"], "monai null": ["monai"]}
"""What a way needs besides what is here; installed without its dependencies, which are here."""

Network = Callable[[Tensor], Tensor]
Way = Callable[[Network, str, Path, Path], None]


class Null(nn.Module):
    """(B, C, H, W) normalised pixels -> (B, K, H, W) scores, by nothing but a copy."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, pixels: Tensor) -> Tensor:
        return pixels[:, :1].expand(-1, self.classes, -1, -1).contiguous()


def normalised(model: str, path: Path) -> tuple[Tensor, dict]:
    """A whole scene in memory, as the network takes it."""
    from d2ls_infer.weights import find_weights

    about = find_weights(model).description
    with rasterio.open(path) as scene:
        pixels, profile = torch.from_numpy(scene.read()).float(), scene.profile
    low, high = about.value_range
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (about.mean, about.std))
    return ((pixels - low) / (high - low) - mean) / std, profile


def write(path: Path, labels: np.ndarray, profile: dict) -> None:
    """A map of one byte a pixel."""
    with rasterio.open(path, "w", **{**profile, "count": 1, "dtype": "uint8", "driver": "GTiff"}) as out:
        out.write(labels.astype(np.uint8), 1)


def plain(network: Network, model: str, scene: Path, output: Path) -> None:
    """As the authors' test script has it: the whole image in memory, tiles that do not overlap, float32."""
    pixels, profile = normalised(model, scene)
    labels = np.zeros(pixels.shape[1:], np.uint8)
    for row in range(0, labels.shape[0], TILE):
        for col in range(0, labels.shape[1], TILE):
            part = slice(row, row + TILE), slice(col, col + TILE)
            labels[part] = network(pixels[None, :, *part]).argmax(1)[0].numpy()
    write(output, labels, profile)


def monai(network: Network, model: str, scene: Path, output: Path) -> None:
    """MONAI's sliding window, Gaussian."""
    from monai.inferers import SlidingWindowInferer

    pixels, profile = normalised(model, scene)
    scores = SlidingWindowInferer((TILE, TILE), 1, overlap=OVERLAP, mode="gaussian")(pixels[None], network)
    write(output, scores.argmax(1)[0].numpy(), profile)


def ours(network: Network, model: str, scene: Path, output: Path) -> None:
    """`predict_raster`; the network is ours already."""
    from d2ls_infer import predict_raster

    predict_raster(network, scene, output, tile_size=TILE, overlap=OVERLAP, overwrite=True)


WAYS: dict[str, Way] = {
    "ours": ours, "ours bfloat16": ours, "ours openvino": ours, "ours null": ours, "plain": plain, "monai": monai,
    "monai null": monai,
}  # fmt: skip


def network_of(name: str, model: str) -> Network:
    """The network as a way takes it: the published form for the others, a segmenter for ours."""
    from forward import published

    from d2ls_infer import load_model
    from d2ls_infer.weights import find_weights, load_network

    weights = find_weights(model)
    if name.startswith("ours"):
        segmenter = load_model(
            model,
            device="cpu",
            precision="bfloat16" if "bfloat16" in name else "float32",
            backend="openvino" if "openvino" in name else "torch",
        )
        if "null" in name:
            segmenter.run = Null(len(segmenter.labels))
        return segmenter  # type: ignore[return-value]
    if "null" in name:
        return Null(len(weights.description.labels))
    network = load_network(weights.path, weights.description)
    return lambda pixels: published(network, pixels)


@torch.inference_mode()
def run_one(name: str, model: str, scene: Path, output: Path, threads: int) -> None:
    """In a process of its own: print what it took."""
    import resource

    torch.set_num_threads(threads)
    network = network_of(name, model)
    clock, processor = time.perf_counter(), time.process_time()
    WAYS[name](network, model, scene, output)
    print(
        json.dumps(
            {
                "in process": time.perf_counter() - clock,
                "processor": time.process_time() - processor,
                "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            }
        )
    )


def environment_for(name: str, folder: Path) -> str:
    """The Python of a way: this one, or of an environment that is made where it is not there."""
    if name not in PACKAGES:
        return sys.executable
    home = folder / PACKAGES[name][0]
    python = home / "bin" / "python"
    if not python.exists():
        venv.create(home, with_pip=True)
        library = next((home / "lib").glob("python*/site-packages"))
        (library / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", *PACKAGES[name]], check=True)
    return str(python)


def noise(path: Path, size: int, bands: int) -> None:
    """A scene of random values, georeferenced."""
    values = np.random.default_rng(0).integers(0, 255, (bands, size, size), np.uint8)
    transform = rasterio.transform.from_origin(500_000, 4_600_000, 0.5, 0.5)
    with rasterio.open(
        path, "w", driver="GTiff", width=size, height=size, count=bands, dtype="uint8", crs="EPSG:32618",
        transform=transform, tiled=True,
    ) as out:  # fmt: skip
        out.write(values)


def main() -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(WAYS), metavar="NAME", help=", ".join(WAYS))
    parser.add_argument("--environments", type=Path, required=True)
    parser.add_argument("--scene", type=Path)
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--model", default="dubai")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--keep", action="store_true", help="leave the environments")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        run_one(options.one, options.model, options.scene, options.environments, options.threads)
        return 0
    if unknown := [name for name in options.names if name not in WAYS]:
        parser.error(f"unknown: {', '.join(unknown)}; known are {', '.join(WAYS)}")
    print(f"load of the machine before: {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores, {options.threads} threads")
    print(f"{'':18}{'process':>9}{'in process':>12}{'processor':>11}{'memory':>10}{'as ours':>10}")
    maps: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory() as work:
        scene = options.scene or Path(work) / "scene.tif"
        if options.scene is None:
            from d2ls_infer.weights import find_weights

            noise(scene, options.size, len(find_weights(options.model).description.bands))
        for name in options.names:
            python, output = environment_for(name, options.environments), Path(work) / f"{name}.tif"
            command = [python, "-W", "ignore", __file__, "--one", name, "--model", options.model]
            command += ["--scene", str(scene), "--environments", str(output), "--threads", str(options.threads)]
            started = time.perf_counter()
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
            taken = time.perf_counter() - started
            if done.returncode:
                print(f"{name:18}failed, exit code {done.returncode}")
                continue
            told = json.loads(done.stdout.splitlines()[-1])
            with rasterio.open(output) as found:
                maps[name] = found.read(1)
            same = f"{(maps[name] == maps['ours']).mean():10.2%}" if "ours" in maps and "null" not in name else ""
            print(
                f"{name:18}{taken:8.1f}s{told['in process']:11.1f}s{told['processor']:10.1f}s"
                f"{told['memory'] / 1e6:7.0f} MB{same}",
                flush=True,
            )
    if not options.keep:
        for home in {options.environments / PACKAGES[name][0] for name in options.names if name in PACKAGES}:
            shutil.rmtree(home, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
