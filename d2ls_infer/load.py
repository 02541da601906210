"""A model by its name, from a file or from the hub, ready to run."""

from __future__ import annotations

from pathlib import Path

from d2ls_infer.exported import ExportedSegmenter
from d2ls_infer.graphs import RUNTIMES
from d2ls_infer.segmenter import D2LSSegmenter, Precision
from d2ls_infer.weights import WeightsFile, find_weights, warn_of_terms


def load_model(
    name_or_path: str | Path,
    device: str = "auto",
    precision: Precision = "auto",
    *,
    backend: str = "torch",
    smooth: bool = True,
    offline: bool = False,
    manifest: str | Path | None = None,
) -> D2LSSegmenter | ExportedSegmenter:
    """A model by the name or alias of the manifest, from a file, or "owner/repo[@revision][:file]" on the hub.

    A file holds weights, or is one of `d2ls export`. device: auto, cpu, cuda, cuda:1, mps. precision: auto, float32,
    bfloat16, float16; the type of the network's products. backend: what runs it: torch, compile, openvino, onnxruntime,
    or auto for the fastest. smooth: even out the pattern that the network leaves in its scores, see `smoothed`.
    offline: do not use the network. manifest: models of your own, over the package's. Raises
    UsageError for an unknown name, device or backend, HubError for a hub that fails, WeightsError for a damaged file.
    """
    weights = find_weights(name_or_path, offline=offline, manifest=manifest)
    return load_segmenter(weights, device=device, precision=precision, backend=backend, smooth=smooth)


def load_segmenter(
    weights: WeightsFile,
    *,
    device: str = "auto",
    precision: Precision = "auto",
    backend: str = "torch",
    smooth: bool = True,
) -> D2LSSegmenter | ExportedSegmenter:
    """The segmenter of a weights file that was found, or of an exported one, which its own runtime runs."""
    warn_of_terms(weights)
    if weights.path.suffix in RUNTIMES:
        return ExportedSegmenter(weights, device=device, precision=precision, backend=backend, smooth=smooth)
    return D2LSSegmenter.of(weights, device=device, precision=precision, backend=backend, smooth=smooth)
