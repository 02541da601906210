"""A real scheduler and real workers, as processes on loopback."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest

dask = pytest.importorskip("dask")
pytest.importorskip("distributed")

sys.path.insert(0, str(Path(__file__).parent))  # which workers take over: they import the toys from here


dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"})


@contextmanager
def workers(count: int) -> Iterator[Any]:
    from d2ls_infer.cluster.clients import local_workers

    # Workers are forked from a process that has loaded everything: they are there in a moment. Dask would have it load
    # less, but it is running by then.
    multiprocessing.set_forkserver_preload(["distributed", "d2ls_infer.cluster.worker", "rasterio", "cluster_toys"])
    forkserver.ensure_running()
    with local_workers(count) as client:
        yield client


@pytest.fixture(scope="session")
def crowd() -> Callable[[int], Any]:
    """A context manager that gives a client of so many workers of its own."""
    return workers


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    """A client of two workers, for tests that leave them as they are."""
    with workers(2) as client:
        yield client


@pytest.fixture
def scene(scene_with_holes: Path) -> Path:
    return scene_with_holes


@pytest.fixture(scope="session")
def contents() -> Callable[[Path], dict[str, bytes]]:
    """The files of a folder, but those that say when they were made."""
    return lambda folder: {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix not in (".gpkg", ".html")}
