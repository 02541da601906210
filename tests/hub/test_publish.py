"""`d2ls publish` and what PyTorchModelHubMixin gives: to the hub and back, the same model."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rasterio
import torch
from click.testing import CliRunner, Result
from huggingface_hub import ModelCard
from huggingface_hub.errors import RepositoryNotFoundError

from d2ls_infer import D2LS, load_model
from d2ls_infer.cli import main
from d2ls_infer.errors import WeightsError
from d2ls_infer.manifest import Metric, ModelDescription
from d2ls_infer.nn import weights_of
from d2ls_infer.weights import file_sha256, find_weights, load_network, read_description, save_weights

FILE, REPO, TOKEN = "model.safetensors", "someone/toy", "hf_right"
Run = Callable[..., "subprocess.CompletedProcess[str]"]
# The client's own use of the library below it.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


def d2ls(*arguments: str | Path) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def refused(result: Result, code: int, *parts: str) -> None:
    assert (result.exit_code, result.stdout) == (code, ""), result.output
    line = result.stderr.splitlines()[-1]
    assert line.startswith("Error: ")
    assert all(part in line for part in parts), line


def test_published_model_is_loaded_on_a_second_machine(run: Run, hub: Any, tmp_path: Path, tiny_weights: Path) -> None:
    done = run("publish", tiny_weights, "--repo", REPO, "--private", "--name", "mine", HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    entry = json.loads(done.stdout)
    assert entry["hub"] == {"repo": REPO, "revision": hub.repos[REPO].refs["main"], "filename": FILE}
    assert entry["sha256"] == file_sha256(tiny_weights)
    assert hub.repos[REPO].private
    assert sorted(hub.repos[REPO].commits[entry["hub"]["revision"]]) == [
        ".gitattributes", "README.md", "config.json", FILE,
    ]  # fmt: skip
    (tmp_path / "config" / "d2ls").mkdir(parents=True)
    usual = tmp_path / "config" / "d2ls" / "weights_manifest.json"
    usual.write_text(json.dumps({"version": 1, "models": [entry]}))
    second = {"HF_HOME": str(tmp_path / "second"), "HF_TOKEN": TOKEN}
    done = run("models", "download", "mine", **second)
    assert done.returncode == 0, done.stderr
    path = Path(done.stdout.strip())
    assert tmp_path / "second" in path.parents
    assert path.read_bytes() == tiny_weights.read_bytes()


@pytest.mark.usefixtures("here")
def test_published_files_are_what_dry_run_leaves(hub: Any, tmp_path: Path, tiny_weights: Path) -> None:
    result = d2ls("publish", tiny_weights, "--repo", REPO, "--dry-run")
    assert (result.exit_code, result.stdout) == (0, "toy\n"), result.output
    assert hub.requests == []
    left = {path.name: path.read_bytes() for path in (tmp_path / "toy").iterdir()}
    assert sorted(left) == ["README.md", "config.json", FILE]
    assert left[FILE] == tiny_weights.read_bytes()
    assert d2ls("publish", tiny_weights, "--repo", REPO).exit_code == 0
    there = hub.repos[REPO]
    assert {key: value for key, value in there.commits[there.refs["main"]].items() if key in left} == left
    refused(d2ls("publish", tiny_weights, "--repo", REPO, "--dry-run"), 2, "toy exists", "--overwrite")
    assert d2ls("publish", tiny_weights, "--repo", REPO, "--dry-run", "-o", tmp_path / "b").exit_code == 0


@pytest.mark.usefixtures("here")
def test_what_cannot_be_published_is_told_before_anything_is_uploaded(
    hub: Any, tmp_path: Path, tiny_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(tiny_weights.read_bytes()[:-100])
    refused(d2ls("publish", broken, "--repo", REPO), 1, "broken.safetensors is damaged")
    refused(d2ls("publish", tmp_path / "none", "--repo", REPO), 2, "no such weights file")
    for repo in ("alone", "a/b/c", "../b", "a/..", "a/b--c"):
        refused(d2ls("publish", tiny_weights, "--repo", repo), 2, "OWNER/NAME")
    refused(d2ls("publish", tiny_weights, "--repo", REPO, "-o", "x"), 2, "--dry-run")
    assert hub.requests == []
    monkeypatch.delenv("HF_TOKEN")
    refused(d2ls("publish", tiny_weights, "--repo", REPO), 1, f"refused {REPO}", "HF_TOKEN")
    assert hub.repos == {}


@pytest.mark.usefixtures("here")
def test_private_weights_do_not_go_into_a_public_repository(hub: Any, tiny_weights: Path) -> None:
    hub.add(REPO, {"README.md": b"public"})
    refused(d2ls("publish", tiny_weights, "--repo", REPO, "--private"), 2, "is public", "--private")
    assert len(hub.repos[REPO].commits) == 1


# The card


@pytest.fixture
def measured(tmp_path: Path, tiny_weights: Path) -> Callable[..., Path]:
    """The tiny weights with scores, and with changes in what they say."""

    def make(**changes: Any) -> Path:
        about = read_description(tiny_weights)
        metrics = [{"name": "mIoU", "value": 67.25, "split": "val, 3 images", "protocol": "whole images"}]
        values = about.to_dict() | {"metrics": metrics, "training_data": "a forest", "note": "preview"} | changes
        description = ModelDescription.from_dict(values)
        save_weights(tmp_path / "m.safetensors", weights_of(load_network(tiny_weights, about)), description)
        return tmp_path / "m.safetensors"

    return make


def card_of(file: Path, tmp_path: Path) -> ModelCard:
    result = d2ls("publish", file, "--repo", REPO, "--dry-run", "-f", "-o", tmp_path / "card")
    assert result.exit_code == 0, result.output
    return ModelCard.load(tmp_path / "card" / "README.md")


def test_card_says_what_the_hub_and_people_must_know(measured: Callable[..., Path], tmp_path: Path) -> None:
    card = card_of(measured(license="CC-BY-NC-SA-4.0", gsd_m=0.3), tmp_path)
    assert card.data.license == "cc-by-nc-sa-4.0"
    assert card.data.library_name == "d2ls-infer"
    assert card.data.pipeline_tag == "image-segmentation"
    (result,) = card.data.eval_results
    assert (result.metric_name, result.metric_value, result.dataset_split) == ("mIoU", 67.25, "val, 3 images")
    assert (result.metric_type, result.metric_args) == ("mean_iou", {"protocol": "whole images"})
    for part in (
        "| mIoU | 67.25 | val, 3 images | whole images |", "**preview**", f'load_model("{REPO}")', "a forest",
        "red, green, blue", "0.3 m", "0 water (#", "does not allow every use", "CC-BY-NC-SA-4.0", "## Limits",
    ):  # fmt: skip
        assert part in card.text, part


def test_terms_without_an_identifier_are_named(measured: Callable[..., Path], tmp_path: Path) -> None:
    card = card_of(measured(license="research use only (ISPRS benchmark)", metrics=[], note=""), tmp_path)
    assert (card.data.license, card.data.license_name) == ("other", "research-use-only-isprs-benchmark")
    assert card.data.eval_results is None
    assert "Not measured." in card.text
    assert "any" in card.text


def test_text_of_a_description_cannot_break_the_cards_header(measured: Callable[..., Path], tmp_path: Path) -> None:
    nasty = "x\n---\nlicense: mit\n"
    card = card_of(measured(license=nasty, metrics=[
        {"name": nasty, "value": 1.0, "split": nasty, "protocol": nasty}]), tmp_path)  # fmt: skip
    assert card.data.license == "other"
    assert card.data.eval_results[0].metric_name == nasty


# The mixin


@pytest.mark.usefixtures("here")
def test_pushed_network_comes_back(hub: Any, tiny_weights: Path) -> None:
    network = load_network(tiny_weights, read_description(tiny_weights))
    network.push_to_hub("someone/bare", private=True)
    loaded = D2LS.from_pretrained("someone/bare")
    assert loaded.config == network.config
    assert not loaded.training
    assert all(torch.equal(value, weights_of(network)[key]) for key, value in weights_of(loaded).items())
    with pytest.raises(WeightsError, match=r"does not describe itself.*D2LS\.from_pretrained"):
        find_weights("someone/bare")
    with pytest.raises(RepositoryNotFoundError):
        D2LS.from_pretrained("someone/none")
    # A pickle is not even asked for.
    hub.add("someone/pickle", {"config.json": b"{}", "pytorch_model.bin": b"x"})
    assert not any("pytorch_model" in request.path for request in hub.requests)


@pytest.mark.usefixtures("here")
def test_published_model_is_a_bare_network_too(tiny_weights: Path) -> None:
    assert d2ls("publish", tiny_weights, "--repo", REPO).exit_code == 0
    expected = load_network(tiny_weights, read_description(tiny_weights))
    pixels = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(D2LS.from_pretrained(REPO)(pixels), expected(pixels))


# A map says which weights made it


@pytest.mark.usefixtures("here")
def test_map_and_report_name_the_commit_and_the_file(
    hub: Any, tmp_path: Path, tiny_weights: Path, write_raster: Callable[..., Path], pixels: Callable[..., Any]
) -> None:
    commit = hub.add(REPO, {FILE: tiny_weights.read_bytes()})
    scene = write_raster(tmp_path / "scene.tif", pixels(3, 40, 50))
    result = d2ls("predict", scene, "--model", REPO, "--device", "cpu", "-q")
    assert result.exit_code == 0, result.output
    with rasterio.open(tmp_path / "scene_d2ls-toy.tif") as dataset:
        tags = dataset.tags()
    assert tags["D2LS_WEIGHTS"] == f"{REPO}@{commit}:{FILE}"
    assert tags["D2LS_WEIGHTS_SHA256"] == file_sha256(tiny_weights)
    for kind in ("images", "masks"):
        (tmp_path / "set" / kind).mkdir(parents=True)
    write_raster(tmp_path / "set/images/a.tif", pixels(3, 40, 50))
    write_raster(tmp_path / "set/masks/a.tif", pixels(1, 40, 50) % 4)
    (tmp_path / "classes.txt").write_text("water\nforest\nfield\nroad\n")
    result = d2ls(
        "evaluate", "--dataset", "folder", "--classes", "classes.txt", "--root", "set", "--split", "all",
        "--model", REPO, "--device", "cpu", "--report", "report", "-q",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "report/report.json").read_text())["about"]["reference"] == tags["D2LS_WEIGHTS"]
    # The tag is itself what --model takes, and makes the same map again.
    again = load_model(tags["D2LS_WEIGHTS"], device="cpu", offline=True)
    assert (again.reference, again.sha256) == (tags["D2LS_WEIGHTS"], tags["D2LS_WEIGHTS_SHA256"])


def test_metrics_type_is_the_hubs_name_where_it_has_one() -> None:
    from d2ls_infer.card import metric_type

    def kind(name: str) -> str:
        return metric_type(Metric(name=name, value=1.0, split="", protocol=""))

    names = ("mIoU", "mean F1 without clutter", "overall accuracy", "F1 impervious surface", "Boundary IoU")
    assert [kind(name) for name in names] == ["mean_iou", "f1", "accuracy", "f1", "boundary-iou"]
