"""Scenes mapped by the workers of a Dask cluster, band by band."""

from __future__ import annotations

import logging
import socket
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from distributed import Client, wait
from distributed.protocol import pickle

from d2ls_infer.alone import alone
from d2ls_infer.at_once import usual_batch
from d2ls_infer.batch import FailedScene, Model, Ready, looked_at
from d2ls_infer.cluster.crew import Crew
from d2ls_infer.cluster.pieces import (
    Band,
    BandDone,
    bands_in,
    cut,
    gaps,
    key_of_pieces,
    known_pieces,
    parts_folder,
    remove_pieces,
    usual_tile_rows,
)
from d2ls_infer.cluster.scenes import SceneRun, put_together, say_what_is_kept
from d2ls_infer.cluster.told import Tell, Told
from d2ls_infer.cluster.worker import About, BandTask, Load, Question, check_weights, work
from d2ls_infer.cluster.worker import Model as ModelOfWorkers
from d2ls_infer.errors import D2LSError, RasterError, UsageError
from d2ls_infer.job import (
    Job,
    PredictResult,
    check_not_there,
    checked,
    finished_before,
    provenance,
    run_key,
    run_tag,
)
from d2ls_infer.journal import journal_path, remove_journal
from d2ls_infer.load import load_segmenter
from d2ls_infer.options import PredictOptions
from d2ls_infer.segmenter import Segmenter
from d2ls_infer.store import address_of, check_writable, named
from d2ls_infer.tiling import rows_sharing_batches
from d2ls_infer.weights import WeightsFile, find_weights

log = logging.getLogger(__name__)

STALL_SECONDS = 300.0
"""A worker that has a band and says nothing for so long hangs; it speaks with every batch of tiles."""

GREETING_SECONDS, GOODBYE_SECONDS = 20.0, 5.0
"""How long workers are waited for that are to know of the model, and to forget it. The scheduler tells all at once, and
those that come later; what is waited for are those that are just being lost."""

HELPERS_SECONDS = 20.0
"""How long a worker is waited for that still scores a tile which nobody needs any more."""

JOINED_AT_ONCE = 2
"""Scenes that are put together at once: one that is followed while its bands are made, and one that is whole."""


@dataclass(frozen=True)
class ClusterOptions:
    """How scenes are handed out.

    band_rows: rows of a scene in a band; by default whole rows of tiles, see `usual_tile_rows`. stall_seconds: how long
    a worker that has work may say nothing before it is started anew. threads: of torch on each worker; None leaves it
    to the worker. one_host: whether the workers run where we are. Raises UsageError for what makes no sense.
    """

    band_rows: int | None = None
    stall_seconds: float = STALL_SECONDS
    threads: int | None = None
    one_host: bool = False

    def __post_init__(self) -> None:
        if self.band_rows is not None and self.band_rows < 1:
            raise UsageError(f"a band has at least 1 row, got {self.band_rows}")
        if not 0 < self.stall_seconds < float("inf"):
            raise UsageError(f"the time a worker may say nothing is seconds above 0, got {self.stall_seconds:g}")


def map_scenes(
    client: Client,
    model: Model,
    sources: Iterable[str | Path],
    output: str | Path | None = None,
    *,
    overwrite: bool = False,
    resume: bool = False,
    load: Load = load_segmenter,
    tell: Tell = lambda news: None,
    cluster: ClusterOptions | None = None,
    **options: Any,
) -> Iterator[PredictResult | FailedScene]:
    """`predict_many` by the workers of a client: the same files to the last byte, results in the order they are ready.

    The workers must see the scenes and the places of the outputs by the same names as we do; addresses of object stores
    are such names. What a run leaves that is stopped are the pieces in `MAP.tif.parts`; `resume` goes on with them.
    With `vrt=True` rasters stay in pieces, under a VRT each; every pixel is the same. tell: takes news of the run for
    people who wait, see `Told`.

    Raises UsageError as `predict_many` does; D2LSError when the scheduler is lost or all workers are.
    """
    settings, cluster = PredictOptions(**options), cluster or ClusterOptions()
    found = find_weights(model) if isinstance(model, str | Path) else model
    ready, failed = looked_at(found, sources, output, settings, overwrite=overwrite or resume)

    def results() -> Iterator[PredictResult | FailedScene]:
        yield from failed
        if ready:
            with Run(client, found, load, settings, cluster, tell, overwrite=overwrite, resume=resume) as run:
                yield from run.map(ready)

    return results()


class Run:
    """One run over many scenes; a context manager."""

    def __init__(
        self,
        client: Client,
        model: Segmenter | WeightsFile,
        load: Load,
        options: PredictOptions,
        cluster: ClusterOptions,
        tell: Tell,
        *,
        overwrite: bool,
        resume: bool,
    ) -> None:
        self.client, self.model, self.load, self.options, self.cluster = client, model, load, options, cluster
        self.told = Told(tell)
        self.overwrite, self.resume = overwrite, resume
        self.name = f"d2ls-{uuid.uuid4().hex[:12]}"
        self.scenes: dict[str, SceneRun] = {}
        self.waiting: deque[Ready] = deque()
        self.outcomes: deque[tuple[Any, Any]] = deque()
        self.joining: dict[str, Future[PredictResult | FailedScene]] = {}
        self.followed: SceneRun | None = None
        self.helped: set[tuple[str, str]] = set()  # Dask's keys of bands, and the workers that were to help with them

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self.crew = stack.enter_context(
                Crew(self.client, self.name, work, stall_seconds=self.cluster.stall_seconds)
            )
            self.joiner = ThreadPoolExecutor(JOINED_AT_ONCE, thread_name_prefix="d2ls-join")
            stack.callback(self.joiner.shutdown, cancel_futures=True)
            stack.callback(self.give_up)
            with self.crew.telling():
                plugin = ModelOfWorkers(self.name, self.model, self.load, self.hosts(), self.cluster.threads)
                check_travels(plugin)
                self.with_all(GREETING_SECONDS, self.client.register_plugin, plugin, name=self.name)
                stack.callback(self.with_all, GOODBYE_SECONDS, self.client.unregister_worker_plugin, self.name)
            self.about: About = self.ask("about")
            self.stack = stack.pop_all()
        return self

    @property
    def takes_up(self) -> bool:
        """Whether pieces of an earlier run may be used: not those of a segmenter that does not say what it is."""
        return self.resume and bool(self.about.sha256)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stack.close()
        with ExitStack() as stack:
            for scene in self.scenes.values():
                stack.enter_context(scene.lock)
                stack.callback(say_what_is_kept, scene, self.about)

    def with_all(self, seconds: float, act: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        """Do something that waits for all workers, but no longer than that for those that hang: the scheduler knows."""

        def acted() -> None:
            with suppress(D2LSError), self.crew.telling():
                act(*arguments, **options)

        thread = threading.Thread(target=acted, name="d2ls-with-all", daemon=True)
        thread.start()
        thread.join(seconds)

    def hosts(self) -> dict[str, WeightsFile]:
        """The weights on each host, fetched where they have to be, and checked once on each."""
        if not isinstance(self.model, WeightsFile):
            return {}
        if self.cluster.one_host:
            return {socket.gethostname(): self.model}
        workers = {
            info["host"]: address for address, info in self.client.scheduler_info(n_workers=-1)["workers"].items()
        }
        futures = [
            self.client.submit(check_weights, self.model, workers=[address], pure=False) for address in workers.values()
        ]
        with suppress(TimeoutError):  # of a host that hangs; whoever works there checks them itself
            wait(futures, timeout=self.cluster.stall_seconds)
        return dict(future.result() for future in futures if future.done())

    def ask(self, what: str, *arguments: Any) -> Any:
        """What a worker says. Raises D2LSError as it does."""
        question = Question(what, arguments)
        self.crew.add(question, first=True)
        while True:
            came = list(self.crew.step())
            self.outcomes += [(task, result) for task, result in came if task is not question]
            for task, result in came:
                if task is question:
                    if isinstance(result, D2LSError):
                        raise result
                    return result

    def map(self, ready: Iterable[Ready]) -> Iterator[PredictResult | FailedScene]:
        """Map each of the scenes."""
        waiting = self.waiting = deque(ready)
        self.told.begin(self.crew, waiting)
        while waiting or self.scenes:
            while waiting and self.crew.room > 0:
                scene = waiting.popleft()
                try:
                    if result := self.begin(scene.source, scene.output):
                        self.told.known(scene.pixels)
                        yield result
                except D2LSError as error:
                    self.told.dropped(scene.pixels)
                    yield FailedScene(scene.source, error)
            self.outcomes += self.crew.step()
            while self.outcomes:
                task, result = self.outcomes.popleft()
                if task is None:
                    self.hear(result)
                else:
                    yield from self.ended(task, result)
            self.told.progress(self.crew)
            if not waiting:
                self.help()
            for source in [source for source, future in self.joining.items() if future.done()]:
                outcome, run = self.joining.pop(source).result(), self.scenes[source]
                if isinstance(outcome, FailedScene):
                    self.stop(run)
                else:
                    del self.scenes[source]
                    run.lock.close()
                yield outcome
        self.see_helpers_off()

    def see_helpers_off(self) -> None:
        """Wait a little for those that still score a tile: Dask would complain of workers that are ended meanwhile."""
        until = time.monotonic() + HELPERS_SECONDS
        with suppress(D2LSError):  # all that matters is done
            while any(handed.task.ahead for handed in self.crew.out.values()) and time.monotonic() < until:
                list(self.crew.step())

    def hear(self, news: Mapping[str, Any]) -> None:
        """A worker tells how far it is with a band."""
        handed = self.crew.out.get(news.get("key", ""))
        if handed is not None and (scene := self.scenes.get(handed.task.source)):
            first, last = handed.task.band
            self.told.parts[news["key"]] = (last - first) * scene.width * news["done"] / max(1, news["total"])

    def begin(self, source: str, output: Path) -> PredictResult | None:
        """Cut a scene into bands and add them; or give what an earlier run has made of it."""
        options = self.options
        check_writable(output)
        with ExitStack() as lock:
            lock.enter_context(alone(output))
            there_may_be = self.overwrite or self.resume
            with checked(self.about, self.about.name, source, output, options, overwrite=there_may_be) as job:
                tags, side_tags, folder = provenance(job, options), run_tag(job, options), parts_folder(output)
                if self.resume and not self.overwrite:
                    if self.about.sha256 and (found := finished_before(job, options, tags | side_tags)):
                        remove_pieces(folder)
                        remove_journal(journal_path(output))
                        return found
                    check_not_there(output, options, source)
                job.warn(options)
                options = replace(options, batch_size=self.batch_size(source, job, options, folder))
                key = run_key(job, options)
                key["weights"] = key["weights"] or self.name  # of a segmenter that does not say what it is
                bands = self.bands_of(job, options, folder, key)
                run = SceneRun(
                    source=source,
                    output=output,
                    options=options,
                    key=key,
                    tags=tags,
                    side_tags=side_tags,
                    bands={band: done for band, (_, done) in bands.items()},
                    resumed=sum(rows for rows, _ in bands.values()),
                    height=job.scene.height,
                    width=job.scene.width,
                    lock=lock.pop_all(),
                )
        run.pixels_known = run.pixels_done
        self.told.known(run.pixels_known)
        self.scenes[source] = run
        for band, done in run.bands.items():
            if done is None:
                self.crew.add(BandTask(source, named(output), options, key, band))
        before = self.followed
        if run.whole:
            self.join(run)
        elif len(run.bands) > 1 and (before is None or before.whole or before.given_up):
            self.followed = run
            self.join(run)
        return None

    def help(self) -> None:
        """Let workers that have nothing to do score tiles ahead for those that have much left.

        Not for maps on an object store, where those would not find them. A worker sees for itself whether it pays.
        """
        bands = {key: handed for key, handed in self.crew.out.items() if isinstance(handed.task, BandTask)}
        if self.crew.todo or not all(handed.worker for handed in bands.values()):  # there are bands to begin with
            return
        helpers = Counter((h.task.source, h.task.band) for h in bands.values() if h.task.ahead)
        for worker in sorted(set(self.crew.workers) - {handed.worker for handed in bands.values()}):
            left = {
                key: handed.left / (1 + helpers[handed.task.source, handed.task.band])
                for key, handed in bands.items()
                if not handed.task.ahead and isinstance(handed.task.output, Path) and (key, worker) not in self.helped
            }
            most = max(left, key=lambda key: left[key], default="")
            if most and left[most] > bands[most].task.options.batch_size:
                task = bands[most].task
                self.helped.add((most, worker))
                helpers[task.source, task.band] += 1
                self.crew.add(replace(task, ahead=True), on=worker, once=True)

    def batch_size(self, source: str, job: Job, options: PredictOptions, folder: Path) -> int:
        """How many tiles at once: as a run that is resumed had it, else as one process would choose it."""
        before = key_of_pieces(folder) if self.takes_up and options.batch_size == "auto" else None
        if before:
            return int(before["options"]["batch_size"])
        if options.batch_size == "auto" or options.max_memory is not None:
            return int(self.ask("batch_size", source, named(job.output), options))
        return int(options.batch_size or usual_batch(job.device, job.grid))

    def bands_of(
        self, job: Job, options: PredictOptions, folder: Path, key: Mapping[str, Any]
    ) -> dict[Band, tuple[int, BandDone | None]]:
        """The bands of a scene, with the rows that are known of each, and what came of it."""
        if not self.takes_up:
            if bands_in(folder):  # else there may be those that a finished VRT shows
                hint = "" if self.resume else "; --resume would have gone on there"
                log.warning("%s, of a run that was stopped, is replaced%s", named(folder), hint)
            remove_pieces(folder)
        bands = known_pieces(folder, key) if self.takes_up else {}
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise RasterError(f"cannot make the folder {folder}: {error}") from error
        height, grid = job.scene.height, job.grid
        if self.cluster.band_rows is not None:
            starts, rows = tuple(range(0, height, self.cluster.band_rows)), 1
        else:
            together = rows_sharing_batches(grid, int(options.batch_size or 1))
            tops = grid.row_starts[::together]
            starts = tuple(round(row * height / grid.height) for row in tops)
            workers = max(1, len(self.crew.workers) // (1 + len(self.waiting)))  # the others have scenes of their own
            handed_over = job.device.type == "cpu" and self.cluster.one_host and address_of(job.output) is None
            rows = usual_tile_rows(len(tops), workers, handed_over=handed_over)
        return bands | {band: (0, None) for gap in gaps(bands, height) for band in cut(gap, starts, rows)}

    def ended(self, task: BandTask, result: BandDone | D2LSError) -> Iterator[FailedScene]:
        """Take note of what came of a band."""
        scene = self.scenes.get(task.source)
        if scene is None or task.ahead:  # it has failed before; or what was made, or not, the band's worker will see
            return
        if isinstance(result, D2LSError):
            self.stop(scene)
            yield FailedScene(task.source, result)
            return
        scene.take(task.band, result)
        self.told.band(task, result, scene.width)
        if scene.whole and scene.source not in self.joining:
            self.join(scene)

    def stop(self, scene: SceneRun) -> None:
        """Do no more for a scene that has failed."""
        del self.scenes[scene.source]
        scene.give_up()
        self.crew.drop(lambda other: other.source != scene.source)
        if future := self.joining.pop(scene.source, None):
            wait_for([future])  # whoever puts it together removes what is not whole
        with scene.lock:
            say_what_is_kept(scene, self.about)
        self.told.dropped(scene.height * scene.width, scene.pixels_done, scene.pixels_known)

    def give_up(self) -> None:
        """Let no thread wait for bands any more."""
        for scene in self.scenes.values():
            scene.give_up()

    def join(self, scene: SceneRun) -> None:
        """Put a scene together, in a thread of its own; it may begin before all bands are there."""

        def joined() -> PredictResult | FailedScene:
            try:
                return put_together(scene, self.about, overwrite=self.overwrite)
            except D2LSError as error:
                return FailedScene(scene.source, error)

        future = self.joiner.submit(joined)
        self.joining[scene.source] = future
        future.add_done_callback(lambda _: self.crew.news.put({"joined": scene.source}))


def check_travels(plugin: ModelOfWorkers) -> None:
    """Raise UsageError for a model that cannot be sent to workers."""
    try:
        pickle.dumps(plugin)
    except Exception as error:  # each object has its own, which have nothing in common
        raise UsageError(f"the model cannot be sent to workers: {error}; give its name or file") from error
