"""`d2ls seams`: how far a map depends on where its tiles lie."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from d2ls_infer import __version__
from d2ls_infer.cli import options
from d2ls_infer.errors import UsageError
from d2ls_infer.files import write_whole

if TYPE_CHECKING:
    from d2ls_infer.seams import SeamReport, Trial
    from d2ls_infer.seams.counts import Lines


@click.command()
@click.argument("scene", metavar="SCENE")
@options.model
@options.manifest
@options.offline
@options.tiles
@click.option(
    "--shifts", default="0.25,0.5,0.75", show_default=True, metavar="SHARE,...",
    help="How far the grids are shifted, of the way from tile to tile; along rows and columns at once.",
)  # fmt: skip
@click.option(
    "--reach", type=click.FloatRange(0, 100), metavar="PERCENT",
    help="Find instead the overlap with which no more of the pixels change class, at the least cost.",
)  # fmt: skip
@click.option("-b", "--batch-size", type=int, help="Tiles at once.  [default: 1 on a CPU, else 8]")
@options.device
@options.precision
@options.smooth
@options.values
@options.part
@options.gsd
@options.tta
@click.option("--json", "json_file", metavar="FILE", type=click.Path(path_type=Path), help="All numbers and settings.")
@click.option(
    "--picture", metavar="FILE.png", type=click.Path(path_type=Path),
    help="The curve, and the place where the maps differ most. Needs matplotlib.",
)  # fmt: skip
@options.overwrite
@options.log_level
@options.quiet
def seams(
    scene: str,
    model: str,
    manifest: Path | None,
    offline: bool,
    shifts: str,
    reach: float | None,
    device: str,
    precision: str,
    smooth: bool,
    json_file: Path | None,
    picture: Path | None,
    overwrite: bool,
    quiet: bool,
    **settings: Any,
) -> None:
    """Measure how far the map of SCENE depends on where its tiles lie.

    The scene is mapped several times with the same model, each time with the tiles elsewhere: as `predict` would do it,
    and in raw tiles without overlap and blending. Counted are the pixels whose class changes with the grid; of raw
    tiles also by the distance to the nearest tile edge; and how much more often neighbouring pixels are of two classes
    at seams than 32 pixels beside them.

    With --reach only the first of these is measured, with ever more overlap, until so few pixels change class.

    Without --window, --bbox or --aoi the middle of the scene is measured, at most 2048 x 2048 pixels.
    """
    from d2ls_infer.weights import find_weights

    # Before torch is loaded: a misspelt name is told at once.
    weights = find_weights(model, offline=offline, manifest=manifest)
    try:
        shares = [float(value) for value in shifts.split(",")]
    except ValueError as error:
        raise UsageError(f"--shifts are numbers with commas between, got {shifts!r}; try 0.25,0.5,0.75") from error

    if reach is not None:
        if json_file is not None or picture is not None:
            raise UsageError("--json and --picture are of one measurement; leave them out, or --reach")
        del settings["overlap"]

    from d2ls_infer.raster import check_output

    for file in (json_file, picture):
        if file is not None:
            check_output(file, source=scene, overwrite=overwrite)
    if picture is not None:
        check_picture(picture, json_file)

    from d2ls_infer.load import load_segmenter
    from d2ls_infer.seams import measure_seams, try_overlaps

    segmenter = load_segmenter(weights, device=device, precision=precision, smooth=smooth)  # type: ignore[arg-type]
    with options.progress_bar(Path(scene).name, unit="tile", quiet=quiet) as bar:
        if reach is not None:
            trials = try_overlaps(segmenter, scene, reach / 100, shifts=shares, progress=bar, **settings)
            click.echo(show_trials(trials, reach))
            return
        report = measure_seams(segmenter, scene, shifts=shares, progress=bar, **settings)
    if json_file is not None:
        write_whole(json_file, (json.dumps({"version": __version__, **report.to_dict()}, indent=2) + "\n").encode())
    if picture is not None:
        from d2ls_infer.seams.picture import seams_png

        write_whole(picture, seams_png(report))
    click.echo(show(report))


def check_picture(picture: Path, json_file: Path | None) -> None:
    """Raise UsageError for a picture that could not be drawn or would be something else."""
    if picture.suffix.lower() != ".png":
        raise UsageError(f"--picture takes a file that ends in .png, got {str(picture)!r}")
    if json_file is not None and json_file.resolve() == picture.resolve():
        raise UsageError(f"--json and --picture would both be written to {picture}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UsageError("--picture needs matplotlib: pip install 'd2ls-infer[train]'") from error


def show_trials(trials: Sequence[Trial], reach: float) -> str:
    """What was tried, as a table, and what came of it."""
    rows = [[str(trial.overlap_px), f"{trial.cost:.2f}", percent(trial.share)] for trial in trials]
    last = trials[-1]
    told = (
        f"--overlap {last.overlap_px} reaches {reach:g} % at the least cost"
        if last.share <= reach / 100
        else f"no overlap of these reaches {reach:g} %; try a larger --tile-size"
    )
    heads = ["overlap, px", "pixels scored for each", "% of pixels that change class"]
    return "\n".join([options.table(heads, rows, right=range(3)), told])


def show(report: SeamReport) -> str:
    """What was measured and where, and three tables for a terminal."""
    col, row, width, height = report.part
    whole = (width, height) == report.scene_size
    *first, last = map(str, report.shifts_px)
    blended, raw = report.blended, report.raw
    names = {
        f"overlap {blended.overlap_px} px, blending {blended.blend}": blended,
        "raw tiles (no overlap, no blending)": raw,
    }
    changes = [
        [
            name,
            percent(maps.mean_share),
            percent(min(shift.share for shift in maps.shifts)),
            percent(max(shift.share for shift in maps.shifts)),
            f"{sum(shift.of for shift in maps.shifts):,}",
        ]
        for name, maps in names.items()
    ]
    curve = [
        [
            f"{item.low} to {item.high - 1}" if item.high else f"{item.low} and more",
            percent(item.share),
            f"{item.of:,}",
        ]
        for item in report.curve
        if item.of
    ]
    lines = [
        [f"{name}, {direction}", *line(counted)]
        for name, maps in (("blended", blended), ("raw", raw))
        for direction, counted in (("left | right", maps.columns), ("above | below", maps.rows))
    ]
    return "\n".join(
        [
            f"{report.source}, model {report.model}; tiles of {report.tile_size} px, "
            f"shifted by {', '.join(first)}{' and ' if first else ''}{last} px",
            f"measured: {'all' if whole else f'columns {col} to {col + width - 1}, rows {row} to {row + height - 1}'} "
            f"of {report.scene_size[0]} x {report.scene_size[1]} px; "
            f"compared in its middle: {' x '.join(map(str, blended.compared))} px, "
            f"of raw tiles {' x '.join(map(str, raw.compared))} px",
            "",
            options.table(
                ["% of pixels that change class", "mean", "least", "most", "pixels"], changes, right=range(1, 5)
            ),
            "",
            options.table(["raw tiles, px to the nearest tile edge", "%", "pixels"], curve, right=(1, 2)),
            "",
            options.table(
                ["% of neighbours of two classes", "at seams", "32 px beside", "ratio", "difference", "pairs at seams"],
                lines,
                right=range(1, 6),
            ),
        ]
    )


def line(counted: Lines) -> list[str]:
    """A row of the last table."""
    ratio = counted.ratio
    return [
        percent(counted.seams.share),
        percent(counted.beside.share),
        "-" if math.isnan(ratio) else f"{ratio:.2f}",
        percent(counted.difference),
        f"{counted.seams.of:,}",
    ]


def percent(share: float) -> str:
    """0..1 on the terminal."""
    return "-" if math.isnan(share) else f"{100 * share:.2f}"
