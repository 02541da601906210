"""A model's name or path -> its weights file -> checked -> a network. Nothing in a weights file is ever executed."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from d2ls_infer import hub
from d2ls_infer.errors import HubError, MissingFileError, UnavailableModelError, UsageError, WeightsError
from d2ls_infer.graphs import RUNTIMES, GraphFile
from d2ls_infer.licence import is_restricted
from d2ls_infer.manifest import HubFile, ModelDescription, WeightsEntry, load_manifest
from d2ls_infer.tensors import read_header, write_tensors

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from d2ls_infer.nn import D2LS

log = logging.getLogger(__name__)

METADATA_KEY = "d2ls"
"""The one metadata entry of a weights file: its whole description as JSON."""

KNOWN_METADATA = {METADATA_KEY, "format"}
"""`format` is what the safetensors library writes of its own accord."""


@dataclass(frozen=True)
class WeightsFile:
    """A weights file that was found: the name to call it by, what it says of itself, and its sha256.

    Files that a manifest names are checked against it before they are given out. hub: for one that came from the hub,
    the commit and file, which always mean the same bytes.
    """

    name: str
    path: Path
    description: ModelDescription
    sha256: str
    hub: HubFile | None = None

    @property
    def reference(self) -> str:
        """`owner/repo@commit:file` of a model from the hub; empty for others."""
        return str(self.hub or "")


def find_weights(
    name_or_path: str | Path, *, offline: bool = False, manifest: str | Path | None = None, force: bool = False
) -> WeightsFile:
    """A path, a name or alias in the manifest, or `owner/repo[@revision][:file]` on the hub -> the file, checked.

    A name without a file ending or folder is taken as a path only where such a file exists. What is on the hub is
    downloaded where it is not in the cache; with `offline` the network is not touched. manifest: a file of the user's
    own, over the packaged one (see `load_manifest`). force: download it even if it is in the cache.

    Raises MissingFileError, UsageError for an unknown name, UnavailableModelError for a model without weights or, when
    offline, not in the cache, HubError for a hub that fails, WeightsError for a damaged file.
    """
    if not isinstance(name_or_path, str | os.PathLike):
        raise UsageError(f"a model is a name or a file, got a {type(name_or_path).__name__}")
    path, text = Path(name_or_path), str(name_or_path)
    if kind := kind_of(path):
        if kind == "folder" and text.lower() not in load_manifest(manifest).by_name():
            raise UsageError(f"{path} is a folder; name the weights file in it")
        if kind == "file" and path.suffix in RUNTIMES:
            graph = GraphFile.of(path)
            return WeightsFile(path.stem, path, graph.description, graph.sha256)
        if kind == "file":
            try:
                return WeightsFile(path.stem, path, read_description(path), file_sha256(path))
            except WeightsError as error:
                if path.suffix == ".safetensors":
                    raise
                kinds = "a model is a .safetensors file, or an .onnx or .xml that `d2ls export` wrote"
                raise UsageError(f"{error}; {kinds}") from error
    reference = hub.parse_reference(text) if isinstance(name_or_path, str) else None
    if reference is not None and not (path.suffix == ".safetensors" and ":" not in text):
        try:
            return find_on_hub(reference, offline=offline, force=force)
        except (MissingFileError, UnavailableModelError, HubError) as error:
            # It may have been meant as a path.
            raise error if set("@:") & set(text) else type(error)(f"no such file: {path}, and {error}") from error
    if path.suffix == ".safetensors" or len(path.parts) > 1:
        raise MissingFileError(f"no such weights file: {path}; a model on the hub is owner/repo[@revision][:file]")
    return find_entry(load_manifest(manifest).find(text), offline=offline, force=force)


def kind_of(path: Path) -> str:
    """ "file" or "folder", or empty where there is neither, and for what no file can be called."""
    try:
        return "file" if path.is_file() else "folder" if path.is_dir() else ""
    except OSError:
        return ""


def find_entry(entry: WeightsEntry, *, offline: bool = False, force: bool = False) -> WeightsFile:
    """The file of a manifest's entry, checked against it; from the hub where it has to be. Raises as `find_weights`."""
    if entry.hub is not None:
        path = hub.fetch(entry.hub, name=entry.name, offline=offline, size=entry.size, force=force)
        remedy = f"nothing was deleted; `d2ls models download {entry.name} --force` fetches it again"
    elif entry.path is None:
        raise UnavailableModelError(f"the model {entry.name} has no weights yet: {entry.unpublished}")
    else:
        path = entry.path
        remedy = "install the package again" if entry.folder is None else "see whether it is the one you meant"
        if not path.is_file():
            kind = "bundled file" if entry.folder is None else "file"
            raise WeightsError(f"the {kind} of {entry.name} is missing: {path}; {remedy}")
    check_bytes(path, entry, remedy=remedy)
    return WeightsFile(entry.name, path, read_description(path), str(entry.sha256), entry.hub)


def check_bytes(path: Path, entry: WeightsEntry, *, remedy: str) -> None:
    """Raise WeightsError, with what is expected and what is found, for a file that is not the entry's."""
    size, sha256 = path.stat().st_size, file_sha256(path)
    if (size, sha256) != (entry.size, entry.sha256):
        raise WeightsError(
            f"{path} is damaged: expected {entry.size} bytes with sha256 {entry.sha256}, "
            f"found {size} bytes with sha256 {sha256}; {remedy}"
        )


def check_entry(entry: WeightsEntry, path: Path, *, whole: bool = False) -> None:
    """Raise WeightsError for a file that is not the entry's, or says something else of itself.

    whole: load it too, and count the parameters.
    """
    check_bytes(path, entry, remedy="nothing was deleted")
    theirs, ours = read_description(path).to_dict(), entry.description.to_dict() if entry.description else {}
    if differing := [key for key in sorted(set(theirs) | set(ours)) if theirs.get(key) != ours.get(key)]:
        raise WeightsError(f"{path} and the manifest differ in what they say: {', '.join(differing)}")
    if whole:
        from d2ls_infer.nn import count_parameters

        num_params = count_parameters(load_network(path, read_description(path)))
        if num_params != entry.num_params:
            raise WeightsError(f"{path} has {num_params} parameters, the manifest says {entry.num_params}")


def find_on_hub(file: HubFile, *, offline: bool = False, force: bool = False) -> WeightsFile:
    """A file on the hub that no manifest vouches for; what it is, is said in the log."""
    path = hub.fetch(file, name=str(file), offline=offline, force=force)
    pinned = HubFile(repo=file.repo, revision=path.parent.name, filename=file.filename)
    description, sha256 = read_description(path), file_sha256(path)
    log.warning("%s is in no manifest: it is %s, sha256 %s", file, pinned, sha256)
    default = file.filename == HubFile.filename
    return WeightsFile(file.repo.split("/")[1] if default else path.stem, path, description, sha256, pinned)


def read_description(path: Path) -> ModelDescription:
    """What a weights file says of itself, from its header alone. Raises WeightsError for anything else."""
    metadata = read_header(path).metadata
    if METADATA_KEY not in metadata:
        raise WeightsError(
            f"{path} does not describe itself (no {METADATA_KEY!r} metadata): its classes and bands are unknown. "
            "`D2LS.from_pretrained` loads a bare network; `d2ls convert` makes a whole file from a checkpoint of the "
            "authors' code"
        )
    if unknown := sorted(set(metadata) - KNOWN_METADATA):
        raise WeightsError(f"{path} has unknown metadata: {', '.join(unknown)[:200]}")
    try:
        return ModelDescription.from_dict(json.loads(metadata[METADATA_KEY]))
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: {error}") from error


def warn_of_terms(weights: WeightsFile) -> None:
    """Say in the log what a user of a model must know: its note, and terms that do not allow every use."""
    description = weights.description
    terms = [f"licence: {description.license}"] if is_restricted(description.license) else []
    if parts := [part for part in (description.note, *terms) if part]:
        log.warning("%s: %s", weights.name, "; ".join(parts))


def load_network(path: Path, description: ModelDescription) -> D2LS:
    """The network of a weights file in eval mode, float32. Every key must be there, none may be left over.

    Raises WeightsError that names missing, left-over or misshapen tensors.
    """
    from d2ls_infer.nn import D2LS

    return D2LS.from_file(path, description.config)


def save_weights(path: Path, state: Mapping[str, Tensor], description: ModelDescription) -> None:
    """Write a weights file that describes itself."""
    write_tensors(path, state, {METADATA_KEY: json.dumps(description.to_dict(), allow_nan=False)})


def file_sha256(path: Path) -> str:
    """The sha256 of a file's bytes, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
