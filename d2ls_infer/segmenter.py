"""What turns a batch of raw pixels into class scores: the protocol that the pipeline knows, and D2LS behind it."""

from __future__ import annotations

from typing import Literal, Protocol, get_args, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from d2ls_infer.errors import UsageError
from d2ls_infer.labels import NODATA, LabelMap
from d2ls_infer.manifest import ModelDescription
from d2ls_infer.nn import D2LS, autocast
from d2ls_infer.tiling import TileGrid, blend, parse_overlap

Precision = Literal["auto", "float32", "bfloat16", "float16"]
PRECISIONS: tuple[str, ...] = get_args(Precision)


@runtime_checkable
class Segmenter(Protocol):
    """Anything that scores tiles. The tiler, the raster reader and the writer know no more of a model than this.

    labels: the classes, in the order of the scores. bands: names of the bands it takes, in channel order.

    Two attributes may be there besides: `value_range`, (low, high) of the raw pixel values, to which scenes of other
    types than uint8 are scaled; and `device`, where the scores are (the CPU where it is left out).
    """

    labels: LabelMap
    bands: tuple[str, ...]

    def score(self, batch: Tensor) -> Tensor:
        """(B, bands, H, W) raw pixel values, uint8 or float32, on the CPU -> (B, K, H, W) scores of the K classes.

        Scores are blended by weighted means and the largest wins. They stay on the segmenter's device.
        """


class D2LSSegmenter:
    """A D2LS network with the description of its weights. Scores are probabilities.

    `network` is the `nn.Module` in eval mode: normalised pixels in, logits out. `name` and `sha256` say which weights
    it holds.
    """

    def __init__(
        self,
        network: D2LS,
        description: ModelDescription,
        *,
        name: str,
        sha256: str,
        device: str = "auto",
        precision: Precision = "auto",
    ) -> None:
        self.device = choose_device(device)
        self.dtype = choose_dtype(precision, self.device)
        self.network = network.eval().to(self.device).to(memory_format=torch.channels_last)
        self.description = description
        self.name, self.sha256 = name, sha256
        self.labels, self.bands, self.value_range = description.labels, description.bands, description.value_range
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
        with autocast(self.device, self.dtype):
            logits = self.network(self.normalise(batch))
        assert isinstance(logits, Tensor)
        return logits.float().softmax(1)

    def predict(
        self, array: np.ndarray, *, tile_size: int = 512, overlap: int | float | str = 0.25, blend_window: str = "hann"
    ) -> np.ndarray:
        """(bands, H, W) raw pixel values -> (H, W) uint8 class indices, 255 where a value is not a finite number.

        Tiled and blended as `predict_raster` does it. Raises UsageError for another number of bands or dimensions.
        """
        if array.ndim != 3 or len(array) != len(self.bands) or 0 in array.shape:
            raise UsageError(
                f"the model takes an array of shape ({len(self.bands)}, height, width) with the bands "
                f"{', '.join(self.bands)}; got {array.shape}"
            )
        if array.dtype.kind not in "uif":
            raise UsageError(f"the model takes whole or real numbers, got {array.dtype}")
        values = array if array.dtype == np.uint8 else array.astype(np.float32)
        valid = np.isfinite(values).all(axis=0)
        values = np.where(valid, values, values.dtype.type(self.value_range[0]))
        height, width = valid.shape
        grid = TileGrid(height, width, tile_size, parse_overlap(overlap, tile_size))
        tiles = (
            (tile, (values[:, *where], valid[where]))
            for tile in grid
            for where in [(slice(tile.row, tile.row + tile.height), slice(tile.col, tile.col + tile.width))]
        )
        rows = blend(self.score, tiles, grid, channels=len(self.labels), window=blend_window, device=self.device)
        return np.concatenate([decide(part.scores, part.covered) for part in rows])


def decide(scores: Tensor, covered: Tensor) -> np.ndarray:
    """Scores (K, rows, width), covered (rows, width) bool -> (rows, width) uint8: the best class, or nodata."""
    labels: np.ndarray = scores.argmax(0).to(torch.uint8).where(covered, NODATA).cpu().numpy()
    return labels


def choose_device(name: str) -> torch.device:
    """ "auto" takes the first accelerator there is, else the CPU. Raises UsageError for one that is not there."""
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
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
