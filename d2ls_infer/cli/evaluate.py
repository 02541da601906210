"""`d2ls evaluate`: a model against labelled images."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from d2ls_infer.cli import options
from d2ls_infer.errors import MissingFileError, OutputExistsError, UsageError
from d2ls_infer.files import write_whole

if TYPE_CHECKING:
    import numpy as np

    from d2ls_infer.datasets import Dataset, LabelledImage
    from d2ls_infer.evaluate import Evaluation


@click.command()
@click.option("--dataset", required=True, metavar="NAME", help="A benchmark, or folder for images/ and masks/.")
@click.option("--root", type=click.Path(path_type=Path), help="Where its images are.  [default: data/NAME]")
@click.option("-m", "--model", metavar="NAME|FILE", help="Model, see predict --help.  [default: the dataset's name]")
@options.manifest
@options.offline
@click.option("--split", default=None, help="train, val, test or all.  [default: test if it is labelled, else val]")
@options.classes
@options.folder
@options.tiles
@options.tta
@options.device
@options.precision
@options.smooth
@click.option("--boundary", type=int, default=3, show_default=True, help="Pixels near a boundary, for boundary IoU.")
@click.option("--report", type=click.Path(path_type=Path), help="Folder for report.json and report.html.")
@click.option(
    "--submission", type=click.Path(path_type=Path), help="Folder for the maps, as the test servers take them."
)
@options.overwrite
@options.log_level
@options.quiet
def evaluate(
    dataset: str,
    root: Path | None,
    model: str | None,
    manifest: Path | None,
    offline: bool,
    split: str | None,
    classes: Path | None,
    bands: tuple[str, ...] | None,
    value_range: tuple[float, float] | None,
    fraction: float | None,
    column: str | None,
    background: str | None,
    tile_size: int | None,
    overlap: str,
    blend: str,
    dictionary: str,
    tta: str,
    device: str,
    precision: str,
    smooth: bool,
    boundary: int,
    report: Path | None,
    submission: Path | None,
    overwrite: bool,
    quiet: bool,
) -> None:
    """Map the labelled images of a benchmark, whole, and compare: IoU, F1, precision, recall, confusion, boundaries.

    Means leave out the classes that the benchmark leaves out (clutter for ISPRS). Where a set has labels without class
    boundaries too (ISPRS), both are counted in one pass.
    """
    from d2ls_infer.datasets import check_server, find_dataset
    from d2ls_infer.weights import find_weights

    if dataset != "folder" or classes is None:
        find_dataset(dataset)  # what it lacks is told before the model's file is read
    elif model is None:
        raise UsageError("--dataset folder wants --model, a name or a weights file")
    weights = find_weights(model or dataset, offline=offline, manifest=manifest)
    data = options.open_dataset(
        dataset,
        classes,
        weights.description,
        bands=bands,
        value_range=value_range,
        fraction=fraction,
        column=column,
        background=background,
    )
    if submission is not None:
        check_server(data)
    for folder in (report, submission):
        check_folder(folder, overwrite=overwrite)
    images, split = find_images(data, root or Path("data") / dataset, split, labelled=submission is None)

    from d2ls_infer import report as reports
    from d2ls_infer.evaluate import evaluate as measure
    from d2ls_infer.load import load_segmenter
    from d2ls_infer.segmenter import AugmentedSegmenter, precision_of

    segmenter = load_segmenter(weights, device=device, precision=precision, smooth=smooth)  # type: ignore[arg-type]
    with options.progress_bar(dataset, unit="image", quiet=quiet) as bar:
        finished = itertools.count(1)

        def done(name: str, predicted: np.ndarray) -> None:
            if submission is not None:
                write_submission(submission, data, name, predicted)
            bar(next(finished), len(images))

        result = measure(
            AugmentedSegmenter(segmenter, tta) if tta != "none" else segmenter,
            images,
            labels=data.labels,
            boundary_px=boundary,
            progress=done,
            tile_size=tile_size,
            overlap=overlap,
            blend=blend,
            dictionary=dictionary,
        )
    about = {
        "model": weights.name,
        "sha256": weights.sha256,
        **({"reference": weights.reference} if weights.hub else {}),
        "training_data": weights.description.training_data,
        "split": split,
        "protocol": f"tiles of {tile_size or segmenter.tile_size} px, overlap {overlap}, blending {blend}, "
        f"dictionary {dictionary}, test-time augmentation {tta}, "
        f"scores {'' if segmenter.smooth else 'not '}smoothed, {precision_of(segmenter)}",
    }
    summary = reports.summarise(result, data, about)
    if report is not None:
        report.mkdir(parents=True, exist_ok=True)
        write_whole(report / "report.json", (json.dumps(summary, indent=2) + "\n").encode())
        write_whole(report / "report.html", reports.render(summary, result).encode())
    click.echo(show(summary, result))


def check_folder(folder: Path | None, *, overwrite: bool) -> None:
    """Raise for a folder to write that holds something already."""
    if folder is not None and folder.exists():
        if not folder.is_dir():
            raise UsageError(f"{folder} is not a folder")
        if any(folder.iterdir()) and not overwrite:
            raise OutputExistsError(f"{folder} is not empty; give --overwrite to write into it")


def find_images(data: Dataset, root: Path, split: str | None, *, labelled: bool) -> tuple[list[LabelledImage], str]:
    """The images of a split, and which it is: by default test, or val where the test images have no labels."""
    usual: list[str] = [name for name in ("test", "val") if name in data.splits] or ["all"]
    for name in [split] if split else usual:
        try:
            images = data.images(root, name)
        except MissingFileError as error:
            missing = error
            continue
        if not labelled or all(image.mask or image.eroded for image in images):
            return images, name
        missing = MissingFileError(f"the {name} images of {data.name} come without labels; name another --split")
    raise missing


def write_submission(folder: Path, data: Dataset, name: str, predicted: np.ndarray) -> None:
    """One map as the benchmark's test server takes it."""
    from d2ls_infer.datasets import submission_file
    from d2ls_infer.raster import png_bytes

    path, picture = submission_file(data, name, predicted)
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    write_whole(folder / path, png_bytes(picture))


def number(value: float | None) -> str:
    """A score on the terminal."""
    return "-" if value is None else f"{value:.2f}"


def interval(ends: list[float | None]) -> str:
    """The ends of a 95 % interval; nothing where there are too few images for one."""
    return "" if None in ends else f" (95 %: {number(ends[0])} to {number(ends[1])})"


def show(summary: dict[str, Any], result: Evaluation) -> str:
    """The scores as tables for a terminal."""
    about = summary["about"]
    lines = [f"{about['dataset']}, split {about['split']}, {about['images']} images; {about['protocol']}"]
    if about.get("training_data"):
        lines.append(
            f"{about['model']} was trained on {about['training_data']}; scores on images that are among them tell how "
            "well it has learnt those, not how it does on others"
        )
    for title, scores in (("all labels", summary["full"]), ("eroded labels", summary["eroded"])):
        if scores is None:
            continue
        columns = ["IoU", "F1", "precision", "recall"]
        rows = [
            [name, *(number(scores[column][index]) for column in columns)]
            + ([number(summary["boundary_iou"]["classes"][index])] if title == "all labels" else [""])
            for index, name in enumerate(result.labels.names)
        ]
        lines.append(options.table([title, *columns, "boundary IoU"], rows, right=range(1, 6)))
        left_out = summary["left_out_of_means"]
        note = f" without {', '.join(left_out)}" if left_out else ""
        lines.append(
            f"mIoU{note} {number(scores['mIoU'])}{interval(scores['mIoU_interval'])}, mF1 {number(scores['mF1'])}"
            f"{interval(scores['mF1_interval'])}, overall accuracy {number(scores['overall_accuracy'])}"
        )
        absent = [name for name, row in zip(result.labels.names, scores["confusion"], strict=True) if not sum(row)]
        if absent:
            lines.append(f"no pixel is labelled {', '.join(absent)}: not in the means")
        if left_out:
            mean_iou, mean_f1 = number(scores["mIoU_all_classes"]), number(scores["mF1_all_classes"])
            lines.append(f"with it, where it occurs: mIoU {mean_iou}, mF1 {mean_f1}")
    if summary["paper"]:
        paper = ", ".join(f"{name} {value:g}" for name, value in summary["paper"].items())
        lines.append(f"the paper's own numbers (ConvNeXt-Base, another split): {paper}")
    return "\n".join(lines)
