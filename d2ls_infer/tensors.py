"""Safetensors files: a header that is bounded and checked before anything else; tensors by the safetensors library."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2ls_infer.errors import WeightsError, shortened
from d2ls_infer.files import write_whole

if TYPE_CHECKING:
    from torch import Tensor

HEADER_LIMIT = 4 << 20
"""Bytes of a header that are read at most. Ours have about 60 thousand."""

TYPES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
"""Number types by the format's names, and the bytes of one value."""

DIMENSIONS = 8


@dataclass(frozen=True)
class Header:
    """What a safetensors file says before its tensors: free text by name, and the shapes of the tensors."""

    metadata: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]


def read_header(path: Path) -> Header:
    """The header alone; whether the tensors are all there is seen when they are read.

    Raises WeightsError, with the path, for anything but a header in which every tensor has a known type and as many
    bytes as its shape takes.
    """
    try:
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 2 <= length <= HEADER_LIMIT:
                raise WeightsError(f"{path} is not a safetensors file")
            header = json.loads(file.read(length), object_pairs_hook=without_twins)
        if not isinstance(header, dict):
            raise WeightsError("the header is no JSON object")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise WeightsError("__metadata__ holds something else than texts by name")
        return Header(metadata, {name: shape_of(name, spec) for name, spec in header.items()})
    except WeightsError as error:
        raise error if str(path) in str(error) else WeightsError(f"{path}: {error}") from error
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} is not a safetensors file, or is damaged: {error}") from error


def without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises WeightsError for a name that stands twice, of which two readers could take either."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise WeightsError(f"names stand twice: {', '.join(sorted({n for n in names if names.count(n) > 1})[:3])}")
    return values


def shape_of(name: str, spec: object) -> tuple[int, ...]:
    """The shape in one tensor's part of a header. Raises WeightsError that names the tensor."""
    if not isinstance(spec, dict) or set(spec) != {"dtype", "shape", "data_offsets"}:
        raise WeightsError(f"tensor {name!r} must have dtype, shape and data_offsets, got {shortened(spec)}")
    kind, shape, offsets = spec["dtype"], spec["shape"], spec["data_offsets"]
    if not isinstance(kind, str) or kind not in TYPES:
        raise WeightsError(f"tensor {name!r} has the unknown number type {shortened(kind)}")
    for what, values in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(values, list) or any(type(value) is not int or not 0 <= value < 2**63 for value in values):
            raise WeightsError(f"tensor {name!r}: {what} must be whole numbers of at least 0, got {shortened(values)}")
    if len(shape) > DIMENSIONS:
        raise WeightsError(f"tensor {name!r} has {len(shape)} dimensions, at most {DIMENSIONS} make sense")
    size = math.prod(shape) * TYPES[kind]
    if len(offsets) != 2 or offsets[1] - offsets[0] != size:
        raise WeightsError(
            f"tensor {name!r} of shape {shortened(shape)} and type {kind} takes {size} bytes, "
            f"but lies at the offsets {shortened(offsets)}"
        )
    return tuple(shape)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors, on the CPU. Raises WeightsError with the path, for a bad header too."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    read_header(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise WeightsError(f"{path} is damaged: {error}") from error


def write_tensors(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a file whole or not at all."""
    from safetensors.torch import save

    write_whole(path, save({key: value.contiguous() for key, value in state.items()}, dict(metadata)))
