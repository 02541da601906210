"""The order of the modules: an import only points to the same layer or an earlier one."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import d2ls_infer

PACKAGE = Path(d2ls_infer.__file__).parent

# From the bottom up.
LAYERS = (
    "errors",
    "files",
    "store",
    "alone",
    "background",
    "transfers",
    "smoothing",
    "labels",
    "licence",
    "manifest",
    "graphs",
    "tensors",
    "nn",
    "backends",
    "legacy",
    "hub",
    "card",
    "weights",
    "tiling",
    "context",
    "segmenter",
    "raster",
    "outputs",
    "journal",
    "memory",
    "at_once",
    "options",
    "notices",
    "exported",
    "load",
    "job",
    "predict",
    "plan",
    "batch",
    "cluster",
    "api",
    "datasets",
    "metrics",
    "evaluate",
    "report",
    "seams",
    "train",
    "cli",
)
RANKS = {layer: rank for rank, layer in enumerate(LAYERS)} | {"__main__": len(LAYERS)}
MAY_KNOW_THE_HUB = {f"{PACKAGE.name}.nn.pretrained"}
MAY_KNOW_THE_VERSION = {"job", "report", "cli", "__main__"}
MAY_DRAW = {f"{PACKAGE.name}.seams.picture", f"{PACKAGE.name}.cli.seams"}


class Import(NamedTuple):
    """A module that another one names, wherever in the file: in functions and under TYPE_CHECKING too."""

    importer: str
    imported: str
    place: str


def modules() -> dict[str, Path]:
    """Dotted names and files of all modules of the package."""
    names = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = (PACKAGE.name, *path.relative_to(PACKAGE).with_suffix("").parts)
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


MODULES = modules()


def imports() -> Iterator[Import]:
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            place = f"{path.relative_to(PACKAGE.parent)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield Import(name, alias.name, place)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{place}: imports are absolute here"
                assert node.module is not None
                for alias in node.names:
                    full = f"{node.module}.{alias.name}"
                    # What is no module of ours is a name inside one.
                    named = full if full in MODULES or node.module == PACKAGE.name else node.module
                    yield Import(name, named, place)


ALL = list(imports())
INSIDE = [item for item in ALL if item.imported.split(".")[0] == PACKAGE.name and item.importer != PACKAGE.name]


def layer(module: str) -> str:
    return module.split(".")[1]


def test_every_module_has_a_layer() -> None:
    assert {layer(name) for name in MODULES if name != PACKAGE.name} <= set(RANKS)


def test_every_layer_is_there() -> None:
    assert set(LAYERS) == {layer(name) for name in MODULES if name != PACKAGE.name} - {"__main__"}


def test_an_import_points_to_the_same_layer_or_an_earlier_one() -> None:
    wrong = []
    for item in INSIDE:
        target = item.imported.partition(".")[2]
        if target == "__version__":
            allowed = layer(item.importer) in MAY_KNOW_THE_VERSION
        else:  # what is no module has no rank: it is to be imported from where it is, not from the package
            allowed = RANKS.get(target.split(".")[0], len(RANKS)) <= RANKS[layer(item.importer)]
        if not allowed:
            wrong.append(f"{item.place} imports {item.imported}")
    assert wrong == []


def test_only_raster_knows_rasterio() -> None:
    assert {layer(item.importer) for item in ALL if item.imported.split(".")[0] == "rasterio"} == {"raster"}


def test_only_the_command_line_imports_train() -> None:
    assert {item.importer for item in INSIDE if layer(item.imported) == "train" != layer(item.importer)} == {
        f"{PACKAGE.name}.cli.train"
    }


def test_only_train_knows_what_training_alone_needs() -> None:
    for library in ("lightning", "matplotlib"):
        users = {item.importer for item in ALL if item.imported.split(".")[0] == library} - MAY_DRAW
        assert {layer(user) for user in users} == {"train"}


def test_the_network_knows_nothing_of_rasters_or_files() -> None:
    """It is torch and timm, and our errors; `pretrained.py` alone reads and writes files, as the hub's mixin does."""
    network = [
        item for item in ALL if item.importer.startswith(f"{PACKAGE.name}.nn") and item.importer not in MAY_KNOW_THE_HUB
    ]
    known = {item.imported.split(".")[0] for item in network}
    assert not known & {"rasterio", "safetensors", "huggingface_hub", "click", "numpy", "pickle"}
    ours = {layer(item.imported) for item in network if item.imported.startswith(PACKAGE.name)}
    assert ours == {"errors", "nn"}


def test_only_these_modules_know_the_hub() -> None:
    assert {item.importer for item in ALL if item.imported.split(".")[0] == "huggingface_hub"} == MAY_KNOW_THE_HUB | {
        f"{PACKAGE.name}.hub", f"{PACKAGE.name}.card",
    }  # fmt: skip


def test_only_store_knows_object_stores() -> None:
    assert {layer(item.importer) for item in ALL if item.imported.split(".")[0] in ("fsspec", "s3fs")} == {"store"}


def test_weights_are_read_by_way_of_tensors() -> None:
    """So that no header goes unchecked; training reads the backbones of timm besides."""
    assert {layer(item.importer) for item in ALL if item.imported.split(".")[0] == "safetensors"} <= {
        "tensors",
        "train",
    }


def test_no_module_is_imported_in_a_circle() -> None:
    """Layers leave room for circles inside one."""
    known = {name: {i.imported for i in INSIDE if i.importer == name and i.imported in MODULES} for name in MODULES}
    while known:
        free = [name for name, needs in known.items() if not needs & set(known) - {name}]
        assert free, f"these import each other: {', '.join(known)}"
        for name in free:
            del known[name]
