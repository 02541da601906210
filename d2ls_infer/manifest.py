"""`weights_manifest.json` and the description inside each weights file -> frozen values. Unknown keys are errors."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

from d2ls_infer.errors import UsageError, WeightsError
from d2ls_infer.labels import NODATA, LabelMap

PACKAGE = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A measured number: what, how much (percent), on which split, and how it was measured."""

    name: str
    value: float
    split: str
    protocol: str


@dataclass(frozen=True, kw_only=True)
class ModelDescription:
    """What a weights file says of itself.

    config: the network's, see `D2LSConfig`. bands: names in channel order. value_range: the lowest and highest pixel
    value; mean and std: per band, on 0..1 of that range: the network sees ((v - low) / (high - low) - mean) / std.
    gsd_m: ground sampling distance of the training data in metres, None where it varies.
    """

    config: Mapping[str, Any]
    labels: LabelMap
    bands: tuple[str, ...]
    value_range: tuple[float, float]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    gsd_m: float | None
    metrics: tuple[Metric, ...]
    license: str
    training_data: str
    source: str

    def __post_init__(self) -> None:
        if not len(self.bands) == len(self.mean) == len(self.std) > 0:
            raise WeightsError(f"{len(self.bands)} bands, but {len(self.mean)} means and {len(self.std)} deviations")
        if not all(band.strip() for band in self.bands) or len(set(self.bands)) < len(self.bands):
            raise WeightsError(f"bands need names, each its own, got {list(self.bands)}")
        if self.gsd_m is not None and not 0 < self.gsd_m < math.inf:
            raise WeightsError(f"gsd_m must be a number of metres above 0, got {self.gsd_m}")
        if not self.value_range[0] < self.value_range[1]:
            raise WeightsError(f"value_range goes from a lower to a higher number, got {list(self.value_range)}")
        if any(not value > 0 for value in self.std):
            raise WeightsError(f"std must be above 0, got {list(self.std)}")
        counts = self.config.get("num_classes"), self.config.get("in_channels", 3)
        if counts != (len(self.labels), len(self.bands)):
            raise WeightsError(
                f"the network has {counts[0]} classes and {counts[1]} bands, "
                f"but {len(self.labels)} labels and {len(self.bands)} bands are described"
            )

    def to_dict(self) -> dict[str, Any]:
        """The JSON form that `from_dict` reads."""
        return {
            "config": dict(self.config),
            "labels": self.labels.to_list(),
            "ignore_index": self.labels.ignore_index,
            "bands": list(self.bands),
            "value_range": list(self.value_range),
            "mean": list(self.mean),
            "std": list(self.std),
            "gsd_m": self.gsd_m,
            "metrics": [asdict(metric) for metric in self.metrics],
            "license": self.license,
            "training_data": self.training_data,
            "source": self.source,
        }

    @classmethod
    def from_dict(cls, values: object) -> ModelDescription:
        """The reverse of `to_dict`. Raises WeightsError that names what is wrong."""
        reader = Reader(values, "description")
        ignore_index = reader.take("ignore_index", int, default=NODATA)
        description = {
            "config": reader.take("config", dict),
            "labels": reader.checked(
                lambda: LabelMap.from_list(reader.take("labels", list), ignore_index=ignore_index)
            ),
            "bands": reader.take_all("bands", str),
            "value_range": reader.take_all("value_range", float, length=2),
            "mean": reader.take_all("mean", float),
            "std": reader.take_all("std", float),
            "gsd_m": reader.take("gsd_m", float, default=None),
            "metrics": tuple(read_metric(item) for item in reader.take("metrics", list)),
            "license": reader.take("license", str),
            "training_data": reader.take("training_data", str),
            "source": reader.take("source", str),
        }
        reader.finish()
        return cls(**description)


def read_metric(values: object) -> Metric:
    """One metric from its JSON form."""
    reader = Reader(values, "metric")
    metric = Metric(
        name=reader.take("name", str),
        value=reader.take("value", float),
        split=reader.take("split", str),
        protocol=reader.take("protocol", str),
    )
    reader.finish()
    return metric


@dataclass(frozen=True, kw_only=True)
class HubFile:
    """A file on the Hugging Face Hub: owner/name, the commit (40 hexadecimal digits), and the file's name there."""

    repo: str
    revision: str
    filename: str

    @classmethod
    def from_dict(cls, values: object) -> HubFile:
        """From the manifest's JSON. Raises WeightsError for a revision that is not a whole commit, or odd names."""
        reader = Reader(values, "hub")
        file = cls(**{key: reader.take(key, str) for key in ("repo", "revision", "filename")})
        reader.finish()
        if not re.fullmatch(r"[0-9a-f]{40}", file.revision):
            raise WeightsError(f"hub: revision is a commit of 40 hexadecimal digits, got {file.revision!r}")
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", file.repo) or not re.fullmatch(
            r"[\w-][\w.-]*\.safetensors", file.filename
        ):
            raise WeightsError(f"hub: not a repository and a safetensors file: {file.repo!r}, {file.filename!r}")
        return file


@dataclass(frozen=True, kw_only=True)
class WeightsEntry:
    """A published model.

    file: path of a bundled file, relative to the package; hub: where it is on the hub otherwise. A model that is
    announced but has no weights yet has neither, and then `unpublished` says what to do instead. sha256, size (bytes)
    and num_params belong to the file.
    """

    name: str
    aliases: tuple[str, ...]
    summary: str
    file: str | None
    hub: HubFile | None
    sha256: str | None
    size: int | None
    num_params: int | None
    unpublished: str | None
    description: ModelDescription | None

    @property
    def path(self) -> Path | None:
        """Where the bundled file lies."""
        return PACKAGE / self.file if self.file else None

    @classmethod
    def from_dict(cls, values: object) -> WeightsEntry:
        """From the manifest's JSON. Raises WeightsError that names the entry and what is wrong."""
        reader = Reader(values, "entry")
        name = reader.what = reader.take("name", str)
        entry = {
            "name": name,
            "aliases": reader.take_all("aliases", str, default=()),
            "summary": reader.take("summary", str),
            "file": reader.take("file", str, default=None),
            "sha256": reader.take("sha256", str, default=None),
            "size": reader.take("size", int, default=None),
            "num_params": reader.take("num_params", int, default=None),
            "unpublished": reader.take("unpublished", str, default=None),
            "hub": None,
            "description": None,
        }
        if (hub := reader.take("hub", dict, default=None)) is not None:
            entry["hub"] = HubFile.from_dict(hub)
        if (description := reader.take("description", dict, default=None)) is not None:
            try:
                entry["description"] = ModelDescription.from_dict(description)
            except WeightsError as error:
                raise WeightsError(f"{name}: {error}") from error
        reader.finish()
        if entry["file"] and entry["hub"]:
            raise WeightsError(f"{name} has both a bundled file and one on the hub")
        if not entry["file"] and not entry["hub"]:
            if entry["unpublished"] is None:
                raise WeightsError(f"{name} has no file, and does not say why (unpublished)")
        elif missing := [key for key in ("sha256", "size", "num_params", "description") if entry[key] is None]:
            raise WeightsError(f"{name} has a file, but no {', '.join(missing)}")
        elif not re.fullmatch(r"[0-9a-f]{64}", entry["sha256"]):
            raise WeightsError(f"{name}: sha256 is 64 hexadecimal digits, got {entry['sha256']!r}")
        elif entry["file"] and (".." in Path(entry["file"]).parts or Path(entry["file"]).is_absolute()):
            raise WeightsError(f"{name}: file lies outside the package: {entry['file']!r}")
        return cls(**entry)


@dataclass(frozen=True)
class Manifest:
    """The published models, by name."""

    entries: tuple[WeightsEntry, ...]

    def find(self, name: str) -> WeightsEntry:
        """The entry of a name or alias, in any case. Raises UsageError that lists the nearest names."""
        by_name = {known.lower(): entry for entry in self.entries for known in (entry.name, *entry.aliases)}
        if entry := by_name.get(name.lower()):
            return entry
        near = difflib.get_close_matches(name.lower(), by_name, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(by_name)}"
        raise UsageError(f"unknown model {name!r}: no file of that name and not in the manifest; {hint}")


@cache
def load_manifest() -> Manifest:
    """The manifest that came with the package: inside an installed one, at the project's top for an editable one."""
    for path in (PACKAGE / "weights_manifest.json", PACKAGE.parent / "weights_manifest.json"):
        if path.is_file():
            return read_manifest(path)
    raise WeightsError("weights_manifest.json did not come with the package; install it again")


def read_manifest(path: Path) -> Manifest:
    """Read a manifest file. Raises WeightsError that names the file and what is wrong."""
    try:
        reader = Reader(json.loads(path.read_text(encoding="utf-8")), "manifest")
        if (version := reader.take("version", int)) != 1:
            raise WeightsError(f"manifest of version {version}, but this package reads version 1; update it")
        entries = tuple(WeightsEntry.from_dict(item) for item in reader.take("models", list))
        reader.finish()
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path}: {error}") from error
    names = [name.lower() for entry in entries for name in (entry.name, *entry.aliases)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise WeightsError(f"{path}: names stand twice: {', '.join(twice)}")
    return Manifest(entries)


class Reader:
    """Takes typed values out of parsed JSON. Raises WeightsError for missing, mistyped and unknown keys."""

    MISSING = object()

    def __init__(self, values: object, what: str) -> None:
        if not isinstance(values, Mapping):
            raise WeightsError(f"{what} must be a JSON object, got {type(values).__name__}")
        self.values, self.what = dict(values), what

    def take(self, key: str, kind: type, *, default: Any = MISSING) -> Any:
        """The value of a key; the default where it is missing or null."""
        value = self.values.pop(key, None)
        if value is None:
            if default is self.MISSING:
                raise WeightsError(f"{self.what}: {key} is missing")
            return default
        return self.typed(key, value, kind)

    def take_all(self, key: str, kind: type, *, length: int | None = None, default: Any = MISSING) -> Any:
        """A list of values of one kind, as a tuple."""
        values = self.take(key, list, default=default)
        if length is not None and len(values) != length:
            raise WeightsError(f"{self.what}: {key} has {len(values)} values, not {length}")
        return tuple(self.typed(key, value, kind) for value in cast(Sequence[Any], values))

    def typed(self, key: str, value: Any, kind: type) -> Any:
        """The value, if it is of that kind. Whole numbers pass as floats, True and False never as numbers."""
        if kind is float and type(value) is int and abs(value) < 2**1023:
            value = float(value)
        if type(value) is not kind or (isinstance(value, float) and not math.isfinite(value)):
            raise WeightsError(f"{self.what}: {key} must be {kind.__name__}, got {value!r}")
        return value

    def checked(self, make: Any) -> Any:
        """What `make` gives, with its UsageError turned into a WeightsError."""
        try:
            return make()
        except UsageError as error:
            raise WeightsError(f"{self.what}: {error}") from error

    def finish(self) -> None:
        """Raise for keys nobody took."""
        if self.values:
            raise WeightsError(f"{self.what}: unknown keys {', '.join(sorted(map(str, self.values)))}")
