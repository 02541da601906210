"""`d2ls seams`: the tables, the files, and what it refuses."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result

from d2ls_infer import load_model
from d2ls_infer.raster import read_array
from d2ls_infer.seams import measure_seams, try_overlaps

Run = Callable[..., Result]


@pytest.fixture
def scene(tmp_path: Path, write_raster: Callable[..., Path], pixels: Callable[..., np.ndarray]) -> Path:
    return write_raster(tmp_path / "scene.tif", pixels(3, 150, 160))


def seams(d2ls: Run, scene: Path, weights: Path, *more: str | Path) -> Result:
    return d2ls("seams", scene, "--model", weights, "--device", "cpu", "--tile-size", "64", "-q", *more)


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_tables_numbers_and_picture(d2ls: Run, scene: Path, tiny_weights: Path, tmp_path: Path) -> None:
    numbers, picture = tmp_path / "seams.json", tmp_path / "seams.png"
    result = seams(d2ls, scene, tiny_weights, "--json", numbers, "--picture", picture, "--shifts", "0.25,0.5")
    assert result.exit_code == 0, result.output
    model = load_model(tiny_weights, device="cpu")
    report = measure_seams(model, scene, tile_size=64, shifts=(0.25, 0.5))
    told = json.loads(numbers.read_text())
    assert told.pop("version")
    assert told == json.loads(json.dumps(report.to_dict()))
    assert told["sha256"] == model.sha256
    assert len(told["sha256"]) == 64
    assert told["options"]["blend"] == "hann"
    assert told["part"] == [0, 0, 160, 150]
    for part in (
        "measured: all of 160 x 150 px",
        "shifted by 12 and 24 px",
        f"{100 * report.blended.mean_share:.2f}",
        f"{100 * report.raw.mean_share:.2f}",
        f"{report.curve[0].of:,}",
        f"{100 * report.curve[0].share:.2f}",
        "raw, left | right",
    ):
        assert part in result.output
    drawn = read_array(picture)
    assert drawn.shape[1:] == (1200, 1500)
    assert len(np.unique(drawn[:3].reshape(3, -1), axis=1).T) > 100
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scene.tif", "seams.json", "seams.png"]


def test_the_overlap_that_is_enough_is_found(d2ls: Run, scene: Path, tiny_weights: Path, tmp_path: Path) -> None:
    model = load_model(tiny_weights, device="cpu")
    (trial,) = try_overlaps(model, scene, 1.0, tile_size=64, shifts=(0.25,))
    enough = seams(d2ls, scene, tiny_weights, "--shifts", "0.25", "--reach", f"{100 * trial.share + 1e-9}")
    assert enough.exit_code == 0, enough.output
    assert ["0", "1.54", f"{100 * trial.share:.2f}"] in [line.split() for line in enough.output.splitlines()]
    assert "--overlap 0 reaches" in enough.output
    never = seams(d2ls, scene, tiny_weights, "--shifts", "0.25", "--reach", "0", "--no-smooth")
    assert "no overlap of these reaches 0 %" in never.output
    refused = seams(d2ls, scene, tiny_weights, "--reach", "1", "--json", tmp_path / "a.json")
    assert refused.exit_code == 2
    assert "--json and --picture are of one measurement" in refused.output


def test_a_part_is_named(d2ls: Run, scene: Path, tiny_weights: Path) -> None:
    result = seams(d2ls, scene, tiny_weights, "--window", "10,20,140,130", "--shifts", "0.5")
    assert result.exit_code == 0, result.output
    assert "measured: columns 10 to 149, rows 20 to 149 of 160 x 150 px" in result.output
    assert "shifted by 24 px" in result.output


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--tile-size", "512"), "nothing to measure in 160 x 150 pixels"),
        (("--shifts", "half"), "--shifts are numbers with commas between, got 'half'"),
        (("--shifts", "2"), "shifts are different shares, between 0 and 1"),
        (("--picture", "seams.jpg"), "--picture takes a file that ends in .png, got 'seams.jpg'"),
        (("--json", "no/such/folder.json"), "no such folder: no/such"),
        (("--overlap", "1.5"), "overlap must be whole pixels"),
    ],
)
def test_what_makes_no_sense(
    d2ls: Run, scene: Path, tiny_weights: Path, more: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(scene.parent)
    result = seams(d2ls, scene, tiny_weights, *more)
    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
    assert [path.name for path in scene.parent.iterdir()] == ["scene.tif"]


def test_files_are_not_overwritten(d2ls: Run, scene: Path, tiny_weights: Path, tmp_path: Path) -> None:
    file = tmp_path / "seams.json"
    file.write_text("mine")
    result = seams(d2ls, scene, tiny_weights, "--json", file, "--shifts", "0.5")
    assert (result.exit_code, file.read_text()) == (2, "mine")
    assert f"{file} exists" in result.stderr
    assert seams(d2ls, scene, tiny_weights, "--json", file, "--shifts", "0.5", "-f").exit_code == 0
    assert json.loads(file.read_text())["shifts_px"] == [24]
    result = seams(d2ls, scene, tiny_weights, "--json", tmp_path / "a.png", "--picture", tmp_path / "a.png")
    assert result.exit_code == 2
    assert "both be written to" in result.stderr


def test_a_picture_without_matplotlib(
    d2ls: Run, scene: Path, tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = seams(d2ls, scene, tiny_weights, "--picture", tmp_path / "seams.png")
    assert result.exit_code == 2
    assert "pip install 'd2ls-infer[train]'" in result.stderr
