"""`d2ls train`: from labelled images to a model that the other commands take, and what it refuses."""

from __future__ import annotations

import json
import logging
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from click.testing import Result
from torch import Tensor

from d2ls_infer import load_model
from d2ls_infer.labels import LabelMap
from d2ls_infer.train.module import D2LSModule
from d2ls_infer.weights import read_description

Run = Callable[..., Result]
CLASSES = ("water", "field", "roof")
TINY = """
backbone = "mobilenetv3_small_050"
embed_dim = 32
stages = 1
epochs = 2
crops_per_epoch = 4
batch_size = 2
crop = 32
"""


@pytest.fixture(autouse=True)
def levels(cpu_only: None) -> Iterator[None]:
    """The command sets how much is told, for the whole process."""
    loggers = [logging.getLogger(name) for name in ("timm", "lightning.pytorch", "d2ls_infer")]
    before = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, before, strict=True):
        logger.setLevel(level)


@pytest.fixture
def place(tmp_path: Path, toys: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in: data/folder with images and masks, classes.txt, tiny.toml."""
    shutil.copytree(toys, tmp_path / "data/folder")
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    (tmp_path / "tiny.toml").write_text(TINY)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def train(d2ls: Run, place: Path, backbone_file: Path) -> Run:
    """The command on the folder's images, with the tiny settings, in this process and thread."""

    def run(*more: str | Path, start: bool = True) -> Result:
        weights = ["--backbone-weights", backbone_file] if start else []
        return d2ls(
            "train", "--dataset", "folder", "--classes", "classes.txt", "--config", "tiny.toml", "--workers", "0",
            *weights, *more,
        )  # fmt: skip

    return run


def test_a_folder_is_trained_on_and_the_model_maps_a_scene(train: Run, d2ls: Run, place: Path) -> None:
    result = train("-q")
    assert result.exit_code == 0, result.output
    assert result.stdout == "runs/folder/folder.safetensors\n"
    assert result.stderr == ""
    about = read_description(place / "runs/folder/folder.safetensors")
    assert about.labels == LabelMap.of(CLASSES)
    assert {metric.split for metric in about.metrics} == {"val, 2 images"}
    assert {metric.name for metric in about.metrics} >= {"mIoU", "mean F1", "overall accuracy", "IoU roof"}
    result = d2ls("evaluate", "--dataset", "folder", "--classes", "classes.txt", "--model", result.stdout.strip(),
                  "--split", "val", "--device", "cpu", "--report", "report", "-q")  # fmt: skip
    assert result.exit_code == 0, result.output
    report = json.loads((place / "report/report.json").read_text())["full"]
    measured = {metric.name: metric.value for metric in about.metrics}
    assert report["overall_accuracy"] == pytest.approx(measured["overall accuracy"], abs=0.011)
    result = d2ls("predict", "data/folder/images/d.tif", "-m", "runs/folder/folder.safetensors", "-q", "-o", "map.tif")
    assert result.exit_code == 0, result.output
    with rasterio.open("map.tif") as found:
        assert found.shape == (48, 40)
        assert set(np.unique(found.read(1)).tolist()) <= {0, 1, 2}


def test_options_go_over_the_config_and_the_config_over_the_paper(train: Run, place: Path) -> None:
    (place / "tiny.toml").write_text(TINY + "backbone_rate = 0.5\n")
    result = train("--epochs", "1", "--batch-size", "3", "--val-split", "none", "--output", "out", "-q")
    assert result.exit_code == 0, result.output
    settings = json.loads((place / "out/config.json").read_text())
    expected = {"epochs": 1, "batch_size": 3, "backbone_rate": 0.5, "crop": 32, "seed": 42, "weight_decay": 0.01}
    assert {name: settings[name] for name in expected} == expected
    assert read_description(place / "out/folder.safetensors").metrics == ()


def test_images_are_split_by_fraction_where_no_files_list_them(train: Run, place: Path) -> None:
    for split in ("train", "val"):
        (place / f"data/folder/{split}.txt").unlink()
    # Of a to e, c draws 0.43 and all the others more.
    result = train("--fraction", "0.5", "--gsd", "0.5", "--epochs", "1", "-q")
    assert result.exit_code == 0, result.output
    about = read_description(place / "runs/folder/folder.safetensors")
    assert {metric.split for metric in about.metrics} == {"val, 1 image"}
    assert about.training_data == "folder, 4 images"
    assert about.gsd_m == 0.5


def box(first_row: int, first_col: int, last_row: int, last_col: int) -> bytes:
    """A block of pixels of 2 m as a polygon in WKB."""
    left, right = 500_000.0 + 2 * first_col, 500_000.0 + 2 * last_col
    top, bottom = 4_600_000.0 - 2 * first_row, 4_600_000.0 - 2 * last_row
    ring = [(left, top), (right, top), (right, bottom), (left, bottom), (left, top)]
    return b"\x01" + struct.pack("<III", 3, 1, len(ring)) + np.array(ring, "<f8").tobytes()


def test_scenes_with_polygons_as_labels_are_trained_on(
    train: Run, d2ls: Run, place: Path, write_raster: Callable[..., Path]
) -> None:
    raw = pytest.importorskip("pyogrio.raw")
    root = place / "scenes"
    for kind in ("images", "labels"):
        (root / kind).mkdir(parents=True)
    rng = np.random.default_rng(4)
    for name, suffix in (("a", ".gpkg"), ("b", ".geojson"), ("c", ".gpkg")):
        write_raster(root / "images" / f"{name}.tif", rng.integers(0, 4000, (4, 50, 60)).astype(np.uint16))
        raw.write(
            root / "labels" / f"{name}{suffix}",
            geometry=np.array([box(0, 0, 50, 20), box(10, 30, 40, 60)], object),
            field_data=[np.array(["roof", "field"], object)],
            fields=["kind"],
            geometry_type="Polygon",
            crs="EPSG:32618",
        )
    (root / "train.txt").write_text("a\nb\n")
    (root / "val.txt").write_text("c\n")
    result = train(
        "--root", "scenes", "--column", "kind", "--background", "water", "--bands", "red, green,blue,nir",
        "--value-range", "0,4000", "--epochs", "1", "-q",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    model = load_model(place / "runs/folder/folder.safetensors", device="cpu")
    about = model.description
    assert about.bands == ("red", "green", "blue", "nir")
    assert about.value_range == (0.0, 4000.0)
    assert about.mean == pytest.approx((0.5,) * 4, abs=0.02)
    assert about.std == pytest.approx((12**-0.5,) * 4, abs=0.02)
    # The background is a class here, so that every class has a score of the polygons' and the other pixels.
    assert {metric.name for metric in about.metrics} >= {"F1 water", "F1 field", "F1 roof"}
    truth = np.zeros((50, 60), np.uint8)
    truth[:, :20], truth[10:40, 30:] = 2, 1
    with rasterio.open(root / "images/c.tif") as scene:
        right = (model.predict(scene.read()) == truth).mean()
    found = {metric.name: metric.value for metric in about.metrics}
    assert found["overall accuracy"] == pytest.approx(100 * right, abs=0.1)
    # Evaluated by the same command line, but for bands and values, which the model knows.
    again = d2ls(
        "evaluate", "--dataset", "folder", "--classes", "classes.txt", "--root", "scenes", "--column", "kind",
        "--background", "water", "--model", "runs/folder/folder.safetensors", "--device", "cpu", "-q",
    )  # fmt: skip
    assert f"overall accuracy {found['overall accuracy']:.2f}" in again.output
    assert "folder was trained on folder, 2 images" in again.output


def test_an_interrupted_run_is_gone_on_with(train: Run, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert train("--output", "whole", "-q").exit_code == 0
    step, steps = D2LSModule.training_step, 0

    def interrupted(self: D2LSModule, *arguments: Any) -> Tensor:
        nonlocal steps
        steps += 1
        if steps == 4:
            raise KeyboardInterrupt
        return step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(D2LSModule, "training_step", interrupted)
        result = train("--output", "parts")
    assert result.exit_code == 130
    assert result.stdout == ""
    assert "Epoch 1" in result.stderr
    assert result.stderr.splitlines()[-1] == "Error: stopped in epoch 2 of 2; go on with --resume"
    assert not (place / "parts/folder.safetensors").exists()

    result = train("--output", "parts", "-q")
    assert result.exit_code == 2
    assert result.stderr == "Error: parts holds a run; go on with --resume, or name another --output\n"

    result = train("--output", "parts", "-q", "--resume", start=False)
    assert result.exit_code == 0, result.output
    for name in ("folder.safetensors", "curves.json", "config.json"):
        assert (place / "parts" / name).read_bytes() == (place / "whole" / name).read_bytes(), name


def test_a_trained_model_is_where_another_one_starts(
    train: Run, place: Path, tiny_weights: Path, caplog: pytest.LogCaptureFixture
) -> None:
    result = train("--init", tiny_weights, "--epochs", "1", start=False)
    assert result.exit_code == 0, result.output
    assert "started from tiny, which knows water, field" in caplog.messages  # tiny has no roof
    assert "Epoch 0" in result.stderr
    assert result.stdout == "runs/folder/folder.safetensors\n"
    about = read_description(place / "runs/folder/folder.safetensors")
    assert about.source == "d2ls train, 1 epochs; started from the model tiny"
    former = read_description(tiny_weights).training_data
    assert about.training_data == f"folder, 3 images; started from tiny, which was trained on {former}"
    assert f"tiny, from which this starts, was trained on {former}; if some of the val images are among" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "vaihingn"], "perhaps vaihingen is meant"),
        (["--dataset", "folder"], "needs its classes"),
        (["--dataset", "folder", "--bands", "a,b"], "needs its classes"),
        (["--dataset", "folder", "--classes", "none.txt"], "no such file: none.txt; it names the classes"),
        (["--dataset", "dubai", "--classes", "classes.txt"], "--classes is for --dataset folder; what dubai holds is"),
        (["--dataset", "dubai", "--gsd", "1", "--bands", "a"], "--bands, --gsd are for --dataset folder"),
        (["--dataset", "vaihingn", "--classes", "classes.txt"], "perhaps vaihingen is meant"),
        (["--dataset", "uavid", "--root", "nowhere"], "no such folder: nowhere; get uavid from"),
        (["--dataset", "uavid"], "no such folder: data/uavid; get uavid from"),
        (["--split", "holdout"], "has the splits train, val, test and all, got 'holdout'"),
        (["--val-split", "test"], "no test images of folder in data/folder"),
        (["--bands", "red,,blue"], "--bands are names with commas between, each its own; got 'red,,blue'"),
        (["--bands", "red,red,blue"], "--bands are names"),
        (["--value-range", "0-255"], "--value-range is MIN,MAX such as 0,10000; got '0-255'"),
        (["--value-range", ""], "--value-range is MIN,MAX such as 0,10000; got ''"),
        (["--value-range", "5,5"], "--value-range goes from a lower to a higher number, got '5,5'"),
        (["--value-range", "0,inf"], "--value-range goes from a lower to a higher number"),
        (["--value-range", "nan,1"], "--value-range goes from a lower to a higher number"),
        (["--gsd", "0"], "--gsd is a number of metres above 0, got 0"),
        (["--gsd", "nan"], "--gsd is a number of metres above 0, got nan"),
        (["--fraction", "1.5"], "the fraction for validation lies between 0 and 1, got 1.5"),
        (["--background", "sea"], "the background 'sea' is none of the classes"),
        (["--workers", "-1"], "--workers is at least 0, got -1"),
        (["--epochs", "0"], "epochs is at least 1; got 0"),
        (["--batch-size", "0"], "batch_size is at least 1; got 0"),
        (["--backbone", "resnet1"], "unknown backbone 'resnet1'"),
        (["--backbone-weights", "none.safetensors"], "no such file: none.safetensors"),
        (["--backbone-weights", "classes.txt"], "classes.txt is not a safetensors file"),
        (["--config", "none.toml"], "no such file: none.toml"),
        (["--config", "wrong.toml"], "wrong.toml: crop is a multiple of 32; try 96; got 100"),
        (["--init", "vaihingn"], "unknown model 'vaihingn'"),
        (["--init", "vaihingen", "--backbone", "resnet18"], "--init brings its own backbone"),
        (["--init", "vaihingen", "--backbone-weights", "x"], "--init brings its own backbone"),
        (["--resume"], "nothing to resume in runs/folder"),
        (["--devices", "some"], "devices some, strategy auto: "),
        (["--strategy", "magic"], "devices auto, strategy magic: "),
        (["--output", "classes.txt"], "classes.txt is a file; name a folder for --output"),
    ],
)
def test_what_makes_no_sense_is_one_line_and_exit_code_2(
    d2ls: Run, place: Path, backbone_file: Path, arguments: list[str], message: str
) -> None:
    (place / "wrong.toml").write_text("crop = 100\n")
    given = list(map(str, arguments))
    if "--dataset" not in given:
        given = ["--dataset", "folder", "--classes", "classes.txt", *given]
    if "--config" not in given:
        given += ["--config", "tiny.toml"]
    if not {"--backbone-weights", "--init"} & {*given}:
        given += ["--backbone-weights", str(backbone_file)]
    result = d2ls("train", *given, "-q")
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert result.stdout == ""
    assert not list((place / "runs").rglob("*.safetensors"))


def test_an_output_is_not_written_over(train: Run, place: Path) -> None:
    (place / "out").mkdir()
    (place / "out/folder.safetensors").write_text("mine")
    result = train("--output", "out", "-q")
    assert result.exit_code == 2
    assert result.stderr == "Error: out/folder.safetensors exists; name another --output\n"
    assert (place / "out/folder.safetensors").read_text() == "mine"


def test_without_lightning_it_says_what_to_install(d2ls: Run, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for library in ("lightning", "matplotlib"):
        with monkeypatch.context() as patch:
            for name in [name for name in sys.modules if name.split(".")[:2] == ["d2ls_infer", "train"]]:
                patch.delitem(sys.modules, name)
            patch.setitem(sys.modules, library, None)
            result = d2ls("train", "--dataset", "folder", "--classes", "classes.txt")
        assert result.exit_code == 2
        assert result.stderr.startswith('Error: training needs more packages: pip install "d2ls-infer[train]" (')
        assert len(result.stderr.splitlines()) == 1
    assert not (place / "runs").exists()
