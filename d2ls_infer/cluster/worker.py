"""What a worker does: it loads the model once, and maps bands of scenes, one at a time."""

from __future__ import annotations

import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from distributed import Worker, get_worker
from distributed.diagnostics.plugin import WorkerPlugin
from distributed.worker import thread_state
from torch import Tensor

from d2ls_infer.at_once import Halving
from d2ls_infer.cluster.pieces import (
    PARTS,
    Band,
    BandDone,
    Piece,
    begun_piece,
    parts_folder,
    piece_path,
    place_path,
    raster_of,
)
from d2ls_infer.cluster.shared import (
    BELOW_ALL,
    MOST_AHEAD_BYTES,
    NOWHERE,
    SharedLooks,
    SharedScores,
    Shelf,
    place_of,
    say_place,
)
from d2ls_infer.context import Looks
from d2ls_infer.errors import D2LSError, UsageError, WeightsError
from d2ls_infer.job import Job, choose_batch, prepared, provenance, run_key
from d2ls_infer.journal import differences, remove_journal
from d2ls_infer.labels import LabelMap
from d2ls_infer.options import PredictOptions
from d2ls_infer.outputs import Finished, Outputs
from d2ls_infer.outputs.options import RASTERS
from d2ls_infer.predict import Stopwatch, finish_rows
from d2ls_infer.segmenter import TILE_PX, Segmenter, name_of, precision_of
from d2ls_infer.store import fetch, place, upload
from d2ls_infer.tiling import Around, Batch, Rows, batches, rows_sharing_batches, stacked
from d2ls_infer.weights import WeightsFile, find_weights

SECONDS_BETWEEN_NEWS = 0.5
"""How often a worker says at most how far it is."""

Load = Callable[[WeightsFile], Segmenter]


@dataclass(frozen=True)
class BandTask:
    """A band to map. key: what its rows depend on; a worker on which they would come out otherwise refuses.

    output: the map, whose pieces lie beside it: a path, or an address of an object store. ahead: another worker has the
    band; its last tiles are to be scored for it.
    """

    source: str
    output: Path | str
    options: PredictOptions
    key: Mapping[str, Any]
    band: Band
    ahead: bool = False


@dataclass(frozen=True)
class Question:
    """What a worker is asked: a method of `Model`, and its arguments."""

    what: str
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True)
class About:
    """All of a segmenter but the network: it stands in for it where nothing is scored."""

    name: str
    labels: LabelMap
    bands: tuple[str, ...]
    value_range: tuple[float, float] | None
    gsd_m: float | None
    tile_size: int
    sha256: str
    reference: str
    device: str
    dtype: str
    backend: str
    smooth: bool | None
    observes: bool | None

    @classmethod
    def of(cls, segmenter: Any) -> About:
        return cls(
            name=name_of(segmenter),
            labels=segmenter.labels,
            bands=tuple(segmenter.bands),
            value_range=getattr(segmenter, "value_range", None),
            gsd_m=getattr(segmenter, "gsd_m", None),
            tile_size=getattr(segmenter, "tile_size", TILE_PX),
            sha256=str(getattr(segmenter, "sha256", "")),
            reference=str(getattr(segmenter, "reference", "")),
            device=str(getattr(segmenter, "device", "cpu")),
            dtype=precision_of(segmenter),
            backend=str(getattr(segmenter, "backend", "torch")),
            smooth=getattr(segmenter, "smooth", None),
            observes=getattr(segmenter, "observes", None),
        )


class Model(WorkerPlugin):  # type: ignore[misc]
    """The model of a run, on a worker: loaded when it is first needed, and let go with the run.

    Dask hands it to every worker, also to those that come later. model: a segmenter, which travels, or a weights file.
    found: the same weights on hosts where they were checked, by the host's name. threads: of torch, for each worker.
    """

    def __init__(
        self,
        run: str,
        model: Segmenter | WeightsFile,
        load: Load,
        found: Mapping[str, WeightsFile],
        threads: int | None,
    ) -> None:
        self.name, self.model, self.load, self.found, self.threads = run, model, load, found, threads

    def setup(self, worker: Worker) -> None:
        self.worker = worker
        self.alone = threading.Lock()  # whatever the number of its threads: memory is that of one process
        self.segmenter: Any = None
        self.ended = False
        self.scene: tuple[str, Path | str, PredictOptions] | None = None
        self.opened = ExitStack()
        self.shared: SharedScores | None = None
        if self.threads is not None:
            torch.set_num_threads(self.threads)

    def teardown(self, worker: Worker) -> None:
        self.segmenter, self.ended = None, True
        if self.alone.acquire(blocking=False):  # else a band is worked at that nobody wants any more, and closes it
            self.forget()
            self.alone.release()

    def loaded(self) -> Any:
        """The segmenter."""
        if self.segmenter is None:
            if isinstance(self.model, WeightsFile):
                self.segmenter = self.load(self.found.get(socket.gethostname()) or on_this_host(self.model))
            else:
                self.segmenter = self.model
        return self.segmenter

    def job(
        self, source: str, output: Path | str, options: PredictOptions, key: Mapping[str, Any] | None = None
    ) -> Job:
        """A scene, opened. It stays open for the next band, since percentiles are taken from all of it.

        key: what the map's rows depend on, where that is known. Raises UsageError where they come out otherwise here.
        """
        if self.scene != (source, output, options):
            self.forget()
            place_here = self.place(output)
            job = self.opened.enter_context(prepared(self.loaded(), source, place_here, options, overwrite=True))
            self.current = job.observed(options, self.looks(job, output, options, key))
            self.scene = source, output, options
        job = self.current
        if key is not None:
            self.check(job, options, key)
        return replace(job, view=options.seen(job.scene, getattr(job.segmenter, "gsd_m", None)))

    def check(self, job: Job, options: PredictOptions, key: Mapping[str, Any]) -> None:
        """Raise UsageError where a map of another key would come out here."""
        here = run_key(job, options)
        here["weights"] = here["weights"] or key["weights"]  # of a segmenter that does not say what it is
        if here != dict(key):
            told = ", ".join(differences(key, here))
            raise UsageError(f"{self.worker.address} would make another map of {job.scene.path}: it has other {told}")

    def looks(self, job: Job, output: Path | str, options: PredictOptions, key: Mapping[str, Any] | None) -> Looks:
        """How a scene is looked at before its tiles are scored: together with the others that work at it."""
        # On an object store this worker's folder is its own: the others would not find anything.
        if key is None or not isinstance(output, Path):
            return map
        self.check(job, options, key)  # before anything is told to others
        return SharedLooks(Shelf(parts_folder(output), key), job.device)

    def forget(self) -> None:
        """Close the scene, and let nothing of it be left on this host alone."""
        self.scene = None
        self.opened.close()
        self.opened = ExitStack()
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def folder(self) -> Path:
        """What this worker makes before it goes to an object store; Dask removes it with the worker, if it is lost."""
        return Path(self.worker.local_directory) / self.name

    def place(self, output: Path | str) -> Path:
        """Where a map would lie as this worker has it: its pieces are made beside it."""
        return output if isinstance(output, Path) else place(output, self.folder)

    @contextmanager
    def piece(self, task: BandTask) -> Iterator[Piece]:
        """The piece of a band; one in an object store is fetched if it is there, else uploaded once it is whole."""
        folder = parts_folder(self.place(task.output))
        if isinstance(task.output, Path):
            with begun_piece(folder, task.band, task.key) as piece:
                yield piece
            return
        folder.mkdir(exist_ok=True)
        file = piece_path(folder, task.band)
        address = f"{task.output}{PARTS}/{file.name}"
        fetch(address, file)
        with begun_piece(folder, task.band, task.key) as piece:
            was_whole = piece.done is not None
            yield piece
        if not was_whole:
            upload(file, address)
        remove_journal(file)

    def about(self) -> About:
        """What the model says of itself."""
        with self.alone:
            return About.of(self.loaded())

    def batch_size(self, source: str, output: Path | str, options: PredictOptions) -> int:
        """How many tiles of a scene to score at once here."""
        with self.alone:
            return choose_batch(self.job(source, output, options), options)

    def map(self, task: BandTask) -> BandDone | None:
        """Make the finished rows of a band, and keep them beside the map; or help another worker to make them."""
        with self.alone:
            tell = News(self.name, self.worker)
            tell(0, 1)
            try:
                if not task.ahead:
                    return self.mapped(task, tell)
                self.help(task, tell)
                return None
            except BaseException:
                self.forget()  # what is wrong with a source may be wrong with this handle alone
                raise
            finally:
                if self.ended:
                    self.forget()

    def job_of(self, task: BandTask) -> Job:
        """The scene of a band."""
        return self.job(task.source, task.output, task.options, task.key)

    def mapped(self, task: BandTask, tell: Callable[[int, int], None]) -> BandDone:
        """The same, once this worker does nothing else."""
        job, options, (first, last) = self.job_of(task), task.options, task.band
        layers = layers_of(options)
        job.scene.clipped_values = job.scene.seen_values = 0
        with self.piece(task) as piece:
            if piece.done:
                return piece.done
            known, watch = piece.rows, Stopwatch()

            def write(rows: Rows) -> None:
                start, stop = max(known, rows.first), min(last, rows.first + len(rows.covered))
                if stop <= start:
                    return
                with watch("write"):
                    finished, part = Finished(rows), slice(start - rows.first, stop - rows.first)
                    values = {name: getattr(finished, name)[..., part, :] for name in layers}
                    piece.add(Finished.of(start, values))

            tiles = 0

            def progress(done: int, total: int) -> None:
                nonlocal tiles
                tiles = total
                tell(done, total)

            skipped = finish_rows(
                job,
                options,
                write,
                watch=watch,
                first=first,
                last=last,
                known=known,
                progress=progress,
                around=self.handing_over(job, task),
            )
            if isinstance(task.output, Path):
                say_place(place_path(parts_folder(task.output), task.band), BELOW_ALL)  # helpers need do no more
            done = BandDone(
                tiles=tiles,
                skipped=skipped,
                clipped=job.scene.clipped_values,
                seen=job.scene.seen_values,
                seconds=dict(watch.seconds),
                worker=self.worker.address,
            )
            if options.vrt:
                piece.commit()
                with watch("write"):
                    done = replace(done, **map_of(piece, job, options))
                done = replace(done, seconds=dict(watch.seconds))
            piece.finish(done)
            return done

    def handing_over(self, job: Job, task: BandTask) -> Around | None:
        """What takes and keeps the scores that others need too, or have made; None where nobody would find them."""
        if not isinstance(task.output, Path):  # on an object store: this worker's folder is its own
            return None
        grid, height, (first, last) = job.grid, job.scene.height, task.band
        together = rows_sharing_batches(grid, int(task.options.batch_size or 1))

        def tile_rows(first: int, last: int) -> set[int]:
            return set(range(*grid.touching(*job.view.needs(first, last), together)))

        above = tile_rows(first - 1, first) if first > 0 else set()
        below = tile_rows(last, last + 1) if last < height else set()
        rows = {grid.row_starts[index] for index in tile_rows(first, last) & (above | below)}
        folder = parts_folder(task.output)
        return self.scores(job).of(Shelf(folder, task.key), rows, place_path(folder, task.band))

    def scores(self, job: Job) -> SharedScores:
        """What tells whether handing over pays here."""
        if self.shared is None:
            self.shared = SharedScores(job.device)
        return self.shared

    def help(self, task: BandTask, tell: Callable[[int, int], None]) -> None:
        """Score the tiles of a band from the last one upwards, until we meet the worker that maps it.

        It takes them when it comes there. So no worker waits long for the last bands, however high they are.
        """
        assert isinstance(task.output, Path), "who maps the band would find nothing"
        job, batch_size, folder = self.job_of(task), int(task.options.batch_size or 1), parts_folder(task.output)
        shared, shelf, place = self.scores(job), Shelf(folder, task.key), place_path(folder, task.band)
        together = rows_sharing_batches(job.grid, batch_size)
        start, stop = job.grid.touching(*job.view.needs(*task.band), together)
        in_parts, left = Halving(job.segmenter.score), 0

        def score(batch: Batch) -> Tensor:
            return in_parts(stacked(batch))

        for top in reversed(range(start, stop, together)):
            view = self.job_of(task).view  # one that reads on from above knows no way up
            tiles = view.tiles(job.grid, slice(top, min(top + together, stop)))
            for batch in reversed(list(batches(tiles, job.grid, batch_size))):
                tell(0, 1)
                # It has passed here, or has not begun: because its scores are not handed over, or all is done and gone.
                if not NOWHERE < place_of(place) < batch[0][0][:2] or not shared.pays or left > MOST_AHEAD_BYTES:
                    return
                left += shared.left(shelf, place, [tile for tile, _, _ in batch], partial(score, batch))


class News:
    """Says to the run how far a task is, now and then, and stops the task once nobody wants it any more."""

    def __init__(self, run: str, worker: Worker) -> None:
        self.run, self.worker, self.key, self.said = run, worker, thread_state.key, 0.0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self.said < SECONDS_BETWEEN_NEWS:
            return
        self.said = now
        state = self.worker.state.tasks.get(self.key)
        if state is None or state.state == "cancelled":
            raise D2LSError("the run has ended")
        self.worker.log_event(self.run, {"key": self.key, "worker": self.worker.address, "done": done, "total": total})


def layers_of(options: PredictOptions) -> list[str]:
    """What of finished rows the outputs of a scene are made of, see `Finished`."""
    asked = [name for name in RASTERS if getattr(options, name)]
    shown = ["confidence"] if options.vector or options.report else []
    return list(dict.fromkeys(["labels", *asked, *shown]))


def map_of(piece: Piece, job: Job, options: PredictOptions) -> dict[str, Any]:
    """Write the rasters of a band beside its piece, as those of a scene of its own; what `BandDone` tells of them."""
    first, last = piece.band
    outputs = Outputs(
        piece.path.with_name(raster_of(piece.band)),
        options.of_piece(),
        scene=job.scene.strip(first, last),
        labels=job.segmenter.labels,
        name=job.name,
        tags=provenance(job, options),
        grid=job.grid,
    )
    with outputs:
        for rows in piece:
            outputs.add(Finished.of(rows.first - first, rows.values()))
    tally = outputs.tally
    return {"raster": outputs.path.name, "pixels": tally.pixels.tolist(), "areas_m2": tally.areas_m2.tolist()}


def on_this_host(weights: WeightsFile) -> WeightsFile:
    """The same weights on another machine: where they lie there, else by name or from the hub; checked.

    Raises WeightsError where they are not to be had.
    """
    reason: D2LSError | None = None
    for name in (weights.path, weights.reference or weights.name):
        try:
            found = find_weights(name)
        except D2LSError as error:
            reason = error
        else:
            if found.sha256 == weights.sha256:
                return replace(weights, path=found.path)
    raise WeightsError(
        f"the weights of {weights.name} (sha256 {weights.sha256}) are not on {socket.gethostname()}, neither as "
        f"{weights.path} nor by name" + (f": {reason}" if reason else "")
    )


def check_weights(weights: WeightsFile) -> tuple[str, WeightsFile]:
    """The host's name, and the weights on it."""
    return socket.gethostname(), on_this_host(weights)


def work(run: str, task: BandTask | Question) -> Any:
    """Map a band with the model of a run, or ask it."""
    model: Model | None = get_worker().plugins.get(run)
    if model is None:
        raise D2LSError(f"{get_worker().address} does not know of the model yet")
    return model.map(task) if isinstance(task, BandTask) else getattr(model, task.what)(*task.arguments)
