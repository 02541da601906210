"""What turns a batch of raw pixels into class scores: the protocol that the pipeline knows, and D2LS behind it."""

from __future__ import annotations

import logging
import operator
from collections.abc import Sequence
from typing import Any, Literal, Protocol, Self, get_args, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2ls_infer.backends import EXTRAS, Run, check_backend, fastest_backend, runner, version_of
from d2ls_infer.context import Looks, Observer, ReadRows, observed, parse_dictionary
from d2ls_infer.errors import D2LSError, UsageError
from d2ls_infer.labels import NODATA, LabelMap
from d2ls_infer.manifest import ModelDescription
from d2ls_infer.nn import ByEmbeddings, FoldedD2LS, allow_packing, inference_form
from d2ls_infer.smoothing import smoothed
from d2ls_infer.tiling import TileGrid, parse_overlap
from d2ls_infer.tiling import blend as blend_tiles
from d2ls_infer.transfers import Uploads
from d2ls_infer.weights import WeightsFile, load_network

log = logging.getLogger(__name__)

Precision = Literal["auto", "float32", "bfloat16", "float16"]
PRECISIONS: tuple[str, ...] = get_args(Precision)

TILE_PX = 512
"""Side of a tile for segmenters that do not say by what tiles they are best mapped."""

USED_SHARE = 0.1
"""Of the model's range of values: what uses more of it, and nothing beyond, is taken to be on it."""


@runtime_checkable
class Segmenter(Protocol):
    """Anything that scores tiles. The tiler, the raster reader and the writer know no more of a model than this.

    labels: the classes, in the order of the scores. bands: names of the bands it takes, in channel order.

    Attributes that may be there besides: `value_range`, (low, high) of the raw pixel values, to which scenes of other
    types than uint8 are scaled; `device`, where the scores are (the CPU where it is left out); `gsd_m`, the ground
    sampling distance it was trained at; `tile_size`, the side in pixels of the tiles that it is best mapped by; `name`,
    of which the names of its maps are made (that of its class where it is left out); and `sha256`, which tells it from
    any other, without which `resume` takes up nothing. One that wants to see some of a scene before it scores its tiles
    is an `Observer` too.
    """

    labels: LabelMap
    bands: tuple[str, ...]

    def score(self, batch: Tensor) -> Tensor:
        """(B, bands, H, W) raw pixel values, uint8 or float32, on the CPU -> (B, K, H, W) scores of the K classes.

        Scores are blended by weighted means and the largest wins. They stay on the segmenter's device.
        """


def name_of(model: Any) -> str:
    """What maps by a segmenter, or by a weights file, are named after."""
    return str(getattr(model, "name", type(model).__name__))


class Normalisation(nn.Module):
    """(B, bands, H, W) float32 raw pixel values -> the same shape as a network takes them, see `ModelDescription`."""

    def __init__(self, description: ModelDescription) -> None:
        super().__init__()
        low, high = description.value_range
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (description.mean, description.std))
        self.gamma, self.low, self.extent = description.gamma, low, high - low
        extent, low = (self.extent, low / self.extent) if self.gamma == 1 else (1, 0)  # then one product and one sum
        self.gain, self.offset = nn.Buffer(1 / (extent * std)), nn.Buffer(-(low + mean) / std)

    def forward(self, raw: Tensor) -> Tensor:
        if self.gamma != 1:
            raw = ((raw - self.low) / self.extent).clamp(min=0) ** self.gamma
        return raw * self.gain + self.offset


class D2LSSegmenter:
    """A D2LS network with the description of its weights. Scores are probabilities.

    `network` is the `nn.Module` in its inference form: normalised pixels in, logits out. A D2LS that is given stays as
    it is; of one that is folded already, products keep their type. `backend` is what runs it, see `BACKENDS`; "auto"
    is settled by `settle`, or by the first tile. `smooth`: whether scores are `smoothed`. `name` and `sha256` say which
    weights it holds, `reference` where they are on the hub ("owner/repo@commit:file"; empty for others).
    """

    def __init__(
        self,
        network: nn.Module,
        description: ModelDescription,
        *,
        name: str,
        sha256: str,
        reference: str = "",
        device: str = "auto",
        precision: Precision = "auto",
        backend: str = "torch",
        smooth: bool = True,
    ) -> None:
        self.device = choose_device("cpu" if device == "auto" and backend in EXTRAS else device)
        self.dtype = choose_dtype(precision, self.device)
        if backend != "auto":
            check_backend(backend, self.device, self.dtype)
        self.network = inference_form(network, self.dtype).to(self.device)
        self.backend, self.is_settled = backend, backend != "auto"
        self.settled_for: tuple[int, int] | None = None
        self.run = runner("torch" if backend == "auto" else backend, self.network)
        self.given: tuple[Tensor, Run] | None = None
        self.uploads = Uploads(self.device) if self.device.type == "cuda" else None
        self.smooth = smooth
        self.description = description
        self.name, self.sha256, self.reference = name, sha256, reference
        self.labels, self.bands, self.value_range = description.labels, description.bands, description.value_range
        self.gsd_m, self.tile_size = description.gsd_m, description.tile_size
        self.normalisation = Normalisation(description).to(self.device)

    @classmethod
    def of(cls, weights: WeightsFile, **options: Any) -> Self:
        """The segmenter of a weights file that was found. options: device, precision, backend, smooth."""
        network = load_network(weights.path, weights.description)
        return cls(
            network,
            weights.description,
            name=weights.name,
            sha256=weights.sha256,
            reference=weights.reference,
            **options,
        )

    def normalise(self, batch: Tensor) -> Tensor:
        """(B, bands, H, W) raw pixel values -> the same shape as the network takes it, float32 on its device."""
        if self.uploads is not None and batch.device.type == "cpu":
            batch = self.uploads(batch)
        pixels: Tensor = self.normalisation(batch.to(self.device, non_blocking=True).float())
        return pixels.contiguous(memory_format=torch.channels_last)

    @torch.inference_mode()
    def score(self, batch: Tensor, context: Tensor | None = None) -> Tensor:
        """(B, bands, H, W) raw pixel values -> (B, N, H, W) float32 probabilities, any H and W.

        context: class embeddings (L + 2, N, C') in place of each tile's own, see `FoldedD2LS`.
        """
        pixels = self.normalise(batch)
        if self.backend == "auto":
            self.settle(*batch.shape[-2:])
        run = self.run if context is None else self.run_by(context)
        scores = run(pixels).softmax(1)
        return smoothed(scores) if self.smooth else scores

    def run_by(self, context: Tensor) -> Run:
        """The network by given class embeddings, which a runtime's graph takes as constants; the last ones are kept."""
        given = self.given  # another thread may replace it
        if given is None or given[0] is not context:
            given = self.given = context, runner(self.backend, ByEmbeddings(self.network, context))
        return given[1]

    @torch.inference_mode()
    def settle(self, height: int, width: int) -> None:
        """Of the backend "auto": from now on the one that is fastest for tiles of that size."""
        if self.is_settled or self.settled_for == (height, width):
            return
        runs = {}

        def make(backend: str) -> Run:
            runs[backend] = runner(backend, self.network)
            return runs[backend]

        pixels = torch.zeros(1, len(self.bands), height, width, device=self.device)
        backend = fastest_backend(make, pixels, self.dtype, {"weights": self.sha256})
        if backend != self.backend:  # else it keeps the graphs that it has
            self.run = runs.get(backend) or runner(backend, self.network)
        allow_packing(self.network, backend != "compile")  # else as the last that was measured has it
        self.backend, self.settled_for = backend, (height, width)

    @property
    def observes(self) -> bool:
        """Whether the network was trained for a context."""
        return self.description.shared_dictionary and isinstance(self.network, FoldedD2LS)

    @torch.inference_mode()
    def observe(self, batch: Tensor) -> Tensor:
        """(B, bands, H, W) raw pixel values -> the mean of their class embeddings, (L + 2, N, C') float32.

        Raises UsageError for a network with parts of its own.
        """
        if not isinstance(self.network, FoldedD2LS):
            raise UsageError(f"the network of {self.name} takes no dictionary of a scene; try that of each tile")
        return self.network.embeddings(self.normalise(batch)).mean(0)

    def merge(self, contexts: Sequence[Tensor]) -> Tensor:
        """The mean of class embeddings."""
        return torch.stack(list(contexts)).mean(0)

    def predict(self, array: np.ndarray, **options: Any) -> np.ndarray:
        """(bands, H, W) raw pixel values -> (H, W) uint8 class indices, 255 where there is no value.

        options: tile_size, overlap, blend, batch_size, dictionary, as those of `predict_raster`. See `predict_array`
        of this module for what counts as no value, and for what is raised.
        """
        warn_of_values(self, array)
        return predict_array(self, array, **options)


def predict_array(
    segmenter: Segmenter,
    array: np.ndarray,
    *,
    tile_size: int | None = None,
    overlap: int | float | str = 0.25,
    blend: str = "hann",
    batch_size: int = 1,
    dictionary: str = "auto",
) -> np.ndarray:
    """(bands, H, W) raw pixel values -> (H, W) uint8 class indices, 255 where a value is not a finite number.

    Of a masked array, such as `rasterio` reads with `masked=True`, 255 is also where all bands are masked. Values are
    taken on the model's range, whatever their type; those beyond are clipped. Tiled and blended as `predict_raster`
    does it, by the same options. Raises UsageError for another number of bands or dimensions.
    """
    bands, array = segmenter.bands, np.asanyarray(array)
    if array.ndim != 3 or len(array) != len(bands) or 0 in array.shape:
        raise UsageError(
            f"the model takes an array of shape ({len(bands)}, height, width) with the bands {', '.join(bands)}; "
            f"got {array.shape}"
        )
    if array.dtype.kind not in "uif":
        raise UsageError(f"the model takes whole or real numbers, got {array.dtype}")
    values, valid = model_values(segmenter, array)
    height, width = valid.shape
    grid = tiles_of(segmenter, height, width, tile_size, overlap)
    segmenter = in_context(segmenter, lambda start, stop: (values[:, start:stop], valid[start:stop]), grid, dictionary)
    tiles = (
        (tile, (values[:, *where], valid[where]))
        for tile in grid
        for where in [(slice(tile.row, tile.row + tile.height), slice(tile.col, tile.col + tile.width))]
    )
    rows = blend_tiles(
        segmenter.score,
        tiles,
        grid,
        channels=len(segmenter.labels),
        window=blend,
        batch_size=batch_size,
        device=getattr(segmenter, "device", "cpu"),
    )
    return np.concatenate([decide(part.scores, part.covered) for part in rows])


def tiles_of(about: Any, height: int, width: int, tile_size: int | None, overlap: int | float | str) -> TileGrid:
    """The tiles of a scene for a segmenter, or its description: of the side that is asked for, else the one it states.

    Raises UsageError for a size or an overlap that makes no sense.
    """
    try:
        size = operator.index(getattr(about, "tile_size", TILE_PX) if tile_size is None else tile_size)
    except TypeError:
        raise UsageError(f"the side of a tile is a whole number of pixels, got {tile_size!r}") from None
    return TileGrid(height, width, size, parse_overlap(overlap, size))


def seems_on(value_range: tuple[float, float], least: float, largest: float) -> bool:
    """Whether values between these two are on a model's range, as far as they tell."""
    low, high = value_range
    return low <= least and low + USED_SHARE * (high - low) < largest <= high


def warn_of_values(segmenter: Segmenter, array: np.ndarray) -> None:
    """Say it when values of another type than uint8 do not look as if they were on the model's range."""
    value_range, array = getattr(segmenter, "value_range", None), np.asanyarray(array)
    if array.dtype == np.uint8 or array.dtype.kind not in "uif" or value_range is None:
        return
    known = np.ma.masked_array(np.ma.getdata(array), np.ma.getmaskarray(array) | ~np.isfinite(np.ma.getdata(array)))
    if known.count() and not seems_on(value_range, least := float(known.min()), largest := float(known.max())):
        log.warning(
            "the array holds %s values from %g to %g; they are taken on the model's range %g to %g as they are. "
            "If they are on another, bring them to it",
            array.dtype, least, largest, *value_range,
        )  # fmt: skip


def model_values(segmenter: Segmenter, array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(bands, H, W) raw pixel values -> the same, uint8 or float32 in the model's value range, and (H, W) bool: valid.

    Valid is where all values are finite numbers, and not all are masked where the array is a masked one.
    """
    value_range = getattr(segmenter, "value_range", None)
    mask, array = np.ma.getmask(array), np.asarray(array)
    valid: np.ndarray = np.isfinite(array).all(axis=0)
    if mask is not np.ma.nomask:
        valid &= ~mask.all(axis=0)
    if array.dtype == np.uint8:
        return (array if valid.all() else np.where(valid, array, np.uint8(0))), valid
    values = np.where(valid, array, value_range[0] if value_range else 0)  # clipped as a scene's values are
    return (np.clip(values, *value_range) if value_range else values).astype(np.float32), valid


TTA: dict[str, tuple[tuple[int, bool, float], ...]] = {
    "none": ((0, False, 1.0),),
    "flip": ((0, False, 1.0), (0, True, 1.0), (2, True, 1.0)),
    "d4": tuple((turns, flip, 1.0) for flip in (False, True) for turns in range(4)),
    "multiscale": tuple((0, flip, scale) for scale in (0.75, 1.0, 1.25) for flip in (False, True)),
}
"""Test-time augmentation by name: the views of a tile as (quarter turns, mirrored, magnification)."""


STATED = (
    "value_range", "gsd_m", "tile_size", "device", "dtype", "name", "sha256", "reference", "backend", "smooth",
)  # fmt: skip
"""What a segmenter may say of itself besides its classes and bands."""


class Wrapper:
    """What another segmenter says of itself."""

    def __init__(self, segmenter: Any) -> None:
        self.segmenter = segmenter
        self.labels, self.bands = segmenter.labels, segmenter.bands
        for name in STATED:
            if hasattr(segmenter, name):
                setattr(self, name, getattr(segmenter, name))


class InContext(Wrapper):
    """A segmenter with a context that it has observed: `score` takes a batch and no more."""

    def __init__(self, segmenter: Observer, context: Any) -> None:
        super().__init__(segmenter)
        self.context = context

    def score(self, batch: Tensor) -> Tensor:
        """(B, bands, H, W) raw pixel values -> (B, K, H, W) scores."""
        scores: Tensor = self.segmenter.score(batch, self.context)
        return scores


def in_context(segmenter: Any, rows: ReadRows, grid: TileGrid, dictionary: str, looks: Looks = map) -> Any:
    """The segmenter as it shall score the tiles of a grid; see `whose_dictionary` and `observed`."""
    if whose_dictionary(getattr(segmenter, "observes", None), grid, dictionary) == "tile":
        return segmenter
    context = observed(segmenter, rows, grid.height, grid.width, looks)
    return segmenter if context is None else InContext(segmenter, context)


def whose_dictionary(observes: bool | None, grid: TileGrid, dictionary: str) -> str:
    """ "scene" or "tile": what one of `DICTIONARIES` comes to; "tile" where one tile is all of the scene.

    observes: whether the segmenter is made to see a scene, None for one that cannot. Raises UsageError for an unknown
    name, and for a scene's dictionary where the segmenter cannot take it.
    """
    parse_dictionary(dictionary)
    if dictionary == "scene" and observes is None:
        raise UsageError("this model takes no dictionary of a scene; try that of each tile")
    wanted = observes if dictionary == "auto" else dictionary == "scene"
    return "scene" if wanted and len(grid) > 1 else "tile"


class AugmentedSegmenter(Wrapper):
    """A segmenter whose scores are the mean over several views of each tile, turned back; see `TTA`.

    Costs as many times the original as there are views. It observes as the original does, in one view. Raises
    UsageError for an unknown name.
    """

    def __init__(self, segmenter: Segmenter, mode: str) -> None:
        if mode not in TTA:
            raise UsageError(f"unknown test-time augmentation {mode!r}; known are {', '.join(TTA)}")
        super().__init__(segmenter)
        self.views = TTA[mode]
        self.observes = getattr(segmenter, "observes", None)
        if self.observes is not None:
            self.observe, self.merge = self.segmenter.observe, self.segmenter.merge

    def score(self, batch: Tensor, context: Any = None) -> Tensor:
        """(B, bands, H, W) raw pixel values -> (B, K, H, W) mean scores."""
        known = () if context is None else (context,)
        total = torch.zeros(0)
        for index, (turns, mirrored, scale) in enumerate(self.views):
            view = torch.rot90(batch.flip(-1) if mirrored else batch, turns, (-2, -1))
            scores = self.segmenter.score(resized(view, scale), *known)
            scores = torch.rot90(resized(scores, 1 / scale, view.shape[-2:]), -turns, (-2, -1))
            scores = scores.flip(-1) if mirrored else scores
            total = scores.float() if index == 0 else total + scores
        return total / len(self.views)


def resized(images: Tensor, scale: float, size: Sequence[int] | None = None) -> Tensor:
    """(B, C, H, W) magnified, or brought to a size; as it is where nothing changes."""
    if scale == 1:
        return images
    size = size or [max(1, round(side * scale)) for side in images.shape[-2:]]
    return F.interpolate(images.float(), tuple(size), mode="bilinear", align_corners=False, antialias=scale < 1)


def decide(scores: Tensor, covered: Tensor) -> np.ndarray:
    """`best_classes` on the host."""
    labels: np.ndarray = best_classes(scores, covered).cpu().numpy()
    return labels


def best_classes(scores: Tensor, covered: Tensor) -> Tensor:
    """Scores (K, rows, width), covered (rows, width) bool -> (rows, width) uint8: the best class, or nodata.

    Raises D2LSError where a covered pixel's scores are no finite numbers: the largest of those would mean nothing.
    """
    # A sum is not finite if one of its terms is not, and else only beyond all that a network gives.
    sound = scores.sum(0).isfinite() | ~covered
    if not sound.all() and not scores[:, ~sound].isfinite().all():
        raise D2LSError("the model gave scores that are not finite numbers; try precision float32")
    if scores.device.type == "cpu":  # where the index of the largest takes five times as long
        highest, lower, best = scores.amax(0), torch.ones_like(covered), torch.zeros_like(covered, dtype=torch.uint8)
        for plane in scores[:-1]:
            lower &= plane != highest
            best += lower  # how many come before the first that has the highest score
    else:
        best = scores.max(0).indices.to(torch.uint8)
    return best.where(covered, NODATA)


def precision_of(segmenter: object) -> str:
    """The number type of a segmenter's products, such as "float32"; empty where it does not say."""
    return str(getattr(segmenter, "dtype", "")).removeprefix("torch.")


def backend_of(segmenter: object) -> str:
    """What runs a segmenter's network, with its version where that is not torch's; "torch" where it does not say."""
    return version_of(str(getattr(segmenter, "backend", "torch")))


def choose_device(name: str) -> torch.device:
    """ "auto" takes the first accelerator there is, else the CPU. Raises UsageError for one that is not there."""
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # a meta tensor has no value
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0]
        raise UsageError(f"device {name!r} is not there: {reason}; try auto or cpu") from error
    return device


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The type the network's products run in. "auto": float16 on CUDA devices with units for it, else float32.

    It takes no longer than bfloat16 there, and far fewer labels differ from those of float32.
    """
    if precision not in PRECISIONS:
        raise UsageError(f"unknown precision {precision!r}; known are {', '.join(PRECISIONS)}")
    if precision != "auto":
        dtype: torch.dtype = getattr(torch, precision)
        return dtype
    fast = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0)
    return torch.float16 if fast else torch.float32
