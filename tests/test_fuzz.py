"""Whatever stands in a weights file or a manifest: it is read, or refused with one clear error, and nothing else.

D2LS_FUZZ=20 tries twenty times as many cases as the suite does.
"""

from __future__ import annotations

import copy
import json
import os
import random
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from d2ls_infer.errors import D2LSError, WeightsError
from d2ls_infer.manifest import PACKAGE, packaged_manifest_path, read_manifest
from d2ls_infer.nn import D2LS
from d2ls_infer.tensors import read_header, read_tensors
from d2ls_infer.weights import find_weights, load_network, read_description

EFFORT = float(os.environ.get("D2LS_FUZZ", "1"))
SCHEMA = json.loads((PACKAGE / "weights_manifest.schema.json").read_text(encoding="utf-8"))
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**63), 10**30, 10**400, 0.5, 1e308, float("nan"), float("inf"),
    "", " ", "x", "\x00", "\n", "..", "../../etc/passwd", "/etc/passwd", "C:\\x", "a" * 5000, "0" * 64, "é", "\ud800",
    [], {}, [[]], [None], [0], [-1, 5], {"a": 1}, [1] * 300, "F32", "I64", "__metadata__", "hf-hub:x/y", "local-dir:/",
]  # fmt: skip
"""Values that stand where others should."""


def cases(count: int, seed: int) -> Iterator[random.Random]:
    """As many sources of chance, the same ones on every run."""
    for index in range(round(count * EFFORT)):
        yield random.Random(f"{seed} {index}")


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        yield from places(inner)


def mutated(value: Any, chance: random.Random) -> Any:
    """A JSON value with one or two things in it changed, taken out, doubled or added."""
    value = copy.deepcopy(value)
    for _ in range(chance.choice([1, 1, 2])):
        container, key = chance.choice(list(places(value)))
        what = chance.randrange(6)
        if what == 0:
            del container[key]
        elif what == 1 and isinstance(container, list):
            container.append(copy.deepcopy(container[key]))
        elif what == 1:
            container[key + chance.choice(["s", "", "_"])] = copy.deepcopy(chance.choice(ODD))
        elif what == 2 and isinstance(container[key], str):
            at = chance.randrange(len(container[key]) + 1)
            container[key] = (
                container[key][:at] + chance.choice(["", "/", "..", "\n", "é", "0"]) + container[key][at + 1 :]
            )
        elif what == 3 and type(container[key]) in (int, float):
            container[key] = chance.choice(
                [-container[key], container[key] + 1, container[key] * 2, str(container[key])]
            )
        else:
            container[key] = copy.deepcopy(chance.choice(ODD))
        if not value:
            break
    return value


def bitten(content: bytes, chance: random.Random) -> bytes:
    """Bytes with some changed, cut off, taken out, doubled or put in."""
    content = bytes(content)
    at, more = chance.randrange(len(content)), chance.randrange(1, 64)
    return chance.choice([
        lambda: content[:at] + bytes([content[at] ^ 1 << chance.randrange(8)]) + content[at + 1 :],
        lambda: content[:at],
        lambda: content[:at] + content[at + more :],
        lambda: content[:at] + content[at : at + more] + content[at:],
        lambda: content[:at] + chance.randbytes(more) + content[at:],
        lambda: content[:at] + chance.randbytes(more) + content[at + more :],
    ])()  # fmt: skip


@contextmanager
def clear_errors_alone(path: Path) -> Iterator[list[str]]:
    """Takes an error of ours, which must name the file and be short enough to read; gives the list it then is in."""
    errors: list[str] = []
    try:
        yield errors
    except D2LSError as error:
        errors.append(" ".join(str(error).split()))
    for text in errors:
        assert str(path) in text
        assert len(text) < len(str(path)) + 2500


# Weights files


@pytest.fixture(scope="module")
def parts(tiny_weights: Path) -> tuple[bytes, bytes]:
    """Header and tensors of the tiny weights file."""
    whole = tiny_weights.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    return whole[8 : 8 + length], whole[8 + length :]


def assembled(header: bytes, tensors: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + tensors


def with_description(header: bytes, change: Callable[[Any], Any]) -> bytes:
    """A header in which the description is another."""
    values = json.loads(header)
    values["__metadata__"]["d2ls"] = json.dumps(change(json.loads(values["__metadata__"]["d2ls"])))
    return json.dumps(values).encode("utf-8", "surrogatepass")


def test_bytes_of_a_header_are_read_or_refused(tmp_path: Path, parts: tuple[bytes, bytes]) -> None:
    path = tmp_path / "x.safetensors"
    refused = 0
    for chance in cases(2000, seed=1):
        header = bitten(parts[0], chance)
        content = assembled(header, b"")
        path.write_bytes(content if chance.random() < 0.8 else bitten(content, chance))
        with clear_errors_alone(path) as errors:
            read_description(path)
        refused += len(errors)
    assert refused > 1000 * EFFORT


def test_values_of_a_header_are_read_or_refused(tmp_path: Path, parts: tuple[bytes, bytes]) -> None:
    path = tmp_path / "x.safetensors"
    values = json.loads(parts[0])
    few = {key: values[key] for key in [*list(values)[:6], "__metadata__"]}
    refused = 0
    for chance in cases(1500, seed=2):
        header = json.dumps(mutated(few, chance)).encode("utf-8", "surrogatepass")
        if chance.random() < 0.5:
            header = with_description(parts[0], lambda about: mutated(about, chance))  # noqa: B023
        path.write_bytes(assembled(header, b""))
        with clear_errors_alone(path) as errors:
            read_description(path)
        refused += len(errors)
    assert refused > 1000 * EFFORT


def test_tensors_are_read_whole_or_refused(tmp_path: Path, parts: tuple[bytes, bytes]) -> None:
    path = tmp_path / "x.safetensors"
    values = json.loads(parts[0])
    for chance in cases(300, seed=3):
        header = bitten(parts[0], chance) if chance.random() < 0.5 else json.dumps(mutated(values, chance)).encode()
        path.write_bytes(assembled(header, parts[1] if chance.random() < 0.8 else bitten(parts[1], chance)))
        with clear_errors_alone(path):
            tensors = read_tensors(path)
            assert {name: tuple(value.shape) for name, value in tensors.items()} == dict(read_header(path).shapes)


@pytest.mark.filterwarnings("ignore")  # timm and torch say what they think of odd sizes
def test_networks_are_loaded_whole_or_refused(tmp_path: Path, parts: tuple[bytes, bytes]) -> None:
    """Slow, a network each: sizes that no file fills are refused before their memory is taken."""
    path = tmp_path / "x.safetensors"
    config = json.loads(json.loads(parts[0])["__metadata__"]["d2ls"])["config"]
    for chance in cases(40, seed=4):
        about = mutated(config, chance)
        header = with_description(parts[0], lambda description: description | {"config": about})  # noqa: B023
        tensors = parts[1]
        if chance.random() < 0.5:
            header, tensors = parts[0], bitten(parts[1], chance)
        path.write_bytes(assembled(header, tensors))
        with clear_errors_alone(path):
            network = load_network(path, find_weights(path).description)
            assert all(value.isfinite().all() for value in network.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embed_dim": 1 << 20}, "asks for a network of at least"),
        ({"stages": 10**9}, "asks for a network of at least"),
        ({"reduction": 10**12}, "asks for a network of at least"),
        ({"backbone": "hf-hub:someone/evil"}, "no model of that name"),
        ({"backbone": "local-dir:/tmp/evil"}, "no model of that name"),
    ],
)
def test_config_that_would_take_all_memory_or_another_place_is_refused(
    tmp_path: Path, parts: tuple[bytes, bytes], changes: dict[str, Any], message: str
) -> None:
    path = tmp_path / "x.safetensors"
    header = with_description(parts[0], lambda about: about | {"config": about["config"] | changes})
    path.write_bytes(assembled(header, parts[1]))
    with pytest.raises(WeightsError, match=message):
        load_network(path, read_description(path))


SPEC = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": [-2, 3]}, r"'w': shape must be whole numbers of at least 0, got \[-2, 3\]"),
        ({"shape": [2**62, 2**62]}, r"'w' of shape .* takes \d+ bytes, but lies at the offsets \[0, 24\]"),
        ({"shape": [2**64, 0]}, "shape must be whole numbers"),
        ({"shape": [1] * 9}, "9 dimensions, at most 8"),
        ({"shape": 6}, "shape must be whole numbers"),
        ({"shape": [2.0, 3]}, "shape must be whole numbers"),
        ({"shape": [True, 3]}, "shape must be whole numbers"),
        ({"dtype": "F128"}, "unknown number type 'F128'"),
        ({"dtype": ["F32"]}, "unknown number type"),
        ({"data_offsets": [24, 0]}, "lies at the offsets"),
        ({"data_offsets": [0, 24, 48]}, "lies at the offsets"),
        ({"data_offsets": [-24, 0]}, "data_offsets must be whole numbers"),
        ({"strides": [3, 1]}, "must have dtype, shape and data_offsets"),
    ],
)
def test_tensor_that_makes_no_sense_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(assembled(json.dumps({"w": SPEC | changes}).encode(), bytes(24)))
    with pytest.raises(WeightsError, match=message) as caught:
        read_tensors(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b'{"w": {}, "w": {}}', "names stand twice: w"),
        (b'{"__metadata__": {"a": 1}}', "something else than texts"),
        (b"[]", "no JSON object"),
    ],
)
def test_header_that_could_be_read_in_two_ways_is_refused(tmp_path: Path, header: bytes, message: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(assembled(header, b""))
    with pytest.raises(WeightsError, match=message):
        read_header(path)


def test_metadata_of_unknown_names_is_refused(tmp_path: Path, parts: tuple[bytes, bytes]) -> None:
    values = json.loads(parts[0])
    values["__metadata__"]["execute"] = "me"
    path = tmp_path / "x.safetensors"
    path.write_bytes(assembled(json.dumps(values).encode(), parts[1]))
    with pytest.raises(WeightsError, match="unknown metadata: execute"):
        read_description(path)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_tensor_of_another_kind_of_number_is_named(tmp_path: Path, tiny_weights: Path, dtype: torch.dtype) -> None:
    from d2ls_infer.weights import save_weights

    state = read_tensors(tiny_weights)
    state["dictionary.static"] = torch.ones(4, 32, dtype=dtype)
    save_weights(tmp_path / "x.safetensors", state, read_description(tiny_weights))
    with pytest.raises(WeightsError, match=r"dictionary\.static holds torch\.\w+, not real numbers"):
        load_network(tmp_path / "x.safetensors", read_description(tiny_weights))


# Networks of the mixin


@pytest.mark.filterwarnings("ignore")
def test_configs_of_the_mixin_make_a_network_or_are_refused(
    tmp_path: Path, tiny_weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = load_network(tiny_weights, read_description(tiny_weights))
    network.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    whole: list[Any] = [[], 3, None, "x", {}, {"pretrained": True}, {**config, "pretrained": True}, {"config": config}]
    whole += [mutated(config, chance) for chance in cases(20, seed=5)]
    for values in whole:
        (tmp_path / "config.json").write_text(json.dumps(values), encoding="utf-8", errors="surrogatepass")
        with clear_errors_alone(tmp_path):
            D2LS.from_pretrained(tmp_path)


# Manifests

BASE = json.loads(packaged_manifest_path().read_text(encoding="utf-8"))
PUBLISHED = next(entry for entry in BASE["models"] if entry.get("file"))
HUB = {"repo": "someone/toy", "revision": "0123456789" * 4, "filename": "model.safetensors"}
DARK = PUBLISHED["description"] | {"gamma": 0.5}
MODELS = [
    {key: value for key, value in PUBLISHED.items() if key != "file"}
    | {"name": "far", "aliases": ["f"], "hub": HUB, "description": DARK},
    PUBLISHED,
    {"name": "later", "summary": "not yet", "unpublished": "wait"},
]
MANIFEST = {"version": 1, "models": MODELS}


def accepted_by_schema(values: Any) -> bool:
    return bool(jsonschema.Draft202012Validator(SCHEMA).is_valid(values))


def accepted_by_reader(values: Any, path: Path) -> bool:
    path.write_text(json.dumps(values), encoding="utf-8", errors="surrogatepass")
    with clear_errors_alone(path) as errors:
        read_manifest(path, folder=path.parent)
    return not errors


def test_schema_is_one_and_the_package_keeps_to_it() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert accepted_by_schema(BASE)
    assert accepted_by_schema(MANIFEST)


def test_manifests_are_read_or_refused_and_the_schema_takes_what_the_reader_takes(tmp_path: Path) -> None:
    """The schema cannot count, so the reader may refuse more. What it refuses for a reason of form, both do."""
    path = tmp_path / "models.json"
    refused = {"reader": 0, "schema": 0}
    for chance in cases(2500, seed=6):
        values = mutated(MANIFEST, chance)
        by_reader = accepted_by_reader(values, path)
        by_schema = accepted_by_schema(values)
        assert by_schema or not by_reader, values
        refused["reader"] += not by_reader
        refused["schema"] += not by_schema
    assert refused["schema"] > 0.8 * refused["reader"] > 1000 * EFFORT


def test_bytes_of_a_manifest_are_read_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "models.json"
    content = json.dumps(MANIFEST).encode()
    for chance in cases(2000, seed=7):
        path.write_bytes(bitten(content, chance))
        with clear_errors_alone(path):
            read_manifest(path, folder=tmp_path)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ((), []), (("version",), 2), (("version",), "1"), (("more",), 1), (("models",), {}),
        (("models", 0, "name"), "../x"), (("models", 0, "name"), ""), (("models", 0, "name"), 3),
        (("models", 0, "aliases"), "f"), (("models", 0, "aliases"), ["a/b"]), (("models", 0, "url"), "x"),
        (("models", 0, "hub", "revision"), "main"), (("models", 0, "hub", "repo"), "../../etc"),
        (("models", 0, "hub", "repo"), "a/.."), (("models", 0, "hub", "repo"), "a/b--c"),
        (("models", 0, "hub", "filename"), "../model.safetensors"), (("models", 0, "hub", "filename"), "model.ckpt"),
        (("models", 0, "hub", "branch"), "main"), (("models", 0, "file"), "both.safetensors"),
        (("models", 0, "sha256"), "0" * 63), (("models", 0, "sha256"), None), (("models", 0, "size"), 0),
        (("models", 0, "size"), -5), (("models", 0, "num_params"), 1.5), (("models", 0, "description"), None),
        (("models", 1, "file"), "../x.safetensors"), (("models", 1, "file"), "a/../../x"),
        (("models", 1, "file"), "/etc/passwd"), (("models", 1, "file"), "C:\\x"), (("models", 1, "file"), "\\\\x\\y"),
        (("models", 1, "file"), "a\\..\\x"), (("models", 1, "file"), ""), (("models", 2, "unpublished"), None),
        (("models", 2, "sha256"), "x"),
        *(((*("models", 0, "description"), *rest), value) for rest, value in [
            (("license",), 3), (("license",), None), (("note",), 3), (("more",), 1), (("bands",), []),
            (("bands",), ["a", "a", "b"]), (("bands", 0), " "), (("value_range",), [0]), (("std", 0), 0),
            (("gsd_m",), 0), (("gsd_m",), "1"), (("labels",), []), (("labels", 0, "color"), "red"),
            (("labels", 0, "id"), 1), (("labels", 0, "name"), ""), (("metrics", 0, "value"), "67"),
            (("gamma",), 0), (("gamma",), "1"),
            (("metrics", 0, "std"), 1), (("config", "backbone"), None), (("config", "stages"), 0),
            (("config", "stages"), None), (("config", "heads"), 8), (("ignore_index",), 1.5), (("mean", 0), True),
        ]),
    ],
    ids=lambda value: ".".join(map(str, value)) if isinstance(value, tuple) else None,
)  # fmt: skip
def test_schema_and_reader_refuse_the_same_faults(tmp_path: Path, place: tuple[Any, ...], value: Any) -> None:
    values: Any = {"": copy.deepcopy(MANIFEST)}
    container, key = values, ""
    for step in place:
        container, key = container[key], step
    container[key] = value
    assert not accepted_by_reader(values[""], tmp_path / "models.json")
    assert not accepted_by_schema(values[""])


# Names


def test_names_are_found_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline, so that what looks like a repository is not asked for."""
    monkeypatch.chdir(tmp_path)
    pieces = [
        "naip",
        "/",
        "..",
        "@",
        ":",
        "main",
        "model.safetensors",
        "\x00",
        "é",
        "~",
        "\\",
        "C:",
        " ",
        "a" * 300,
        "--",
    ]
    for chance in cases(500, seed=8):
        name = "".join(chance.choice(pieces) for _ in range(chance.randrange(1, 7)))
        if name == "naip":
            continue
        with pytest.raises(D2LSError) as caught:
            find_weights(name, offline=True)
        assert len(str(caught.value)) < 5000
    assert list(tmp_path.iterdir()) == []
