"""The curves of a run: what Lightning logs, by epoch -> curves.json and curves.png."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from d2ls_infer.files import write_whole

Points = list[tuple[int, float]]
"""(epoch, value), the first epoch being 1."""


class Curves(Callback):
    """Keeps what is logged by epoch, and writes it after each; a run that is resumed goes on with it.

    `points` by name: `train/...` at the end of every epoch, `val/...` of those that were validated.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.points: dict[str, Points] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"points": self.points}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.points = state_dict["points"]

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.keep(trainer, "val/")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.keep(trainer, "train/")
        if trainer.is_global_zero:
            write_json(self.points, self.folder / "curves.json")

    def keep(self, trainer: pl.Trainer, prefix: str) -> None:
        """Take over the values of this epoch."""
        for name, value in trainer.callback_metrics.items():
            if name.startswith(prefix):
                self.points.setdefault(name, []).append((trainer.current_epoch + 1, float(value)))


def write_json(points: dict[str, Points], file: Path) -> None:
    """{name: [[epoch, value], ...]}; null for a value that is no number."""
    known = {name: [(e, v if math.isfinite(v) else None) for e, v in values] for name, values in sorted(points.items())}
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(values)}" for name, values in known.items())
    write_whole(file, ("{\n" + lines + "\n}\n").encode())


def draw(points: dict[str, Points], file: Path) -> None:
    """The terms of the loss beside the validation's scores, as a PNG."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    panels = (("train/", "loss", "Training"), ("val/", "%", "Validation"))
    for axes, (prefix, unit, title) in zip(figure.subplots(1, 2), panels, strict=True):
        for name, values in sorted(points.items()):
            if name.startswith(prefix) and name != "train/learning_rate":
                epochs, heights = zip(*values, strict=True)
                label = name.removeprefix(prefix).replace("_", " ")
                axes.plot(epochs, heights, label=label, marker="." if len(epochs) < 30 else "")
        axes.set(title=title, xlabel="epoch", ylabel=unit)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize="small")
    png = io.BytesIO()
    figure.savefig(png, dpi=120)
    write_whole(file, png.getvalue())
