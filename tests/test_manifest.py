"""The manifest and the descriptions in weights files: nothing unknown, missing or mistyped passes."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2ls_infer.errors import MissingFileError, UsageError, WeightsError
from d2ls_infer.labels import LabelMap
from d2ls_infer.manifest import (
    CONFIG_SIZES,
    HubFile,
    Manifest,
    Metric,
    ModelDescription,
    WeightsEntry,
    load_manifest,
    own_manifest,
    read_manifest,
)
from d2ls_infer.nn import D2LSConfig, count_parameters
from d2ls_infer.weights import file_sha256, load_network, read_description

DESCRIPTION: dict[str, Any] = {
    "config": {"backbone": "mobilenetv3_small_050", "num_classes": 2, "embed_dim": 32, "stages": 1, "in_channels": 4},
    "labels": [{"name": "road", "color": "#ff0000"}, {"name": "tree", "color": "#00ff00"}],
    "ignore_index": 254,
    "bands": ["red", "green", "blue", "nir"],
    "value_range": [0.0, 10000.0],
    "mean": [0.1, 0.2, 0.3, 0.4],
    "std": [0.1, 0.1, 0.1, 0.2],
    "gsd_m": 0.6,
    "metrics": [{"name": "mIoU", "value": 67.0, "split": "val", "protocol": "full tiles"}],
    "license": "CC0-1.0",
    "training_data": "made up",
    "source": "nowhere",
}
ENTRY: dict[str, Any] = {
    "name": "toy",
    "aliases": ["toy-v1"],
    "summary": "a toy",
    "file": "weights/toy.safetensors",
    "sha256": "0" * 64,
    "size": 100,
    "num_params": 10,
    "description": DESCRIPTION,
}

numbers = st.floats(allow_nan=False, allow_infinity=False)
positive = st.floats(min_value=1e-6, max_value=1e6)
words = st.text(min_size=1, max_size=12)


@st.composite
def descriptions(draw: st.DrawFn) -> ModelDescription:
    names = draw(st.lists(words.filter(str.strip), min_size=1, max_size=6, unique=True))
    bands = tuple(draw(st.lists(words.filter(str.strip), min_size=1, max_size=5, unique=True)))
    low = draw(st.floats(-1e6, 1e6))
    return ModelDescription(
        config={"backbone": draw(words), "num_classes": len(names), "in_channels": len(bands)},
        labels=LabelMap.of(names),
        bands=bands,
        value_range=(low, low + draw(st.floats(0.5, 1e6))),
        mean=tuple(draw(st.lists(numbers, min_size=len(bands), max_size=len(bands)))),
        std=tuple(draw(st.lists(positive, min_size=len(bands), max_size=len(bands)))),
        gamma=draw(positive),
        gsd_m=draw(st.none() | positive),
        metrics=tuple(
            Metric(name=name, value=value, split=split, protocol="")
            for name, value, split in draw(st.lists(st.tuples(words, numbers, words), max_size=3))
        ),
        license=draw(words),
        training_data=draw(words),
        source=draw(words),
        note=draw(st.just("") | words),
    )


def changed(values: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**values, **changes}


# Descriptions


@given(descriptions())
def test_description_comes_back_from_its_json(description: ModelDescription) -> None:
    assert ModelDescription.from_dict(json.loads(json.dumps(description.to_dict()))) == description


def test_json_form_of_a_description_is_the_one_it_was_read_from() -> None:
    assert ModelDescription.from_dict(DESCRIPTION).to_dict() == DESCRIPTION


def test_description_is_frozen_and_gives_nothing_away_that_changes_it() -> None:
    description = ModelDescription.from_dict(DESCRIPTION)
    with pytest.raises(dataclasses.FrozenInstanceError):
        description.bands = ()  # type: ignore[misc]
    given_away = description.to_dict()
    given_away["metrics"][0]["value"] = 100.0
    given_away["config"]["stages"] = 9
    given_away["labels"][0]["name"] = "other"
    given_away["mean"][0] = 9.0
    assert description.to_dict() == DESCRIPTION


def test_whole_numbers_pass_as_real_ones_and_optional_values_have_defaults() -> None:
    values = changed(DESCRIPTION, value_range=[0, 255], gsd_m=1)
    del values["ignore_index"]
    description = ModelDescription.from_dict(values)
    assert description.value_range == (0.0, 255.0)
    assert isinstance(description.value_range[1], float)
    assert description.gsd_m == 1.0
    assert description.labels.ignore_index == 255
    assert ModelDescription.from_dict(changed(DESCRIPTION, gsd_m=None)).gsd_m is None


@pytest.mark.parametrize("key", sorted(set(DESCRIPTION) - {"ignore_index", "gsd_m"}))
def test_missing_key_of_a_description_is_named(key: str) -> None:
    values = {name: value for name, value in DESCRIPTION.items() if name != key}
    with pytest.raises(WeightsError, match=f"{key} is missing"):
        ModelDescription.from_dict(values)


METRIC = DESCRIPTION["metrics"][0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bandz": 1}, "unknown keys bandz"),
        ({"metrics": [changed(METRIC, std=1.0)]}, "metric: unknown keys std"),
        ({"metrics": [{"name": "mIoU"}]}, "metric: value is missing"),
        ({"metrics": ["mIoU"]}, "metric must be a JSON object, got str"),
        ({"labels": [{"name": "road", "color": "#ff0000", "id": 1}, DESCRIPTION["labels"][1]]}, "id"),
    ],
)
def test_unknown_key_is_named_at_any_depth(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        ModelDescription.from_dict({**DESCRIPTION, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": []}, "config must be dict"),
        ({"bands": "rgb"}, "bands must be list"),
        ({"bands": ["red", "green", 3, "nir"]}, "bands must be str, got 3"),
        ({"mean": [0.1, 0.2, 0.3, "0.4"]}, "mean must be float, got '0.4'"),
        ({"mean": [0.1, 0.2, 0.3, True]}, "mean must be float, got True"),
        ({"std": [0.1, 0.2, 0.3, None]}, "std must be float, got None"),
        ({"std": [0.1, 0.2, 0.3, float("nan")]}, "std must be float, got nan"),
        ({"value_range": [0, float("inf")]}, "value_range must be float, got inf"),
        ({"value_range": [0.0]}, "value_range has 1 values, not 2"),
        ({"value_range": [5.0, 5.0]}, r"lower to a higher number, got \[5\.0, 5\.0\]"),
        ({"gamma": 0}, "gamma must be a number above 0, got 0.0"),
        ({"gamma": "0.5"}, "gamma must be float, got '0.5'"),
        ({"gsd_m": True}, "gsd_m must be float, got True"),
        ({"gsd_m": float("nan")}, "gsd_m must be float, got nan"),
        ({"gsd_m": -0.5}, "gsd_m"),
        ({"gsd_m": 10**400}, "gsd_m"),
        ({"ignore_index": 255.0}, r"ignore_index must be int, got 255\.0"),
        ({"ignore_index": True}, "ignore_index must be int, got True"),
        ({"license": 3}, "license must be str, got 3"),
        ({"metrics": [changed(METRIC, value=True)]}, "value must be float, got True"),
        ({"metrics": [changed(METRIC, value="67")]}, "value must be float, got '67'"),
        ({"std": [0.1, 0.2, 0.3, 0.0]}, "std must be above 0"),
        ({"bands": ["red"]}, "1 bands, but 4 means and 4 deviations"),
        ({"labels": DESCRIPTION["labels"][:1]}, "2 classes and 4 bands, but 1 labels and 4 bands"),
        ({"labels": [{"name": "road", "color": "red"}] * 2}, "a colour is written"),
        ({"labels": [DESCRIPTION["labels"][0]] * 2}, "class names stand twice: road"),
        ({"config": changed(DESCRIPTION["config"], in_channels=3)}, "2 classes and 3 bands"),
    ],
)
def test_value_of_a_description_that_makes_no_sense_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        ModelDescription.from_dict({**DESCRIPTION, **changes})


@pytest.mark.parametrize("values", [None, [], "x", 3])
def test_description_must_be_an_object(values: Any) -> None:
    with pytest.raises(WeightsError, match="description must be a JSON object"):
        ModelDescription.from_dict(values)


# Entries


def test_entry_says_where_its_file_lies() -> None:
    entry = WeightsEntry.from_dict(ENTRY)
    assert entry.path is not None
    assert entry.path.parts[-3:] == ("d2ls_infer", "weights", "toy.safetensors")
    assert entry.description == ModelDescription.from_dict(DESCRIPTION)
    assert entry.aliases == ("toy-v1",)


def test_entry_without_weights_says_what_to_do_instead() -> None:
    entry = WeightsEntry.from_dict({"name": "later", "summary": "comes later", "unpublished": "train it yourself"})
    assert entry.path is None
    assert entry.unpublished == "train it yourself"
    with pytest.raises(WeightsError, match="later has no file, and does not say why"):
        WeightsEntry.from_dict({"name": "later", "summary": "comes later"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": None}, "name is missing"),
        ({"summary": None}, "toy: summary is missing"),
        ({"sha256": None}, "toy has a file, but no sha256"),
        ({"size": None, "num_params": None}, "toy has a file, but no size, num_params"),
        ({"description": None}, "toy has a file, but no description"),
        ({"size": True}, "toy: size must be int, got True"),
        ({"size": 1.5}, "toy: size must be int"),
        ({"num_params": "10"}, "toy: num_params must be int"),
        ({"sha256": "0" * 63}, "toy: sha256 is 64 hexadecimal digits"),
        ({"sha256": "0" * 63 + "G"}, "toy: sha256 is 64 hexadecimal digits"),
        ({"sha256": "0" * 64 + "\n"}, "toy: sha256 is 64 hexadecimal digits"),
        ({"file": "../toy.safetensors"}, "toy: file lies outside the package"),
        ({"file": "weights/../../toy.safetensors"}, "toy: file lies outside the package"),
        ({"file": "/etc/passwd"}, "toy: file lies outside the package"),
        ({"file": ""}, "toy.*file"),
        ({"aliases": "toy"}, "entry: aliases must be list"),
        ({"url": "https://example.org"}, "toy: unknown keys url"),
        ({"description": changed(DESCRIPTION, std=[0.0] * 4)}, "std must be above 0"),
    ],
)
def test_entry_that_makes_no_sense_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        WeightsEntry.from_dict({**ENTRY, **changes})


HUB = {"repo": "someone/some-model", "revision": "0123456789abcdef" * 2 + "01234567", "filename": "toy.safetensors"}


def test_entry_on_the_hub_says_where() -> None:
    entry = WeightsEntry.from_dict({key: value for key, value in ENTRY.items() if key != "file"} | {"hub": HUB})
    assert entry.path is None
    assert entry.hub is not None
    assert (entry.hub.repo, entry.hub.revision, entry.hub.filename) == tuple(HUB.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"revision": "main"}, "revision is a commit of 40 hexadecimal digits, got 'main'"),
        ({"revision": "0" * 39}, "40 hexadecimal digits"),
        ({"repo": "../../etc"}, "not a repository"),
        ({"repo": "alone"}, "not a repository"),
        ({"filename": "../toy.safetensors"}, "not a repository and a safetensors file"),
        ({"filename": "toy.ckpt"}, "not a repository and a safetensors file"),
        ({"branch": "main"}, "unknown keys branch"),
    ],
)
def test_hub_file_is_pinned_and_named_plainly(changes: dict[str, str], message: str) -> None:
    values = {key: value for key, value in ENTRY.items() if key != "file"} | {"hub": HUB | changes}
    with pytest.raises(WeightsError, match=message):
        WeightsEntry.from_dict(values)


def test_a_file_is_in_one_place() -> None:
    with pytest.raises(WeightsError, match="both a bundled file and one on the hub"):
        WeightsEntry.from_dict(ENTRY | {"hub": HUB})


def test_damaged_description_of_an_entry_names_the_entry() -> None:
    with pytest.raises(WeightsError, match=r"toy\b"):
        WeightsEntry.from_dict(changed(ENTRY, description=changed(DESCRIPTION, license=3)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "../toy"}, r"a name is up to 96 letters, digits.*got '\.\./toy'"),
        ({"name": "to y"}, "got 'to y'"),
        ({"aliases": ["ok", "a/b"]}, "got 'a/b'"),
        ({"size": 0}, "toy: size must be at least 1, got 0"),
        ({"num_params": -3}, "toy: num_params must be at least 1, got -3"),
        ({"file": "C:\\toy.safetensors"}, "outside the package"),
        ({"file": "weights\\..\\..\\toy.safetensors"}, "outside the package"),
        ({"file": "\\\\host\\share\\toy.safetensors"}, "outside the package"),
        ({"sha256": "x", "file": None, "unpublished": "wait"}, "sha256 is 64 hexadecimal digits"),
    ],
)
def test_names_and_places_are_plain_on_every_system(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        WeightsEntry.from_dict({**ENTRY, **changes})


@pytest.mark.parametrize("repo", ["../..", "a/..", "a--b/c", "a/b--c", "-a/b", "a/b/c", "á/b", "a/b\n"])
def test_repository_is_named_as_the_hub_names_them(repo: str) -> None:
    values = {key: value for key, value in ENTRY.items() if key != "file"} | {"hub": HUB | {"repo": repo}}
    with pytest.raises(WeightsError, match="not a repository"):
        WeightsEntry.from_dict(values)


ON_HUB = {key: value for key, value in ENTRY.items() if key != "file"} | {"hub": HUB}


@pytest.mark.parametrize(
    "values", [ENTRY, ON_HUB, {"name": "later", "aliases": [], "summary": "", "unpublished": "wait"}]
)
def test_json_form_of_an_entry_is_the_one_it_was_read_from(values: dict[str, Any]) -> None:
    assert json.loads(json.dumps(WeightsEntry.from_dict(values).to_dict())) == values


def test_reference_of_a_hub_file_is_what_model_takes() -> None:
    file = HubFile.from_dict(HUB)
    assert str(file) == f"someone/some-model@{HUB['revision']}:toy.safetensors"
    assert file.is_pinned
    assert not HubFile(repo="a/b", revision="main").is_pinned


# What a user must know


def test_note_is_part_of_a_description_where_there_is_one() -> None:
    assert ModelDescription.from_dict(DESCRIPTION).note == ""
    noted = ModelDescription.from_dict(changed(DESCRIPTION, note="a preview"))
    assert noted.note == "a preview"
    assert noted.to_dict() == changed(DESCRIPTION, note="a preview")
    with pytest.raises(WeightsError, match="note must be str"):
        ModelDescription.from_dict(changed(DESCRIPTION, note=3))


def test_tile_size_is_part_of_a_description_where_it_is_stated() -> None:
    description = ModelDescription.from_dict(DESCRIPTION)
    for told, size in (
        ({}, 512),
        ({"tile_size": 256}, 256),
        ({"shared_dictionary": True}, 1024),
        ({"shared_dictionary": True, "tile_size": 512}, 512),
    ):
        made = ModelDescription.from_dict(changed(DESCRIPTION, **told))
        assert made.tile_size == size
        assert made.to_dict() == changed(DESCRIPTION, **told)
    assert dataclasses.replace(description, shared_dictionary=True).tile_size == 1024
    with pytest.raises(WeightsError, match="tile_size must be at least 1 pixel, got 0"):
        ModelDescription.from_dict(changed(DESCRIPTION, tile_size=0))


# Configs


def test_config_is_read_as_the_network_has_it() -> None:
    assert {"backbone", *CONFIG_SIZES} == {field.name for field in dataclasses.fields(D2LSConfig)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 8}, "config: unknown keys heads"),
        ({"backbone": None}, "config: backbone is missing"),
        ({"stages": "3"}, "config: stages must be int, got '3'"),
        ({"stages": 0}, "config: stages must be at least 1, got 0"),
    ],
)
def test_config_that_makes_no_sense_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        ModelDescription.from_dict(changed(DESCRIPTION, config=changed(DESCRIPTION["config"], **changes)))


# The manifest


@pytest.fixture
def write_manifest(tmp_path: Path) -> Callable[[Any], Path]:
    def write(content: Any) -> Path:
        path = tmp_path / "manifest.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return path

    return write


def test_manifest_is_read(write_manifest: Callable[[Any], Path]) -> None:
    manifest = read_manifest(write_manifest({"version": 1, "models": [ENTRY]}))
    assert manifest == Manifest((WeightsEntry.from_dict(ENTRY),))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "Expecting value"),
        ("{", "Expecting"),
        ("[]", "manifest must be a JSON object"),
        ({"models": []}, "version is missing"),
        ({"version": 2, "models": []}, "version 2, but this package reads version 1"),
        ({"version": True, "models": []}, "version must be int"),
        ({"version": 1}, "models is missing"),
        ({"version": 1, "models": {}}, "models must be list"),
        ({"version": 1, "models": [3]}, "entry must be a JSON object"),
        ({"version": 1, "models": [], "models2": []}, "unknown keys models2"),
        ({"version": 1, "models": [ENTRY, ENTRY]}, "names stand twice: toy, toy-v1"),
        ({"version": 1, "models": [changed(ENTRY, aliases=["TOY"])]}, "names stand twice: toy"),
        ({"version": 1, "models": [ENTRY, changed(ENTRY, name="Toy-V1", aliases=[])]}, "stand twice: toy-v1"),
        ({"version": 1, "models": [changed(ENTRY, description=changed(DESCRIPTION, gsd_m=10**400))]}, "gsd_m"),
    ],
)
def test_manifest_that_makes_no_sense_is_refused_with_its_file(
    write_manifest: Callable[[Any], Path], content: Any, message: str
) -> None:
    path = write_manifest(content)
    with pytest.raises(WeightsError, match=message) as caught:
        read_manifest(path)
    assert str(path) in str(caught.value)


def test_missing_manifest_is_told(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=re.escape(str(tmp_path / "none.json"))):
        read_manifest(tmp_path / "none.json")


@pytest.mark.parametrize("name", ["toy", "TOY", "toy-v1", "Toy-V1"])
def test_model_is_found_by_name_or_alias_in_any_case(name: str) -> None:
    entry = WeightsEntry.from_dict(ENTRY)
    assert Manifest((entry,)).find(name) is entry


def test_unknown_model_is_told_with_the_nearest_names() -> None:
    entries = [
        WeightsEntry.from_dict({"name": name, "summary": "", "unpublished": "not yet"})
        for name in ("loveda", "potsdam", "vaihingen")
    ]
    with pytest.raises(UsageError, match=r"unknown model 'postdam'.* did you mean potsdam\?"):
        Manifest(tuple(entries)).find("postdam")
    with pytest.raises(UsageError, match="known are loveda, potsdam, vaihingen"):
        Manifest(tuple(entries)).find("qqq")


# A manifest of the user's own


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A manifest that knows `mine`, and another `naip` than the package's."""
    entries = [changed(ENTRY, name="mine", aliases=["potsdam"]), changed(ENTRY, name="NAIP", aliases=[])]
    path = tmp_path / "models.json"
    path.write_text(json.dumps({"version": 1, "models": entries}))
    return path


def test_own_entries_are_over_those_of_the_package(own: Path) -> None:
    merged = load_manifest(own)
    packaged = {entry.name for entry in load_manifest().entries}
    assert {entry.name for entry in merged.entries} == packaged - {"naip", "potsdam"} | {"mine", "NAIP"}
    assert merged.find("naip").sha256 == merged.find("potsdam").sha256 == ENTRY["sha256"]
    assert merged.find("vaihingen") == load_manifest().find("vaihingen")


def test_files_of_an_own_manifest_lie_in_its_folder(own: Path) -> None:
    assert load_manifest(own).find("mine").path == own.parent / "weights/toy.safetensors"


def test_own_manifest_is_named_or_lies_in_the_usual_place(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert own_manifest() is None
    usual = tmp_path / "config" / "d2ls" / "weights_manifest.json"
    usual.parent.mkdir(parents=True)
    usual.write_text('{"version": 1, "models": []}')
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    assert own_manifest() == usual
    monkeypatch.setenv("D2LS_MANIFEST", "")
    assert own_manifest() == usual
    monkeypatch.setenv("D2LS_MANIFEST", str(own))
    assert own_manifest() == own
    assert load_manifest().find("mine")
    assert own_manifest(usual) == usual
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.delenv("D2LS_MANIFEST")
    monkeypatch.setenv("HOME", str(tmp_path))
    usual.parent.rename(tmp_path / "d2ls")
    (tmp_path / "config").rename(tmp_path / ".config")
    (tmp_path / "d2ls").rename(tmp_path / ".config" / "d2ls")
    assert own_manifest() == tmp_path / ".config" / "d2ls" / "weights_manifest.json"


def test_own_manifest_that_is_named_must_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingFileError, match=r"no such manifest: .*none\.json$"):
        load_manifest(tmp_path / "none.json")
    monkeypatch.setenv("D2LS_MANIFEST", "none.json")
    with pytest.raises(MissingFileError, match=r"no such manifest: none\.json \(named by D2LS_MANIFEST\)"):
        load_manifest()


def test_user_without_a_home_has_no_own_manifest(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setattr(Path, "expanduser", homeless)
    assert own_manifest() is None


# The manifest of this project


def project_entries() -> list[Any]:
    return [pytest.param(entry, id=entry.name) for entry in load_manifest().entries]


def test_manifest_of_this_project_is_read() -> None:
    assert isinstance(load_manifest(), Manifest)


@pytest.mark.parametrize("entry", project_entries())
def test_published_file_is_the_one_the_manifest_describes(entry: WeightsEntry) -> None:
    if entry.path is None:
        assert entry.unpublished
        return
    assert entry.path.is_file(), entry.path
    assert entry.path.stat().st_size == entry.size
    assert file_sha256(entry.path) == entry.sha256
    assert read_description(entry.path) == entry.description
    assert entry.description is not None
    assert count_parameters(load_network(entry.path, entry.description)) == entry.num_params
