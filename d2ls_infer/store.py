"""Outputs on object stores: a folder here stands for the stores, files are made in it and copied there and back."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from d2ls_infer.errors import RasterError, StoreError, UsageError
from d2ls_infer.files import cache_folder

MAPS = (".tif", ".tiff")
"""Endings of an address that names a map; all others name a folder."""

READ_ONLY = ("http", "https")


def staging_root() -> Path:
    """The folder that stands for the stores: ~/.cache/d2ls/stores, or under XDG_CACHE_HOME."""
    return cache_folder() / "stores"


def is_address(output: str | Path) -> bool:
    """Whether an output is to lie on an object store: "s3://bucket/maps/map.tif"."""
    return isinstance(output, str) and "://" in output


def place(output: str | Path, root: Path | None = None) -> Path:
    """Where an output is made: where it is to lie, or, of an address, the file or folder here that stands for it.

    s3://bucket/maps/map.tif is made as s3/bucket/maps/map.tif in `root`, by default `staging_root()`. An address that
    does not end in .tif is that of a folder. Folders are made. Raises UsageError for an address that cannot be written
    to, and for a package that is missing; RasterError where there is no room here.
    """
    if not is_address(output):
        return Path(output)
    protocol, _, key = str(output).partition("://")
    parts = key.removesuffix("/").split("/")
    if protocol in READ_ONLY:
        raise UsageError(
            f"{protocol} addresses are read, not written; give a file, or s3://, gs:// and so on; got {output}"
        )
    if not protocol.isalnum() or any(part in ("", ".", "..") for part in parts):
        raise UsageError(
            f"an output on an object store is s3://bucket/folder/ or s3://bucket/folder/map.tif; got {output}"
        )
    library_of(protocol)
    path = (root or staging_root()).joinpath(protocol, *parts)
    names_map = not key.endswith("/") and path.suffix.lower() in MAPS and len(parts) > 1
    try:
        (path.parent if names_map else path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RasterError(
            f"cannot make the folder {path}, where {output} is made before it is uploaded: {error}"
        ) from error
    return path


def library_of(protocol: str) -> None:
    """Load what speaks to a kind of store. Raises UsageError where it is not known, or not installed."""
    try:
        import fsspec

        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        raise UsageError(
            f"outputs on {protocol}:// need more: pip install 'd2ls-infer[store]' brings what s3:// needs ({error})"
        ) from error
    except ValueError as error:
        raise UsageError(f"no object store is called {protocol}://: {error}") from error


def address_of(path: Path) -> str | None:
    """The address that a path here stands for; None for any other path."""
    root = staging_root()
    parts = path.relative_to(root).parts if path.is_relative_to(root) else ()
    return f"{parts[0]}://{'/'.join(parts[1:])}" if len(parts) > 1 else None


def named(path: Path) -> Path | str:
    """An output as its user calls it: the path, or the address it stands for."""
    return address_of(path) or path


def all_named(files: Mapping[str, Path]) -> dict[str, Path | str]:
    """The same of many."""
    return {name: named(path) for name, path in files.items()}


@contextmanager
def asking(address: str) -> Iterator[tuple[Any, str]]:
    """The store of an address, and its key there; turns what its library raises into a line that tells the address."""
    import fsspec

    try:
        store, key = fsspec.url_to_fs(address)
        store.invalidate_cache()  # of listings: others write too
        yield store, key
    except Exception as error:  # each store's library has kinds of its own, which have nothing in common
        raise StoreError(f"cannot use {address}: {str(error) or type(error).__name__}") from error


def exists(path: Path) -> bool:
    """Whether a file is there, in its store if it has one."""
    if (address := address_of(path)) is None:
        return path.exists()
    with asking(address) as (store, key):
        return bool(store.exists(key))


def names_in(folder: Path) -> list[str]:
    """The names in a folder, or of the objects in one of a store; none where there is no such folder."""
    if (address := address_of(folder)) is None:
        return [path.name for path in folder.iterdir()] if folder.is_dir() else []
    with asking(address) as (store, key), suppress(FileNotFoundError):
        return [PurePosixPath(name).name for name in store.ls(key, detail=False)]
    return []


def check_writable(path: Path) -> None:
    """Raise StoreError where the store of a file or folder cannot be written to; the only way to know is to try."""
    if address := address_of(path if path.is_dir() else path.parent):
        with asking(address) as (store, key):
            trial = f"{key}/.d2ls-{uuid.uuid4().hex}"
            store.pipe_file(trial, b"")
            store.rm_file(trial)


def remove(path: Path) -> None:
    """Remove a file of a store, if it is there. Files that are here in its place stay."""
    if address := address_of(path):
        with asking(address) as (store, key), suppress(FileNotFoundError):
            store.rm_file(key)


def upload(path: Path, address: str) -> None:
    """Copy a file into a store, as one object."""
    with asking(address) as (store, key):
        store.put_file(str(path), key)


def fetch(address: str, path: Path) -> None:
    """Copy an object of a store here, if it is there."""
    with asking(address) as (store, key):
        if store.exists(key):
            store.get_file(key, str(path))


@contextmanager
def at_hand(path: Path) -> Iterator[None]:
    """Inside the `with` block a file is here, also one of a store, if it is there."""
    if (address := address_of(path)) is None:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        fetch(address, path)
        yield
    finally:
        path.unlink(missing_ok=True)


def upload_all(files: Iterable[Path]) -> None:
    """Upload those of the files that are there and stand for addresses, in this order.

    After an error none of them is left in the store; objects that they have replaced are gone too.
    """
    done: list[Path] = []
    try:
        for path in files:
            if (address := address_of(path)) and path.exists():
                upload(path, address)
                done.append(path)
    except BaseException:
        for path in done:
            with suppress(StoreError):  # the first error is the one to tell
                remove(path)
        raise


def clear(files: Iterable[Path]) -> None:
    """Remove those of the files that stand for addresses; what is in the store stays."""
    for path in files:
        if address_of(path):
            path.unlink(missing_ok=True)
