"""`d2ls evaluate`: tables, reports, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import rasterio
from click.testing import Result

from d2ls_infer import load_model

Run = Callable[..., Result]
NAMES = ("water", "forest", "field", "road")  # those of the tiny model


@pytest.fixture
def folder(tmp_path: Path, write_raster: Callable[..., Path]) -> Path:
    """Two labelled images, all of them in the split test, and their classes."""
    rng = np.random.default_rng(3)
    for kind in ("images", "masks"):
        (tmp_path / "set" / kind).mkdir(parents=True)
    for name in ("a", "b"):
        write_raster(tmp_path / "set/images" / f"{name}.tif", rng.integers(0, 256, (3, 40, 48), dtype=np.uint8))
        write_raster(tmp_path / "set/masks" / f"{name}.tif", rng.choice([0, 1, 2, 255], (1, 40, 48)).astype(np.uint8))
    (tmp_path / "set/test.txt").write_text("a\nb\n")
    (tmp_path / "classes.txt").write_text("\n".join(NAMES) + "\n")
    return tmp_path


def evaluate(d2ls: Run, folder: Path, weights: Path, *more: str | Path) -> Result:
    return d2ls(
        "evaluate", "--dataset", "folder", "--classes", folder / "classes.txt", "--root", folder / "set",
        "--model", weights, "--device", "cpu", "-q", *more,
    )  # fmt: skip


def test_scores_are_those_of_the_predictions(d2ls: Run, folder: Path, tiny_weights: Path) -> None:
    result = evaluate(d2ls, folder, tiny_weights, "--split", "test", "--report", folder / "report")
    assert result.exit_code == 0, result.output
    model = load_model(tiny_weights, device="cpu")
    right = labelled = 0
    for name in ("a", "b"):
        with (
            rasterio.open(folder / "set/images" / f"{name}.tif") as image,
            rasterio.open(folder / "set/masks" / f"{name}.tif") as mask,
        ):
            truth, predicted = mask.read(1), model.predict(image.read())
        right += int(((truth == predicted) & (truth != 255)).sum())
        labelled += int((truth != 255).sum())
    report = json.loads((folder / "report/report.json").read_text())
    assert report["full"]["overall_accuracy"] == pytest.approx(100 * right / labelled, abs=0.01)
    assert np.sum(report["full"]["confusion"]) == labelled
    assert report["about"]["split"] == "test"
    assert f"overall accuracy {report['full']['overall_accuracy']:.2f}" in result.output
    assert all(name in result.output for name in NAMES)
    assert f"no pixel is labelled {NAMES[3]}: not in the means" in result.output
    assert "data:image/png" in (folder / "report/report.html").read_text()


def test_classes_in_another_order_are_matched_by_name(d2ls: Run, folder: Path, tiny_weights: Path) -> None:
    evaluate(d2ls, folder, tiny_weights, "--split", "test", "--report", folder / "one")
    (folder / "classes.txt").write_text("\n".join((NAMES[1], NAMES[0], *NAMES[2:])) + "\n")
    for name in ("a", "b"):  # the masks with classes 0 and 1 exchanged say the same under the new names
        with rasterio.open(folder / "set/masks" / f"{name}.tif", "r+") as mask:
            mask.write(np.array([1, 0, 2, *range(3, 256)], np.uint8)[mask.read()])
    result = evaluate(d2ls, folder, tiny_weights, "--split", "test", "--report", folder / "two")
    assert result.exit_code == 0, result.output
    one, two = (json.loads((folder / name / "report.json").read_text())["full"] for name in ("one", "two"))
    assert one["overall_accuracy"] == two["overall_accuracy"]
    assert one["F1"][:2] == two["F1"][1::-1]


def test_bands_of_a_folder_are_the_models_unless_they_are_named(d2ls: Run, folder: Path, tiny_weights: Path) -> None:
    evaluate(d2ls, folder, tiny_weights, "--split", "test", "--report", folder / "one")
    for name in ("a", "b"):
        with rasterio.open(folder / "set/images" / f"{name}.tif", "r+") as image:
            image.write(image.read()[::-1])
    more = ("--bands", "blue,green,red", "--split", "test", "--report", folder / "two")
    result = evaluate(d2ls, folder, tiny_weights, *more)
    assert result.exit_code == 0, result.output
    one, two = (json.loads((folder / name / "report.json").read_text())["full"] for name in ("one", "two"))
    assert one == two


def test_test_time_augmentation_is_told_in_the_report(d2ls: Run, folder: Path, tiny_weights: Path) -> None:
    result = evaluate(d2ls, folder, tiny_weights, "--split", "test", "--tta", "d4", "--report", folder / "report")
    assert result.exit_code == 0, result.output
    assert "augmentation d4, scores smoothed," in protocol(folder)


def protocol(folder: Path) -> str:
    told: str = json.loads((folder / "report/report.json").read_text())["about"]["protocol"]
    return told


def test_scores_that_are_not_smoothed_are_told_in_the_report(d2ls: Run, folder: Path, tiny_weights: Path) -> None:
    result = evaluate(d2ls, folder, tiny_weights, "--split", "test", "--no-smooth", "--report", folder / "report")
    assert result.exit_code == 0, result.output
    assert ", scores not smoothed," in protocol(folder)


def test_a_report_is_not_written_over(d2ls: Run, folder: Path, tiny_weights: Path) -> None:
    (folder / "report").mkdir()
    (folder / "report/notes.txt").write_text("mine")
    result = evaluate(d2ls, folder, tiny_weights, "--split", "test", "--report", folder / "report")
    assert result.exit_code == 2
    assert "is not empty; give --overwrite" in result.output
    result = evaluate(d2ls, folder, tiny_weights, "--split", "test", "--report", folder / "report", "--overwrite")
    assert result.exit_code == 0
    assert (folder / "report/notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["report.json", "report.html"])
def test_a_report_that_cannot_be_written_leaves_the_former_one(
    d2ls: Run, folder: Path, tiny_weights: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    replace = Path.replace

    def full(self: Path, target: Path) -> Path:
        if target.name == name:
            raise OSError("no space left")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", full)
    (folder / "report").mkdir()
    (folder / "report" / name).write_text("former")
    with pytest.raises(OSError, match="no space left"):
        evaluate(d2ls, folder, tiny_weights, "--split", "test", "--report", folder / "report", "--overwrite")
    assert (folder / "report" / name).read_text() == "former"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "vaihingn"], "perhaps vaihingen is meant"),
        (["--dataset", "folder"], "needs its classes"),
        (["--dataset", "folder", "--classes", "x.txt"], "--dataset folder wants --model"),
        (
            ["--dataset", "uavid", "--model", "vaihingen", "--root", "nowhere"],
            "no such folder: nowhere; get uavid from",
        ),
        (["--dataset", "dubai", "--classes", "x.txt"], "is for --dataset folder"),
        (["--dataset", "potsdam", "--submission", "maps"], "no test server that takes maps"),
        (["--dataset", "naip", "--split", "holdout", "--root", "."], "has the splits"),
    ],
)
def test_what_makes_no_sense_is_one_line_and_exit_code_2(
    d2ls: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = d2ls("evaluate", *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert len(result.output.strip().splitlines()) == 1


def test_a_model_of_other_classes_is_refused(d2ls: Run, folder: Path, tiny_weights: Path) -> None:
    (folder / "classes.txt").write_text("sea\nwood\nmeadow\nstreet\n")
    result = evaluate(d2ls, folder, tiny_weights, "--split", "test")
    assert result.exit_code == 2
    assert "the model knows water, forest, field, road; the labels hold sea" in result.output
