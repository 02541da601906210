"""Tasks for workers of Dask: a few ahead of each, tried again where they fail, taken away where a worker hangs."""

from __future__ import annotations

import logging
import queue
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from distributed import CancelledError, Client, Future, KilledWorker

from d2ls_infer.errors import D2LSError

log = logging.getLogger(__name__)

TRIES = 3
"""How often a task is tried before it counts as failed; where there are others, not again by the same worker.

A worker that is lost does not count: Dask itself gives its tasks to others, and `KilledWorker`, after four lost workers
by its own default, is one failed try."""

TASKS_PER_WORKER = 2
"""How many tasks are handed out for each worker: one that it works at, one that waits for it. So the scheduler knows of
few, and what they need is there when they begin."""

WORKERS_SECONDS = 1.0
"""How often we ask which workers there are."""

RESTART_SECONDS = 30.0
"""How long a worker that hangs is given to start again."""


@dataclass
class Handed:
    """A task that was handed out. avoid: the workers that have failed at it. on: the worker that it is meant for.

    worker: the one that is at it, which has said that so much is left.
    """

    task: Any
    tries: int = 0
    on: str = ""
    avoid: set[str] = field(default_factory=set)
    worker: str = ""
    left: int = 0
    future: Future | None = None


class Crew:
    """Has `act(run, task)` done by the workers of a client for each task that is added; a context manager.

    `step` gives what came of tasks, in the order in which they end. Where `act` raises a D2LSError, or its workers are
    killed again and again, the task is tried by another worker, TRIES times in all; then the error is what came of it.
    Any other exception is raised. A worker that has tasks and has said nothing (on the topic `run`) for `stall_seconds`
    is started anew, and its tasks go to others. At the end of the `with` block what is still out is cancelled.

    `step` raises D2LSError when the scheduler is lost, or when no worker is there for `stall_seconds`.
    """

    def __init__(self, client: Client, run: str, act: Callable[[str, Any], Any], *, stall_seconds: float) -> None:
        self.client, self.run, self.act, self.stall_seconds = client, run, act, stall_seconds
        self.todo: deque[Handed] = deque()
        self.out: dict[str, Handed] = {}
        self.news: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.heard: dict[str, float] = {}  # when a worker has last said anything, or was given something to do
        self.workers: list[str] = []
        self.asked = self.watched = self.seen_workers = time.monotonic()
        self.count = 0
        with self.telling():
            self.look_around(at_once=True)
            has = (worker.get("resources", {}) for worker in client.scheduler_info(n_workers=-1)["workers"].values())
            self.resources = {"GPU": 1} if any("GPU" in resources for resources in has) else None

    def add(self, task: Any, *, first: bool = False, on: str = "", once: bool = False) -> None:
        """One more task to be done. first: before those that wait; on: by which worker, if it is there; once: not tried
        again."""
        (self.todo.appendleft if first else self.todo.append)(Handed(task, tries=once * (TRIES - 1), on=on))

    def drop(self, wanted: Callable[[Any], bool]) -> None:
        """Let go of the tasks that are not wanted any more."""
        self.todo = deque(handed for handed in self.todo if wanted(handed.task))
        dropped = [key for key, handed in self.out.items() if not wanted(handed.task)]
        futures = [self.out.pop(key).future for key in dropped]
        if futures:
            with self.telling():
                self.client.cancel(futures, force=True)

    @property
    def room(self) -> int:
        """How many more tasks the workers could be given."""
        return TASKS_PER_WORKER * max(1, len(self.workers)) - len(self.out) - len(self.todo)

    def step(self, seconds: float = 0.2) -> Iterator[tuple[Any, Any]]:
        """Hand out what there is room for, wait a little, and give each task that has ended, with its result or error.

        What workers tell comes as (None, news), what was put into `news` by others as (None, it).
        """
        with self.telling():
            self.look_around()
            while self.todo and len(self.out) < TASKS_PER_WORKER * max(1, len(self.workers)):
                self.hand_out(self.todo.popleft())
            self.look_after()
        items = []
        with suppress(queue.Empty):
            items.append(self.news.get(timeout=seconds))
            while True:
                items.append(self.news.get_nowait())
        wanted = [item for item in items if isinstance(item, Future) and item.key in self.out]
        finished = [future for future in wanted if future.status == "finished"]
        with self.telling():  # all at once, since each time takes its time
            results = {
                future.key: result for future, result in zip(finished, self.client.gather(finished), strict=True)
            }
        for item in items:
            if not isinstance(item, Future):
                self.hear(item)
                yield None, item
            elif item.key in self.out and item.key not in results and item.status in ("pending", "lost"):
                item.add_done_callback(self.news.put)  # its worker was lost before we had the result: it is done again
            elif item.key in self.out:
                yield from self.ended(self.out.pop(item.key), item, results)

    def hand_out(self, handed: Handed) -> None:
        """Give a task to Dask."""
        self.count += 1
        wanted = [handed.on] if handed.on else []
        if handed.avoid and not handed.on:
            wanted = [worker for worker in self.workers if worker not in handed.avoid]
        future = self.client.submit(
            attempt,
            self.act,
            self.run,
            handed.task,
            key=f"{self.run}-{self.count}",
            pure=False,
            resources=self.resources,
            **({"workers": wanted, "allow_other_workers": True} if wanted else {}),
        )
        handed.future, handed.worker, handed.left = future, "", 0
        self.out[future.key] = handed
        future.add_done_callback(self.news.put)

    def ended(self, handed: Handed, future: Future, results: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
        """What came of a task; nothing where it is tried again."""
        result = results[future.key] if future.key in results else self.error_of(future)
        if not isinstance(result, D2LSError):
            yield handed.task, result
            return
        handed.tries += 1
        if handed.worker:
            handed.avoid.add(handed.worker)
        if handed.tries >= TRIES:
            yield handed.task, result
            return
        log.warning(
            "try %d of %d failed%s: %s", handed.tries, TRIES, f" on {handed.worker}" * bool(handed.worker), result
        )
        self.todo.appendleft(handed)

    def error_of(self, future: Future) -> D2LSError:
        """Why a task failed. Raises what is no fault of the task."""
        if future.status != "error":
            if not self.connected:
                raise self.lost()
            return D2LSError("the scheduler has let go of it")  # seen where a worker was killed on a busy machine
        error = future.exception()
        if isinstance(error, KilledWorker):
            return D2LSError(f"{error.allowed_failures + 1} workers, one after the other, were lost with it")
        assert error is not None
        raise error

    def hear(self, item: Any) -> None:
        """Take note of who is alive."""
        if isinstance(item, dict) and "worker" in item:
            self.heard[item["worker"]] = time.monotonic()
            if handed := self.out.get(item["key"]):
                handed.worker, handed.left = item["worker"], item["total"] - item["done"]

    def look_around(self, *, at_once: bool = False) -> None:
        """See which workers there are, now and then. Raises D2LSError where there are none for too long."""
        now = time.monotonic()
        if not at_once and now - self.asked < WORKERS_SECONDS:
            return
        self.asked, self.workers = now, sorted(self.client.nthreads())
        if self.workers:
            self.seen_workers = now
        elif now - self.seen_workers > self.stall_seconds:
            raise D2LSError(f"no worker at {self.client.scheduler.address} for {self.stall_seconds:g} s")

    def look_after(self) -> None:
        """Start workers anew that have something to do and say nothing."""
        now = time.monotonic()
        if now - self.watched < min(5.0, self.stall_seconds / 4):
            return
        self.watched = now
        for worker, keys in self.client.processing().items():
            if not any(key in self.out for key in keys):
                self.heard.pop(worker, None)
            elif now - self.heard.setdefault(worker, now) > self.stall_seconds:
                log.warning("%s has said nothing for %g s; it is started anew", worker, self.stall_seconds)
                self.heard[worker] = now
                self.restart(worker)

    def restart(self, worker: str) -> None:
        """Kill a worker and start it anew; where nothing looks after it, let the scheduler forget it."""
        try:
            self.client.restart_workers([worker], timeout=RESTART_SECONDS, raise_for_error=False)
        except ValueError:  # it has no nanny
            self.client.retire_workers([worker], close_workers=True)

    @property
    def connected(self) -> bool:
        """Whether there is a way to the scheduler now."""
        return bool(self.client.status == "running")

    def lost(self) -> D2LSError:
        """The error for a scheduler that is gone."""
        return D2LSError("the scheduler is lost; what is finished is kept, and the same command with --resume goes on")

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Turn errors of the connection into a line."""
        try:
            yield
        except D2LSError:
            raise
        except Exception as error:  # Dask has many names for it, and of a client that was closed several, by version
            if isinstance(error, OSError | TimeoutError | CancelledError | RuntimeError) or not self.connected:
                raise self.lost() from error
            raise

    def __enter__(self) -> Self:
        with self.telling():
            self.client.subscribe_topic(self.run, lambda event: self.news.put(event[1]))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        futures = [handed.future for handed in self.out.values()]
        self.out.clear()
        with suppress(D2LSError), self.telling():
            self.client.cancel(futures, force=True)
            self.client.unsubscribe_topic(self.run)


def attempt(act: Callable[[str, Any], Any], run: str, task: Any) -> Any:
    """What a worker does: the result, or the D2LSError, without what lies behind it, which may be of no kind to travel.

    It is not raised, since Dask would print it at every try.
    """
    try:
        return act(run, task)
    except D2LSError as error:
        return type(error)(*error.args)
