"""What people who wait are told of a run on a cluster."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from d2ls_infer.batch import Ready
from d2ls_infer.cluster.crew import Crew
from d2ls_infer.cluster.pieces import BandDone
from d2ls_infer.cluster.worker import BandTask

SECONDS_BETWEEN_PROGRESS = 0.5
"""How often we tell at most how far it is."""

Tell = Callable[[dict[str, Any]], None]
"""Called with what goes on, see `Told`."""


class Told:
    """What is told of a run: dicts with a `status`.

    begun: how many `scenes` and `workers`, `pixels` of all, and the address of Dask's `dashboard`, None where there is
    none. band: `source`, `first` and one after the `last` row, `worker`, and `seconds` by stage. progress: `pixels`
    done, of `all`, by how many `workers`; `rate` in pixels a second of each worker, and `seconds_left`, None at first.
    """

    def __init__(self, tell: Tell) -> None:
        self.tell = tell
        self.pixels = self.all = self.before = 0
        self.parts: dict[str, float] = {}  # pixels that are done of the bands that are out, by Dask's key
        self.began = self.said = time.monotonic()

    def begin(self, crew: Crew, ready: Iterable[Ready]) -> None:
        """The first word."""
        pixels = [scene.pixels for scene in ready]
        self.all, self.began = sum(pixels), time.monotonic()
        has_dashboard = "dashboard" in crew.client.scheduler_info(n_workers=0)["services"]
        self.tell({
            "status": "begun", "scenes": len(pixels), "workers": len(crew.workers), "pixels": self.all,
            "dashboard": crew.client.dashboard_link if has_dashboard else None,
        })  # fmt: skip

    def known(self, pixels: int) -> None:
        """So many pixels were finished before."""
        self.pixels += pixels
        self.before += pixels

    def dropped(self, pixels: int, done: int = 0, known: int = 0) -> None:
        """So many pixels will not be mapped, of which so many were, and so many of those before this run."""
        self.all -= pixels
        self.pixels -= done
        self.before -= known

    def band(self, task: BandTask, done: BandDone, width: int) -> None:
        """A band is finished."""
        first, last = task.band
        self.pixels += (last - first) * width
        self.tell({
            "status": "band", "source": task.source, "first": first, "last": last, "worker": done.worker,
            "seconds": done.seconds,
        })  # fmt: skip

    def progress(self, crew: Crew) -> None:
        """How far it all is, now and then."""
        now = time.monotonic()
        if now - self.said < SECONDS_BETWEEN_PROGRESS:
            return
        self.said = now
        self.parts = {key: pixels for key, pixels in self.parts.items() if key in crew.out}
        pixels = self.pixels + sum(self.parts.values())
        rate = (pixels - self.before) / (now - self.began)
        self.tell({
            "status": "progress", "pixels": int(pixels), "all": self.all, "workers": len(crew.workers),
            "rate": rate / max(1, len(crew.workers)), "seconds_left": (self.all - pixels) / rate if rate > 0 else None,
        })  # fmt: skip
