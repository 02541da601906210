"""Options that several commands share, and how tables look on a terminal."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from d2ls_infer.errors import UsageError

if TYPE_CHECKING:
    from d2ls_infer.datasets import Dataset
    from d2ls_infer.manifest import ModelDescription

Command = TypeVar("Command", bound=Callable[..., Any])

model = click.option(
    "-m", "--model", required=True, metavar="NAME|FILE",
    help="A name that `d2ls models` lists, a weights file, or owner/repo[@revision][:file] on the Hugging Face Hub.",
)  # fmt: skip
manifest = click.option(
    "--manifest", metavar="FILE", type=click.Path(path_type=Path),
    help="Models of your own, over those of the package.  [default: $D2LS_MANIFEST]",
)  # fmt: skip
offline = click.option("--offline", is_flag=True, help="Do not use the network: models come from the package or cache.")


def tiles(command: Command) -> Command:
    """--tile-size, --overlap, --blend and --dictionary."""
    for option in (
        click.option(
            "--dictionary",
            type=click.Choice(["auto", "scene", "tile"]),
            default="auto",
            show_default=True,
            help="Score tiles by class embeddings of the scene, or by each tile's own; auto: the scene's, if the model "
            "was trained for that.",
        ),
        click.option(
            "--blend",
            type=click.Choice(["hann", "gaussian", "linear", "none"]),
            default="hann",
            show_default=True,
            help="How overlapping tiles are weighed; none cuts between their centres.",
        ),
        click.option(
            "--overlap", default="0.25", show_default=True, help="Of neighbouring tiles: pixels, or a share of a tile."
        ),
        click.option(
            "--tile-size", type=int, help="Side of a tile in pixels.  [default: as the model is best mapped by]"
        ),
    ):
        command = option(command)
    return command


def values(command: Command) -> Command:
    """--bands, --scale and --nodata."""
    for option in (
        click.option(
            "--nodata", metavar="VALUE|none", help="In place of the file's nodata value; none: all values are valid."
        ),
        click.option(
            "--scale", metavar="MIN,MAX|pN,pN",
            help="Raw values, or percentiles of the scene, that become the ends of the model's value range.",
        ),
        click.option(
            "--bands", metavar="N,N,...",
            help="The scene's bands for the model's, from 1, or by name.  "
            "[default: as the file marks them, else in order]",
        ),
    ):  # fmt: skip
        command = option(command)
    return command


def part(command: Command) -> Command:
    """--window, --bbox, --bbox-crs and --aoi."""
    for option in (
        click.option(
            "--aoi", type=click.Path(), metavar="FILE",
            help="Map what lies in these polygons, of any file that GDAL reads; outside is nodata.",
        ),
        click.option("--bbox-crs", metavar="EPSG:N", help="Coordinate system of --bbox.  [default: the scene's]"),
        click.option("--bbox", metavar="MINX,MINY,MAXX,MAXY", help="Map this part of the ground only."),
        click.option("--window", metavar="COL,ROW,WIDTH,HEIGHT", help="Map these pixels only."),
    ):  # fmt: skip
        command = option(command)
    return command


gsd = click.option(
    "--gsd", metavar="METRES|auto",
    help="Ground sampling distance to read the scene at, auto for the model's. A map keeps the scene's own grid.",
)  # fmt: skip
tta = click.option(
    "--tta",
    type=click.Choice(["none", "flip", "d4", "multiscale"]),
    default="none",
    show_default=True,
    help="Test-time augmentation: the mean over several views of each tile.",
)
classes = click.option(
    "--classes",
    type=click.Path(path_type=Path),
    help="For --dataset folder: its classes, a line each: NAME or NAME,#rrggbb.",
)


def folder(command: Command) -> Command:
    """--bands, --value-range, --fraction, --column and --background: what a folder of one's own holds."""
    own = "For --dataset folder"
    for option in (
        click.option(
            "--background", metavar="CLASS", help=f"{own} with polygons: the class between them; else that is ignored."
        ),
        click.option("--column", help=f"{own} with polygons: where the class stands.  [default: class]"),
        click.option("--fraction", type=float, help=f"{own} without split files: to measure on.  [default: 0.2]"),
        click.option(
            "--value-range", metavar="MIN,MAX", callback=read_range,
            help=f"{own}: of the images' values.  [default: the model's, else 0,255]",
        ),
        click.option(
            "--bands", metavar="NAMES", callback=read_bands,
            help=f"{own}: the images' bands.  [default: the model's, else red,green,blue]",
        ),
    ):  # fmt: skip
        command = option(command)
    return command


def read_bands(context: click.Context, option: click.Parameter, text: str | None) -> tuple[str, ...] | None:
    """ "red, green" -> ("red", "green")."""
    if text is None:
        return None
    names = tuple(name.strip() for name in text.split(","))
    if not all(names) or len(set(names)) < len(names):
        raise UsageError(f"--bands are names with commas between, each its own; got {text!r}")
    return names


def read_range(context: click.Context, option: click.Parameter, text: str | None) -> tuple[float, float] | None:
    """ "0,10000" -> (0.0, 10000.0)."""
    if text is None:
        return None
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        raise UsageError(f"--value-range is MIN,MAX such as 0,10000; got {text!r}") from None
    if not -math.inf < low < high < math.inf:
        raise UsageError(f"--value-range goes from a lower to a higher number, got {text!r}")
    return low, high


def outputs(command: Command) -> Command:
    """What is made of a scene besides the map of classes."""
    beside = "A file, or only its ending for one beside the map."
    for option in (
        click.option("--stac", is_flag=True, help="A STAC item that lists all files."),
        click.option("--preview", metavar="FILE.png", help=f"The map as a small picture. {beside}"),
        click.option(
            "--report", metavar="FILE.html", help=f"A page with picture, areas, confidence and settings. {beside}"
        ),
        click.option(
            "--simplify", "simplify_m", type=float, metavar="METRES",
            help="Simplify polygons by about that much; neighbours keep common borders, areas are those of the pixels.",
        ),
        click.option(
            "--min-area", "min_area_m2", type=float, metavar="M2",
            help="Leave out polygons smaller than that many square metres.",
        ),
        click.option(
            "--vector", metavar="FILE.gpkg|.fgb|.parquet",
            help=f"Polygons with class, area and mean confidence. {beside}",
        ),
        click.option(
            "--vrt", is_flag=True,
            help="On a cluster: leave rasters in pieces, under a VRT each, which is there with the last piece.",
        ),
        click.option("--cog", is_flag=True, help="Write rasters as Cloud Optimized GeoTIFFs, with overviews."),
        click.option(
            "--disagreement", is_flag=True, help="How far overlapping tiles differ before blending, as a raster."
        ),
        click.option("--entropy", is_flag=True, help="How undecided the model is, from 0 to 1, as a raster."),
        click.option("--probabilities", is_flag=True, help="The probability of each class, as bands of a raster."),
        click.option("--confidence", is_flag=True, help="The probability of the class on the map, as a raster."),
    ):  # fmt: skip
        command = option(command)
    return command


def set_log_level(context: click.Context, option: click.Parameter, value: str) -> None:
    """What is said on standard error: all that is at least so important; of other libraries no more than warnings."""
    level = logging.getLevelNamesMapping()[value.upper()]
    logging.getLogger().setLevel(max(level, logging.WARNING))
    logging.getLogger("d2ls_infer").setLevel(level)


log_level = click.option(
    "--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default="warning", show_default=True,
    callback=set_log_level, expose_value=False, help="What is said on standard error.",
)  # fmt: skip
quiet = click.option("-q", "--quiet", is_flag=True, help="No progress.")
overwrite = click.option("-f", "--overwrite", is_flag=True, help="Replace an output that exists.")
device = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, mps.")
precision = click.option(
    "--precision",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="Number type of the network's products.",
)
smooth = click.option(
    "--smooth/--no-smooth", default=True, show_default=True,
    help="Even out the pattern of four pixels that the network's upsampler leaves in the scores.",
)  # fmt: skip
backend = click.option(
    "--backend",
    type=click.Choice(["auto", "torch", "compile", "openvino", "onnxruntime"]),
    default="torch",
    show_default=True,
    help="What runs the network; auto measures once which is fastest here.",
)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> str:
    """Columns under their headings, two spaces apart; the columns in `right` (from 0) are set to the right."""
    cells = [list(header), *map(list, rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = (
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    )
    return "\n".join(line.rstrip() for line in lines)


@contextmanager
def progress_bar(title: str, *, unit: str, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar with rate and time left on standard error, silent where that is no terminal.

    Gives a function that takes how many are done and how many there are.
    """
    from tqdm import tqdm

    with tqdm(desc=title, unit=unit, disable=True if quiet else None, leave=False) as bar:

        def update(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield update


def open_dataset(name: str, classes: Path | None, model: ModelDescription | None = None, **settings: Any) -> Dataset:
    """A benchmark by name, or a folder with classes and other `settings` of its own; those that are None count not.

    model: says a folder's bands, the range of its values and the colours of its classes, where nobody else does.
    Raises UsageError for classes or settings beside a benchmark, and for a folder without classes.
    """
    from d2ls_infer.datasets import find_dataset, folder_dataset, read_classes

    settings = {key: value for key, value in settings.items() if value is not None}
    if name == "folder" and classes is not None:
        known = {} if model is None else {"bands": model.bands, "value_range": model.value_range}
        labels = read_classes(classes, like=None if model is None else model.labels)
        return folder_dataset(labels, **known | settings)
    dataset = find_dataset(name)
    if classes is not None or settings:
        given = ["--classes"] * (classes is not None)
        given += ["--" + key.removesuffix("_m").replace("_", "-") for key in settings]
        verb = "is" if len(given) == 1 else "are"
        raise UsageError(f"{', '.join(given)} {verb} for --dataset folder; what {name} holds is known")
    return dataset
