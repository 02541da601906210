"""Weights files: found, checked, read whole or refused by name."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from d2ls_infer import manifest as manifest_module
from d2ls_infer import weights as weights_module
from d2ls_infer.errors import MissingFileError, UnavailableModelError, UsageError, WeightsError
from d2ls_infer.labels import LabelMap
from d2ls_infer.load import load_model
from d2ls_infer.manifest import Manifest, ModelDescription, WeightsEntry
from d2ls_infer.nn import D2LS, D2LSConfig, count_parameters, weights_of
from d2ls_infer.weights import (
    check_entry,
    file_sha256,
    find_weights,
    load_network,
    read_description,
    save_weights,
)

CONFIG = D2LSConfig(backbone="mobilenetv3_small_050", num_classes=2, embed_dim=32, stages=1)


def describe(**changes: Any) -> ModelDescription:
    values: dict[str, Any] = {
        "config": CONFIG.to_dict(),
        "labels": LabelMap.of(["road", "tree"]),
        "bands": ("red", "green", "blue"),
        "value_range": (0.0, 255.0),
        "mean": (0.5, 0.5, 0.5),
        "std": (0.25, 0.25, 0.25),
        "gsd_m": None,
        "metrics": (),
        "license": "CC0-1.0",
        "training_data": "none",
        "source": "random",
    }
    return ModelDescription(**{**values, **changes})


@pytest.fixture(scope="module")
def network() -> D2LS:
    torch.manual_seed(0)
    return D2LS(CONFIG).eval()


@pytest.fixture
def file(tmp_path: Path, network: D2LS) -> Path:
    path = tmp_path / "toy.safetensors"
    save_weights(path, weights_of(network), describe())
    return path


def with_header(path: Path, header: Any, *, length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw)
    return path


# Round trip


def test_weights_and_description_come_back(file: Path, network: D2LS) -> None:
    assert read_description(file) == describe()
    loaded = load_network(file, read_description(file))
    assert not loaded.training
    assert loaded.config == CONFIG
    pixels = torch.randn(1, 3, 32, 64)
    with torch.inference_mode():
        assert torch.equal(loaded(pixels), network(pixels))


def test_saving_leaves_the_file_alone_under_its_name(file: Path) -> None:
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_saving_replaces_a_file_that_is_there(file: Path, network: D2LS) -> None:
    save_weights(file, weights_of(network), describe(source="again"))
    assert read_description(file).source == "again"
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_description_is_the_only_metadata(file: Path) -> None:
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata().keys() == {"d2ls"}
        assert ModelDescription.from_dict(json.loads(opened.metadata()["d2ls"])) == describe()


def test_tensors_of_any_memory_layout_are_saved(tmp_path: Path, network: D2LS) -> None:
    state = {key: value.clone() for key, value in weights_of(network).items()}
    for key, value in state.items():
        if value.ndim == 4:
            state[key] = value.to(memory_format=torch.channels_last)
    path = tmp_path / "toy.safetensors"
    save_weights(path, state, describe())
    saved = load_file(path)
    assert all(torch.equal(saved[key], state[key]) for key in state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_on_disk_loads_as_float32(tmp_path: Path, network: D2LS, dtype: torch.dtype) -> None:
    path = tmp_path / "half.safetensors"
    state = {key: value.to(dtype) for key, value in weights_of(network).items()}
    save_weights(path, state, describe())
    loaded = weights_of(load_network(path, read_description(path)))
    assert {value.dtype for value in loaded.values()} == {torch.float32}
    assert all(torch.equal(loaded[key], state[key].float()) for key in state)


def test_description_that_json_cannot_hold_is_not_written(tmp_path: Path, network: D2LS) -> None:
    # JSON has no NaN: such a file could not be read again.
    path = tmp_path / "toy.safetensors"
    with pytest.raises(ValueError):  # noqa: PT011
        save_weights(path, weights_of(network), describe(gsd_m=float("nan")))
    assert list(tmp_path.iterdir()) == []


# Damage in the header

NOT_SAFETENSORS: dict[str, Callable[[Path, bytes], object]] = {
    "empty": lambda path, whole: path.write_bytes(b""),
    "seven bytes": lambda path, whole: path.write_bytes(whole[:7]),
    "cut in the length": lambda path, whole: path.write_bytes(whole[:8]),
    "cut in the header": lambda path, whole: path.write_bytes(whole[:500]),
    "random": lambda path, whole: path.write_bytes(random.Random(0).randbytes(5000)),
    "text": lambda path, whole: path.write_bytes(b"weights" * 100),
    "zip": lambda path, whole: path.write_bytes(b"PK\x03\x04" + bytes(100)),
    "huge header": lambda path, whole: path.write_bytes(struct.pack("<Q", 2**63) + whole[8:]),
    "header beyond the limit": lambda path, whole: path.write_bytes(struct.pack("<Q", (4 << 20) + 1) + whole[8:]),
    "no header": lambda path, whole: path.write_bytes(bytes(100)),
    "header too short": lambda path, whole: path.write_bytes(struct.pack("<Q", 40) + whole[8:]),
    "no JSON": lambda path, whole: with_header(path, b"{not json"),
    "no text": lambda path, whole: with_header(path, b"\xff\xfe\xfd" * 10),
    "deep JSON": lambda path, whole: with_header(path, b"[" * 100_000),
    "list": lambda path, whole: with_header(path, [1, 2]),
    "number": lambda path, whole: with_header(path, 12),
}


@pytest.mark.parametrize("damage", NOT_SAFETENSORS)
def test_file_that_is_no_safetensors_is_refused_with_its_path(file: Path, damage: str) -> None:
    NOT_SAFETENSORS[damage](file, file.read_bytes())
    with pytest.raises(WeightsError) as caught:
        read_description(file)
    assert str(file) in str(caught.value)


DESCRIBED = describe().to_dict()


@pytest.mark.parametrize(
    "header",
    [
        {},
        {"__metadata__": {}},
        {"__metadata__": {"format": "pt"}},
        {"__metadata__": None},
        {"__metadata__": "d2ls"},
        {"__metadata__": ["d2ls"]},
        {"__metadata__": {"d2ls": None}},
        {"__metadata__": {"d2ls": 3}},
        {"__metadata__": {"d2ls": ""}},
        {"__metadata__": {"d2ls": "{"}},
        {"__metadata__": {"d2ls": "[]"}},
        {"__metadata__": {"d2ls": "{}"}},
        {"__metadata__": {"d2ls": json.dumps({**DESCRIBED, "more": 1})}},
        {"__metadata__": {"d2ls": json.dumps({**DESCRIBED, "gsd_m": float("nan")})}},
        {"__metadata__": {"d2ls": json.dumps({**DESCRIBED, "gsd_m": 10**400})}},
        {"__metadata__": {"d2ls": json.dumps({**DESCRIBED, "labels": [1, 2]})}},
        {"__metadata__": {"d2ls": json.dumps({**DESCRIBED, "config": None})}},
        {"__metadata__": {"d2ls": "[" * 100_000}},
    ],
)
def test_file_that_does_not_describe_itself_is_refused_with_its_path(tmp_path: Path, header: Any) -> None:
    path = with_header(tmp_path / "toy.safetensors", header)
    with pytest.raises(WeightsError) as caught:
        read_description(path)
    assert str(path) in str(caught.value)


def test_safetensors_of_another_program_is_told_how_to_convert(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(WeightsError, match="d2ls convert"):
        read_description(path)


def test_description_is_read_without_the_tensors(file: Path) -> None:
    whole = file.read_bytes()
    file.write_bytes(whole[: 8 + struct.unpack("<Q", whole[:8])[0]])
    assert read_description(file) == describe()


# Damage in the tensors


def resaved(path: Path, state: dict[str, Tensor], description: ModelDescription | None = None) -> Path:
    save_weights(path, state, description or describe())
    return path


@pytest.mark.parametrize("kept", [0.3, 0.99])
def test_truncated_tensors_are_refused_with_the_path(file: Path, kept: float) -> None:
    whole = file.read_bytes()
    file.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(WeightsError, match=r"toy\.safetensors is damaged"):
        load_network(file, describe())


def test_bytes_after_the_tensors_are_refused(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"more")
    with pytest.raises(WeightsError, match=r"toy\.safetensors"):
        load_network(file, describe())


def test_missing_left_over_and_misshapen_tensors_are_named_with_the_path(file: Path, network: D2LS) -> None:
    state = dict(weights_of(network))
    del state["decoder.position.gaussian"]
    state["head.bias"] = torch.zeros(3)
    state["dictionary.static"] = torch.zeros(3, 32)
    with pytest.raises(WeightsError) as caught:
        load_network(resaved(file, state), describe())
    for part in (str(file), "missing decoder.position.gaussian", "left over head.bias", "dictionary.static"):
        assert part in str(caught.value)


def test_tensor_that_is_not_finite_is_named(file: Path, network: D2LS) -> None:
    state = {**weights_of(network), "dictionary.static": torch.full((2, 32), torch.nan)}
    with pytest.raises(WeightsError, match=r"toy\.safetensors.*dictionary\.static"):
        load_network(resaved(file, state), describe())


@pytest.mark.parametrize(
    "changes", [{"backbone": "nothing_of_timm"}, {"embed_dim": 40}, {"stages": "1"}, {"num_heads": 8}, {"stages": 2}]
)
def test_config_that_does_not_fit_is_refused_with_the_path(file: Path, changes: dict[str, Any]) -> None:
    description = describe(config={**CONFIG.to_dict(), **changes})
    with pytest.raises(WeightsError, match=r"toy\.safetensors"):
        load_network(file, description)


# Finding


@pytest.fixture
def publish(tmp_path: Path, file: Path, network: D2LS, monkeypatch: pytest.MonkeyPatch) -> Callable[..., WeightsEntry]:
    """Put an entry of the toy file, with changes, into the manifest that `find_weights` asks."""

    def put(**changes: Any) -> WeightsEntry:
        values: dict[str, Any] = {
            "name": "toy",
            "aliases": ["toy-v1"],
            "summary": "a toy",
            "file": file.name,
            "sha256": file_sha256(file),
            "size": file.stat().st_size,
            "num_params": count_parameters(network),
            "description": DESCRIBED,
        }
        entry = WeightsEntry.from_dict({**values, **changes})
        monkeypatch.setattr(manifest_module, "PACKAGE", tmp_path)
        monkeypatch.setattr(weights_module, "load_manifest", lambda _: Manifest((entry,)))
        return entry

    return put


def test_path_is_found_without_the_manifest(file: Path) -> None:
    found = find_weights(file)
    assert (found.name, found.path, found.description) == ("toy", file, describe())
    assert found.sha256 == file_sha256(file)
    assert find_weights(str(file)) == found


@pytest.mark.parametrize("name", ["toy", "TOY", "toy-v1"])
def test_bundled_file_is_found_by_name_and_alias(publish: Callable[..., WeightsEntry], file: Path, name: str) -> None:
    entry = publish()
    found = find_weights(name)
    assert (found.name, found.path, found.sha256) == ("toy", file, entry.sha256)
    assert found.description == entry.description


def test_damaged_bundled_file_is_refused_with_expected_and_found(
    publish: Callable[..., WeightsEntry], file: Path
) -> None:
    entry = publish()
    whole = bytearray(file.read_bytes())
    whole[-1] ^= 1
    file.write_bytes(whole)
    with pytest.raises(WeightsError) as caught:
        find_weights("toy")
    for part in (str(file), f"expected {entry.size} bytes", entry.sha256, f"found {len(whole)}", file_sha256(file)):
        assert part in str(caught.value)


def test_truncated_bundled_file_is_refused(publish: Callable[..., WeightsEntry], file: Path) -> None:
    publish()
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(WeightsError, match="is damaged: expected"):
        find_weights("toy")


def test_missing_bundled_file_is_told(publish: Callable[..., WeightsEntry], file: Path) -> None:
    publish()
    file.unlink()
    with pytest.raises(WeightsError, match="bundled file of toy is missing"):
        find_weights("toy")


def test_model_without_weights_says_what_to_do_instead(publish: Callable[..., WeightsEntry]) -> None:
    publish(file=None, sha256=None, size=None, num_params=None, description=None, unpublished="train it yourself")
    with pytest.raises(UnavailableModelError, match="toy has no weights yet: train it yourself") as caught:
        find_weights("toy")
    assert isinstance(caught.value, UsageError)


def test_unknown_name_is_told_with_the_nearest(publish: Callable[..., WeightsEntry]) -> None:
    publish()
    with pytest.raises(UsageError, match="did you mean toy"):
        find_weights("tois")


def test_path_that_is_not_there_is_told(tmp_path: Path) -> None:
    for path in (tmp_path / "none.safetensors", tmp_path / "none", Path("none.safetensors")):
        with pytest.raises(MissingFileError, match="no such weights file"):
            find_weights(path)


# The order of meaning


def test_folder_is_not_taken_for_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("runs", "someone/toy"):
        (tmp_path / name).mkdir(parents=True)
        with pytest.raises(UsageError, match=f"{name} is a folder; name the weights file in it"):
            find_weights(name)


def test_name_is_meant_even_beside_a_folder_of_that_name(
    publish: Callable[..., WeightsEntry], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy").mkdir()
    assert find_weights("toy").name == "toy"


def test_file_is_meant_before_a_name(publish: Callable[..., WeightsEntry], file: Path, tmp_path: Path) -> None:
    publish()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        file.rename("toy")
        assert find_weights("toy").path == Path("toy")


@pytest.mark.parametrize("name", ["x" * 5000, "a/" * 3000, "nul\0"])
def test_name_that_no_file_can_have_is_told(name: str) -> None:
    with pytest.raises(UsageError):
        find_weights(name, offline=True)


def test_local_file_of_an_own_manifest_is_found_and_checked(tmp_path: Path, file: Path, network: D2LS) -> None:
    entry = {
        "name": "mine", "summary": "", "file": file.name, "sha256": file_sha256(file), "size": file.stat().st_size,
        "num_params": count_parameters(network), "description": DESCRIBED,
    }  # fmt: skip
    (tmp_path / "models.json").write_text(json.dumps({"version": 1, "models": [entry]}))
    found = find_weights("mine", manifest=tmp_path / "models.json")
    assert (found.name, found.path, found.hub, found.reference) == ("mine", file, None, "")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(WeightsError, match="is damaged: expected") as caught:
        find_weights("mine", manifest=tmp_path / "models.json")
    assert "install" not in str(caught.value)
    file.unlink()
    with pytest.raises(WeightsError, match="the file of mine is missing"):
        find_weights("mine", manifest=tmp_path / "models.json")


# What a user must know


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"note": "a preview"}, ["toy: a preview"]),
        ({"license": "CC-BY-NC-SA-4.0"}, ["toy: licence: CC-BY-NC-SA-4.0"]),
        ({"note": "a preview", "license": "research use only"}, ["toy: a preview; licence: research use only"]),
    ],
)
def test_note_and_terms_are_said_once_when_a_model_is_loaded(
    file: Path, network: D2LS, caplog: pytest.LogCaptureFixture, changes: dict[str, str], expected: list[str]
) -> None:
    save_weights(file, weights_of(network), describe(**changes))
    load_model(file, device="cpu")
    assert caplog.messages == expected


# Against a manifest's entry


def test_entry_and_file_must_say_the_same(publish: Callable[..., WeightsEntry], file: Path) -> None:
    check_entry(publish(), file, whole=True)
    other = publish(description={**DESCRIBED, "license": "MIT", "note": "new"})
    with pytest.raises(WeightsError, match="differ in what they say: license, note"):
        check_entry(other, file)
    check_entry(publish(num_params=3), file)
    with pytest.raises(WeightsError, match=r"has \d+ parameters, the manifest says 3"):
        check_entry(publish(num_params=3), file, whole=True)
