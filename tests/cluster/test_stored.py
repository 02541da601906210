"""Maps on an object store by the workers of a cluster, who share nothing else: the bytes are those of one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cluster_toys import Touchy, put_into_environment

from d2ls_infer import FailedScene, predict_many, predict_raster
from d2ls_infer.cluster import ClusterOptions
from d2ls_infer.errors import StoreError

OPTIONS: dict[str, Any] = {"tile_size": 32, "overlap": 8, "confidence": True, "cluster": ClusterOptions(band_rows=50)}
NAMES = ["map.qml", "map.tif", "map.tif.aux.xml", "map_confidence.tif"]


@pytest.fixture
def whole(scene: Path, tmp_path: Path) -> dict[str, bytes]:
    """The files of a run in one process."""
    options = {name: value for name, value in OPTIONS.items() if name != "cluster"}
    predict_raster(Touchy(), scene, tmp_path / "map.tif", **options)
    return {name: (tmp_path / name).read_bytes() for name in NAMES}


def left(client: Any, staging: Path) -> list[str]:
    """The files that are left where the client and the workers make what they upload."""

    def of_worker(dask_worker: Any) -> list[str]:
        return [str(path) for path in Path(dask_worker.local_directory).rglob("*.tif*/*")]

    files = [str(path) for path in staging.rglob("*") if path.is_file()]
    return files + [path for paths in client.run(of_worker).values() for path in paths]


def bands(news: list[dict[str, Any]]) -> int:
    return sum(item["status"] == "band" for item in news)


def test_the_objects_are_the_files_of_one_process(
    crowd: Callable[[int], Any], bucket: SimpleNamespace, scene: Path, staging: Path, whole: dict[str, bytes]
) -> None:
    """Also where the map could not be uploaded at first: then its pieces stay."""
    import fsspec
    import s3fs

    class Refusing(s3fs.S3FileSystem):  # type: ignore[misc, name-defined]
        async def _put_file(self, lpath: str, rpath: str, *arguments: Any, **options: Any) -> None:
            if rpath.endswith("map.tif"):
                raise PermissionError("Access Denied")
            await super()._put_file(lpath, rpath, *arguments, **options)

    output, news = f"{bucket.address}/maps/map.tif", []
    with crowd(1) as client:
        client.run(put_into_environment, bucket.environment)
        fsspec.register_implementation("s3", Refusing, clobber=True)  # of this process, not of the worker
        try:
            (failed,) = predict_many(Touchy(), [scene], output, client=client, tell=news.append, **OPTIONS)
        finally:
            fsspec.register_implementation("s3", s3fs.S3FileSystem, clobber=True)
        assert isinstance(failed, FailedScene)
        assert str(failed.error) == f"cannot use {output}: Access Denied"
        assert len(bucket.objects()) == bands(news) == 6
        assert all(key.startswith("maps/map.tif.parts/") for key in bucket.objects())
        news.clear()
        result = predict_raster(Touchy(), scene, output, client=client, resume=True, tell=news.append, **OPTIONS)
        assert bucket.objects() == {f"maps/{name}": content for name, content in whole.items()}
        assert (result.output, result.resumed_rows, bands(news)) == (output, 300, 0)
        assert left(client, staging) == []


def test_a_run_that_is_stopped_goes_on_with_its_pieces(
    crowd: Callable[[int], Any], bucket: SimpleNamespace, scene: Path, staging: Path, whole: dict[str, bytes],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    output, news = f"{bucket.address}/map.tif", []

    def stop(told: dict[str, Any]) -> None:
        news.append(told)
        if bands(news) == 2:
            raise KeyboardInterrupt

    with crowd(2) as client:
        client.run(put_into_environment, bucket.environment)
        with pytest.raises(KeyboardInterrupt):
            list(predict_many(Touchy(0.02), [scene], output, client=client, tell=stop, **OPTIONS))
        assert f"the map are kept in {output}.parts; the same command with --resume" in caplog.text
        assert len(bucket.objects()) >= 2
        assert not set(bucket.objects()) & set(NAMES)
        news.clear()
        result = predict_raster(Touchy(), scene, output, client=client, resume=True, tell=news.append, **OPTIONS)
        assert bucket.objects() == whole
        assert result.resumed_rows >= 100
        assert bands(news) <= 4
        again = predict_raster(Touchy(), scene, output, client=client, resume=True, **OPTIONS)
        assert (again.was_there, again.areas) == (True, result.areas)
        (failed,) = predict_many(Touchy(), [scene], "s3://no-such-bucket/", client=client, **OPTIONS)
        assert isinstance(failed, FailedScene)
        assert isinstance(failed.error, StoreError)
        assert left(client, staging) == []
