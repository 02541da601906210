"""How raw values become a model's: the option, as it is written on a command line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from d2ls_infer.errors import UsageError


@dataclass(frozen=True)
class Scale:
    """How raw values become the model's: `low`..`high` goes to the ends of its value range, what is outside is clipped.

    kind "values": low and high are raw values; "percentiles": percentiles of each band's valid pixels in the scene.
    """

    low: float
    high: float
    kind: Literal["values", "percentiles"] = "values"

    def __post_init__(self) -> None:
        if not self.low < self.high or not np.isfinite([self.low, self.high]).all():
            raise UsageError(f"a scale goes from a lower to a higher number, got {self.low:g},{self.high:g}")
        if self.kind == "percentiles" and not (self.low >= 0 and self.high <= 100):
            raise UsageError(f"percentiles lie between p0 and p100, got {self.low:g},{self.high:g}")

    def __str__(self) -> str:
        mark = "p" if self.kind == "percentiles" else ""
        return ",".join(mark + (f"{v:g}" if float(f"{v:g}") == v else repr(v)) for v in (self.low, self.high))


def parse_scale(text: str) -> Scale:
    """ "0,10000" -> raw values, "p2,p98" -> percentiles of the scene. Raises UsageError for anything else."""
    kind: Literal["values", "percentiles"] = "percentiles" if "p" in text else "values"
    parts = [part.strip() for part in text.split(",")]
    if kind == "percentiles" and all(part.startswith("p") for part in parts):
        parts = [part[1:] for part in parts]
    try:
        low, high = (float(part) for part in parts)
    except ValueError as error:
        raise UsageError(f"a scale is MIN,MAX such as 0,10000, or percentiles such as p2,p98; got {text!r}") from error
    try:
        return Scale(low, high, kind)
    except UsageError as error:
        raise UsageError(f"{error} ({text!r})") from error
