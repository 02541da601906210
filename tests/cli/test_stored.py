"""`d2ls predict -o s3://...`: what is written, and how it ends where it cannot be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import Result

from d2ls_infer.store import place

D2LS = Callable[..., Result]


def test_a_folder_of_a_bucket(
    d2ls: D2LS, bucket: SimpleNamespace, scene_alone: Path, tmp_path: Path, tiny_weights: Path
) -> None:
    options = ("--model", tiny_weights, "--device", "cpu", "--tile-size", "64", "--confidence")
    assert d2ls("predict", scene_alone, *options).exit_code == 0
    expected = {path.name: path.read_bytes() for path in scene_alone.parent.iterdir() if path != scene_alone}
    folder = f"{bucket.address}/maps/"
    done = d2ls("predict", scene_alone, "-o", folder, *options)
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith(f"{folder}scene_d2ls-tiny.tif  (")
    assert f"\n{folder}scene_d2ls-tiny_confidence.tif\n" in done.stdout
    assert bucket.objects() == {f"maps/{name}": content for name, content in expected.items()}
    again = d2ls("predict", scene_alone, "-o", folder, *options)
    assert (again.exit_code, again.stdout) == (2, "")
    assert again.stderr == (
        f"Error: {folder}scene_d2ls-tiny.tif exists; give --overwrite (in Python overwrite=True) to replace it\n"
    )
    there = d2ls("predict", scene_alone, "-o", folder, *options, "--resume")
    assert there.stdout == f"{folder}scene_d2ls-tiny.tif  (was there)\n"


def test_a_store_that_cannot_be_used(
    d2ls: D2LS, bucket: SimpleNamespace, scene_alone: Path, tiny_weights: Path, staging: Path
) -> None:
    done = d2ls("predict", scene_alone, "-o", "s3://no-such-bucket/maps/", "--model", tiny_weights)
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr == "Error: cannot use s3://no-such-bucket/maps: The specified bucket does not exist\n"
    assert [path for path in staging.rglob("*") if path.is_file()] == []
    assert bucket.objects() == {}


def test_a_server_that_is_not_there(
    d2ls: D2LS, bucket: SimpleNamespace, scene_alone: Path, tiny_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    s3fs.S3FileSystem.clear_instance_cache()
    done = d2ls("predict", scene_alone, "-o", "s3://bucket/maps/", "--model", tiny_weights)
    s3fs.S3FileSystem.clear_instance_cache()
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith("Error: cannot use s3://bucket/maps/scene_d2ls-tiny.tif: Could not connect to")
    assert done.stderr.count("\n") == 1


def test_addresses_that_are_no_outputs(d2ls: D2LS, scene_alone: Path, tiny_weights: Path, staging: Path) -> None:
    done = d2ls("predict", scene_alone, "-o", "https://example.org/maps/", "--model", tiny_weights)
    assert (done.exit_code, done.stdout) == (2, "")
    assert "https addresses are read, not written" in done.stderr
    place("memory://maps/")
    done = d2ls("predict", scene_alone, "-o", "memory://maps/", "--report", "page.html", "--model", tiny_weights)
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr == "Error: on an object store --report lies beside its map: give .html alone, not page.html\n"
