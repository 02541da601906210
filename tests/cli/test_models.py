"""`d2ls models`: one line for every model of the manifest."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
from click.testing import CliRunner

from d2ls_infer.cli import main
from d2ls_infer.manifest import Manifest, WeightsEntry, load_manifest

DESCRIPTION: dict[str, Any] = {
    "config": {"backbone": "resnet18", "num_classes": 2, "in_channels": 4},
    "labels": [{"name": "road", "color": "#ff0000"}, {"name": "tree", "color": "#00ff00"}],
    "bands": ["red", "green", "blue", "nir"],
    "value_range": [0, 255],
    "mean": [0.5] * 4,
    "std": [0.5] * 4,
    "gsd_m": 0.6,
    "metrics": [
        {"name": "mIoU", "value": 67.25, "split": "val", "protocol": "full tiles"},
        {"name": "OA", "value": 91.0, "split": "val", "protocol": "full tiles"},
    ],
    "license": "CC0-1.0",
    "training_data": "made up",
    "source": "nowhere",
}


def entry_of(name: str, aliases: list[str], **changes: Any) -> WeightsEntry:
    return WeightsEntry.from_dict(
        {
            "name": name,
            "aliases": aliases,
            "summary": f"maps of {name}",
            "file": f"weights/{name}.safetensors",
            "sha256": "0" * 64,
            "size": 6_340_000,
            "num_params": 3_000_000,
            "description": {**DESCRIPTION, **changes},
        }
    )


def output_of(monkeypatch: pytest.MonkeyPatch, *entries: WeightsEntry) -> list[str]:
    # The name `d2ls_infer.cli.models` is the command; the module of that name is asked for by importlib.
    module = importlib.import_module("d2ls_infer.cli.models")
    monkeypatch.setattr(module, "load_manifest", lambda: Manifest(entries))
    result = CliRunner().invoke(main, ["models"])
    assert result.exit_code == 0, result.output
    return result.stdout.splitlines()


def test_line_of_a_model_says_what_it_takes_and_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    header, line = output_of(monkeypatch, entry_of("naip", ["naip-v1"]))
    assert header.split() == ["model", "classes", "bands", "GSD", "size", "measured", "licence", "for"]
    cells = [cell for cell in line.split("  ") if cell]
    assert [cell.strip() for cell in cells] == [
        "naip/naip-v1",
        "2",
        "red, green, blue, nir",
        "0.6 m",
        "6.3 MB",
        "mIoU 67.2 % (val)",
        "CC0-1.0",
        "maps of naip",
    ]


def test_columns_stand_under_their_headings(monkeypatch: pytest.MonkeyPatch) -> None:
    header, *lines = output_of(monkeypatch, entry_of("a", []), entry_of("a-much-longer-name", ["b", "c"]))
    assert {line.index("maps of") for line in lines} == {header.index("for")}
    assert {line.index("CC0-1.0") for line in lines} == {header.index("licence")}


def test_what_is_not_known_is_a_dash(monkeypatch: pytest.MonkeyPatch) -> None:
    _, line = output_of(monkeypatch, entry_of("dubai", [], metrics=[], gsd_m=None))
    assert "  any  " in line
    assert "  -  " in line


def test_model_without_weights_is_listed_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    later = WeightsEntry.from_dict({"name": "loveda", "summary": "land cover", "unpublished": "not yet"})
    _, line = output_of(monkeypatch, later)
    assert line.startswith("loveda")
    assert "not trained yet" in line
    assert line.endswith("land cover")


def test_empty_manifest_gives_the_headings_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(output_of(monkeypatch)) == 1


def test_models_of_this_project_are_listed() -> None:
    result = CliRunner().invoke(main, ["models"])
    assert result.exit_code == 0
    assert len(result.stdout.splitlines()) == 1 + len(load_manifest().entries)
    assert all(entry.name in result.stdout for entry in load_manifest().entries)


@pytest.mark.parametrize("arguments", [["models", "extra"], ["models", "--what"], ["modles"]])
def test_wrong_use_exits_with_2(arguments: list[str]) -> None:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert "Error: " in result.stderr
