"""What turns a batch of raw pixels into class scores: the protocol that the pipeline knows, and D2LS behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2ls_infer.errors import D2LSError, UsageError
from d2ls_infer.labels import NODATA, LabelMap
from d2ls_infer.manifest import ModelDescription
from d2ls_infer.nn import inference_form
from d2ls_infer.tiling import TileGrid, blend, parse_overlap

Precision = Literal["auto", "float32", "bfloat16", "float16"]
PRECISIONS: tuple[str, ...] = get_args(Precision)


@runtime_checkable
class Segmenter(Protocol):
    """Anything that scores tiles. The tiler, the raster reader and the writer know no more of a model than this.

    labels: the classes, in the order of the scores. bands: names of the bands it takes, in channel order.

    Two attributes may be there besides: `value_range`, (low, high) of the raw pixel values, to which scenes of other
    types than uint8 are scaled; `device`, where the scores are (the CPU where it is left out); and `gsd_m`, the ground
    sampling distance it was trained at.
    """

    labels: LabelMap
    bands: tuple[str, ...]

    def score(self, batch: Tensor) -> Tensor:
        """(B, bands, H, W) raw pixel values, uint8 or float32, on the CPU -> (B, K, H, W) scores of the K classes.

        Scores are blended by weighted means and the largest wins. They stay on the segmenter's device.
        """


class D2LSSegmenter:
    """A D2LS network with the description of its weights. Scores are probabilities.

    `network` is the `nn.Module` in its inference form: normalised pixels in, logits out. A D2LS that is given stays as
    it is; of one that is folded already, products keep their type. `name` and `sha256` say which weights it holds,
    `reference` where they are on the hub ("owner/repo@commit:file"; empty for others).
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
    ) -> None:
        self.device = choose_device(device)
        self.dtype = choose_dtype(precision, self.device)
        self.network = inference_form(network, self.dtype).to(self.device)
        self.description = description
        self.name, self.sha256, self.reference = name, sha256, reference
        self.labels, self.bands, self.value_range = description.labels, description.bands, description.value_range
        self.gsd_m = description.gsd_m
        low, high = description.value_range
        mean, std = (
            torch.tensor(values, device=self.device).view(-1, 1, 1) for values in (description.mean, description.std)
        )
        # ((v - low) / (high - low) - mean) / std as one product and one sum
        self.gain = 1 / ((high - low) * std)
        self.offset = -(low / (high - low) + mean) / std

    def normalise(self, batch: Tensor) -> Tensor:
        """(B, bands, H, W) raw pixel values -> the same shape as the network takes it, float32 on its device."""
        pixels = batch.to(self.device, non_blocking=True).float() * self.gain + self.offset
        return pixels.contiguous(memory_format=torch.channels_last)

    @torch.inference_mode()
    def score(self, batch: Tensor) -> Tensor:
        """(B, bands, H, W) raw pixel values -> (B, N, H, W) float32 probabilities, any H and W."""
        logits: Tensor = self.network(self.normalise(batch))
        return logits.softmax(1)

    def predict(self, array: np.ndarray, **options: Any) -> np.ndarray:
        """(bands, H, W) raw pixel values -> (H, W) uint8 class indices; see `predict_array`."""
        return predict_array(self, array, **options)


def predict_array(
    segmenter: Segmenter,
    array: np.ndarray,
    *,
    tile_size: int = 512,
    overlap: int | float | str = 0.25,
    blend_window: str = "hann",
    batch_size: int = 1,
) -> np.ndarray:
    """(bands, H, W) raw pixel values -> (H, W) uint8 class indices, 255 where a value is not a finite number.

    Tiled and blended as `predict_raster` does it. Raises UsageError for another number of bands or dimensions.
    """
    bands = segmenter.bands
    if array.ndim != 3 or len(array) != len(bands) or 0 in array.shape:
        raise UsageError(
            f"the model takes an array of shape ({len(bands)}, height, width) with the bands {', '.join(bands)}; "
            f"got {array.shape}"
        )
    if array.dtype.kind not in "uif":
        raise UsageError(f"the model takes whole or real numbers, got {array.dtype}")
    values, valid = model_values(segmenter, array)
    height, width = valid.shape
    grid = TileGrid(height, width, tile_size, parse_overlap(overlap, tile_size))
    tiles = (
        (tile, (values[:, *where], valid[where]))
        for tile in grid
        for where in [(slice(tile.row, tile.row + tile.height), slice(tile.col, tile.col + tile.width))]
    )
    rows = blend(
        segmenter.score,
        tiles,
        grid,
        channels=len(segmenter.labels),
        window=blend_window,
        batch_size=batch_size,
        device=getattr(segmenter, "device", "cpu"),
    )
    return np.concatenate([decide(part.scores, part.covered) for part in rows])


def model_values(segmenter: Segmenter, array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(bands, H, W) raw pixel values -> the same, uint8 or float32 in the model's value range, and (H, W) bool: valid.

    Valid is where all values are finite numbers.
    """
    value_range = getattr(segmenter, "value_range", None)
    valid: np.ndarray = np.isfinite(array).all(axis=0)
    if array.dtype == np.uint8:
        return array, valid
    values = np.where(valid, array, value_range[0] if value_range else 0)  # clipped as a scene's values are
    return (np.clip(values, *value_range) if value_range else values).astype(np.float32), valid


TTA: dict[str, tuple[tuple[int, bool, float], ...]] = {
    "none": ((0, False, 1.0),),
    "flip": ((0, False, 1.0), (0, True, 1.0), (2, True, 1.0)),
    "d4": tuple((turns, flip, 1.0) for flip in (False, True) for turns in range(4)),
    "multiscale": tuple((0, flip, scale) for scale in (0.75, 1.0, 1.25) for flip in (False, True)),
}
"""Test-time augmentation by name: the views of a tile as (quarter turns, mirrored, magnification)."""


class AugmentedSegmenter:
    """A segmenter whose scores are the mean over several views of each tile, turned back; see `TTA`.

    Costs as many times the original as there are views. Raises UsageError for an unknown name.
    """

    def __init__(self, segmenter: Segmenter, mode: str) -> None:
        if mode not in TTA:
            raise UsageError(f"unknown test-time augmentation {mode!r}; known are {', '.join(TTA)}")
        self.segmenter, self.views = segmenter, TTA[mode]
        self.labels, self.bands = segmenter.labels, segmenter.bands
        for name in ("value_range", "gsd_m", "device", "dtype", "name", "sha256", "reference"):
            if hasattr(segmenter, name):
                setattr(self, name, getattr(segmenter, name))

    def score(self, batch: Tensor) -> Tensor:
        """(B, bands, H, W) raw pixel values -> (B, K, H, W) mean scores."""
        total = torch.zeros(0)
        for index, (turns, mirrored, scale) in enumerate(self.views):
            view = torch.rot90(batch.flip(-1) if mirrored else batch, turns, (-2, -1))
            scores = self.segmenter.score(resized(view, scale))
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
    """Scores (K, rows, width), covered (rows, width) bool -> (rows, width) uint8: the best class, or nodata.

    Raises D2LSError where a covered pixel's scores are no finite numbers: the largest of those would mean nothing.
    """
    if not (scores.isfinite().all(0) | ~covered).all():
        raise D2LSError("the model gave scores that are not finite numbers; try precision float32")
    labels: np.ndarray = scores.argmax(0).to(torch.uint8).where(covered, NODATA).cpu().numpy()
    return labels


def precision_of(segmenter: object) -> str:
    """The number type of a segmenter's products, such as "float32"; empty where it does not say."""
    return str(getattr(segmenter, "dtype", "")).removeprefix("torch.")


def choose_device(name: str) -> torch.device:
    """ "auto" takes the first accelerator there is, else the CPU. Raises UsageError for one that is not there."""
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # a meta tensor has no value
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise UsageError(f"device {name!r} is not there: {str(error).splitlines()[0]}; try auto or cpu") from error
    return device


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The type the network's products run in. "auto": bfloat16 on CUDA devices that have it, else float32."""
    if precision not in PRECISIONS:
        raise UsageError(f"unknown precision {precision!r}; known are {', '.join(PRECISIONS)}")
    if precision != "auto":
        dtype: torch.dtype = getattr(torch, precision)
        return dtype
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if fast else torch.float32
