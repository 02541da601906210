"""Maps on an object store by the workers of a cluster, who share nothing else: the bytes are those of one process."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cluster_toys import Touchy

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


@pytest.mark.parametrize("workers", [1, 2])
def test_the_objects_are_the_files_of_one_process(
    crowd: Callable[[int], Any], bucket: SimpleNamespace, scene: Path, staging: Path, whole: dict[str, bytes],
    workers: int, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    output = f"{bucket.address}/map.tif"
    parts: list[str] = []

    def tell(news: dict[str, Any]) -> None:
        if news["status"] == "band":
            parts.extend(key for key in bucket.objects() if key.startswith("map.tif.parts/"))
            if len(set(parts)) > 1 and workers == 2:
                raise KeyboardInterrupt

    with crowd(workers) as client:
        client.run(os.environ.update, bucket.environment)
        if workers == 2:
            with pytest.raises(KeyboardInterrupt):
                list(predict_many(Touchy(0.02), [scene], output, client=client, tell=tell, **OPTIONS))
            kept = {key: content for key, content in bucket.objects().items() if key in parts}
            assert f"the map are kept in {output}.parts; the same command with --resume" in caplog.text
            assert not set(bucket.objects()) & set(NAMES)
            assert len(kept) >= 2
        result = predict_raster(
            Touchy(), scene, output, client=client, resume=workers == 2, **({} if workers == 2 else {"tell": tell}),
            **OPTIONS,
        )  # fmt: skip
        assert bucket.objects() == whole
        assert result.output == output
        assert (result.resumed_rows >= 100) == (workers == 2)
        assert len(set(parts)) > 1
        again = predict_raster(Touchy(), scene, output, client=client, resume=True, **OPTIONS)
        assert again.was_there
        assert again.areas == result.areas
        (failed,) = predict_many(Touchy(), [scene], "s3://no-such-bucket/", client=client, **OPTIONS)
        assert isinstance(failed, FailedScene)
        assert isinstance(failed.error, StoreError)
        assert left(client, staging) == []
