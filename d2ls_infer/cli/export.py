"""`d2ls export`: a model -> one file for OpenVINO, ONNX Runtime or torch, and how far its labels stay the same."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from d2ls_infer.cli import options

if TYPE_CHECKING:
    from d2ls_infer.exported import Agreement
    from d2ls_infer.labels import LabelMap


@click.command()
@options.model
@options.manifest
@options.offline
@click.option(
    "--format", "format_", type=click.Choice(["onnx", "openvino", "torch.export"]), required=True,
    help="An .onnx, an .xml with its .bin, or a .pt2.",
)  # fmt: skip
@click.option(
    "--tile-size", type=int, help="Side of the tiles it takes, in pixels.  [default: as the model is best mapped by]"
)
@click.option(
    "--precision", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True,
    help="Number type of the network's products; bfloat16 not with onnx.",
)  # fmt: skip
@click.option("--int8", is_flag=True, help="The encoder's products in int8, calibrated on real tiles; with openvino.")
@options.smooth
@click.option("--calibrate", metavar="SCENE", multiple=True, help="Scenes whose tiles --int8 is calibrated on.")
@click.option("--scene", "scenes", metavar="SCENE", multiple=True, help="Scenes to compare labels on.")
@click.option("--tiles", type=click.IntRange(1), default=16, show_default=True, help="Tiles to take of all scenes.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="File to write.  [default: MODEL and the format's ending]"
)
@options.overwrite
@options.log_level
def export(
    model: str,
    manifest: Path | None,
    offline: bool,
    format_: str,
    tile_size: int | None,
    precision: str,
    int8: bool,
    smooth: bool,
    calibrate: tuple[str, ...],
    scenes: tuple[str, ...],
    tiles: int,
    output: Path | None,
    overwrite: bool,
) -> None:
    """Write a model as a file for another runtime: raw pixel values in, probabilities out.

    One image of TILE-SIZE squared, float32, at a time. Labels, bands, value range, ground sampling distance, licence
    and the sha256 of the weights stand in the file's metadata, and `d2ls predict --model` takes the .onnx or .xml.
    With --scene or --calibrate its labels are compared with those of the network in float32.
    """
    from d2ls_infer.weights import find_weights

    weights = find_weights(model, offline=offline, manifest=manifest)

    from d2ls_infer.exported import ENDINGS, check_export, export_model, sample_tiles
    from d2ls_infer.raster import find_scenes

    tile_size = weights.description.tile_size if tile_size is None else tile_size
    output = output or Path(weights.name + ENDINGS[format_])
    check_export(output, file_format=format_, precision=precision, tile_size=tile_size, int8=int8, overwrite=overwrite)
    learnt = find_scenes(calibrate) if calibrate else []
    compared = find_scenes(scenes) if scenes else learnt
    agreement = export_model(
        weights,
        output,
        file_format=format_,
        precision=precision,  # type: ignore[arg-type]
        tile_size=tile_size,
        calibrate=sample_tiles(weights.description, learnt, tile_size, tiles),
        tiles=sample_tiles(weights.description, compared, tile_size, tiles),
        int8=int8,
        smooth=smooth,
        overwrite=overwrite,
    )
    click.echo(f"{output}: {weights.name}, tiles of {tile_size} px, {'int8' if int8 else precision}")
    click.echo(
        "labels were not compared: give --scene SCENE"
        if agreement is None
        else show(agreement, weights.description.labels)
    )


def show(agreement: Agreement, labels: LabelMap) -> str:
    """How far the labels are the same, and whether that is enough."""
    rows = [[name, f"{100 * off:+.4f}"] for name, off in zip(labels.names, agreement.areas, strict=True)]
    same = f"{100 * agreement.same:.4f} % of {agreement.pixels} labels are those of the network in float32"
    goal = f"{100 * agreement.goal:g} % of the labels, and areas within {100 * agreement.most_area:g} %"
    verdict = f"as it should be: {goal}" if agreement.is_good else f"too few: it should be {goal}"
    return "\n".join([same, options.table(["class", "area off by, % of all pixels"], rows, right=[1]), verdict])
