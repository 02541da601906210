"""What a file of `d2ls export` says of itself, read without torch: ONNX, or OpenVINO's .xml with its .bin beside it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from xml.etree import ElementTree

from d2ls_infer.errors import UsageError, WeightsError
from d2ls_infer.manifest import ModelDescription

RUNTIMES = {".onnx": "onnxruntime", ".xml": "openvino"}
"""What runs a file, by its ending."""


@dataclass(frozen=True)
class GraphFile:
    """An exported model: of which weights, in which types of products. The tiles it takes are what it describes.

    smooth: whether its scores are smoothed; those of earlier versions are not.
    """

    path: Path
    description: ModelDescription
    model: str
    precision: str
    smooth: bool

    @classmethod
    def of(cls, path: Path) -> GraphFile:
        """Raises WeightsError for a file that is damaged or not from here, UsageError where its runtime is missing."""
        metadata = read_metadata(path)
        try:
            description = ModelDescription.from_dict(json.loads(metadata["d2ls"]))
            return cls(
                path,
                replace(description, stated_tile_size=int(metadata["d2ls_tile_size"])),
                metadata["d2ls_model"],
                metadata["d2ls_precision"],
                metadata.get("d2ls_smooth") == "yes",
            )
        except KeyError as error:
            raise WeightsError(f"{path} does not describe itself (no {error}): it is not from `d2ls export`") from error
        except (ValueError, RecursionError) as error:
            raise WeightsError(f"{path}: {error}") from error

    @property
    def sha256(self) -> str:
        """Of all its bytes, those of the .bin after those of the .xml."""
        digest = hashlib.sha256(self.path.read_bytes())
        if self.path.suffix == ".xml":
            digest.update(self.path.with_suffix(".bin").read_bytes())
        return digest.hexdigest()


def read_metadata(path: Path) -> dict[str, str]:
    """The texts that an exported file says of itself, by name."""
    if path.suffix == ".xml":
        if not path.with_suffix(".bin").is_file():
            raise WeightsError(f"{path} has no {path.with_suffix('.bin').name} beside it, which holds its weights")
        try:
            told = ElementTree.parse(path).getroot().find("rt_info/d2ls")
        except (ElementTree.ParseError, OSError) as error:
            raise WeightsError(f"{path} is not a model of OpenVINO: {error}") from error
        return {} if told is None else {entry.tag: entry.get("value", "") for entry in told}
    try:
        import onnx
    except ImportError as error:
        raise UsageError(f"{path} needs more packages: pip install 'd2ls-infer[onnx]'") from error
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # whatever protobuf makes of it
        raise WeightsError(f"{path} is not an ONNX model: {error}") from error
    return {entry.key: entry.value for entry in model.metadata_props}
