"""Long runs on the command line: plans, lines of JSON, Ctrl+C and going on."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

D2LS = Callable[..., Result]


@pytest.fixture
def scene(scene_alone: Path) -> Path:
    return scene_alone


# What a run would do


def test_a_dry_run_tells_the_plan_and_writes_nothing(d2ls: D2LS, scene: Path, tiny_weights: Path) -> None:
    done = d2ls("predict", scene, "--model", tiny_weights, "--dry-run", "--tile-size", "64", "--confidence")
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert lines[0] == str(scene)
    told = dict(line.split(maxsplit=1) for line in lines[1:])
    assert told["scene"] == "120 x 400 pixels of 2 m, EPSG:32618"
    assert told["bands"] == "red = 1, green = 2, blue = 3"
    assert told["values"] == "uint8, as they are"
    assert told["tiles"] == "24 (8 x 3) of 64 px, 16 px overlap"
    assert told["network"] == "1 tile at once on cpu, float32"
    assert told["memory"].startswith("about ")
    assert told["disk"] == "at most 0.1 MB of rasters"
    assert told["time"].startswith("about ")
    assert told["classes"].endswith("scene_d2ls-tiny.tif")
    assert told["confidence"].endswith("scene_d2ls-tiny_confidence.tif")
    assert [path.name for path in scene.parent.iterdir()] == ["scene.tif"]


def test_a_dry_run_of_a_bad_scene_is_its_error(d2ls: D2LS, scene: Path, tiny_weights: Path) -> None:
    done = d2ls("predict", scene, "--model", tiny_weights, "--dry-run", "--bands", "1,2,9")
    assert (done.exit_code, done.stdout) == (2, "")
    assert "no band 9" in done.stderr


# For machines


def test_json_is_a_line_for_each_scene(d2ls: D2LS, scene: Path, tmp_path: Path, tiny_weights: Path) -> None:
    arguments = ("predict", scene, tmp_path / "missing.tif", "--model", tiny_weights, "--json", "--tile-size", "128")
    done = d2ls(*arguments)
    assert done.exit_code == 1
    failed, mapped = map(json.loads, done.stdout.splitlines())
    assert failed == {
        "status": "failed", "source": str(tmp_path / "missing.tif"), "exit_code": 2,
        "error": f"no such file: {tmp_path / 'missing.tif'}",
    }  # fmt: skip
    assert mapped["status"] == "mapped"
    assert mapped["files"] == {"classes": mapped["output"]}
    assert Path(mapped["output"]).exists()
    assert (mapped["tiles"], mapped["skipped"], mapped["resumed_rows"]) == (4, 0, 0)
    assert sum(area["pixels"] for area in mapped["areas"]) == 400 * 120
    assert mapped["seconds"]["total"] > 0
    again = d2ls(*arguments, "--resume")
    assert [json.loads(line)["status"] for line in again.stdout.splitlines()] == ["failed", "was there"]
    for flag in ("-f", "--resume"):
        planned = d2ls(*arguments, "--dry-run", flag)
        assert [json.loads(line)["status"] for line in planned.stdout.splitlines()] == ["failed", "planned"]
    refused = [json.loads(line) for line in d2ls(*arguments, "--dry-run").stdout.splitlines()]
    assert [line["status"] for line in refused] == ["failed", "failed"]
    assert f"{mapped['output']} exists" in refused[0]["error"]


def test_json_of_a_single_bad_scene_is_a_line_too(d2ls: D2LS, tmp_path: Path, tiny_weights: Path) -> None:
    done = d2ls("predict", tmp_path / "missing.tif", "--model", tiny_weights, "--json")
    assert done.exit_code == 2
    assert json.loads(done.stdout)["status"] == "failed"


@pytest.mark.parametrize(("level", "said"), [("info", True), ("warning", False)])
def test_the_log_level_says_what_is_said(
    d2ls: D2LS, scene: Path, tiny_weights: Path, caplog: pytest.LogCaptureFixture, level: str, said: bool
) -> None:
    assert d2ls("predict", scene, "--model", tiny_weights, "--log-level", level).exit_code == 0
    assert ("120 x 400 pixels, 1 tiles, 1 at once, on cpu" in caplog.text) is said


def test_a_limit_of_memory_that_is_none(d2ls: D2LS, scene: Path, tiny_weights: Path) -> None:
    done = d2ls("predict", scene, "--model", tiny_weights, "--max-memory", "lots")
    assert done.exit_code == 2
    assert "memory is a number of bytes such as 1500M, 2G or 2GiB; got 'lots'" in done.stderr


# Stopped


SLOW = """
import sys, time
from d2ls_infer import journal, segmenter
journal.COMMIT_SECONDS = 0.0
score = segmenter.D2LSSegmenter.score
segmenter.D2LSSegmenter.score = lambda self, batch: (time.sleep(0.1), score(self, batch))[1]
from d2ls_infer.cli import main
main()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="sends signals of POSIX")
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_stopped_says_what_is_kept_and_goes_on_there(
    d2ls: D2LS, scene: Path, tmp_path: Path, tiny_weights: Path, sent: signal.Signals
) -> None:
    arguments = ["predict", scene, "--model", tiny_weights, "--tile-size", "64", "--confidence", "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    journal = scene.with_name("scene_d2ls-tiny.tif.journal")
    while process.poll() is None and not journal.exists():
        time.sleep(0.01)
    process.send_signal(sent)
    out, error = process.communicate()
    assert (process.returncode, out) == (130, "")
    warning, last = error.splitlines()
    assert last == "Error: stopped"
    assert "% of the map are kept in" in warning
    assert warning.endswith("the same command with --resume (in Python: resume=True) goes on")
    assert sorted(path.name for path in scene.parent.iterdir()) == ["scene.tif", journal.name]

    done = d2ls(*arguments, "--resume")
    assert done.exit_code == 0, done.output
    assert "rows from an earlier run" in done.stdout
    whole = tmp_path / "whole"
    whole.mkdir()
    assert d2ls(*arguments, "--output", whole).exit_code == 0
    for path in whole.iterdir():
        assert scene.with_name(path.name).read_bytes() == path.read_bytes(), path.name
    assert not journal.exists()
