"""A model's name or path -> its weights file -> checked -> a network. Nothing in a weights file is ever executed."""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from d2ls_infer.errors import D2LSError, MissingFileError, UnavailableModelError, WeightsError
from d2ls_infer.manifest import ModelDescription, load_manifest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from d2ls_infer.nn import D2LS

METADATA_KEY = "d2ls"
"""The one metadata entry of a weights file: its whole description as JSON."""

HEADER_LIMIT = 4 << 20
"""Bytes of a safetensors header that are read at most. Ours have about 60 thousand."""


@dataclass(frozen=True)
class WeightsFile:
    """A weights file that was found: the name to call it by, what it says of itself, and its sha256.

    Bundled files are checked against the manifest before they are given out.
    """

    name: str
    path: Path
    description: ModelDescription
    sha256: str


def find_weights(name_or_path: str | Path) -> WeightsFile:
    """A path, or a name or alias in the manifest -> the file, checked.

    A name without a file ending or folder is taken as a path only where such a file exists. Raises MissingFileError,
    UsageError for an unknown name, UnavailableModelError for a model without weights, WeightsError for a damaged file.
    """
    path = Path(name_or_path)
    if path.is_file():
        return WeightsFile(path.stem, path, read_description(path), file_sha256(path))
    if path.suffix == ".safetensors" or len(path.parts) > 1:
        raise MissingFileError(f"no such weights file: {path}")
    entry = load_manifest().find(str(name_or_path))
    if entry.hub is not None:
        raise UnavailableModelError(
            f"the model {entry.name} is not in the package; fetch {entry.hub.filename} of {entry.hub.repo} at "
            f"{entry.hub.revision} from the Hugging Face Hub, and give its path"
        )
    if entry.path is None:
        raise UnavailableModelError(f"the model {entry.name} has no weights yet: {entry.unpublished}")
    if not entry.path.is_file():
        raise WeightsError(f"the bundled file of {entry.name} is missing: {entry.path}; install the package again")
    size, sha256 = entry.path.stat().st_size, file_sha256(entry.path)
    if (size, sha256) != (entry.size, entry.sha256):
        raise WeightsError(
            f"{entry.path} is damaged: expected {entry.size} bytes with sha256 {entry.sha256}, "
            f"found {size} bytes with sha256 {sha256}; install the package again"
        )
    return WeightsFile(entry.name, entry.path, read_description(entry.path), sha256)


def read_description(path: Path) -> ModelDescription:
    """What a weights file says of itself, from its header alone. Raises WeightsError for anything else."""
    try:
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 2 <= length <= HEADER_LIMIT:
                raise WeightsError(f"{path} is not a safetensors file")
            header = file.read(length)
        metadata = json.loads(header).get("__metadata__", {})
        if METADATA_KEY not in metadata:
            raise WeightsError(
                f"{path} does not describe itself (no {METADATA_KEY!r} metadata); "
                "`d2ls convert` makes such a file from a checkpoint of the authors' code"
            )
        return ModelDescription.from_dict(json.loads(metadata[METADATA_KEY]))
    except WeightsError as error:
        raise error if str(path) in str(error) else WeightsError(f"{path}: {error}") from error
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise WeightsError(f"{path} is not a safetensors file, or is damaged: {error}") from error


def load_network(path: Path, description: ModelDescription) -> D2LS:
    """The network of a weights file in eval mode, float32. Every key must be there, none may be left over.

    Raises WeightsError that names missing, left-over or misshapen tensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from d2ls_infer.nn import D2LS, D2LSConfig, load_weights

    try:
        network = D2LS(D2LSConfig.from_dict(description.config))
        load_weights(network, load_file(path))
    except D2LSError as error:
        raise WeightsError(f"{path}: {error}") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(f"{path} is damaged: {error}") from error
    return network.eval()


def save_weights(path: Path, state: Mapping[str, Tensor], description: ModelDescription) -> None:
    """Write a weights file that describes itself."""
    from safetensors.torch import save

    metadata = {METADATA_KEY: json.dumps(description.to_dict(), allow_nan=False)}
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(save({key: value.contiguous() for key, value in state.items()}, metadata))
    partial.replace(path)


def file_sha256(path: Path) -> str:
    """The sha256 of a file's bytes, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
