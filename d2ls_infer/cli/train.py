"""`d2ls train`: labelled images -> a weights file for --model."""

from __future__ import annotations

import logging
import math
import os
from pathlib import Path

import click

from d2ls_infer.cli import options
from d2ls_infer.errors import UsageError


@click.command()
@click.option("--dataset", required=True, metavar="NAME", help="A benchmark, or folder for images/ and masks/.")
@click.option("--root", type=click.Path(path_type=Path), help="Where its images are.  [default: data/NAME]")
@click.option("--split", default="train", show_default=True, help="Images to train on: train, train+val, all.")
@click.option("--val-split", default="val", show_default=True, help="Images to measure on; none for no measuring.")
@options.classes
@options.folder
@click.option("--gsd", type=float, metavar="METRES", help="For --dataset folder: size of a pixel on the ground.")
@click.option(
    "--terms", metavar="LICENCE", help="For --dataset folder: what the weights may be used for, best as SPDX has it."
)
@click.option(
    "--config",
    "configs",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="FILE.toml",
    help="Settings over the paper's; given twice, the second over the first.",
)
@click.option("--backbone", help="timm name of the backbone, in place of the config's.")
@click.option("--backbone-weights", type=click.Path(path_type=Path), help="Its weights; else timm fetches them.")
@click.option("--init", metavar="NAME|FILE", help="Model to start from; classes of the same names are kept.")
@options.manifest
@options.offline
@click.option("--epochs", type=int, help="In place of the config's.")
@click.option("--batch-size", type=int, help="Crops a step, in place of the config's.")
@click.option("--devices", default="auto", show_default=True, help="How many, or which: 2; 0,1; auto.")
@click.option("--strategy", default="auto", show_default=True, help="Lightning's, over several devices: ddp, fsdp.")
@click.option(
    "--precision",
    default="32-true",
    show_default=True,
    type=click.Choice(["32-true", "bf16-mixed", "16-mixed"]),
    help="Number type of the network's products.",
)
@click.option("--workers", type=int, default=2, show_default=True, help="Processes that make crops.")
@click.option("--resume", is_flag=True, help="Go on from the output's last whole epoch.")
@click.option("--output", type=click.Path(path_type=Path), help="Folder of the run.  [default: runs/NAME]")
@options.quiet
def train(
    dataset: str,
    root: Path | None,
    split: str,
    val_split: str,
    classes: Path | None,
    bands: tuple[str, ...] | None,
    value_range: tuple[float, float] | None,
    fraction: float | None,
    column: str | None,
    background: str | None,
    gsd: float | None,
    terms: str | None,
    configs: tuple[Path, ...],
    backbone: str | None,
    backbone_weights: Path | None,
    init: str | None,
    manifest: Path | None,
    offline: bool,
    epochs: int | None,
    batch_size: int | None,
    devices: str,
    strategy: str,
    precision: str,
    workers: int,
    resume: bool,
    output: Path | None,
    quiet: bool,
) -> None:
    """Train D2LS on labelled images, by the paper's settings unless told otherwise.

    OUTPUT gets NAME.safetensors, measured and ready for --model, curves.json and curves.png, and the checkpoint that
    --resume goes on from. Needs pip install "d2ls-infer[train]".
    """
    if init is not None and (backbone is not None or backbone_weights is not None):
        raise UsageError("--init brings its own backbone; leave out --backbone and --backbone-weights")
    if workers < 0:
        raise UsageError(f"--workers is at least 0, got {workers}")
    if gsd is not None and not 0 < gsd < math.inf:
        raise UsageError(f"--gsd is a number of metres above 0, got {gsd:g}")
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"  # timm fetches backbones by the same client, which reads this when imported
    from d2ls_infer.weights import find_weights

    source = None if init is None else find_weights(init, offline=offline, manifest=manifest)

    from d2ls_infer.train import RunOptions, default_config, read_config
    from d2ls_infer.train import train as run

    # timm warns of the classifier that the backbone does without, Lightning advertises.
    logging.getLogger("timm").setLevel(logging.ERROR)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    if not quiet:
        logging.getLogger("d2ls_infer").setLevel(logging.INFO)
    data = options.open_dataset(
        dataset,
        classes,
        None if source is None else source.description,
        bands=bands,
        value_range=value_range,
        gsd_m=gsd,
        fraction=fraction,
        column=column,
        background=background,
        terms=terms,
    )
    settings = default_config(dataset)
    for config in configs:
        settings = read_config(config, settings)
    given = {"backbone": backbone, "epochs": epochs, "batch_size": batch_size}
    settings = settings.updated({name: value for name, value in given.items() if value is not None})
    root = root or Path("data") / dataset
    file = run(
        data,
        data.images(root, split),
        [] if val_split == "none" else data.images(root, val_split),
        settings,
        RunOptions(
            output=output or Path("runs") / dataset,
            devices=int(devices) if devices.isdecimal() else devices,
            strategy=strategy,
            precision=precision,
            workers=workers,
            resume=resume,
            progress=not quiet,
        ),
        backbone_file=backbone_weights,
        init=source,
        validated_on=val_split,
    )
    click.echo(file)
