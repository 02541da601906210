"""Two runs do not make one map."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from torch import Tensor

from d2ls_infer import predict_many, predict_raster
from d2ls_infer.alone import alone
from d2ls_infer.batch import FailedScene
from d2ls_infer.errors import OutputBusyError, RasterError
from d2ls_infer.plan import plan_raster

Write = Callable[..., Path]
Pixels = Callable[..., np.ndarray]

HOLDER = """
import sys
from pathlib import Path
from d2ls_infer.alone import alone

with alone(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def scene(tmp_path: Path, write_raster: Write, pixels: Pixels) -> Path:
    return write_raster(tmp_path / "scene.tif", pixels(3, 60, 50))


def test_the_lock_is_beside_the_map_and_gone_when_it_is_made(tmp_path: Path) -> None:
    output, other = tmp_path / "map.tif", tmp_path / "other.tif"
    for _ in range(2):
        with suppress(KeyError), alone(output):
            with pytest.raises(OutputBusyError, match=r"is making .*map\.tif, it holds .*map\.tif\.lock"):
                alone(output).__enter__()
            with alone(other):
                assert sorted(path.name for path in tmp_path.iterdir()) == ["map.tif.lock", "other.tif.lock"]
            raise KeyError
        assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(number: int) -> None:
        def acquire(lock: FileLock) -> None:
            Path(lock.lock_file).touch()
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(FileLock, "acquire", acquire)

    refuse(errno.ENOLCK)
    with alone(tmp_path / "map.tif"):
        pass
    assert f"{tmp_path}: there are no locks on this file system" in caplog.text
    assert list(tmp_path.iterdir()) == []
    refuse(errno.ENOSPC)
    with pytest.raises(RasterError, match=r"cannot write .*map\.tif\.lock: No space left on device"):
        alone(tmp_path / "map.tif").__enter__()


@pytest.mark.skipif(sys.platform == "win32", reason="there processes are not killed by signals")
def test_a_process_that_was_killed_holds_nothing(tmp_path: Path) -> None:
    output = tmp_path / "map.tif"
    command = [sys.executable, "-c", HOLDER, str(output)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(OutputBusyError):
            alone(output).__enter__()
        holder.send_signal(signal.SIGKILL)
    assert [path.name for path in tmp_path.iterdir()] == ["map.tif.lock"]
    with alone(output):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("how", [{}, {"overwrite": True}, {"resume": True}])
def test_a_second_run_is_refused_and_the_first_one_untouched(
    scene: Path, tmp_path: Path, fakes: SimpleNamespace, how: dict[str, Any]
) -> None:
    options: dict[str, Any] = {"tile_size": 16, "overlap": 4, "confidence": True}
    refused: list[FailedScene] = []

    class Interrupted(fakes.PerPixel):  # type: ignore[misc, name-defined]
        sha256 = "1" * 64

        def score(self, batch: Tensor) -> Tensor:
            if not refused:
                plan_raster(fakes.PerPixel(), scene, tmp_path / "map.tif", overwrite=True, tile_size=64)
                with pytest.raises(OutputBusyError, match="another run is making"):
                    predict_raster(fakes.PerPixel(), scene, tmp_path / "map.tif", **how, **options)
                refused.extend(predict_many(fakes.PerPixel(), [scene], tmp_path / "map.tif", **how, **options))
            scores: Tensor = super().score(batch)
            return scores

    made = predict_raster(Interrupted(), scene, tmp_path / "map.tif", **options)
    (failed,) = refused
    assert isinstance(failed.error, OutputBusyError)
    assert failed.error.exit_code == 1
    alike = predict_raster(Interrupted(), scene, tmp_path / "alike.tif", **options)
    for name, path in made.files.items():
        assert Path(path).read_bytes() == Path(alike.files[name]).read_bytes()
    assert not [path for path in tmp_path.iterdir() if path.suffix in (".lock", ".partial", ".journal")]
