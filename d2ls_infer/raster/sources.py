"""What users name when they mean scenes: files, addresses, patterns, folders, lists, STAC -> rasters to open."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.error import URLError
from urllib.parse import unquote, urljoin, urlsplit
from urllib.request import urlopen

from d2ls_infer.errors import D2LSError, MissingFileError, RasterError, UsageError
from d2ls_infer.raster.dataset import is_address, is_remote, local_file, open_quietly

SUFFIXES = (
    ".tif", ".tiff", ".vrt", ".jp2", ".j2k", ".png", ".jpg", ".jpeg", ".webp", ".bmp", ".img", ".dat", ".pix", ".ecw",
    ".sid", ".ntf", ".nitf", ".nc", ".h5", ".hdf", ".hdf5", ".zarr",
)  # fmt: skip
"""What is taken for a scene in a folder."""

MAP = "*_d2ls-*"
"""What our own maps are called; in a folder they are passed over."""

SECONDS = 30
"""How long a server may take over a STAC item."""

JSON_BYTES = 16 << 20


def find_scenes(names: Sequence[str | Path], *, asset: str | None = None) -> list[str]:
    """The rasters that are meant, in order, each as `Scene.open` takes it.

    A name is a raster (a file, a URL, or whatever else GDAL opens), a pattern (`tiles/*.tif`, `**` goes into folders),
    a folder (the rasters in it, by their suffix, but for maps of ours), a list of any of these (`@list.txt`, or a .txt
    that is no raster itself: one a line, as they stand or as seen from the list's folder; a line that begins with # is
    a comment), or a STAC item (a .json file or address: the asset called `asset`, or the one that is data), or a
    collection of them: the items that it holds, as an answer to a search does, or that it links to, by way of further
    collections too.

    Raises MissingFileError; UsageError where nothing is found, or several assets would do.
    """
    found = [scene for name in names for scene in expand(str(name), asset)]
    if asset is not None and not any(is_item(name) or is_list(name) for name in map(str, names)):
        raise UsageError("--asset chooses from a STAC item, but none was given")
    return found


def is_list(name: str) -> bool:
    """Whether a name looks like that of a list of scenes."""
    return name.startswith("@") or name.lower().endswith(".txt")


def expand(name: str, asset: str | None) -> Iterator[str]:
    """The rasters of one name."""
    path = local_file(name)
    if name.startswith("@") and path is None:
        yield from of_list(Path(name[1:]), asset)
    elif is_item(name):
        yield from stac_scenes(name, asset)
    elif path is not None and path.is_dir() and not is_raster(name):
        yield from in_folder(path)
    elif path is not None and path.suffix.lower() == ".txt" and not is_raster(name):
        yield from of_list(path, asset)
    elif path is None and not is_remote(name) and glob.has_magic(name):
        yield from matching(name)
    else:
        yield name


def of_list(path: Path, asset: str | None) -> Iterator[str]:
    """The rasters of a list. What is not there is told with the scenes, and stops none of the others."""
    for name, is_there in listed(path):
        yield from expand(name, asset) if is_there else [name]


def is_raster(name: str) -> bool:
    """Whether GDAL opens it: some rasters, and containers of them, are folders (Zarr), some are text (ASCII grids)."""
    try:
        open_quietly(name).close()
    except D2LSError:
        return False
    return True


def matching(pattern: str) -> list[str]:
    """The files of a pattern, by name; what a pattern without a suffix matches beside rasters is left out."""
    files = map(Path, sorted(glob.glob(pattern, recursive=True)))  # noqa: PTH207 - pathlib takes no absolute patterns
    wanted = [path for path in files if path.suffix.lower() in SUFFIXES or (Path(pattern).suffix and path.is_file())]
    found = [str(path) for path in wanted if not path.match(MAP)]
    if not found:
        raise MissingFileError(f"no scene is called {pattern}")
    return found


def in_folder(folder: Path) -> list[str]:
    """The rasters in a folder, by name."""
    found = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in SUFFIXES]
    files = [str(path) for path in found if not path.match(MAP)]
    if not files:
        raise MissingFileError(
            f"no scene in the folder {folder}; it is not a raster itself, scenes end in .tif and so on"
        )
    return files


def listed(path: Path) -> Iterator[tuple[str, bool]]:
    """The names in a list, as they stand or as seen from its folder, and whether something is there.

    Raises MissingFileError and UsageError for what is no list; so is one that names nothing that is there.
    """
    if not path.is_file():
        raise MissingFileError(f"no such list of scenes: {path}")
    what = f"{path} is not a raster, and as a list of scenes"
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UsageError(f"{what} it is not text in UTF-8") from error
    names = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.split("#")[0].strip()]
    if not names:
        raise UsageError(f"{what} it is empty")
    found = [(number, place_of(name, path.parent), name) for number, name in names]
    if not any(place for _, place, _ in found):
        number, _, name = found[0]
        raise MissingFileError(f"{what} its line {number} names no file: {name}")
    for number, place, name in found:
        if place and (file := local_file(place)) and file.suffix.lower() == ".txt" and not is_raster(place):
            raise UsageError(f"{what} its line {number} names no raster: {name}; lists do not go into lists")
        yield place or name, place is not None


def place_of(name: str, folder: Path) -> str | None:
    """A name in a list as it is found, as it stands or as seen from the list's folder; None where nothing is there."""
    places = name, str(folder / name)
    return next((place for place in places if is_address(place) or local_file(place) or is_pattern(place)), None)


def is_pattern(name: str) -> bool:
    """Whether files go by a pattern."""
    return glob.has_magic(name) and any(glob.iglob(name, recursive=True))  # noqa: PTH207 - as above


# STAC

LEADING = ("item", "child", "items")
"""Links from a collection to what it holds."""


def is_item(name: str) -> bool:
    """Whether a name is that of a JSON file, or of an item or collection of a STAC API."""
    if name.startswith("/vsi"):
        return False
    path = PurePosixPath(urlsplit(name).path)
    of_api = path.suffix == "" and {"items", "collections"} & {path.name, path.parent.name}
    return path.suffix.lower() in (".json", ".geojson") or (name.startswith(("http://", "https://")) and bool(of_api))


def stac_scenes(name: str, wanted: str | None, above: tuple[str, ...] = ()) -> Iterator[str]:
    """The assets of a STAC item, or of all items of a collection; above: the collections that led to it.

    Raises UsageError for any other JSON, and for collections without items, in pages, or that lead to themselves.
    """
    found = read_json(name)
    links = [link for link in found.get("links") or () if isinstance(link, dict) and isinstance(link.get("href"), str)]
    by_kind = {kind: [link["href"] for link in links if link.get("rel") == kind] for kind in ("next", *LEADING)}
    if found.get("type") == "FeatureCollection":
        if by_kind["next"]:
            raise UsageError(f"{name} is one page of several; ask for all items at once, as by limit=1000")
        if not (items := found.get("features")):
            raise UsageError(f"{name} has no items")
        for item in items:
            yield item_asset(name, item, wanted)
    elif found.get("type") in ("Collection", "Catalog"):
        # An API's own list of all items says the same as links to them.
        further = [*by_kind["item"], *by_kind["child"]] or by_kind["items"]
        here = name if is_remote(name) else str(Path(name).resolve())  # by whatever way we came
        if not further or here in above:
            raise UsageError(f"{name} leads to {'itself' if further else 'no items'}")
        for href in further:
            yield from stac_scenes(resolved(name, href), wanted, (*above, here))
    else:
        yield item_asset(name, found, wanted)


def item_asset(name: str, item: Any, wanted: str | None) -> str:
    """The address of the asset of a STAC item that is data, by role or else by type, or of the one that is wanted.

    name: of the file that holds the item. Raises UsageError for what is no item.
    """
    assets = item.get("assets") if isinstance(item, dict) and "stac_version" in item else None
    if not isinstance(assets, dict) or not all(
        isinstance(a, dict) and isinstance(a.get("href"), str) for a in assets.values()
    ):
        raise UsageError(f"{name} is no STAC item: stac_version and assets with an href each are needed")
    if wanted is not None:
        if wanted not in assets:
            raise UsageError(f"{name} has no asset {wanted!r}; it has {', '.join(assets) or 'none'}")
        return resolved(name, assets[wanted]["href"])
    data = [key for key, asset in assets.items() if "data" in (asset.get("roles") or ())]
    data = data or [key for key, asset in assets.items() if is_picture(asset)]
    if len(data) != 1:
        told = (
            f"of its assets {len(data)} are data: {', '.join(data)}"
            if data
            else f"it has {', '.join(assets) or 'none'}"
        )
        raise UsageError(
            f"which asset of {name}? Choose by --asset NAME; {told}"
            + (" (bands in files of their own: put them into one by gdalbuildvrt -separate)" if data else "")
        )
    return resolved(name, assets[data[0]]["href"])


def is_picture(asset: Mapping[str, Any]) -> bool:
    """Whether an asset without the role of data may be the scene: an image that is there for no other purpose."""
    other = {"thumbnail", "overview", "metadata"} & set(asset.get("roles") or ())
    return str(asset.get("type", "")).startswith("image/") and not other


def read_json(name: str) -> Mapping[str, Any]:
    """A JSON object from a file or over the network. Raises UsageError for what is none."""
    if is_remote(name) and not name.startswith(("http://", "https://")):
        raise UsageError(f"a STAC item is read from a file, or over http(s); got {name}")
    try:
        if is_remote(name):
            with urlopen(name, timeout=SECONDS) as answer:
                text = answer.read(JSON_BYTES)
        else:
            text = Path(name).read_bytes()
        found = json.loads(text)
    except FileNotFoundError as error:
        raise MissingFileError(f"no such file: {name}") from error
    except URLError as error:
        raise RasterError(f"cannot open {name}: {error.reason}") from error
    except OSError as error:
        raise RasterError(f"cannot read {name}: {error}") from error
    except ValueError as error:
        raise UsageError(f"{name} is no STAC item: it is not JSON") from error
    if not isinstance(found, dict):
        raise UsageError(f"{name} is no STAC item: it is no JSON object")
    return found


def resolved(item: str, href: str) -> str:
    """The address of an asset or a further file, as seen from the one that names it."""
    if is_remote(href):
        return unquote(urlsplit(href).path) if href.startswith("file://") else href
    return urljoin(item, href) if is_remote(item) else str(Path(item).parent / href)


# Names of outputs


def home_of(source: str | Path) -> tuple[Path, str]:
    """The folder that a scene's map goes to by default, and the scene's name in the map's.

    Beside the scene's file, or where we are if it has none. A part of a file is called by both names.
    """
    name = str(source)
    if is_remote(name):
        return Path(), PurePosixPath(unquote(urlsplit(name).path)).stem or "scene"
    if is_address(name) and local_file(name) is None:
        parts = [part.strip('"') for part in re.findall(r'"[^"]*"|[^:]+', name)[1:]]
        files = [Path(part) for part in parts if local_file(part)]
        stem = "_".join(Path(part).stem if Path(part) in files else part.strip("/") for part in parts)
        return (files[0].parent if files else Path()), re.sub(r"[^\w.-]+", "_", stem) or "scene"
    return Path(name).parent, Path(name).stem
