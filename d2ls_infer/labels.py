"""Class names, their colours, and the values that are no class."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from d2ls_infer.errors import UsageError, shortened

if TYPE_CHECKING:
    import numpy as np

NODATA = 255
"""Value of a pixel of a class map that has no class: outside the scene's valid area."""

Color = tuple[int, int, int]


@dataclass(frozen=True)
class LabelMap:
    """The classes of a model, in index order: class i is `names[i]`, drawn in `colors[i]` (red, green, blue 0-255).

    `ignore_index` is the mask value that means "not labelled" in the training data. Raises UsageError where names and
    colours do not pair up, a name is empty or stands twice, or there are more classes than a uint8 map can hold.
    """

    names: tuple[str, ...]
    colors: tuple[Color, ...]
    ignore_index: int = NODATA

    def __post_init__(self) -> None:
        if len(self.names) != len(self.colors):
            raise UsageError(f"{len(self.names)} class names but {len(self.colors)} colours")
        if not 1 <= len(self.names) <= NODATA:
            raise UsageError(f"a class map holds 1 to {NODATA} classes, got {len(self.names)}")
        if any(not isinstance(name, str) or not name.strip() for name in self.names):
            raise UsageError(f"a class name is empty: {shortened(list(self.names))}")
        if twice := {name for name in self.names if self.names.count(name) > 1}:
            raise UsageError(f"class names stand twice: {', '.join(sorted(twice))[:200]}")
        for color in self.colors:
            if len(color) != 3 or any(type(value) is not int or not 0 <= value <= 255 for value in color):
                raise UsageError(f"a colour is three whole numbers from 0 to 255, got {shortened(color)}")

    def __len__(self) -> int:
        return len(self.names)

    @classmethod
    def of(cls, names: Sequence[str], colors: Sequence[Color] | None = None) -> LabelMap:
        """Labels from names alone; colours are spread over the hue circle where none are given."""
        if colors is None:
            colors = [spread_color(index) for index in range(len(names))]
        return cls(tuple(names), tuple(colors))

    def painted(self, classes: np.ndarray) -> np.ndarray:
        """(h, w) uint8 class indices -> (3, h, w) uint8 in the classes' colours; black where there is none."""
        import numpy as np

        table = np.zeros((256, 3), np.uint8)
        table[: len(self)] = self.colors
        picture: np.ndarray = table[classes].transpose(2, 0, 1)
        return picture

    def to_list(self) -> list[dict[str, Any]]:
        """[{"name": ..., "color": "#rrggbb"}, ...] in index order."""
        return [
            {"name": name, "color": format_color(color)} for name, color in zip(self.names, self.colors, strict=True)
        ]

    @classmethod
    def from_list(cls, items: Sequence[Mapping[str, Any]], *, ignore_index: int = NODATA) -> LabelMap:
        """The reverse of `to_list`. Raises UsageError for anything else."""
        try:
            pairs = [(item["name"], parse_color(item["color"])) for item in items]
            if any(set(item) != {"name", "color"} for item in items):
                raise KeyError("unknown keys")
        except (TypeError, KeyError) as error:
            wanted = '{"name": ..., "color": "#rrggbb"}'
            raise UsageError(f"labels are a list of {wanted}, got {shortened(items)}") from error
        return cls(tuple(name for name, _ in pairs), tuple(color for _, color in pairs), ignore_index)


def format_color(color: Color) -> str:
    """(red, green, blue) -> "#rrggbb"."""
    return "#{:02x}{:02x}{:02x}".format(*color)


def parse_color(text: str) -> Color:
    """ "#rrggbb" -> (red, green, blue)."""
    if not isinstance(text, str) or not re.fullmatch(r"#[0-9a-fA-F]{6}", text):
        raise UsageError(f'a colour is written "#rrggbb", got {shortened(text)}')
    return int(text[1:3], 16), int(text[3:5], 16), int(text[5:7], 16)


def spread_color(index: int) -> Color:
    """A distinct colour for any class index: hues a golden angle apart, in three brightnesses."""
    import colorsys

    red, green, blue = colorsys.hsv_to_rgb(index * 0.618034 % 1.0, 0.65, (0.95, 0.75, 0.55)[index % 3])
    return round(red * 255), round(green * 255), round(blue * 255)
