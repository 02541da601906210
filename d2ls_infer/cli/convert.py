"""`d2ls convert`: a checkpoint of the authors' code -> a weights file that describes itself."""

from __future__ import annotations

from pathlib import Path

import click

from d2ls_infer.cli import options
from d2ls_infer.errors import OutputExistsError, UsageError, WeightsError

# What the authors' training code normalises by: ImageNet's values, on 0..1 of 8-bit images.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("output", metavar="OUT.safetensors", type=click.Path(path_type=Path))
@click.option("--classes", required=True, metavar="NAME,NAME,...", help="Class names in index order.")
@click.option("--colors", metavar="#RRGGBB,...", help="A colour per class; by default they are spread over the hues.")
@click.option("--bands", default="red,green,blue", show_default=True, help="Names of the bands, in channel order.")
@click.option("--gsd", type=float, metavar="METRES", help="Ground sampling distance of the training data.")
@click.option("--license", "license_", default="unknown", show_default=True, help="Licence of the weights.")
@click.option("--training-data", default="unknown", show_default=True, help="What the weights were trained on.")
@options.overwrite
def convert(
    checkpoint: Path,
    output: Path,
    classes: str,
    colors: str | None,
    bands: str,
    gsd: float | None,
    license_: str,
    training_data: str,
    overwrite: bool,
) -> None:
    """Make CHECKPOINT, a Lightning checkpoint or state dict of the authors' code, into a weights file for --model.

    Backbone, number of classes and of stages are read from the tensors' shapes. Nothing in the file is executed.
    """
    if output.is_dir():
        raise UsageError(f"{output} is a folder, not a file to write")
    if output.exists() and checkpoint.exists() and output.samefile(checkpoint):
        raise UsageError(f"the output is the checkpoint itself: {output}")
    if output.exists() and not overwrite:
        raise OutputExistsError(f"{output} exists; give --overwrite to replace it")
    if not output.resolve().parent.is_dir():
        raise UsageError(f"no such folder: {output.parent}")

    from d2ls_infer.labels import LabelMap, parse_color
    from d2ls_infer.legacy import load_legacy
    from d2ls_infer.manifest import ModelDescription
    from d2ls_infer.nn import count_parameters, weights_of
    from d2ls_infer.weights import save_weights

    names = [name.strip() for name in classes.split(",")]
    labels = LabelMap.of(names, [parse_color(color.strip()) for color in colors.split(",")] if colors else None)
    band_names = tuple(name.strip() for name in bands.split(","))
    network = load_legacy(checkpoint)
    config = network.config
    if len(names) != config.num_classes:
        raise UsageError(f"{checkpoint} has {config.num_classes} classes, but --classes names {len(names)}")
    if config.in_channels != len(IMAGENET_MEAN):
        raise UsageError(f"{checkpoint} takes {config.in_channels} bands; the authors' normalisation is for 3")
    if len(band_names) != config.in_channels:
        raise UsageError(f"{checkpoint} takes {config.in_channels} bands, but --bands names {len(band_names)}")
    try:
        description = ModelDescription(
            config=config.to_dict(),
            labels=labels,
            bands=band_names,
            value_range=(0.0, 255.0),
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
            gsd_m=gsd,
            metrics=(),
            license=license_,
            training_data=training_data,
            source=f"converted from {checkpoint.name}",
        )
    except WeightsError as error:
        raise UsageError(str(error)) from error
    save_weights(output, weights_of(network), description)
    click.echo(
        f"{output}: {config.backbone}, {config.num_classes} classes, {count_parameters(network) / 1e6:.2f} M parameters"
    )
