"""A model as one file for other runtimes: raw pixel values in, probabilities out, and what it is in its own metadata."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from d2ls_infer.backends import ONNXRuntime, OpenVINO, check_backend, exported, onnx_model
from d2ls_infer.errors import D2LSError, OutputExistsError, UsageError
from d2ls_infer.options import PredictOptions
from d2ls_infer.segmenter import D2LSSegmenter
from d2ls_infer.tiling import TileGrid

ENDINGS = {"onnx": ".onnx", "openvino": ".xml", "torch.export": ".pt2"}
"""The ending of a file, by format. Beside an .xml lies a .bin of the same name, with the weights."""

LEAST_SAME, LEAST_SAME_INT8, MOST_AREA = 0.999, 0.995, 0.001
"""Goals: the share of labels that stay the same; of all pixels, by which a class's area may be off."""

LEAST_VALID = 0.5
"""Of a tile: emptier ones say little of a model."""


@dataclass(frozen=True)
class Agreement:
    """How far a file's labels are those of the network in float32.

    pixels: compared; same: the share of equal labels; areas: for each class, by how much of all pixels its area is off.
    goal: the least `same` that is good enough.
    """

    pixels: int
    same: float
    areas: tuple[float, ...]
    goal: float

    @property
    def is_good(self) -> bool:
        """Whether the file may stand for the network."""
        return self.same >= self.goal and max(map(abs, self.areas)) <= MOST_AREA


class Whole(nn.Module):
    """(1, bands, H, W) float32 raw pixel values -> (1, N, H, W) float32 probabilities."""

    def __init__(self, segmenter: D2LSSegmenter) -> None:
        super().__init__()
        self.network = segmenter.network
        self.register_buffer("gain", segmenter.gain)
        self.register_buffer("offset", segmenter.offset)

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.network(pixels * self.gain + self.offset)
        return logits.softmax(1)


def export_model(
    segmenter: D2LSSegmenter,
    output: str | Path,
    *,
    format: str,
    tile_size: int = 512,
    tiles: Sequence[Tensor] = (),
    int8: bool = False,
    overwrite: bool = False,
) -> Agreement | None:
    """Write a model as a file for tiles of one size, and compare it on `tiles`; None where there are none.

    segmenter: on the CPU; its types of products stand in the file. tiles: (1, bands, tile_size, tile_size) raw pixel
    values; with int8, an OpenVINO file's encoder is calibrated on them. Raises UsageError for what makes no sense or is
    not installed, OutputExistsError, and D2LSError for a network that cannot be exported.
    """
    output = Path(output)
    check_export(output, format=format, tile_size=tile_size, int8=int8, overwrite=overwrite)
    if int8 and not tiles:
        raise UsageError("int8 is calibrated on real tiles; give --calibrate SCENE")
    if segmenter.device.type != "cpu":
        raise UsageError(f"a model is exported on the CPU, got one on {segmenter.device}")
    program = exported(Whole(segmenter).eval(), torch.zeros(1, len(segmenter.bands), tile_size, tile_size))
    metadata = metadata_of(segmenter, tile_size, int8=int8)
    # Finished in a folder beside it: what has its name is whole.
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.resolve().parent) as folder:
        made = Path(folder) / output.name
        try:
            run = WRITERS[format](program, made, metadata, tiles if int8 else ())
            agreement = compare(run, segmenter, tiles, LEAST_SAME_INT8 if int8 else LEAST_SAME) if tiles else None
            for file in sorted(made.parent.iterdir()):  # the .bin before the .xml
                file.replace(output.with_name(file.name))
        except OSError as error:
            raise D2LSError(f"{output} cannot be written: {error}") from error
    return agreement


def check_export(output: Path, *, format: str, tile_size: int, int8: bool, overwrite: bool) -> None:
    """Raise for all that can be seen before a model is loaded; see `export_model`."""
    if format not in ENDINGS:
        raise UsageError(f"unknown format {format!r}; known are {', '.join(ENDINGS)}")
    if output.suffix != ENDINGS[format]:
        raise UsageError(f"a file of the format {format} ends in {ENDINGS[format]}, got {output.name}")
    if backend := {"onnx": "onnxruntime", "openvino": "openvino"}.get(format):
        check_backend(backend, torch.device("cpu"), torch.float32)
    if int8 and format != "openvino":
        raise UsageError("int8 is for --format openvino")
    if int8 and not find_spec("nncf"):
        raise UsageError("int8 needs more packages: pip install 'd2ls-infer[int8]'")
    if tile_size < 1:
        raise UsageError(f"tile size must be at least 1 pixel, got {tile_size}; try 512")
    if not output.resolve().parent.is_dir():
        raise UsageError(f"no such folder: {output.parent}")
    for file in [output, output.with_suffix(".bin")] if format == "openvino" else [output]:
        if file.is_dir():
            raise UsageError(f"{file} is a folder, not a file to write")
        if file.exists() and not overwrite:
            raise OutputExistsError(f"{file} exists; give --overwrite to replace it")


def metadata_of(segmenter: D2LSSegmenter, tile_size: int, *, int8: bool) -> dict[str, str]:
    """What a file says of itself, as texts."""
    description = segmenter.description
    return {
        "d2ls_model": segmenter.name,
        "d2ls_weights_sha256": segmenter.sha256,
        "d2ls_tile_size": str(tile_size),
        "d2ls_precision": "int8" if int8 else str(segmenter.dtype).removeprefix("torch."),
        "d2ls_input": "raw pixel values, float32, one image: bands, rows, columns",
        "d2ls_output": "probabilities of the classes, float32",
        "labels": json.dumps(list(segmenter.labels.names)),
        "bands": json.dumps(list(segmenter.bands)),
        "value_range": json.dumps(list(segmenter.value_range)),
        "gsd_m": json.dumps(segmenter.gsd_m),
        "license": description.license,
        "d2ls": json.dumps(description.to_dict(), allow_nan=False),
    }


def write_onnx(program: ExportedProgram, path: Path, metadata: dict[str, str], _: Sequence[Tensor]) -> ONNXRuntime:
    """Write an ONNX file; gives it loaded again."""
    model = onnx_model(program)
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=value)
    path.write_bytes(model.SerializeToString())
    return ONNXRuntime(str(path))


def write_openvino(program: ExportedProgram, path: Path, metadata: dict[str, str], tiles: Sequence[Tensor]) -> OpenVINO:
    """Write an .xml and its .bin; gives them loaded again. tiles: for int8, what it is calibrated on."""
    import openvino

    model = openvino.convert_model(program)
    if tiles:
        model = quantised(model, tiles)
    for key, value in metadata.items():
        model.set_rt_info(value, ["d2ls", key])
    openvino.save_model(model, path, compress_to_fp16=False)
    return OpenVINO(str(path))


def write_program(
    program: ExportedProgram, path: Path, metadata: dict[str, str], _: Sequence[Tensor]
) -> Callable[[Tensor], Tensor]:
    """Write a program of torch.export, its metadata as a JSON file inside; gives it loaded again."""
    torch.export.save(program, path, extra_files={"d2ls.json": json.dumps(metadata)})
    run: Callable[[Tensor], Tensor] = torch.export.load(path).module()
    return run


WRITERS: dict[str, Callable[..., Callable[[Tensor], Tensor]]] = {
    "onnx": write_onnx,
    "openvino": write_openvino,
    "torch.export": write_program,
}


def quantised(model: Any, tiles: Sequence[Tensor]) -> Any:
    """An OpenVINO model whose encoder runs in int8, its ranges taken from raw tiles."""
    import nncf

    return nncf.quantize(
        model,
        nncf.Dataset([tile.float().numpy() for tile in tiles]),
        subset_size=len(tiles),
        preset=nncf.QuantizationPreset.MIXED,
    )


@torch.inference_mode()
def compare(run: Callable[[Tensor], Tensor], segmenter: D2LSSegmenter, tiles: Iterable[Tensor], goal: float) -> Agreement:
    """A file's labels against those of the segmenter's network in float32."""
    classes = len(segmenter.labels)
    same = pixels = 0
    areas = np.zeros(classes, dtype=np.int64)
    for tile in tiles:
        found = run(tile.float()).argmax(1).flatten()
        expected = segmenter.score(tile).argmax(1).flatten()
        same += int((found == expected).sum())
        pixels += len(expected)
        areas += (found.bincount(minlength=classes) - expected.bincount(minlength=classes)).numpy()
    return Agreement(pixels, same / pixels, tuple(float(area) / pixels for area in areas), goal)


def sample_tiles(segmenter: D2LSSegmenter, scenes: Sequence[str], tile_size: int, most: int) -> list[Tensor]:
    """At most `most` tiles (1, bands, tile_size, tile_size), raw values as `predict` gives them, evenly picked.

    Raises UsageError for a scene without a whole tile of which half is valid, and what opening a scene raises.
    """
    options, found = PredictOptions(tile_size=tile_size, overlap=0), []
    for source in scenes:
        with options.open(source, bands=segmenter.bands, value_range=segmenter.value_range) as scene:
            grid = TileGrid(scene.height, scene.width, tile_size, 0)
            share = -(-most // len(scenes))
            step = max(1, len(grid) // share)
            whole = [
                torch.from_numpy(values)[None]
                for index, (tile, (values, valid)) in enumerate(scene.tiles(grid))
                if index % step == 0
                and (tile.height, tile.width) == (tile_size, tile_size)
                and valid.mean() >= LEAST_VALID
            ][:share]
            if not whole:
                raise UsageError(f"{source} has no valid tile of {tile_size} pixels; give a smaller --tile-size")
            found += whole
    return found
