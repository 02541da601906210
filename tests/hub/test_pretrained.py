"""`D2LS.from_pretrained` and `save_pretrained` as those know them who come from timm, and the backbones of timm."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub import PyTorchModelHubMixin
from safetensors.torch import load_file, save_file

from d2ls_infer.errors import MissingFileError, WeightsError
from d2ls_infer.nn import D2LS, D2LSConfig, weights_of

CONFIG = D2LSConfig(backbone="mobilenetv3_small_050", num_classes=3, embed_dim=32, stages=1, in_channels=4)


@pytest.fixture(scope="module")
def network() -> D2LS:
    torch.manual_seed(0)
    return D2LS(CONFIG).eval()


@pytest.fixture
def folder(tmp_path: Path, network: D2LS) -> Path:
    network.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def same(one: D2LS, other: D2LS) -> bool:
    ours, theirs = weights_of(one), weights_of(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_saved_network_comes_back(folder: Path, network: D2LS) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert json.loads((folder / "config.json").read_text()) == CONFIG.to_dict()
    loaded = D2LS.from_pretrained(folder)
    assert loaded.config == CONFIG
    assert not loaded.training
    assert same(loaded, network)


def test_network_made_by_keywords_is_saved_the_same(tmp_path: Path, folder: Path) -> None:
    D2LS(config=CONFIG, pretrained=False).save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_bytes() == (folder / "config.json").read_bytes()


def test_weights_that_the_mixin_itself_wrote_are_taken(folder: Path, network: D2LS) -> None:
    """They hold the step counters of batch norms too."""
    PyTorchModelHubMixin._save_pretrained(network, folder)
    assert any(key.endswith("num_batches_tracked") for key in load_file(folder / "model.safetensors"))
    assert same(D2LS.from_pretrained(folder), network)


def test_network_is_still_copied_and_pickled_as_any_module(network: D2LS) -> None:
    assert same(copy.deepcopy(network), network)
    assert same(pickle.loads(pickle.dumps(network)), network)
    assert copy.deepcopy(network)._hub_mixin_config == CONFIG


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: {key: state[key] for key in list(state)[1:]}, "missing "),
        (lambda state: state | {"more": torch.zeros(1)}, "left over more"),
        (lambda state: state | {"dictionary.static": torch.zeros(4, 32)}, "dictionary.static has shape"),
        (lambda state: state | {"dictionary.static": torch.full((3, 32), torch.nan)}, "not finite"),
    ],
)
def test_weights_must_fit_as_they_are(folder: Path, change: Callable[[Any], Any], message: str) -> None:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file)
    with pytest.raises(WeightsError, match=message) as caught:
        D2LS.from_pretrained(folder)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("[]", "config.json is not that of a network"),
        ("3", "config.json is not that of a network"),
        ("{", "config.json is not that of a network"),
        ("{}", "missing keys in the network's config: backbone, num_classes"),
        (json.dumps({**CONFIG.to_dict(), "heads": 8}), "unknown keys in the network's config: heads"),
        (json.dumps({**CONFIG.to_dict(), "pretrained": True}), "config.json is not that of a network"),
        (json.dumps({**CONFIG.to_dict(), "embed_dim": 1 << 20}), "asks for a network of at least"),
        (json.dumps({**CONFIG.to_dict(), "backbone": "hf-hub:someone/evil"}), "timm .* has no model of that name"),
    ],
)
def test_config_that_is_none_is_told(folder: Path, config: str, message: str) -> None:
    (folder / "config.json").write_text(config)
    with pytest.raises(WeightsError, match=message) as caught:
        D2LS.from_pretrained(folder)
    assert str(folder) in str(caught.value)


def test_pickles_and_gaps_are_refused(folder: Path, network: D2LS) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(network.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(MissingFileError, match=r"no such weights file: .*model\.safetensors"):
        D2LS.from_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(MissingFileError, match=r"no such file: .*config\.json"):
        D2LS.from_pretrained(folder)


@pytest.mark.usefixtures("here")
def test_pickle_on_the_hub_is_not_even_asked_for(hub: Any) -> None:
    from huggingface_hub.errors import EntryNotFoundError

    config = json.dumps(CONFIG.to_dict()).encode()
    hub.add("someone/pickle", {"config.json": config, "pytorch_model.bin": b"x"})
    with pytest.raises(EntryNotFoundError):
        D2LS.from_pretrained("someone/pickle")
    assert not any("pytorch_model" in request.path for request in hub.requests)


@pytest.mark.usefixtures("here")
def test_backbone_comes_from_timms_part_of_the_hub(hub: Any, tmp_path: Path) -> None:
    """`pretrained` is timm's own download, by the same client and into the same cache."""
    name = CONFIG.backbone
    torch.manual_seed(1)
    source = timm.create_model(name)
    save_file(source.state_dict(), tmp_path / "backbone.safetensors")
    place = timm.get_pretrained_cfg(name).hf_hub_id
    hub.add(place, {"model.safetensors": (tmp_path / "backbone.safetensors").read_bytes()})
    network = D2LS(D2LSConfig(**CONFIG.to_dict() | {"in_channels": 3}), pretrained=True)
    stem = network.encoder.backbone.state_dict()["conv_stem.weight"]
    assert torch.equal(stem, source.state_dict()["conv_stem.weight"])


def test_main_commands_work_where_nothing_can_be_reached(
    tmp_path: Path, tiny_weights: Path, write_raster: Callable[..., Path], pixels: Callable[..., Any],
    environment: dict[str, str],
) -> None:  # fmt: skip
    """One process for all of them, in which every connection fails, as without a network."""
    write_raster(tmp_path / "scene.tif", pixels(4, 40, 50))
    for kind in ("images", "masks"):
        (tmp_path / "set" / kind).mkdir(parents=True)
    write_raster(tmp_path / "set/images/a.tif", pixels(3, 40, 50))
    write_raster(tmp_path / "set/masks/a.tif", pixels(1, 40, 50) % 4)
    (tmp_path / "classes.txt").write_text("water\nforest\nfield\nroad\n")
    code = f"""
import socket, sys
def refuse(*arguments):
    raise OSError(101, "Network is unreachable")
socket.socket.connect = refuse
socket.getaddrinfo = refuse
from d2ls_infer.cli import main
def run(*arguments):
    try:
        main(list(arguments))
    except SystemExit as end:
        print("ended:", end.code)
run("models", "verify")
run("predict", "scene.tif", "--model", "naip", "--device", "cpu")
run("evaluate", "--dataset", "folder", "--classes", "classes.txt", "--root", "set", "--split", "all",
    "--model", {str(tiny_weights)!r}, "--device", "cpu", "-q")
run("publish", {str(tiny_weights)!r}, "--repo", "someone/toy", "--dry-run")
run("predict", "scene.tif", "--model", "someone/far")
run("publish", {str(tiny_weights)!r}, "--repo", "someone/toy")
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, cwd=tmp_path, check=False,
        env={name: value for name, value in environment.items() if name != "HF_ENDPOINT"},
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    ends = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("ended: ")]
    assert ends == ["0", "0", "0", "0", "1", "1"], done.stdout + done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 2
    assert all("https://huggingface.co cannot be reached" in line for line in errors), errors
    assert (tmp_path / "scene_d2ls-naip.tif").is_file()
