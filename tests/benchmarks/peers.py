"""Ours against other sliding windows, on the same network, weights, scene, tiles and overlap, each in its own process.

    python tests/benchmarks/peers.py table --environments DIR [--size 2048] [--networks published,null] [NAME ...]
    python tests/benchmarks/peers.py memory --environments DIR [--heights 2048,8192,32768]
    python tests/benchmarks/peers.py pipeline [--size 2048]

Each peer has a virtual environment under --environments, made when it is first wanted, that sees the packages of this
Python besides its own. All get one network, from raw pixels to probabilities: "published", the order of products that
the paper has; "folded", our inference form; or "null", which costs next to nothing, so that reading, blending and
writing are left. Ours is always folded, or null. The scene is made of examples/naip_scene.tif, with noise.

"process" is the whole of it, with imports and weights; "run" is from the opened network to the written map, "cpu" the
processor's seconds of that; "peak" is the most memory of the process, "growth" how much of it came after the network was
opened; "same" is the share of labels equal to ours. Seconds are the least of the runs, memory is the most. Linux only.
`table` measures all that, `memory` against the scene's height, `pipeline` ours against its network's own time. Exits
with 1 where a goal is missed.
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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

PACKAGES = {
    "monai": ["monai==1.6.1"],
    "geoai": ["geoai-py==0.40.1"],
    "terratorch": ["terratorch==1.2.11"],
    "geo-inference": ["geo-inference==3.2.4"],
    # Without its onnxruntime-gpu, which brings CUDA and would stand in the place of the onnxruntime that is here.
    "habitat-mapper": (
        "--no-deps habitat-mapper==0.16.2 charset-normalizer cyclopts defusedxml deprecation humanize loguru mdurl "
        "markdown-it-py opencv-python-headless platformdirs requests rich rioxarray urllib3 wrapt"
    ).split(),
}
"""What pip is asked for, for a peer: what is here already, torch above all, is not installed again."""

GRAPHS = {"geo-inference": ".pt", "habitat-mapper": ".onnx"}
"""The peers that take a network as a file."""


@dataclass(frozen=True)
class Case:
    """One map to make: by whom, with which network, of which scene. graph: the network as a file."""

    way: str
    network: str
    model: str
    bands: int
    classes: int
    scene: str
    output: str = ""
    graph: str = ""

    @property
    def name(self) -> str:
        return f"{self.way}, {self.network}"


# Networks


def network_of(form: str, model: str) -> nn.Module:
    """(B, bands, H, W) raw pixel values -> (B, N, H, W) float32 probabilities, by a form of a model's network."""
    from forward import published
    from torch import nn

    from d2ls_infer.exported import Whole, segmenter_of
    from d2ls_infer.weights import find_weights, load_network

    class Published(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = load_network(weights.path, weights.description)

        def forward(self, pixels: Tensor) -> Tensor:
            return published(self.network, pixels)

    weights = find_weights(model)
    whole = Whole(segmenter_of(weights, "float32"))
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

    segmenter = load_model(case.model, device="cpu", **options)
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


def plain(case: Case) -> Callable[[], None]:
    """As the authors' test script has it: the whole image in memory, tiles that do not overlap, float32."""
    network = network_of(case.network, case.model)

    def run() -> None:
        pixels, profile = whole_scene(case)
        labels = np.zeros(pixels.shape[-2:], np.uint8)
        for row in range(0, labels.shape[0], TILE):
            for col in range(0, labels.shape[1], TILE):
                part = slice(row, row + TILE), slice(col, col + TILE)
                labels[part] = network(pixels[(..., *part)]).argmax(1)[0].numpy()
        write_map(case, labels, profile)

    return run


def monai(case: Case) -> Callable[[], None]:
    from monai.inferers import SlidingWindowInferer

    network = network_of(case.network, case.model)
    inferer = SlidingWindowInferer((TILE, TILE), 1, overlap=OVERLAP, mode="gaussian")

    def run() -> None:
        pixels, profile = whole_scene(case)
        write_map(case, inferer(pixels, network).argmax(1)[0].numpy(), profile)

    return run


def terratorch(case: Case) -> Callable[[], None]:
    from terratorch.tasks.tiled_inference import tiled_inference

    network, stride = network_of(case.network, case.model), int(TILE * (1 - OVERLAP))

    def run() -> None:
        pixels, profile = whole_scene(case)
        scores = tiled_inference(network, pixels, crop=TILE, stride=stride, delta=0, batch_size=1, padding=False)
        write_map(case, scores.argmax(1)[0].numpy(), profile)

    return run


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


def whole_scene(case: Case) -> tuple[Tensor, dict[str, Any]]:
    """(1, bands, H, W) float32, and the profile of a map of it."""
    import torch

    with rasterio.open(case.scene) as scene:
        pixels = torch.from_numpy(scene.read()).float()[None]
        return pixels, {**scene.profile, "count": 1, "nodata": 255, "compress": "lzw"}


def write_map(case: Case, labels: np.ndarray, profile: dict[str, Any]) -> None:
    with rasterio.open(case.output, "w", **profile) as output:
        output.write(labels.astype(np.uint8), 1)


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
    home, packages = folder / way, "\n".join(PACKAGES[way])
    python, whole = home / "bin" / "python", home / "packages.txt"
    if not whole.exists() or whole.read_text() != packages:
        venv.create(home, clear=True)
        library = next((home / "lib").glob("python*/site-packages"))
        (library / "shared.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
        pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
        done = subprocess.run([*pip, *PACKAGES[way]], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"not installed: {last_words(done.stderr)}")
        whole.write_text(packages)
    return str(python)


def make_scene(path: Path, height: int, width: int, bands: int) -> None:
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


@contextmanager
def prepared(options: argparse.Namespace) -> Iterator[tuple[Case, Path]]:
    """A case to be filled in, and a folder for its files."""
    from d2ls_infer.weights import find_weights

    about = find_weights(options.model).description
    with tempfile.TemporaryDirectory(prefix="d2ls-peers-") as work:
        yield Case("", "", options.model, len(about.bands), len(about.labels), ""), Path(work)


def completed(case: Case, folder: Path) -> Case:
    """A case with an output, and with its network as a file where its peer takes one."""
    graph = ""
    if ending := GRAPHS.get(case.way):
        graph = str(folder / f"{case.network}{ending}")
        if not Path(graph).exists():
            write_graph(case.network, case.model, case.bands, Path(graph))
    return replace(case, output=str(folder / f"{case.name}.tif"), graph=graph)


# What is measured


def table(options: argparse.Namespace) -> list[str]:
    """Everybody's time and memory on one scene."""
    missed = []
    with prepared(options) as (about, folder):
        scene = options.scene or folder / "scene.tif"
        if options.scene is None:
            make_scene(scene, options.size, options.size, about.bands)
        for network in options.networks.split(","):
            cases = [replace(about, way=way, network=network, scene=str(scene)) for way in options.names]
            found, failed, maps = measured(cases, folder, options)
            print(f"\nnetwork: {network}")
            print(f"{'':16}{'process':>9}{'run':>9}{'cpu':>9}{'peak':>9}{'growth':>9}{'to ours':>9}{'same':>9}")
            for way in options.names:
                if way not in found:
                    print(f"{way:16}  failed: {failed[way]}")
                    continue
                told, ratio, same = found[way], "", ""
                if "ours" in found:
                    ratio = f"{told['run'] / found['ours']['run']:8.2f}x"
                    same = f"{(maps[way] == maps['ours']).mean():9.2%}" if network != "null" else ""
                    if told["run"] < found["ours"]["run"] and way in PACKAGES:
                        missed.append(f"{way}, {network}: takes {ratio.strip()} of our time, goal: no peer less")
                seconds = "".join(f"{told[name]:8.2f}s" for name in ("process", "run", "cpu"))
                memory = "".join(f"{told[name] / MB:6.0f} MB" for name in ("peak", "growth"))
                print(f"{way:16}{seconds}{memory}{ratio}{same}")
    return missed


def measured(
    cases: list[Case], folder: Path, options: argparse.Namespace
) -> tuple[dict[str, dict[str, float]], dict[str, str], dict[str, np.ndarray]]:
    """By way: what was taken in runs that alternate, why there is none, and the maps."""
    found: dict[str, dict[str, float]] = {}
    failed: dict[str, str] = {}
    maps = {}
    for _ in range(options.runs):
        for case in cases:
            if case.way in failed:
                continue
            try:
                python = environment(case.way, options.environments)
                told = run_apart(whole := completed(case, folder), python)
                with rasterio.open(whole.output) as output:
                    maps[case.way] = output.read(1)
            except Exception as error:  # of any kind: it stands in the table
                failed[case.way] = last_words(str(error))
                found.pop(case.way, None)
                continue
            before = found.get(case.way, told)
            found[case.way] = {
                name: (max if name in ("peak", "growth") else min)(value, before[name]) for name, value in told.items()
            }
    return found, failed, maps


def memory(options: argparse.Namespace) -> list[str]:
    """Growth over the opened network against a scene's height, with the null network."""
    missed = []
    ways = ("ours", "habitat-mapper")
    print("null network, growth over it and seconds, by rows of 4,096 pixels")
    with prepared(options) as (about, folder):
        for height in map(int, options.heights.split(",")):
            scene = folder / "scene.tif"
            make_scene(scene, height, 4096, about.bands)
            cases = [replace(about, way=way, network="null", scene=str(scene)) for way in ways]
            found, failed, _ = measured(cases, folder, options)
            told = [
                f"{way} {found[way]['growth'] / MB:.0f} of {found[way]['peak'] / MB:.0f} MB, {found[way]['run']:.1f} s"
                if way in found
                else f"{way} failed: {failed[way]}"
                for way in ways
            ]
            print(f"{height:8}  {';  '.join(told)}", flush=True)
            growth = {way: taken["growth"] for way, taken in found.items()}
            if not growth.get("ours", np.inf) <= MOST_GROWTH:
                missed.append(f"{height} rows: ours grows by more than {MOST_GROWTH / MB:.0f} MB")
            if not growth.get("ours", np.inf) < growth.get("habitat-mapper", -np.inf):
                missed.append(f"{height} rows: ours does not grow by less than habitat-mapper")
    return missed


def pipeline(options: argparse.Namespace) -> list[str]:
    """Ours end to end against its network's own time on the same tiles, and with the null network."""
    import torch
    from forward import Timer

    from d2ls_infer import load_model
    from d2ls_infer.raster import Scene
    from d2ls_infer.tiling import TileGrid

    segmenter = load_model(options.model, device="cpu", precision="float32")
    timer = Timer()
    with prepared(options) as (about, folder):
        case = replace(about, way="ours", scene=str(folder / "scene.tif"))
        make_scene(Path(case.scene), options.size, options.size, about.bands)
        with Scene.open(case.scene, bands_needed=about.bands) as scene:
            grid = TileGrid(scene.height, scene.width, TILE, int(TILE * OVERLAP))
            tiles = [torch.from_numpy(pixels.values)[None] for _, pixels in scene.tiles(grid)]

        def network() -> None:
            for tile in tiles:
                segmenter.score(tile)

        forms = {"the network alone": network} | {
            name: ours(replace(case, network=form, output=str(folder / f"{form}.tif")), precision="float32")
            for name, form in (("end to end", "folded"), ("end to end, null network", "null"))
        }
        segmenter.score(tiles[0])
        for _ in range(options.runs):
            for name, run in forms.items():
                timer.run(name, run)
    print(f"{len(tiles)} tiles of {TILE} px{'clock':>16}{'ratio':>8}{'cpu':>9}{'ratio':>8}")
    base, missed = timer.seconds["the network alone"], []
    for name, goal in zip(forms, (1.0, MOST_OVER, MOST_NULL), strict=True):
        clock, processor = timer.seconds[name]
        ratios = clock / base[0], processor / base[1]
        print(f"{name:25}{clock:9.2f}s{ratios[0]:8.3f}{processor:8.2f}s{ratios[1]:8.3f}")
        if ratios[0] > goal:
            missed.append(f"{name}: {ratios[0]:.3f} of the network's own time, goal {goal}")
    return missed


def main() -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("one").add_argument("case")  # in a process of its own, see `run_apart`
    for command in (table, memory, pipeline):
        added = commands.add_parser(command.__name__, help=command.__doc__)
        added.set_defaults(command=command)
        added.add_argument("--model", default="dubai")
        added.add_argument("--cores", type=int, default=2, help="what every process is bound to")
        added.add_argument("--runs", type=int, default=1 if command is memory else 3)
        if command is not pipeline:
            added.add_argument("--environments", type=Path, required=True)
        if command is not memory:
            added.add_argument("--size", type=int, default=2048)
    commands.choices["memory"].add_argument("--heights", default="2048,8192,32768")
    commands.choices["table"].add_argument("--scene", type=Path, help="in place of one that is made")
    commands.choices["table"].add_argument("--networks", default="published,null")
    commands.choices["table"].add_argument("names", nargs="*", default=list(WAYS), metavar="NAME", help=", ".join(WAYS))
    options = parser.parse_args()
    if options.command == "one":
        run_here(Case(**json.loads(options.case)))
        return 0
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
    os.environ["OMP_NUM_THREADS"] = str(options.cores)
    print(f"{options.model}, {options.cores} cores, load of the machine before: {os.getloadavg()[0]:.1f}")
    missed = options.command(options)
    print(*(["", "missed:", *missed] if missed else ["", "all goals are met"]), sep="\n")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
