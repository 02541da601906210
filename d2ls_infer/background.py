"""Work that goes on beside the network's: reading ahead of it, writing behind it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterable
from contextlib import suppress
from types import TracebackType
from typing import Any, Self, TypeVar

import torch

T = TypeVar("T")

PATIENCE_SECONDS = 0.1
"""How long a thread waits at a queue before it looks whether it is still wanted."""


def started(work: Callable[[], object], name: str) -> threading.Thread:
    """A thread that does some work, each of torch's operations by itself.

    Else its first larger one would start threads of its own for it, and with more of them than cores those of the
    network no longer stay awake from one operation to the next.
    """
    others = torch.get_num_threads()
    alone = threading.Event()

    def run() -> None:
        try:
            torch.get_num_threads()  # a thread's first such call takes over what was set last, wherever
            torch.set_num_threads(1)
        finally:
            alone.set()
        work()

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    alone.wait()
    torch.set_num_threads(others)  # what it set goes for threads that are made later, too
    return thread


def ahead(items: Iterable[T], depth: int) -> Generator[T]:
    """The items in their order, made in a thread of their own, at most `depth` before they are taken.

    An error on the way comes out where the item would have. When the generator is closed, the thread ends at its next
    item.
    """
    ready: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=depth)
    closed = threading.Event()

    def put(kind: str, value: Any) -> None:
        while not closed.is_set():
            with suppress(queue.Full):
                ready.put((kind, value), timeout=PATIENCE_SECONDS)
                return

    def make() -> None:
        try:
            for item in items:
                put("item", item)
                if closed.is_set():
                    return
        except BaseException as error:
            put("error", error)
        else:
            put("end", None)

    thread = started(make, "d2ls-ahead")
    try:
        while True:
            kind, value = ready.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        closed.set()
        thread.join()


class Behind:
    """Does what it is given in a thread of its own, one after the other; a context manager.

    At most `depth` wait. The first error is raised where the next is given, or at the end of the `with` block; after it
    nothing more is done. At the end of the block everything else is done, also where it ends by an error of its own.
    """

    def __init__(self, act: Callable[[T], None], depth: int) -> None:
        self.act = act
        self.error: BaseException | None = None
        self.waiting: queue.Queue[Any] = queue.Queue(maxsize=depth)
        self.thread: threading.Thread

    def work(self) -> None:
        """What the thread does."""
        while (item := self.waiting.get()) is not None:
            if self.error is None:
                try:
                    self.act(item)
                except BaseException as error:
                    self.error = error

    def give(self, item: Any) -> None:
        """One more thing to do."""
        self.check()
        self.waiting.put(item)

    def check(self) -> None:
        """Raise what has gone wrong."""
        if self.error is not None:
            raise self.error

    def __enter__(self) -> Self:
        self.thread = started(self.work, "d2ls-behind")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.waiting.put(None)
        self.thread.join()
        if error is None:
            self.check()
