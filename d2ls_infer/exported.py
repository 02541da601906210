"""A model as one file for other runtimes: raw pixel values in, probabilities out, described in its own metadata."""

from __future__ import annotations

import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from d2ls_infer.backends import ONNXRuntime, OpenVINO, Run, check_backend, exported, onnx_model
from d2ls_infer.errors import D2LSError, OutputExistsError, UsageError, WeightsError
from d2ls_infer.graphs import RUNTIMES, GraphFile
from d2ls_infer.manifest import ModelDescription
from d2ls_infer.options import PredictOptions
from d2ls_infer.segmenter import D2LSSegmenter, choose_device, precision_of, predict_array, warn_of_values
from d2ls_infer.smoothing import mean_of_cells, smoothed
from d2ls_infer.tiling import TileGrid
from d2ls_infer.weights import WeightsFile, load_network, warn_of_terms

T = TypeVar("T")

ENDINGS = {"onnx": ".onnx", "openvino": ".xml", "torch.export": ".pt2"}
"""The ending of a file, by format. Beside an .xml lies a .bin of the same name, with the weights."""

LEAST_SAME, LEAST_SAME_INT8, MOST_AREA = 0.999, 0.995, 0.001
"""Goals: the share of labels that stay the same; of all pixels, by which a class's area may be off."""

QUANTISED = ("Convolution", "MatMul", "Add", "Multiply", "MVN", "Interpolate", "ReduceMean")
"""The kinds of operations that would be made int8 if nobody said otherwise."""

STRIDE = 32
"""Sides of tiles are multiples of it: the network's reflection below that is in no graph."""

LEAST_VALID = 0.5
"""Of a tile: emptier ones say little of a model."""


@dataclass(frozen=True)
class Agreement:
    """How far a file's labels are those of the network in float32.

    pixels: compared; same: the share of equal labels; areas: for each class, by how much of all pixels its area is off.
    goal: the least `same` that is good enough; most_area: the largest of `areas` that is.
    """

    pixels: int
    same: float
    areas: tuple[float, ...]
    goal: float
    most_area: float = MOST_AREA

    @property
    def is_good(self) -> bool:
        """Whether the file may stand for the network."""
        return self.same >= self.goal and max(map(abs, self.areas)) <= self.most_area


class Whole(nn.Module):
    """(1, bands, H, W) float32 raw pixel values -> (1, N, H, W) float32 probabilities."""

    def __init__(self, segmenter: D2LSSegmenter) -> None:
        super().__init__()
        self.normalisation, self.network, self.smooth = segmenter.normalisation, segmenter.network, segmenter.smooth

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.network(self.normalisation(pixels))
        scores = logits.softmax(1)
        return mean_of_cells(scores) if self.smooth else scores


def export_model(
    weights: WeightsFile,
    output: str | Path,
    *,
    file_format: str,
    precision: Literal["float32", "bfloat16"] = "float32",
    tile_size: int | None = None,
    tiles: Sequence[Tensor] = (),
    calibrate: Sequence[Tensor] = (),
    int8: bool = False,
    smooth: bool = True,
    overwrite: bool = False,
) -> Agreement | None:
    """Write a model as a file for tiles of one size, and compare it on `tiles`; None where there are none.

    precision: the types of products that stand in the file. tile_size: by default the model's. tiles: each (1, bands,
    tile_size, tile_size), raw pixel values. int8: of an OpenVINO file's encoder, with ranges taken from the tiles of
    `calibrate`. smooth: whether the file smooths its scores, see `smoothed`. Raises UsageError for what makes no sense
    or is not installed, OutputExistsError, and D2LSError for a network that cannot be exported.
    """
    output = Path(output)
    tile_size = weights.description.tile_size if tile_size is None else tile_size
    check_export(
        output, file_format=file_format, precision=precision, tile_size=tile_size, int8=int8, overwrite=overwrite
    )
    if int8 and not calibrate:
        raise UsageError("int8 is calibrated on real tiles; give --calibrate SCENE")
    if weights.path.suffix in RUNTIMES:
        raise UsageError(f"{weights.path} is an exported file; a weights file is wanted")
    warn_of_terms(weights)
    network = load_network(weights.path, weights.description)
    network.encoder.float32_on_cpu |= int8  # in bfloat16 int8 is made of it wrongly, by NNCF
    about: dict[str, Any] = {"name": weights.name, "sha256": weights.sha256, "reference": weights.reference}
    segmenter, exact = (
        D2LSSegmenter(network, weights.description, device="cpu", precision=dtype, smooth=smooth, **about)
        for dtype in (precision, "float32")
    )
    program = exported(Whole(segmenter).eval(), torch.zeros(1, len(segmenter.bands), tile_size, tile_size))
    metadata = metadata_of(segmenter, tile_size, int8=int8)
    # Finished in a folder beside it: what has its name is whole.
    try:
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.resolve().parent) as folder:
            made = Path(folder) / output.name
            run = WRITERS[file_format](program, made, metadata, calibrate if int8 else ())
            agreement = compare(run, exact, tiles, LEAST_SAME_INT8 if int8 else LEAST_SAME) if tiles else None
            for file in sorted(made.parent.iterdir()):  # the .bin before the .xml
                file.replace(output.with_name(file.name))
    except OSError as error:
        raise D2LSError(f"{output} cannot be written: {error}") from error
    return agreement


def check_export(
    output: Path, *, file_format: str, precision: str, tile_size: int, int8: bool, overwrite: bool
) -> None:
    """Raise for all that can be seen before a model is loaded; see `export_model`."""
    if file_format not in ENDINGS:
        raise UsageError(f"unknown format {file_format!r}; known are {', '.join(ENDINGS)}")
    if output.suffix != ENDINGS[file_format]:
        raise UsageError(f"a file of the format {file_format} ends in {ENDINGS[file_format]}, got {output.name}")
    if backend := {"onnx": "onnxruntime", "openvino": "openvino"}.get(file_format):
        check_backend(backend, torch.device("cpu"), getattr(torch, precision))
    if int8 and file_format != "openvino":
        raise UsageError("int8 is for --format openvino")
    if int8 and not find_spec("nncf"):
        raise UsageError("int8 needs more packages: pip install 'd2ls-infer[int8]'")
    if tile_size < STRIDE or tile_size % STRIDE:
        raise UsageError(f"an exported model takes tiles of a multiple of {STRIDE} pixels, got {tile_size}; try 512")
    if not output.resolve().parent.is_dir():
        raise UsageError(f"no such folder: {output.parent}")
    for file in [output, output.with_suffix(".bin")] if file_format == "openvino" else [output]:
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
        "d2ls_precision": "int8" if int8 else precision_of(segmenter),
        "d2ls_smooth": "yes" if segmenter.smooth else "no",
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


def write_program(program: ExportedProgram, path: Path, metadata: dict[str, str], _: Sequence[Tensor]) -> Run:
    """Write a program of torch.export, its metadata as a JSON file inside; gives it loaded again."""
    with warnings.catch_warnings():
        # Constants that are views of one tensor are written each by itself, which loses nothing.
        warnings.filterwarnings("ignore", "No complete tensor found in the group")
        torch.export.save(program, path, extra_files={"d2ls.json": json.dumps(metadata)})
    run: Run = torch.export.load(path).module()
    return run


WRITERS: dict[str, Callable[..., Run]] = {
    "onnx": write_onnx,
    "openvino": write_openvino,
    "torch.export": write_program,
}


def quantised(model: Any, tiles: Sequence[Tensor]) -> Any:
    """An OpenVINO model whose encoder's products run in int8, with ranges taken from raw tiles.

    The stem, depth-wise convolutions and all that comes after the encoder stay as they are: of the labels of the
    first bundled `naip`, 97.5 % stayed the same with all in int8, and 99.0 % so.
    """
    import nncf

    logging.getLogger("nncf").setLevel(logging.WARNING)  # it tells of each operation
    operations = model.get_ordered_ops()
    encoder: set[str] = set()  # all that another convolution comes after
    for operation in reversed(operations):
        if "Convolution" in operation.get_type_name() or operation.get_friendly_name() in encoder:
            encoder |= {value.get_node().get_friendly_name() for value in operation.input_values()}
    kept = [
        operation.get_friendly_name()
        for operation in operations
        if operation.get_type_name() == "GroupConvolution"
        or (operation.get_type_name() in QUANTISED and operation.get_friendly_name() not in encoder)
    ]
    stem = next(found.get_friendly_name() for found in operations if found.get_type_name() == "Convolution")
    # Where ranges are not symmetric, OpenVINO subtracts the zero points of linear layers by passes of their own.
    linear = any(found.get_type_name() == "MatMul" and found.get_friendly_name() in encoder for found in operations)
    return nncf.quantize(
        model,
        nncf.Dataset([tile.float().numpy() for tile in tiles]),
        subset_size=len(tiles),
        preset=nncf.QuantizationPreset.PERFORMANCE if linear else nncf.QuantizationPreset.MIXED,
        ignored_scope=nncf.IgnoredScope(names=[stem, *kept]),
    )


@torch.inference_mode()
def compare(run: Run, exact: D2LSSegmenter, tiles: Iterable[Tensor], goal: float) -> Agreement:
    """A file's labels against those of the network in float32."""
    classes = len(exact.labels)
    same = pixels = 0
    areas = np.zeros(classes, dtype=np.int64)
    for tile in tiles:
        found = run(tile.float()).argmax(1).flatten()
        expected = exact.score(tile).argmax(1).flatten()
        same += int((found == expected).sum())
        pixels += len(expected)
        areas += (found.bincount(minlength=classes) - expected.bincount(minlength=classes)).numpy()
    return Agreement(pixels, same / pixels, tuple(float(area) / pixels for area in areas), goal)


def sample_tiles(about: ModelDescription, scenes: Sequence[str], tile_size: int, most: int) -> list[Tensor]:
    """At most `most` tiles (1, bands, tile_size, tile_size), raw values as `predict` gives them, evenly picked.

    Raises UsageError for a scene without a whole tile of which half is valid, and what opening a scene raises.
    """
    options, found = PredictOptions(tile_size=tile_size, overlap=0), []
    scenes = scenes[:most]
    for index, source in enumerate(scenes):
        with options.open(source, bands=about.bands, value_range=about.value_range) as scene:
            grid = TileGrid(scene.height, scene.width, tile_size, 0)
            whole = (
                torch.from_numpy(values)[None]
                for tile, (values, valid) in scene.tiles(grid)
                if (tile.height, tile.width) == (tile_size, tile_size) and valid.mean() >= LEAST_VALID
            )
            picked = evenly(whole, most // len(scenes) + (index < most % len(scenes)))
            if not picked:
                raise UsageError(f"{source} has no valid tile of {tile_size} pixels; give a smaller --tile-size")
            found += picked
    return found


def evenly(items: Iterable[T], most: int) -> list[T]:
    """At most that many of the items, from all over; no two lie more than twice as far apart as others."""
    kept: list[T] = []
    step = 1
    for index, item in enumerate(items):
        if index % step == 0:
            kept.append(item)
        if len(kept) == 2 * most:
            kept, step = kept[::2], 2 * step
    return kept if len(kept) <= most else [kept[index * len(kept) // most] for index in range(most)]


class ExportedSegmenter:
    """A file that `export_model` wrote, as a segmenter: ONNX or OpenVINO, on the CPU.

    Smaller tiles are enlarged by reflection, and their scores cut. Raises UsageError for tiles that are larger than
    those of the file, and where its runtime is not installed.
    """

    def __init__(
        self,
        weights: WeightsFile,
        *,
        device: str = "auto",
        precision: str = "auto",
        backend: str = "torch",
        smooth: bool = True,
    ) -> None:
        graph = GraphFile.of(weights.path)
        self.backend, self.dtype = RUNTIMES[weights.path.suffix], graph.precision
        if backend not in ("torch", "auto", self.backend):
            raise UsageError(f"{weights.path} is for {self.backend}, not for {backend}; leave out --backend")
        if precision not in ("auto", self.dtype):
            raise UsageError(f"the products of {weights.path} are in {self.dtype}; leave out --precision")
        if graph.smooth and not smooth:
            raise UsageError(f"{weights.path} smooths its scores itself; export it with --no-smooth to have them raw")
        self.smooth, self.smooths_after = smooth, smooth and not graph.smooth
        self.device = choose_device("cpu" if device == "auto" else device)
        check_backend(self.backend, self.device, torch.float32)
        self.description, self.name = graph.description, weights.name
        self.sha256, self.reference = weights.sha256, weights.reference
        self.tile_size = self.description.tile_size
        self.labels, self.bands, self.gsd_m = self.description.labels, self.description.bands, self.description.gsd_m
        self.value_range = self.description.value_range
        try:
            runtime = OpenVINO if self.backend == "openvino" else ONNXRuntime
            self.run: Run = runtime(str(weights.path))
        except RuntimeError as error:
            raise WeightsError(f"{weights.path} is damaged: {str(error).strip().splitlines()[0]}") from error

    def score(self, batch: Tensor) -> Tensor:
        """(B, bands, H, W) raw pixel values -> (B, N, H, W) float32 probabilities."""
        height, width = batch.shape[-2:]
        if max(height, width) > self.tile_size:
            raise UsageError(
                f"{self.name} was exported for tiles of {self.tile_size} pixels, got {height} x {width}; "
                f"give --tile-size {self.tile_size}"
            )
        missing = ((0, 0), (0, self.tile_size - height), (0, self.tile_size - width))
        images = [torch.from_numpy(np.pad(image.float().numpy(), missing, mode="reflect"))[None] for image in batch]
        scores = torch.cat([self.run(image) for image in images])
        # Before they are cut, as a file that smooths by itself does it.
        return (smoothed(scores) if self.smooths_after else scores)[..., :height, :width]

    def predict(self, array: np.ndarray, **options: Any) -> np.ndarray:
        """(bands, H, W) raw pixel values -> (H, W) uint8 class indices; see `predict_array`."""
        warn_of_values(self, array)
        return predict_array(self, array, **options)
