"""Ours against other sliding windows, on the same network, weights, scene, tiles and overlap, each in its own process.

    python tests/benchmarks/peers.py table --environments DIR [--size 2048] [--networks published,null] [NAME ...]
    python tests/benchmarks/peers.py memory --environments DIR [--heights 2048,8192,32768]
    python tests/benchmarks/peers.py pipeline [--size 2048]

Each peer has a virtual environment under --environments, made when it is first wanted, that sees the packages of this
Python besides its own. All get one network, from raw pixels to probabilities: "published", the order of products that
the paper has; "folded", our inference form; or "null", which costs next to nothing, so that reading, blending and
writing are left. Ours is always folded, or null. The scene is made of examples/naip_scene.tif, with noise.

"process" is the whole of it, with imports and weights; "run" is from the opened network to the written map, "cpu" the
processor's seconds of that; "peak" is the most memory of the process, "growth" how much of it came after the network
was opened; "same" is the share of labels equal to ours. Seconds are the least of the runs, memory is the most. `table`
measures all that, `memory` against the scene's height, `pipeline` ours against its network's own time. Exits with 1
where a goal is missed. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import rasterio
from rasterio.windows import Window

if TYPE_CHECKING:  # a peer that runs without torch shall not pay for it
    from torch import Tensor, nn

TILE, OVERLAP = 512, 0.5  # the overlap that habitat-mapper and geo-inference have, whatever is asked for
EXAMPLE = Path(__file__).parents[2] / "examples" / "naip_scene.tif"
MOST_GROWTH = 150e6  # bytes over the opened network
MOST_OVER, MOST_NULL = 1.05, 0.1  # of the network's own time: ours end to end, and ours with the null network
MB = 1e6

Told = dict[str, dict[str, float]]
Failed = dict[str, str]

PACKAGES = {
    "monai": "monai==1.6.1",
    "geoai": "geoai-py==0.40.1",
    "terratorch": "terratorch==1.2.11",
    "geo-inference": "geo-inference==3.2.4",
    # Without its onnxruntime-gpu, which brings CUDA and would stand in the place of the onnxruntime that is here.
    "habitat-mapper": "--no-deps habitat-mapper==0.16.2 charset-normalizer cyclopts defusedxml deprecation humanize "
    "loguru mdurl markdown-it-py opencv-python-headless platformdirs requests rich rioxarray urllib3 wrapt",
}
"""What pip is asked for, for a peer: what is here already, torch above all, is not installed again."""

GRAPHS = {"geo-inference": ".pt", "habitat-mapper": ".onnx"}
"""The peers that take a network as a file."""


@dataclass(frozen=True)
class Case:
    """One map to make: by whom, with which network, of which scene. graph: the network as a file."""

    model: str
    bands: int
    classes: int
    way: str = ""
    network: str = ""
    scene: str = ""
    output: str = ""
    graph: str = ""


# Networks


def network_of(form: str, model: str) -> nn.Module:
    """(B, bands, H, W) raw pixel values -> (B, N, H, W) float32 probabilities, by a form of a model's network."""
    from forward import published
    from torch import nn

    from d2ls_infer.exported import Whole
    from d2ls_infer.segmenter import D2LSSegmenter
    from d2ls_infer.weights import find_weights, load_network

    class Published(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = load_network(weights.path, weights.description)

        def forward(self, pixels: Tensor) -> Tensor:
            return published(self.network, pixels)

    weights = find_weights(model)
    whole = Whole(D2LSSegmenter.of(weights, device="cpu", precision="float32", smooth=False))
    if form == "published":
        whole.network = Published()
    if form == "null":
        whole.network = null_network(len(weights.description.labels))
    return whole.eval()


def null_network(classes: int) -> nn.Module:
    """(B, bands, 512, 512) normalised pixels -> (B, classes, 512, 512) logits: waves, hardly moved by the pixels."""
    import torch
    from torch import nn

    class Null(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            place = torch.arange(TILE) / 40
            self.waves = nn.Buffer(
                torch.stack([(place[:, None] + n).sin() * (place - 2 * n).cos() for n in range(classes)])
            )

        def forward(self, pixels: Tensor) -> Tensor:
            height, width = pixels.shape[-2:]
            return pixels[:, :1] / 1000 + self.waves[:, :height, :width]

    return Null()


def write_graph(form: str, model: str, bands: int, path: Path) -> None:
    """A network as a file for tiles of 512 px: TorchScript or ONNX, by its ending."""
    import torch

    from d2ls_infer.backends import exported, onnx_model

    network, pixels = network_of(form, model), torch.rand(1, bands, TILE, TILE) * 255
    with torch.no_grad():
        if path.suffix == ".pt":
            torch.jit.trace(network, pixels, check_trace=False).save(path)
        else:
            path.write_bytes(onnx_model(exported(network, pixels)).SerializeToString())


# Ways: each opens its network and gives what makes the map


def ours(case: Case, **options: Any) -> Callable[[], object]:
    from d2ls_infer import load_model, predict_raster

    segmenter = load_model(case.model, device="cpu", smooth=False, **options)
    if case.network == "null":
        segmenter.run = null_network(case.classes)
    return lambda: predict_raster(
        segmenter,
        case.scene,
        case.output,
        tile_size=TILE,
        overlap=OVERLAP,
        dictionary="tile",
        batch_size=1,
        overwrite=True,
    )


def in_memory(case: Case, label: Callable[[Tensor], Tensor]) -> Callable[[], None]:
    """For what is no reader: the whole scene (1, bands, H, W) float32 -> (H, W) labels, and a map of them."""
    import torch

    def run() -> None:
        with rasterio.open(case.scene) as scene:
            pixels, profile = torch.from_numpy(scene.read()).float()[None], scene.profile
        labels = label(pixels).to(torch.uint8).numpy()
        with rasterio.open(case.output, "w", **{**profile, "count": 1, "nodata": 255, "compress": "lzw"}) as output:
            output.write(labels, 1)

    return run


def plain(case: Case) -> Callable[[], None]:
    """As the authors' test script has it: the whole image in memory, tiles that do not overlap, float32."""
    import torch

    network = network_of(case.network, case.model)

    def label(pixels: Tensor) -> Tensor:
        rows = [
            torch.cat([network(tile).argmax(1)[0] for tile in strip.split(TILE, 3)], 1)
            for strip in pixels.split(TILE, 2)
        ]
        return torch.cat(rows)

    return in_memory(case, label)


def monai(case: Case) -> Callable[[], None]:
    from monai.inferers import SlidingWindowInferer

    network = network_of(case.network, case.model)
    inferer = SlidingWindowInferer((TILE, TILE), 1, overlap=OVERLAP, mode="gaussian")
    return in_memory(case, lambda pixels: inferer(pixels, network).argmax(1)[0])


def terratorch(case: Case) -> Callable[[], None]:
    from terratorch.tasks.tiled_inference import tiled_inference

    network = network_of(case.network, case.model)
    tiles = {"crop": TILE, "stride": int(TILE * (1 - OVERLAP)), "delta": 0, "batch_size": 1, "padding": False}
    return in_memory(case, lambda pixels: tiled_inference(network, pixels, **tiles).argmax(1)[0])


def geoai(case: Case) -> Callable[[], object]:
    import geoai.utils  # noqa: F401 - its function would import it, at the cost of seconds
    from geoai.inference import predict_geotiff

    network = network_of(case.network, case.model)
    return lambda: predict_geotiff(
        network, case.scene, case.output, tile_size=TILE, overlap=int(TILE * OVERLAP), batch_size=1,
        num_classes=case.classes, output_dtype="uint8", output_nodata=255, blend_mode="cosine", device="cpu",
        preprocess_fn=lambda tile: tile, postprocess_fn=lambda scores: scores.argmax(0), verbose=False,
    )  # fmt: skip


def geo_inference(case: Case) -> Callable[[], None]:
    from geo_inference.geo_inference import GeoInference

    folder = Path(case.output).with_suffix("")
    mapper = GeoInference(model=case.graph, work_dir=str(folder), device="cpu", num_classes=case.classes)

    def run() -> None:
        mapper(inference_input=case.scene, bands_requested=[], patch_size=TILE, workers=1)
        (found,) = folder.glob("*.tif")
        found.replace(case.output)

    return run


def habitat_mapper(case: Case) -> Callable[[], None]:
    from habitat_mapper.config import ModelConfig
    from habitat_mapper.model import ONNXModel
    from habitat_mapper.processing import ImageProcessor

    graph = Path(case.graph)
    config = ModelConfig(
        name=graph.stem, revision="20260101", dependencies=[str(graph)], model_filename=graph.name, nodata_value=255,
        input_channels=case.bands, activation=None, normalization=None, max_pixel_value=1.0,
    )  # fmt: skip
    model = ONNXModel(config)
    assert model.input_size == TILE  # it is asked for: that opens the network
    processor = ImageProcessor.from_model(model, crop_size=TILE, batch_size=1, blur_kernel_size=1, quiet=True)
    return lambda: processor.run(case.scene, case.output)


WAYS: dict[str, Callable[[Case], Callable[[], object]]] = {
    "ours": lambda case: ours(case, precision="float32"),
    "ours bfloat16": lambda case: ours(case, precision="bfloat16"),
    "ours openvino": lambda case: ours(case, precision="float32", backend="openvino"),
    "plain": plain,
    "monai": monai,
    "geoai": geoai,
    "terratorch": terratorch,
    "geo-inference": geo_inference,
    "habitat-mapper": habitat_mapper,
}


# Measuring


def memory_now(name: str) -> int:
    """Bytes of this process by the system's name for them: VmRSS now, VmHWM the most since it was last set back."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status tells no {name}")


def run_here(case: Case) -> None:
    """In a process of its own: make the map, and print what it took."""
    run = WAYS[case.way](case)
    if "torch" in sys.modules:
        import torch

        run = torch.inference_mode()(run)
    opened, peak = memory_now("VmRSS"), memory_now("VmHWM")
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back
    clock, processor = time.perf_counter(), time.process_time()
    run()
    told = {"run": time.perf_counter() - clock, "cpu": time.process_time() - processor}
    most = memory_now("VmHWM")
    print(json.dumps({**told, "peak": max(peak, most), "growth": most - opened}))


def run_apart(case: Case, python: str) -> dict[str, float]:
    """What a map took, by name. Raises RuntimeError with the last words of a process that failed."""
    command = [python, "-W", "ignore", __file__, "one", json.dumps(asdict(case))]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    process = time.perf_counter() - started
    if done.returncode:
        raise RuntimeError(last_words(done.stderr) or f"exit code {done.returncode}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return {"process": process, **found}


def last_words(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1][:100]


def environment(way: str, folder: Path) -> str:
    """The Python of a way: this one, or that of an environment, made where it is not there. Raises RuntimeError."""
    if way not in PACKAGES:
        return sys.executable
    home, packages = folder / way, PACKAGES[way]
    python, whole = home / "bin" / "python", home / "packages.txt"
    if not whole.exists() or whole.read_text() != packages:
        venv.create(home, clear=True)
        library = next((home / "lib").glob("python*/site-packages"))
        (library / "shared.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
        pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
        done = subprocess.run([*pip, *packages.split()], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"not installed: {last_words(done.stderr)}")
        whole.write_text(packages)
    return str(python)


def make_scene(path: Path, height: int, width: int, bands: int) -> Path:
    """The example scene side by side, with noise; no pixel is 0, which some peers take for nodata."""
    with rasterio.open(EXAMPLE) as example:
        image = example.read(range(1, bands + 1)).astype(np.int16)
        place = {"crs": example.crs, "transform": example.transform}
    chance = np.random.default_rng(0)
    cols = np.arange(width) % image.shape[2]
    with rasterio.open(
        path, "w", driver="GTiff", dtype="uint8", count=bands, height=height, width=width, tiled=True, **place
    ) as scene:
        for row in range(0, height, TILE):
            rows = np.arange(row, min(row + TILE, height)) % image.shape[1]
            strip = image[:, rows][..., cols]
            strip += chance.integers(-4, 5, strip.shape, dtype=np.int16)
            scene.write(strip.clip(1, 254).astype(np.uint8), window=Window(0, row, width, len(rows)))
    return path


def completed(case: Case, folder: Path) -> Case:
    """A case with an output, and with its network as a file where its peer takes one."""
    graph = folder / f"{case.network}{GRAPHS[case.way]}" if case.way in GRAPHS else None
    if graph and not graph.exists():
        write_graph(case.network, case.model, case.bands, graph)
    return replace(case, output=str(folder / f"{case.way}, {case.network}.tif"), graph=str(graph or ""))


def labels_of(folder: Path, way: str, network: str) -> np.ndarray:
    with rasterio.open(folder / f"{way}, {network}.tif") as found:
        return np.asarray(found.read(1))


# What is measured


def measured(case: Case, ways: list[str], folder: Path, options: argparse.Namespace) -> tuple[Told, Failed]:
    """By way: what was taken in runs that alternate, or why there is none. The maps lie in the folder."""
    found: Told = {}
    failed: Failed = {}
    for _ in range(options.runs):
        for way in ways:
            if way in failed:
                continue
            try:
                python = environment(way, options.environments)
                told = run_apart(completed(replace(case, way=way), folder), python)
            except Exception as error:  # of any kind: it stands in the table
                failed[way] = last_words(str(error))
                found.pop(way, None)
                continue
            before = found.setdefault(way, told)
            for name in told:
                before[name] = (max if name in ("peak", "growth") else min)(told[name], before[name])
    return found, failed


def table(case: Case, folder: Path, options: argparse.Namespace) -> list[str]:
    """Everybody's time and memory on one scene."""
    missed = []
    scene = options.scene or make_scene(folder / "scene.tif", options.size, options.size, case.bands)
    for network in options.networks.split(","):
        case = replace(case, network=network, scene=str(scene))
        found, failed = measured(case, options.names, folder, options)
        print(f"\nnetwork: {network}")
        print(f"{'':16}{'process':>9}{'run':>9}{'cpu':>9}{'peak':>9}{'growth':>9}{'to ours':>9}{'same':>9}")
        for way in options.names:
            if way in failed:
                print(f"{way:16}  failed: {failed[way]}")
                continue
            told, compared = found[way], ""
            if "ours" in found:
                ratio = told["run"] / found["ours"]["run"]
                same = (labels_of(folder, way, network) == labels_of(folder, "ours", network)).mean()
                compared = f"{ratio:8.2f}x{'' if network == 'null' else f'{same:9.2%}'}"
                if ratio < 1 and way in PACKAGES:
                    missed.append(f"{network}: {way} takes {ratio:.2f} of our time, goal: no peer takes less")
            seconds = "".join(f"{told[name]:8.2f}s" for name in ("process", "run", "cpu"))
            print(f"{way:16}{seconds}{told['peak'] / MB:6.0f} MB{told['growth'] / MB:6.0f} MB{compared}", flush=True)
    return missed


def memory(case: Case, folder: Path, options: argparse.Namespace) -> list[str]:
    """Growth over the opened network against a scene's height, with the null network."""
    missed, ways = [], ["ours", "habitat-mapper"]
    print("rows of 4,096 pixels, null network: growth over it, peak, seconds of the run")
    for height in map(int, options.heights.split(",")):
        scene = make_scene(folder / "scene.tif", height, 4096, case.bands)
        found, failed = measured(replace(case, network="null", scene=str(scene)), ways, folder, options)
        for way, told in found.items():
            sizes = f"{told['growth'] / MB:6.0f} MB{told['peak'] / MB:6.0f} MB"
            print(f"{height:8}  {way:16}{sizes}{told['run']:8.1f}s", flush=True)
        missed += [f"{height} rows: {way} failed: {reason}" for way, reason in failed.items()]
        growth = [found[way]["growth"] / MB for way in ways if way in found]
        if "ours" in found and growth[0] > MOST_GROWTH / MB:
            missed.append(f"{height} rows: ours grows by {growth[0]:.0f} MB, goal {MOST_GROWTH / MB:.0f} MB")
        if len(growth) == 2 and growth[0] >= growth[1]:
            missed.append(f"{height} rows: ours grows by {growth[0]:.0f} MB, habitat-mapper by {growth[1]:.0f}")
    return missed


def pipeline(case: Case, folder: Path, options: argparse.Namespace) -> list[str]:
    """Ours end to end against its network's own time on the same tiles, and with the null network."""
    import torch
    from forward import Timer

    from d2ls_infer import load_model
    from d2ls_infer.raster import Scene
    from d2ls_infer.tiling import TileGrid

    segmenter, timer = load_model(options.model, device="cpu", precision="float32", smooth=False), Timer()
    case = replace(case, scene=str(make_scene(folder / "scene.tif", options.size, options.size, case.bands)))
    with Scene.open(case.scene, bands_needed=case.bands) as scene:
        grid = TileGrid(scene.height, scene.width, TILE, int(TILE * OVERLAP))
        tiles = [torch.from_numpy(pixels.values)[None] for _, pixels in scene.tiles(grid)]

    def network() -> None:
        for tile in tiles:
            segmenter.score(tile)

    forms: dict[str, Callable[[], object]] = {"the network alone": network}
    for name, form in (("end to end", "folded"), ("end to end, null network", "null")):
        forms[name] = ours(replace(case, network=form, output=str(folder / f"{form}.tif")), precision="float32")
        forms[name]()  # makes ready
    for _ in range(options.runs):
        for name, run in forms.items():
            timer.run(name, run)
    print(f"{f'{len(tiles)} tiles of {TILE} px':25}{'clock':>10}{'ratio':>8}{'cpu':>9}{'ratio':>8}")
    base, missed = timer.seconds["the network alone"], []
    for name, goal in zip(forms, (1.0, MOST_OVER, MOST_NULL), strict=True):
        clock, processor = timer.seconds[name]
        ratio = clock / base[0]
        print(f"{name:25}{clock:9.2f}s{ratio:8.3f}{processor:8.2f}s{processor / base[1]:8.3f}")
        if ratio > goal:
            missed.append(f"{name}: {ratio:.3f} of the network's own time, goal {goal}")
    return missed


def main() -> int:
    assert __doc__ is not None
    if sys.argv[1:2] == ["one"]:  # in a process of its own, see `run_apart`
        run_here(Case(**json.loads(sys.argv[2])))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for measure in (table, memory, pipeline):
        command = commands.add_parser(measure.__name__, help=measure.__doc__)
        command.set_defaults(measure=measure)
        command.add_argument("--model", default="dubai")
        command.add_argument("--cores", type=int, default=2, help="what every process is bound to")
        command.add_argument("--runs", type=int, default=1 if measure is memory else 3)
        if measure is not pipeline:
            command.add_argument("--environments", type=Path, required=True)
        if measure is not memory:
            command.add_argument("--size", type=int, default=2048)
    commands.choices["memory"].add_argument("--heights", default="2048,8192,32768")
    commands.choices["table"].add_argument("--scene", type=Path, help="in place of one that is made")
    commands.choices["table"].add_argument("--networks", default="published,null")
    commands.choices["table"].add_argument("names", nargs="*", default=list(WAYS), metavar="NAME", help=", ".join(WAYS))
    options = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
    os.environ["OMP_NUM_THREADS"] = str(options.cores)
    print(f"{options.model}, {options.cores} cores, load of the machine before: {os.getloadavg()[0]:.1f}")
    from d2ls_infer.weights import find_weights

    about = find_weights(options.model).description
    with tempfile.TemporaryDirectory(prefix="d2ls-peers-") as work:
        missed = options.measure(Case(options.model, len(about.bands), len(about.labels)), Path(work), options)
    print(*(["", "missed:", *missed] if missed else ["", "all goals are met"]), sep="\n")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
