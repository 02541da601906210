"""`d2ls predict`: scenes in, class maps out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from d2ls_infer.cli import options
from d2ls_infer.errors import UsageError

if TYPE_CHECKING:
    from d2ls_infer.predict import PredictResult


@click.command()
@click.argument("scenes", metavar="SCENE...", nargs=-1, required=True)
@options.model
@options.manifest
@options.offline
@click.option(
    "-o", "--output", "output_text", metavar="PATH",
    help="File to write, or a folder for STEM_d2ls-MODEL.tif. By default beside each scene.",
)  # fmt: skip
@options.tiles
@click.option("-b", "--batch-size", type=int, help="Tiles at once.  [default: 1 on a CPU, else 8]")
@options.device
@options.precision
@click.option(
    "--bands", metavar="N,N,...",
    help="The scene's bands for the model's, from 1, or by name.  [default: as the file marks them, else in order]",
)  # fmt: skip
@click.option(
    "--scale", metavar="MIN,MAX|pN,pN",
    help="Raw values, or percentiles of the scene, that become the ends of the model's value range.",
)  # fmt: skip
@click.option("--nodata", metavar="VALUE|none", help="In place of the file's nodata value; none: all values are valid.")
@options.part
@click.option(
    "--gsd", metavar="METRES|auto",
    help="Ground sampling distance to read the scene at, auto for the model's. The map keeps the scene's own grid.",
)  # fmt: skip
@options.tta
@click.option("--asset", metavar="NAME", help="Of a STAC item: the asset to map.")
@options.outputs
@options.overwrite
@click.option("-q", "--quiet", is_flag=True, help="No progress bar and no table.")
def predict(
    scenes: tuple[str, ...],
    model: str,
    manifest: Path | None,
    offline: bool,
    output_text: str | None,
    tile_size: int,
    overlap: str,
    blend: str,
    batch_size: int | None,
    device: str,
    precision: str,
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

    # Before torch is loaded: a misspelt name is told at once.
    weights = find_weights(model, offline=offline, manifest=manifest)

    from d2ls_infer.outputs import check_outputs
    from d2ls_infer.predict import PredictOptions, default_output, load_segmenter, predict_raster
    from d2ls_infer.raster import find_scenes

    settings: dict[str, Any] = {
        "tile_size": tile_size, "overlap": overlap, "blend": blend, "batch_size": batch_size,
        "bands": bands, "scale": scale, "nodata": nodata, "window": window, "bbox": bbox, "bbox_crs": bbox_crs,
        "aoi": aoi, "gsd": gsd, "tta": tta, **products,
    }  # fmt: skip
    plan = PredictOptions(**settings)
    scenes = tuple(find_scenes(scenes, asset=asset))
    output = Path(output_text) if output_text else None
    if output_text and output_text.endswith(("/", os.sep)) and not Path(output_text).is_dir():
        raise UsageError(f"no such folder: {output_text}")
    folder = output if output is not None and output.is_dir() else None
    if output is not None and folder is None and output.suffix.lower() not in (".tif", ".tiff"):
        raise UsageError(f"{output} is no folder, and a map is a GeoTIFF: name it .tif, or make the folder first")
    if len(scenes) > 1 and output is not None and folder is None:
        raise UsageError(f"{len(scenes)} scenes, but one output: {output} is not a folder")
    outputs = [output if output and not folder else default_output(scene, weights.name, folder) for scene in scenes]
    files = [path for output in outputs for path in plan.files(output).values()]
    places = [path.resolve() for path in files]
    if twice := {str(path) for path, place in zip(files, places, strict=True) if places.count(place) > 1}:
        raise UsageError(f"several scenes would be written to {', '.join(sorted(twice))}")
    # What can be wrong with the last scene is said before the first one takes its hours.
    for scene, path in zip(scenes, outputs, strict=True):
        known = weights.description
        with plan.open(scene, bands=known.bands, value_range=known.value_range) as opened:
            plan.seen(opened, known.gsd_m)
            classes = len(known.labels)
            check_outputs(path, plan, source=scene, overwrite=overwrite, scene=opened, classes=classes)
    segmenter = load_segmenter(weights, device=device, precision=precision)  # type: ignore[arg-type]
    for scene, path in zip(scenes, outputs, strict=True):
        with options.progress_bar(Path(scene).name, unit="tile", quiet=quiet) as bar:
            result = predict_raster(segmenter, scene, path, overwrite=overwrite, progress=bar, **settings)
        if not quiet:
            click.echo(summary(result))


def summary(result: PredictResult) -> str:
    """Where the map is, how long it took, and the areas of its classes."""
    total_m2 = sum(area.area_m2 or 0 for area in result.areas)
    known = all(area.area_m2 is not None for area in result.areas)
    unit, size_m2 = ("km2", 1e6) if total_m2 >= 1e7 else ("ha", 1e4)
    rows = [
        [area.name, f"{(area.area_m2 or 0) / size_m2:,.2f}" if known else f"{area.pixels:,}", f"{100 * area.share:.1f}"]
        for area in result.areas
    ]
    skipped = f", {result.skipped} without valid pixels" if result.skipped else ""
    others = [str(path) for name, path in result.files.items() if name != "classes"]
    lines = [f"{result.output}  ({result.tiles} tiles{skipped}, {result.seconds['total']:.1f} s)", *others]
    return "\n".join([*lines, options.table(["class", unit if known else "pixels", "%"], rows, right=(1, 2))])
