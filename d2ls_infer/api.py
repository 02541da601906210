"""What Python users call: the pipeline in this process, or, with a client of Dask, by its workers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2ls_infer import batch, predict
from d2ls_infer.batch import FailedScene, Model
from d2ls_infer.job import PredictResult
from d2ls_infer.predict import Progress
from d2ls_infer.segmenter import Segmenter

if TYPE_CHECKING:
    from distributed import Client
    from xarray import DataArray, Dataset


def predict_raster(
    model: Segmenter | str | Path,
    source: str | Path,
    output: str | Path | None = None,
    *,
    client: Client | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> PredictResult:
    """Map a raster of any size: a uint8 GeoTIFF of class indices on the raster's own grid, 255 = nodata.

    options: the fields of `d2ls_infer.options.PredictOptions`. See `d2ls_infer.predict.predict_raster`, also for what
    it raises. client: of a Dask cluster, whose workers do it, band by band, see `d2ls_infer.cluster.map_scenes`; the
    files are the same to the last byte. Without a `progress` that counts tiles: the dashboard of Dask shows bands.
    """
    if client is None:
        return predict.predict_raster(
            model, source, output, overwrite=overwrite, resume=resume, progress=progress, **options
        )
    from d2ls_infer.cluster import map_scenes

    (result,) = map_scenes(client, model, [source], output, overwrite=overwrite, resume=resume, **options)
    if isinstance(result, FailedScene):
        raise result.error
    return result


def predict_many(
    model: Model,
    sources: Iterable[str | Path],
    output: str | Path | None = None,
    *,
    client: Client | None = None,
    **options: Any,
) -> Iterator[PredictResult | FailedScene]:
    """Map each of the scenes, see `d2ls_infer.batch.predict_many`; gives a result for each, or what is wrong with it.

    The latter come first, of all that can be told before the first is mapped: see `.source` for which it is.
    options: overwrite, resume, and the fields of `d2ls_infer.options.PredictOptions`. client: of a Dask cluster, whose
    workers do it, see `d2ls_infer.cluster.map_scenes`; results come as they are ready.
    """
    if isinstance(sources, str | Path):  # not its letters
        sources = [sources]
    if client is None:
        return batch.predict_many(model, sources, output, **options)
    from d2ls_infer.cluster import map_scenes

    return map_scenes(client, model, sources, output, **options)


def predict_dataarray(model: Segmenter | str | Path, array: DataArray, **options: Any) -> DataArray | Dataset:
    """Map a georeferenced DataArray (bands, rows, columns) lazily, by Dask.

    options: tile_size, overlap, blend, dictionary, batch_size as those of `predict_raster`; confidence, chunk_rows,
    device, precision and smooth, see `d2ls_infer.cluster.dataarray.predict_dataarray`, also for nodata and for what is
    raised. Values are taken on the model's range (0 to 255 of most); bring others to it beforehand.
    """
    from d2ls_infer.cluster import dataarray

    return dataarray.predict_dataarray(model, array, **options)
