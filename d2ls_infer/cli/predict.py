"""`d2ls predict`: scenes in, class maps out."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from d2ls_infer.cli import cluster as on_cluster
from d2ls_infer.cli import options
from d2ls_infer.cli.results import show
from d2ls_infer.errors import UsageError

if TYPE_CHECKING:
    from d2ls_infer.batch import FailedScene
    from d2ls_infer.job import PredictResult
    from d2ls_infer.plan import Plan


@click.command()
@click.argument("scenes", metavar="SCENE...", nargs=-1, required=True)
@options.model
@options.manifest
@options.offline
@click.option(
    "-o", "--output", "output_text", metavar="PATH",
    help="File to write, or a folder for STEM_d2ls-MODEL.tif; also on an object store, s3://bucket/maps/map.tif, where "
    "all that does not end in .tif is a folder. By default beside each scene.",
)  # fmt: skip
@options.tiles
@click.option(
    "-b",
    "--batch-size",
    metavar="N|auto",
    help="Tiles at once; auto tries what is fastest.  [default: 1 on a CPU, else 8]",
)
@options.device
@options.precision
@options.smooth
@options.backend
@options.values
@options.part
@options.gsd
@options.tta
@click.option("--asset", metavar="NAME", help="Of STAC items: the asset to map.")
@options.outputs
@options.overwrite
@click.option(
    "--resume", is_flag=True,
    help="Go on where a run with the same options was stopped; maps that are finished are left as they are. For "
    "an object store: on the machine where it was stopped, or, with a cluster, on any.",
)  # fmt: skip
@click.option(
    "--max-memory", metavar="SIZE", help="What the process may take, such as 4G; what does not fit is refused."
)
@on_cluster.options
@click.option("--dry-run", is_flag=True, help="Say what would be done, and what it would take; write nothing.")
@click.option("--json", "as_json", is_flag=True, help="A line of JSON for each scene, in place of tables.")
@options.log_level
@click.option("-q", "--quiet", is_flag=True, help="No progress bar and no table.")
def predict(
    scenes: tuple[str, ...],
    model: str,
    manifest: Path | None,
    offline: bool,
    output_text: str | None,
    tile_size: int | None,
    overlap: str,
    blend: str,
    dictionary: str,
    batch_size: str | None,
    device: str,
    precision: str,
    smooth: bool,
    backend: str,
    bands: str | None,
    scale: str | None,
    nodata: str | None,
    window: str | None,
    bbox: str | None,
    bbox_crs: str | None,
    aoi: str | None,
    gsd: str | None,
    tta: str,
    asset: str | None,
    overwrite: bool,
    resume: bool,
    max_memory: str | None,
    cluster: str | None,
    devices: str | None,
    band_rows: int | None,
    stall: float | None,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    **products: Any,
) -> None:
    """Map each SCENE with a trained model.

    A SCENE is any raster that GDAL reads, by file or URL; a pattern, a folder, a list of scenes (@list.txt), or a STAC
    item.

    Writes a GeoTIFF of class indices on the scene's own grid, with colours and class names; 255 is nodata. Other
    rasters lie beside it, in steps of 1/250; 255 is nodata there too.
    """
    from d2ls_infer.weights import find_weights

    distributed = on_cluster.check(cluster, devices, band_rows=band_rows, stall=stall, vrt=products["vrt"] or None)
    # Before torch is loaded: a misspelt name is told at once.
    weights = find_weights(model, offline=offline, manifest=manifest)

    from d2ls_infer.batch import plan_many, predict_many
    from d2ls_infer.load import load_segmenter
    from d2ls_infer.raster import find_scenes
    from d2ls_infer.store import place

    settings: dict[str, Any] = {
        "tile_size": tile_size, "overlap": overlap, "blend": blend, "dictionary": dictionary, "batch_size": batch_size,
        "bands": bands, "scale": scale, "nodata": nodata, "window": window, "bbox": bbox, "bbox_crs": bbox_crs,
        "aoi": aoi, "gsd": gsd, "tta": tta, "max_memory": max_memory, **products,
    }  # fmt: skip
    network: dict[str, Any] = {"device": device, "precision": precision, "backend": backend, "smooth": smooth}
    sources = find_scenes(scenes, asset=asset)
    # As Ctrl+C: what is done is kept.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    output = place(output_text) if output_text else None
    if output_text and output and output_text.endswith(("/", os.sep)) and not output.is_dir():
        raise UsageError(f"no such folder: {output_text}")
    common: dict[str, Any] = {
        "overwrite": overwrite,
        "load": partial(load_segmenter, **network),
        **settings,
    }
    results: Iterator[PredictResult | Plan | FailedScene]
    if dry_run:
        results = plan_many(weights, sources, output, **(common | {"overwrite": overwrite or resume}))
    elif distributed:
        results = on_cluster.map_on_cluster(
            weights, sources, output, cluster=cluster, devices=devices, band_rows=band_rows, stall=stall,
            as_json=as_json, quiet=quiet, resume=resume, **common,
        )  # fmt: skip
    else:
        follow = partial(options.progress_bar, unit="tile", quiet=quiet or as_json)
        results = predict_many(weights, sources, output, resume=resume, follow=follow, **common)
    show(results, len(sources), as_json=as_json, quiet=quiet)
