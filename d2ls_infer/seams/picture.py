"""A picture of what was measured: the curve, and the place where the maps differ most."""

from __future__ import annotations

import io

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from d2ls_infer.labels import format_color
from d2ls_infer.outputs.pictures import in_colors
from d2ls_infer.seams.counts import count_changes
from d2ls_infer.seams.measure import SeamReport

CHANGED = (230, 0, 126)
"""Red, green, blue of pixels that change class, on the faded scene."""


def seams_png(report: SeamReport) -> bytes:
    """The picture as the bytes of a PNG file."""
    figure = Figure(figsize=(15, 12), layout="constrained")
    grid = figure.add_gridspec(3, 4, height_ratios=(0.8, 1, 1))
    draw_curve(figure.add_subplot(grid[0, :3]), report)
    draw_legend(figure.add_subplot(grid[0, 3]), report)
    example, blended = report.example, report.blended
    ways = (
        ("raw tiles, cut", example.raw, example.cuts),
        (f"overlap {blended.overlap_px} px, {blended.blend}", example.blended, ()),
    )
    for row, (title, maps, cuts) in enumerate(ways, 1):
        axes = [figure.add_subplot(grid[row, col]) for col in range(4)]
        place = f"scene, from column {example.col}, row {example.row}"
        show(axes[0], place, example.scene)
        show(axes[1], f"{title}: plain grid", in_colors(maps[0], report.labels))
        show(axes[2], f"{title}: shifted by {example.shift_px} px", in_colors(maps[1], report.labels))
        show(axes[3], f"{percent(count_changes(*maps).share)} here change class", marked(example.scene, *maps))
        for one, (rows, cols) in zip(axes[1:3], cuts, strict=False):
            draw_cuts(one, rows, cols, maps[0].shape)
    content = io.BytesIO()
    figure.savefig(content, dpi=100, format="png")
    return content.getvalue()


def draw_curve(axes: Axes, report: SeamReport) -> None:
    """Bars: the share of raw pixels that change class, by distance; the blended maps' own as a line across."""
    bins = [item for item in report.curve if item.of]
    bars = axes.bar(range(len(bins)), [100 * item.share for item in bins], color="0.45")
    axes.bar_label(bars, [percent(item.share) for item in bins])
    mean = 100 * report.blended.mean_share
    axes.axhline(mean, color="tab:blue", linestyle="--", label=f"blended maps, everywhere: {mean:.2f} %")
    mean = 100 * report.raw.mean_share
    axes.axhline(mean, color="0.45", linestyle="--", label=f"raw tiles, everywhere: {mean:.2f} %")
    axes.set_xticks(
        range(len(bins)),
        [
            f"{item.low} to {item.high - 1}\n{item.of:,} px" if item.high else f"{item.low} and more\n{item.of:,} px"
            for item in bins
        ],
    )
    axes.set(
        title=f"{report.source.rpartition('/')[2]}, model {report.model}: pixels that change class with the tile grid",
        xlabel=f"pixels to the nearest edge of the two tiles of {report.tile_size} px that gave the two classes",
        ylabel="% change class",
    )
    axes.legend()
    axes.spines[["top", "right"]].set_visible(False)


def draw_legend(axes: Axes, report: SeamReport) -> None:
    """The classes of the example, and what else its pictures show."""
    example, labels = report.example, report.labels
    found = np.unique(np.concatenate([labels.ravel() for labels in (*example.raw, *example.blended)]))
    patches = [
        Patch(facecolor=format_color(labels.colors[index]), edgecolor="0.5", label=labels.names[index])
        for index in found
        if index < len(labels)
    ]
    patches.append(Patch(facecolor=format_color(CHANGED), label="changes class"))
    axes.legend(handles=patches, loc="center left", frameon=False, title="below: where blended maps\ndiffer most")
    axes.axis("off")


def draw_cuts(axes: Axes, rows: np.ndarray, cols: np.ndarray, shape: tuple[int, ...]) -> None:
    """Dashed lines where tiles are cut."""
    for row in rows[(rows > 0) & (rows < shape[0])]:
        axes.axhline(row - 0.5, color="black", linestyle="--", linewidth=1.2)
    for col in cols[(cols > 0) & (cols < shape[1])]:
        axes.axvline(col - 0.5, color="black", linestyle="--", linewidth=1.2)


def show(axes: Axes, title: str, picture: np.ndarray) -> None:
    """A (3 or 4, h, w) uint8 picture under its title."""
    axes.imshow(picture.transpose(1, 2, 0), interpolation="nearest")
    axes.set_title(title, fontsize="medium")
    axes.set(xticks=[], yticks=[])


def marked(scene: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The scene (3, h, w) uint8, grey and faded, with the pixels marked that differ in two maps (h, w)."""
    grey = (128 + scene.mean(0) / 2).astype(np.uint8)
    picture: np.ndarray = np.where(one != other, np.array(CHANGED, np.uint8)[:, None, None], grey)
    return picture


def percent(share: float) -> str:
    """0..1 as a reader takes it."""
    return f"{100 * share:.2f} %"
