"""Segmenters that workers, which are other processes, can import; the tests of this folder put it on the path."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import torch
from torch import Tensor

from d2ls_infer import journal
from d2ls_infer.labels import LabelMap


class Touchy:
    """Probabilities that depend on the whole tile and, in the last bits, on what lies in the same batch.

    loads: a folder in which each process that unpickles it leaves a file. at_once: rows are kept as soon as finished.
    """

    labels = LabelMap.of(["water", "forest", "field"])
    bands = ("red", "green", "blue")
    value_range = (0.0, 255.0)
    name, sha256, gsd_m = "touchy", "cd" * 32, 2.0

    def __init__(self, seconds: float = 0.0, loads: Path | None = None, *, at_once: bool = False) -> None:
        self.seconds, self.loads, self.at_once = seconds, loads, at_once

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        torch.set_num_threads(1)
        if self.at_once:
            journal.COMMIT_SECONDS = 0.0
        if self.loads is not None:
            (self.loads / f"{os.getpid()}-{time.monotonic_ns()}").touch()

    def score(self, batch: Tensor) -> Tensor:
        time.sleep(self.seconds)
        far = batch.float().mean((1, 2, 3), keepdim=True) * torch.linspace(-0.05, 0.05, 3).view(1, 3, 1, 1)
        return (batch.float() / 60 + far + 1e-3 * batch.float().mean()).softmax(1)


class Stuck(Touchy):
    """Hangs, once: the process that makes the file first sleeps for good."""

    def __init__(self, once: Path) -> None:
        super().__init__(0.01)
        self.once = once

    def score(self, batch: Tensor) -> Tensor:
        try:
            self.once.touch(exist_ok=False)
        except FileExistsError:
            return super().score(batch)
        time.sleep(3600)
        raise AssertionError("it was to be killed")


class Counted(Touchy):
    """Takes its time for a batch, and leaves a file for it, named by what is in it, in a folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(0.05)
        self.folder = folder

    def score(self, batch: Tensor) -> Tensor:
        content = hashlib.sha256(batch.float().numpy().tobytes()).hexdigest()
        (self.folder / f"{content} {os.getpid()}-{time.monotonic_ns()}").touch()
        return super().score(batch)
