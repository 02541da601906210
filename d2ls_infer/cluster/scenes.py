"""A scene whose bands are being mapped by the workers of a cluster, and how its files are made of them."""

from __future__ import annotations

import logging
import threading
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from d2ls_infer.cluster.pieces import Band, BandDone, bands_in, kept_piece, parts_folder, remove_pieces, remove_rasters
from d2ls_infer.cluster.worker import About
from d2ls_infer.errors import D2LSError, StoreError
from d2ls_infer.job import PredictResult, opened
from d2ls_infer.options import PredictOptions
from d2ls_infer.raster import Strip
from d2ls_infer.store import named, names_in

log = logging.getLogger(__name__)


@dataclass
class SceneRun:
    """A scene that is being mapped. resumed: rows that an earlier run had finished; pixels_known: those of whole bands.
    lock: to be closed when nothing is done for it any more, see `alone`.

    Whoever puts it together waits for its bands, from top to bottom, in a thread of its own.
    """

    source: str
    output: Path
    options: PredictOptions
    key: dict[str, Any]
    tags: dict[str, str]
    side_tags: dict[str, str]  # of the scene as it is when its run begins
    bands: dict[Band, BandDone | None]
    resumed: int
    height: int
    width: int
    lock: ExitStack
    pixels_known: int = 0
    began: float = field(default_factory=time.perf_counter)
    news: threading.Condition = field(default_factory=threading.Condition)
    given_up: bool = False

    def take(self, band: Band, done: BandDone) -> None:
        """A band is finished."""
        with self.news:
            self.bands[band] = done
            self.news.notify_all()

    def give_up(self) -> None:
        """Let nobody wait any more."""
        with self.news:
            self.given_up = True
            self.news.notify_all()

    def wait(self, band: Band) -> BandDone:
        """What came of a band, once it is finished. Raises D2LSError where nobody makes it any more."""
        with self.news:
            while (done := self.bands[band]) is None:
                self.check()
                self.news.wait()
            return done

    def check(self) -> None:
        """Raise D2LSError where bands are missing that nobody makes any more."""
        if self.given_up and not self.whole:
            raise D2LSError(f"{self.source} was given up")

    @property
    def whole(self) -> bool:
        """Whether all bands are finished."""
        return None not in self.bands.values()

    @property
    def pixels_done(self) -> int:
        """Of the bands that are finished."""
        return self.width * sum(band.last - band.first for band, done in self.bands.items() if done is not None)


def put_together(run: SceneRun, about: About, *, overwrite: bool) -> PredictResult:
    """The files of a scene, out of the pieces of its bands, as one process would have written them."""
    options, folder, bands = run.options, parts_folder(run.output), sorted(run.bands)
    with opened(about, about.name, run.source, run.output, options) as job:
        strips = [Strip(*band, folder / run.wait(band).raster) for band in bands] if options.vrt else []
        with job.outputs(options, run.tags, side_tags=run.side_tags, overwrite=overwrite, strips=strips) as outputs:
            if outputs.scene_picture is not None:
                for _ in outputs.seeing(job.view.tiles(job.grid)):
                    run.check()
            done = []
            for band in bands:
                done.append(found := run.wait(band))
                if not outputs.needs_rows:
                    outputs.tally.take(found.pixels, found.areas_m2)
                    continue
                with kept_piece(folder, band, run.key) as piece:
                    for rows in piece:
                        outputs.add(rows)
            job.scene.clipped_values = sum(band.clipped for band in done)
            job.scene.seen_values = sum(band.seen for band in done)
            skipped = sum(band.skipped for band in done)
            seconds = {stage: sum(band.seconds[stage] for band in done) for stage in ("read", "score", "write")}
            seconds["total"] = time.perf_counter() - run.began
            result = job.concluded(outputs, options, skipped=skipped, seconds=seconds, known=run.resumed)
        if options.vrt:
            remove_rasters(folder, but={found.raster for found in done})
        remove_pieces(folder)
        return result


def say_what_is_kept(run: SceneRun, about: About) -> None:
    """Of a scene that was not finished: its pieces, if they may be taken up."""
    if run.pixels_done and about.sha256:
        log.warning(
            "%.0f %% of the map are kept in %s; the same command with --resume (in Python: resume=True) goes on",
            100 * run.pixels_done / (run.height * run.width), named(parts_folder(run.output)),
        )  # fmt: skip
        return
    folder = parts_folder(run.output)
    if run.options.vrt:
        made = {done.raster for done in run.bands.values() if done}
        remove_rasters(folder, but=set(names_in(folder)) - made)
    with suppress(StoreError):  # the first error is the one to tell
        if not about.sha256 or not bands_in(folder):
            remove_pieces(folder)
