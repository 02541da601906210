"""`d2ls models`: what there is, where it is, whether it is whole. Of models on the hub, `tests/hub` tells."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from d2ls_infer.cli import main
from d2ls_infer.manifest import Manifest, WeightsEntry, load_manifest, packaged_manifest_path
from d2ls_infer.nn import count_parameters
from d2ls_infer.weights import file_sha256, load_network, read_description

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


def output_of(monkeypatch: pytest.MonkeyPatch, *entries: WeightsEntry, arguments: tuple[str, ...] = ()) -> list[str]:
    # The name `d2ls_infer.cli.models` is the command; the module of that name is asked for by importlib.
    module = importlib.import_module("d2ls_infer.cli.models")
    monkeypatch.setattr(module, "load_manifest", lambda _: Manifest(entries))
    result = CliRunner().invoke(main, ["models", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout.splitlines()


def models(*arguments: str | Path) -> Result:
    result = CliRunner().invoke(main, ["models", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def refused(result: Result, code: int, *parts: str) -> None:
    assert result.exit_code == code, result.output
    line = result.stderr.splitlines()[-1]
    assert line.startswith("Error: ")
    assert all(part in line for part in parts), line


# The table


def test_line_of_a_model_says_what_it_takes_and_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    header, line = output_of(monkeypatch, entry_of("naip", ["naip-v1"]))
    assert header.split() == ["model", "classes", "bands", "GSD", "size", "source", "licence", "where", "measured"]
    cells = [cell for cell in line.split("  ") if cell]
    assert [cell.strip() for cell in cells] == [
        "naip/naip-v1",
        "2",
        "red, green, blue, nir",
        "0.6 m",
        "6.3 MB",
        "package",
        "CC0-1.0",
        "missing",
        "mIoU 67.2 % (val)",
    ]


def test_columns_stand_under_their_headings(monkeypatch: pytest.MonkeyPatch) -> None:
    header, *lines = output_of(monkeypatch, entry_of("a", []), entry_of("a-much-longer-name", ["b", "c"]))
    assert {line.index("mIoU") for line in lines} == {header.index("measured")}
    assert {line.index("CC0-1.0") for line in lines} == {header.index("licence")}


def test_what_is_not_known_is_a_dash(monkeypatch: pytest.MonkeyPatch) -> None:
    _, line = output_of(monkeypatch, entry_of("dubai", [], metrics=[], gsd_m=None))
    assert "  any  " in line
    assert line.endswith("  -")


def test_model_without_weights_says_what_to_do_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    later = WeightsEntry.from_dict({"name": "loveda", "summary": "land cover", "unpublished": "train it"})
    _, line, instead = output_of(monkeypatch, later)
    assert line.startswith("loveda")
    assert "unpublished" in line
    assert instead == "loveda is not published yet: train it"


def test_empty_manifest_gives_the_headings_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(output_of(monkeypatch)) == 1


def test_models_of_this_project_are_listed_in_lines_that_fit_a_terminal() -> None:
    lines = models().stdout.splitlines()
    entries = load_manifest().entries
    assert len(lines) == 1 + len(entries) + sum(entry.unpublished is not None for entry in entries)
    for entry, line in zip(entries, lines[1:], strict=False):
        assert line.startswith(entry.name)
        assert len(line) <= 175


def test_list_for_machines_holds_all_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = entry_of("naip", ["naip-v1"])
    (listed,) = json.loads("\n".join(output_of(monkeypatch, entry, arguments=("--json",))))
    assert (listed.pop("where"), listed.pop("path")) == ("missing", None)
    assert WeightsEntry.from_dict(listed) == entry


@pytest.mark.parametrize("arguments", [["models", "extra"], ["models", "--what"], ["modles"]])
def test_wrong_use_exits_with_2(arguments: list[str]) -> None:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert "Error: " in result.stderr


# One model


def test_all_that_is_known_of_a_model_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = entry_of("naip", ["naip-v1"], note="a preview", license="CC-BY-NC-4.0")
    text = "\n".join(output_of(monkeypatch, entry, arguments=("show", "NAIP-v1")))
    for part in (
        "maps of naip", "naip-v1", "0" * 64, "6340000 bytes, 3000000 parameters", "backbone resnet18", "0.6 m",
        "red, green, blue, nir", "0 to 255", "CC-BY-NC-4.0 (not for every use)", "made up", "nowhere", "a preview",
        "1  tree   #00ff00", "mIoU", "67.25", "OA", "91.00", "full tiles",
    ):  # fmt: skip
        assert part in text, part
    (listed,) = [json.loads("\n".join(output_of(monkeypatch, entry, arguments=("show", "naip", "--json"))))]
    assert listed["where"] == "missing"
    later = WeightsEntry.from_dict({"name": "later", "summary": "", "unpublished": "train it"})
    text = "\n".join(output_of(monkeypatch, later, arguments=("show", "later")))
    assert "unpublished" in text
    assert "train it" in text


def test_a_weights_file_is_shown_too(tiny_weights: Path) -> None:
    result = models("show", str(tiny_weights))
    assert (result.exit_code, result.stderr) == (0, "")
    for part in (str(tiny_weights), file_sha256(tiny_weights), "red, green, blue", "random numbers", "not measured"):
        assert part in result.stdout, part


def test_a_name_that_no_file_can_have_is_told() -> None:
    refused(models("show", "x" * 300), 2, "unknown model 'xxx")


def test_path_of_a_bundled_model_is_printed_alone() -> None:
    result = models("path", "naip")
    entry = load_manifest().find("naip")
    assert (result.exit_code, result.stdout, result.stderr) == (0, f"{entry.path}\n", "")


@pytest.mark.parametrize("command", ["show", "path", "verify", "download"])
def test_unknown_name_is_told_with_the_nearest(command: str) -> None:
    refused(models(command, "naipp"), 2, "unknown model 'naipp'", "did you mean naip")


def test_model_without_weights_is_told(tmp_path: Path) -> None:
    path = tmp_path / "models.json"
    later = {"name": "later", "summary": "", "unpublished": "train it"}
    path.write_text(json.dumps({"version": 1, "models": [later]}))
    for command in ("download", "path"):
        refused(models(command, "later", "--manifest", path), 2, "later has no weights yet: train it")
    assert models("download", "--all", "--manifest", path).exit_code == 0
    assert "later: not here (unpublished)" in models("verify", "later", "--manifest", path).stdout


@pytest.mark.parametrize("arguments", [["download"], ["download", "naip", "--all"], ["verify", "naip", "--all"]])
def test_one_model_or_all_of_them(arguments: list[str]) -> None:
    refused(models(*arguments), 2, "name of a model, or --all")


# Whole or not


@pytest.fixture
def own(tmp_path: Path, tiny_weights: Path) -> Callable[..., Path]:
    """A manifest of one local model, mine, with changes; its file is a copy of the tiny weights."""
    file = tmp_path / "weights" / "tiny.safetensors"
    file.parent.mkdir()
    file.write_bytes(tiny_weights.read_bytes())
    description = read_description(file)
    num_params = count_parameters(load_network(file, description))

    def write(**changes: Any) -> Path:
        entry = {
            "name": "mine", "summary": "", "file": "weights/tiny.safetensors", "sha256": file_sha256(tiny_weights),
            "size": tiny_weights.stat().st_size, "num_params": num_params, "description": description.to_dict(),
        }  # fmt: skip
        path = tmp_path / "models.json"
        path.write_text(json.dumps({"version": 1, "models": [entry | changes]}))
        return path

    return write


def test_bundled_models_are_whole() -> None:
    result = models("verify")
    assert result.exit_code == 0, result.output
    bundled = [entry.name for entry in load_manifest().entries if entry.path]
    assert [line.split(":")[0] for line in result.stdout.splitlines() if "whole, bundled" in line] == bundled


def test_own_model_is_verified_and_its_option_may_stand_before_the_command(own: Callable[..., Path]) -> None:
    path = own()
    for arguments in (("verify", "mine", "--manifest", path), ("--manifest", path, "verify", "mine")):
        result = models(*arguments)
        assert result.exit_code == 0, result.output
        assert result.stdout == f"mine: whole, local, {path.parent / 'weights/tiny.safetensors'}\n"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 7}, "expected 7 bytes"),
        ({"sha256": "0" * 64}, "expected"),
        ({"file": "weights/none.safetensors"}, "no such file"),
    ],
)
def test_damage_is_told_and_nothing_deleted(own: Callable[..., Path], changes: dict[str, Any], message: str) -> None:
    path = own(**changes)
    before = (path.parent / "weights/tiny.safetensors").read_bytes()
    result = models("verify", "mine", "--manifest", path)
    refused(result, 1, "1 of 1 are not as the manifest says: mine")
    assert message in result.stderr
    assert (path.parent / "weights/tiny.safetensors").read_bytes() == before


def test_valid_manifest_is_said_to_be_so(own: Callable[..., Path]) -> None:
    result = models("validate", own())
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    assert "mine: whole, local" in result.stdout


@pytest.mark.parametrize(
    ("changes", "described", "message"),
    [
        ({"num_params": 5}, {}, "parameters, the manifest says 5"),
        ({}, {"gsd_m": 9.0}, "differ in what they say: gsd_m"),
        ({}, {"license": "cc by 4.0"}, "is CC-BY-4.0 as SPDX"),
    ],
)
def test_manifest_that_does_not_fit_its_files_is_told(
    own: Callable[..., Path], changes: dict[str, Any], described: dict[str, Any], message: str
) -> None:
    path = own(**changes)
    values = json.loads(path.read_text())
    values["models"][0]["description"] |= described
    path.write_text(json.dumps(values))
    result = models("validate", path)
    refused(result, 1, "mine")
    assert message in result.stderr


def test_manifest_that_makes_no_sense_is_told(own: Callable[..., Path], tmp_path: Path) -> None:
    refused(models("validate", own(file="../x.safetensors")), 1, "file lies outside the manifest's folder")
    refused(models("validate", own(more=1)), 1, "mine: unknown keys more")
    refused(models("validate", tmp_path / "none.json"), 2, "no such manifest")


def test_manifest_of_a_checkout_names_files_of_its_package(own: Callable[..., Path], tmp_path: Path) -> None:
    """Where the package that runs is another one, installed elsewhere."""
    package = tmp_path / "d2ls_infer"
    package.mkdir()
    (package / "__init__.py").touch()
    path = own().rename(tmp_path / "weights_manifest.json")
    assert f"no such file: {package / 'weights/tiny.safetensors'}" in models("validate", path).stderr
    (tmp_path / "weights").rename(package / "weights")
    result = models("validate", path)
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    (package / "weights").rename(tmp_path / "weights")
    assert models("validate", path.rename(tmp_path / "own.json")).exit_code == 0


def test_manifest_of_this_project_is_valid() -> None:
    result = models("validate", packaged_manifest_path())
    assert result.exit_code == 0, result.output
