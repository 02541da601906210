"""`weights_manifest.json` and the description inside each weights file -> frozen values. Unknown keys are errors."""

from __future__ import annotations

import difflib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path, PureWindowsPath
from typing import Any, cast

from d2ls_infer.errors import MissingFileError, UsageError, WeightsError, shortened
from d2ls_infer.files import user_folder
from d2ls_infer.labels import NODATA, LabelMap

PACKAGE = Path(__file__).parent

FILE_VARIABLE = "D2LS_MANIFEST"
"""The environment variable that names a user's own manifest."""

CONFIG_SIZES = ("num_classes", "embed_dim", "stages", "reduction", "in_channels")
"""The numbers of a network's config, see `D2LSConfig`; the first one must be there."""

# Names become parts of paths (of outputs, of the hub's cache), so they are plain ones.
NAME = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}"
REPO = rf"(?![^@:]*(?:\.\.|--)){NAME}/{NAME}"
FILENAME = rf"{NAME}\.safetensors"
COMMIT = r"[0-9a-f]{40}"


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
    value; gamma: the power that values on 0..1 of that range are raised to; mean and std: per band, after that: the
    network sees (((v - low) / (high - low)) ** gamma - mean) / std. gsd_m: ground sampling distance of the training
    data in metres, None where it varies. note: what a user must know beforehand, if anything. shared_dictionary:
    whether it was trained to score tiles by the dictionary of their scene. stated_tile_size: see `tile_size`; None for
    the usual.
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
    note: str = ""
    shared_dictionary: bool = False
    stated_tile_size: int | None = None
    gamma: float = 1.0

    def __post_init__(self) -> None:
        if self.tile_size < 1:
            raise WeightsError(f"tile_size must be at least 1 pixel, got {self.tile_size}")
        if not len(self.bands) == len(self.mean) == len(self.std) > 0:
            raise WeightsError(f"{len(self.bands)} bands, but {len(self.mean)} means and {len(self.std)} deviations")
        if not all(band.strip() for band in self.bands) or len(set(self.bands)) < len(self.bands):
            raise WeightsError(f"bands need names, each its own, got {shortened(list(self.bands))}")
        if self.gsd_m is not None and not 0 < self.gsd_m < math.inf:
            raise WeightsError(f"gsd_m must be a number of metres above 0, got {self.gsd_m}")
        if not self.value_range[0] < self.value_range[1]:
            raise WeightsError(f"value_range goes from a lower to a higher number, got {list(self.value_range)}")
        if not 0 < self.gamma < math.inf:
            raise WeightsError(f"gamma must be a number above 0, got {self.gamma}")
        if any(not value > 0 for value in self.std):
            raise WeightsError(f"std must be above 0, got {shortened(list(self.std))}")
        counts = self.config.get("num_classes"), self.config.get("in_channels", 3)
        if counts != (len(self.labels), len(self.bands)):
            raise WeightsError(
                f"the network has {counts[0]} classes and {counts[1]} bands, "
                f"but {len(self.labels)} labels and {len(self.bands)} bands are described"
            )

    @property
    def tile_size(self) -> int:
        """Side in pixels of the tiles that it is best mapped by.

        Where nothing is stated, 1024 with the dictionary of the scene, else 512: a tile's own is to be made of about as
        much as in training.
        """
        return self.stated_tile_size if self.stated_tile_size is not None else 1024 if self.shared_dictionary else 512

    def to_dict(self) -> dict[str, Any]:
        """The JSON form that `from_dict` reads."""
        return {
            "config": dict(self.config),
            "labels": self.labels.to_list(),
            "ignore_index": self.labels.ignore_index,
            "bands": list(self.bands),
            "value_range": list(self.value_range),
            **({} if self.gamma == 1 else {"gamma": self.gamma}),
            "mean": list(self.mean),
            "std": list(self.std),
            "gsd_m": self.gsd_m,
            "metrics": [asdict(metric) for metric in self.metrics],
            "license": self.license,
            "training_data": self.training_data,
            "source": self.source,
            **({"note": self.note} if self.note else {}),
            **({"shared_dictionary": True} if self.shared_dictionary else {}),
            **({} if self.stated_tile_size is None else {"tile_size": self.stated_tile_size}),
        }

    @classmethod
    def from_dict(cls, values: object) -> ModelDescription:
        """The reverse of `to_dict`. Raises WeightsError that names what is wrong."""
        reader = Reader(values, "description")
        ignore_index = reader.take("ignore_index", int, default=NODATA)
        description = {
            "config": read_config(reader.take("config", dict)),
            "labels": reader.checked(
                lambda: LabelMap.from_list(reader.take("labels", list), ignore_index=ignore_index)
            ),
            "bands": reader.take_all("bands", str),
            "value_range": reader.take_all("value_range", float, length=2),
            "gamma": reader.take("gamma", float, default=1.0),
            "mean": reader.take_all("mean", float),
            "std": reader.take_all("std", float),
            "gsd_m": reader.take("gsd_m", float, default=None),
            "metrics": tuple(read_metric(item) for item in reader.take("metrics", list)),
            "license": reader.take("license", str),
            "training_data": reader.take("training_data", str),
            "source": reader.take("source", str),
            "note": reader.take("note", str, default=""),
            "shared_dictionary": reader.take("shared_dictionary", bool, default=False),
            "stated_tile_size": reader.take("tile_size", int, default=None),
        }
        reader.finish()
        return cls(**description)


def read_config(values: object) -> dict[str, Any]:
    """A network's config from its JSON form; whether there is such a network is seen when it is made."""
    reader = Reader(values, "config")
    config = {"backbone": reader.take("backbone", str), "num_classes": reader.take("num_classes", int)}
    config |= {name: reader.take(name, int) for name in CONFIG_SIZES[1:] if name in reader.values}
    reader.finish()
    if small := [name for name in CONFIG_SIZES if config.get(name, 1) < 1]:
        raise WeightsError(f"config: {small[0]} must be at least 1, got {config[small[0]]}")
    return config


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
    """A file on the Hugging Face Hub: owner/name, the revision, and the file's name there.

    In a manifest the revision is a commit of 40 hexadecimal digits. Written as `owner/name@revision:filename` it is
    what --model takes.
    """

    repo: str
    revision: str
    filename: str = "model.safetensors"

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}:{self.filename}"

    @property
    def is_pinned(self) -> bool:
        """Whether the revision is a commit, which always means the same file."""
        return re.fullmatch(COMMIT, self.revision) is not None

    @classmethod
    def from_dict(cls, values: object) -> HubFile:
        """From the manifest's JSON. Raises WeightsError for a revision that is not a whole commit, or odd names."""
        reader = Reader(values, "hub")
        file = cls(**{key: reader.take(key, str) for key in ("repo", "revision", "filename")})
        reader.finish()
        if not file.is_pinned:
            raise WeightsError(f"hub: revision is a commit of 40 hexadecimal digits, got {shortened(file.revision)}")
        if not re.fullmatch(REPO, file.repo) or not re.fullmatch(FILENAME, file.filename):
            found = f"{shortened(file.repo)}, {shortened(file.filename)}"
            raise WeightsError(f"hub: not a repository and a safetensors file: {found}")
        return file


@dataclass(frozen=True, kw_only=True)
class WeightsEntry:
    """A published model.

    file: path of a file relative to `folder`, which is the package's for a bundled one (None) and the manifest's for a
    user's own; hub: where it is on the hub otherwise. A model that is announced but has no weights yet has neither, and
    then `unpublished` says what to do instead. sha256, size (bytes) and num_params belong to the file.
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
    folder: Path | None = None

    @property
    def path(self) -> Path | None:
        """Where the file lies that is not on the hub."""
        return (self.folder or PACKAGE) / self.file if self.file else None

    def to_dict(self) -> dict[str, Any]:
        """The JSON form that `from_dict` reads."""
        description = self.description and self.description.to_dict()
        values = asdict(self) | {"aliases": list(self.aliases), "description": description, "folder": None}
        return {key: value for key, value in values.items() if value is not None}

    @classmethod
    def from_dict(cls, values: object, *, folder: Path | None = None) -> WeightsEntry:
        """From the manifest's JSON. Raises WeightsError that names the entry and what is wrong."""
        reader = Reader(values, "entry")
        name, aliases = reader.take("name", str), reader.take_all("aliases", str, default=())
        if odd := [known for known in (name, *aliases) if not re.fullmatch(NAME, known)]:
            raise WeightsError(f"entry: a name is up to 96 letters, digits, '.', '_', '-', got {shortened(odd[0])}")
        reader.what = name
        entry: dict[str, Any] = {
            "folder": folder,
            "name": name,
            "aliases": aliases,
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
        if small := [key for key in ("size", "num_params") if entry[key] is not None and entry[key] < 1]:
            raise WeightsError(f"{name}: {small[0]} must be at least 1, got {entry[small[0]]}")
        if entry["sha256"] is not None and not re.fullmatch(r"[0-9a-f]{64}", entry["sha256"]):
            raise WeightsError(f"{name}: sha256 is 64 hexadecimal digits, got {shortened(entry['sha256'])}")
        if entry["file"] and not is_inside(entry["file"]):
            where = "manifest's folder" if folder else "package"
            raise WeightsError(f"{name}: file lies outside the {where}: {shortened(entry['file'])}")
        if entry["file"] and entry["hub"]:
            raise WeightsError(f"{name} has both a bundled file and one on the hub")
        if not entry["file"] and not entry["hub"]:
            if entry["unpublished"] is None:
                raise WeightsError(f"{name} has no file, and does not say why (unpublished)")
        elif missing := [key for key in ("sha256", "size", "num_params", "description") if entry[key] is None]:
            raise WeightsError(f"{name} has a file, but no {', '.join(missing)}")
        return cls(**entry)


def is_inside(file: str) -> bool:
    """Whether a relative path stays in its folder, on every system: Windows' rules know both slashes and drives."""
    path = PureWindowsPath(file)
    return not path.anchor and ".." not in path.parts and "\0" not in file


@dataclass(frozen=True)
class Manifest:
    """The published models, by name."""

    entries: tuple[WeightsEntry, ...]

    def by_name(self) -> dict[str, WeightsEntry]:
        """The entries by their names and aliases, in lower case."""
        return {known.lower(): entry for entry in self.entries for known in (entry.name, *entry.aliases)}

    def find(self, name: str) -> WeightsEntry:
        """The entry of a name or alias, in any case. Raises UsageError that lists the nearest names."""
        by_name = self.by_name()
        if entry := by_name.get(name.lower()):
            return entry
        near = difflib.get_close_matches(name.lower(), by_name, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(by_name)}"
        raise UsageError(f"unknown model {name!r}: no file of that name and not in the manifest; {hint}")

    def under(self, own: Manifest) -> Manifest:
        """Both manifests' entries; where names meet, those of `own` win."""
        taken = own.by_name()
        return Manifest((*(entry for entry in self.entries if entry.name.lower() not in taken), *own.entries))


def load_manifest(own: str | Path | None = None) -> Manifest:
    """The package's manifest, and over it a user's own.

    That is the file `own`, else that of the variable D2LS_MANIFEST, else ~/.config/d2ls/weights_manifest.json if there
    is one. Its files are relative to its folder. Raises MissingFileError, and WeightsError for one that is damaged.
    """
    path = own_manifest(own)
    return packaged_manifest().under(manifest_of(path)) if path else packaged_manifest()


def manifest_of(path: Path) -> Manifest:
    """A manifest of the user's own, whose files lie in its folder; or a package's, a checkout's too: they lie there."""
    packaged = packaged_manifest_path()
    if path.samefile(packaged):
        return read_manifest(path)
    package = path.parent / PACKAGE.name
    is_checkout = path.name == packaged.name and (package / "__init__.py").is_file()
    return read_manifest(path, folder=package if is_checkout else path.parent)


def own_manifest(given: str | Path | None = None) -> Path | None:
    """The user's own manifest, as `load_manifest` looks for it. Raises MissingFileError where a named one is not."""
    named = given or os.environ.get(FILE_VARIABLE)
    if named:
        if not Path(named).is_file():
            raise MissingFileError(f"no such manifest: {named}" + ("" if given else f" (named by {FILE_VARIABLE})"))
        return Path(named)
    config = user_folder("XDG_CONFIG_HOME", "~/.config")
    usual = config / "d2ls" / "weights_manifest.json" if config else None
    return usual if usual and usual.is_file() else None


@cache
def packaged_manifest() -> Manifest:
    """The manifest that came with the package."""
    return read_manifest(packaged_manifest_path())


def packaged_manifest_path() -> Path:
    """Inside an installed package, at the project's top for an editable one."""
    for path in (PACKAGE / "weights_manifest.json", PACKAGE.parent / "weights_manifest.json"):
        if path.is_file():
            return path
    raise WeightsError("weights_manifest.json did not come with the package; install it again")


def read_manifest(path: Path, *, folder: Path | None = None) -> Manifest:
    """Read a manifest file whose files lie in `folder`, by default the package's.

    Raises WeightsError that names the file and what is wrong.
    """
    try:
        reader = Reader(json.loads(path.read_text(encoding="utf-8")), "manifest")
        if (version := reader.take("version", int)) != 1:
            raise WeightsError(f"manifest of version {version}, but this package reads version 1; update it")
        entries = tuple(WeightsEntry.from_dict(item, folder=folder) for item in reader.take("models", list))
        reader.finish()
    except (OSError, ValueError, RecursionError) as error:
        kind = "not JSON: " if isinstance(error, json.JSONDecodeError) else ""
        raise WeightsError(f"{path}: {kind}{error}") from error
    names = [name.lower() for entry in entries for name in (entry.name, *entry.aliases)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise WeightsError(f"{path}: names stand twice: {', '.join(twice)[:200]}")
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
            raise WeightsError(f"{self.what}: {key} must be {kind.__name__}, got {shortened(value)}")
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
            unknown = ", ".join(sorted(map(str, self.values)))
            raise WeightsError(f"{self.what}: unknown keys {unknown[:200]}")
