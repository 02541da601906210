"""How fast each backend is against the published form in float32, and whether it gives the same labels.

    OMP_NUM_THREADS=2 python tests/benchmarks/backends.py [--runs 5] [--threads 2] [--scene FILE] [MODEL ...]

MODEL as in `forward.py`. Runs of all forms alternate; clock and processor as there. With --scene, labels are compared
with the network's in float32 on tiles of that scene. int8 is calibrated on every second tile, and compared on the rest.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from forward import Timer, published
from torch import Tensor

from d2ls_infer.backends import OpenVINO, exported, is_installed, runner
from d2ls_infer.exported import LEAST_SAME, LEAST_SAME_INT8, compare, sample_tiles, write_openvino
from d2ls_infer.nn import D2LS, D2LSConfig, fold
from d2ls_infer.segmenter import D2LSSegmenter
from d2ls_infer.weights import find_weights, load_network

FORMS = (
    ("torch", torch.float32), ("torch", torch.bfloat16), ("compile", torch.float32), ("openvino", torch.float32),
    ("openvino", torch.bfloat16), ("onnxruntime", torch.float32),
)  # fmt: skip


def runs_of(
    network: D2LS, pixels: Tensor, wanted: list[str], int8: list[Tensor]
) -> dict[str, Callable[[Tensor], Tensor]]:
    """Every form by name; int8: normalised tiles for its calibration."""
    found: dict[str, Callable[[Tensor], Tensor]] = {"published float32": lambda x: published(network, x)}
    for backend, dtype in FORMS:
        if backend in wanted and is_installed(backend):
            found[f"{backend} {str(dtype).removeprefix('torch.')}"] = runner(backend, fold(network, dtype))
    if int8:
        network.encoder.float32_on_cpu = True  # as `export_model` has it
        for dtype in (torch.float32, torch.bfloat16):
            with tempfile.TemporaryDirectory() as folder:
                model: OpenVINO = write_openvino(
                    exported(fold(network, dtype), pixels), Path(folder) / "int8.xml", {}, int8
                )
            found[f"openvino int8, rest {str(dtype).removeprefix('torch.')}"] = model
    for run in found.values():
        run(pixels)
    return found


@torch.inference_mode()
def main() -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", default=["dubai", "naip-rgb", "convnext_base"])
    parser.add_argument("--scene", action="append", default=[])
    parser.add_argument("--tiles", type=int, default=8)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--backends", default="torch,openvino,onnxruntime", help="compile takes minutes")
    parser.add_argument("--int8", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.models:
        torch.manual_seed(0)
        tiles: list[Tensor] = []
        if "_" in name:
            network = D2LS(D2LSConfig(backbone=name, num_classes=7)).eval()
        else:
            weights = find_weights(name)
            network = load_network(weights.path, weights.description)
            segmenter = D2LSSegmenter.of(weights, device="cpu", precision="float32", smooth=False)
            tiles = sample_tiles(segmenter.description, options.scene, options.size, options.tiles)
        pixels = torch.randn(1, network.config.in_channels, options.size, options.size)
        seen = [segmenter.normalise(tile) for tile in tiles[::2]] if tiles else [pixels]
        forms = runs_of(network, pixels, options.backends.split(","), seen if options.int8 else [])
        timer = Timer()
        for _ in range(options.runs):
            for form, run in forms.items():
                timer.run(form, lambda run=run, pixels=pixels: run(pixels))
        print(f"\n{name}: {network.config.backbone}, {network.config.num_classes} classes, {options.size} px")
        print(f"{'':30}{'clock':>9}{'ratio':>7}{'processor':>11}{'ratio':>7}{'same labels':>14}{'area off':>10}")
        base = timer.seconds["published float32"]
        for form, run in forms.items():
            clock, processor = timer.seconds[form]
            told = ""
            if tiles:
                goal = LEAST_SAME_INT8 if "int8" in form else LEAST_SAME
                held = tiles[1::2] if "int8" in form and len(tiles) > 1 else tiles
                found = compare(lambda x, run=run, to=segmenter.normalise: run(to(x)), segmenter, held, goal)
                told = f"{found.same:14.4%}{max(map(abs, found.areas)):10.4%}{'' if found.is_good else '  missed'}"
            print(f"{form:30}{clock:8.3f}s{base[0] / clock:7.2f}{processor:10.3f}s{base[1] / processor:7.2f}{told}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
