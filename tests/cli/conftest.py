"""The command in this process and as a program of its own."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from d2ls_infer.cli import main


@pytest.fixture
def d2ls() -> Callable[..., Result]:
    """Run the command in this process. An exception that no user can cause is passed on."""

    def run(*arguments: str | Path) -> Result:
        result = CliRunner().invoke(main, [str(argument) for argument in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run


@pytest.fixture
def run_d2ls() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the installed command as a user does, with all that the libraries below say on their own."""
    command = shutil.which("d2ls", path=sysconfig.get_path("scripts"))
    assert command is not None, "the package is not installed: pip install -e '.[dev]'"

    def run(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [command, *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=cwd,
            env={**os.environ, "PYTHONWARNINGS": "default"},
            check=False,
        )

    return run


@pytest.fixture
def scene_alone(tmp_path: Path, write_raster: Callable[..., Path], pixels: Callable[..., np.ndarray]) -> Path:
    """Three bands of 400 x 120 pixels, alone in a folder, some seconds old."""
    folder = tmp_path / "scenes"
    folder.mkdir()
    path = write_raster(folder / "scene.tif", pixels(3, 400, 120))
    made = time.time() - 5  # stores tell in whole seconds when an object was made, and a map is newer than its scene
    os.utime(path, (made, made))
    return path


@pytest.fixture(autouse=True)
def same_signals_and_levels() -> Iterator[None]:
    """The command changes them for its process, which here is that of all tests."""
    handler = signal.getsignal(signal.SIGTERM)
    loggers = [logging.getLogger(name) for name in (None, "d2ls_infer", "distributed")]
    levels = [logger.level for logger in loggers]
    yield
    signal.signal(signal.SIGTERM, handler)
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
