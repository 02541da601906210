"""A real scheduler and real workers, as processes on loopback."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("dask")
pytest.importorskip("distributed")


@pytest.fixture(scope="session", autouse=True)
def loading(forked: Any) -> None:
    """What workers are made of is loaded while tests go on that need none."""


@pytest.fixture(scope="session")
def crowd(forked: Any) -> Callable[[int], Any]:
    """A context manager that gives a client of so many workers of its own."""
    from d2ls_infer.cluster.clients import local_workers

    return local_workers


@pytest.fixture(scope="module")
def client(crowd: Callable[[int], Any]) -> Iterator[Any]:
    """A client of two workers, for tests that leave them as they are."""
    with crowd(2) as client:
        yield client


@pytest.fixture
def scene(scene_with_holes: Path) -> Path:
    return scene_with_holes


@pytest.fixture(scope="session")
def contents() -> Callable[[Path], dict[str, bytes]]:
    """The files of a folder, but those that say when they were made."""
    return lambda folder: {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix not in (".gpkg", ".html")}


@pytest.fixture
def both_ways(scene: Path, tmp_path: Path) -> Callable[..., tuple[Path, Any, Path, Any]]:
    """Map the scene in one process and by workers: the folder and what came of it, of either.

    options: of both; more: of the workers alone.
    """
    from cluster_toys import Touchy

    from d2ls_infer import PredictResult, predict_many, predict_raster
    from d2ls_infer.cluster import ClusterOptions

    def mapped(
        client: Any, number: int, band_rows: int | None, options: dict[str, Any], **more: Any
    ) -> tuple[Path, Any, Path, Any]:
        one, many = tmp_path / f"one {number}", tmp_path / f"many {number}"
        one.mkdir()
        many.mkdir()
        whole = predict_raster(Touchy(), scene, one, **options)
        cluster = ClusterOptions(band_rows=band_rows)
        (made,) = predict_many(Touchy(), [scene], many, client=client, cluster=cluster, **options, **more)
        assert isinstance(made, PredictResult), made
        return one, whole, many, made

    return mapped


@pytest.fixture
def quiet() -> Iterator[None]:
    """Dask tells of lost workers at length; what it says of those that were killed here is no matter."""
    logger = logging.getLogger("distributed")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(before)
