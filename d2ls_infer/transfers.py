"""Between the host and a CUDA device: neither waits for the other where it need not."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

Wait = Callable[[], object]

BATCHES_AHEAD = 2
"""Batches that the host may have handed over before the device is done with them: one to work on, one that waits."""


class Pace:
    """Holds the host back where it is too far ahead of a device. mark: gives what waits for all the work so far."""

    def __init__(self, mark: Callable[[], Wait], most: int = BATCHES_AHEAD) -> None:
        self.mark, self.most = mark, most
        self.marks: deque[Wait] = deque()

    def step(self) -> None:
        """To be called before each batch: waits until all but the last batches are done."""
        self.marks.append(self.mark())
        if len(self.marks) > self.most:
            self.marks.popleft()()


class Uploads:
    """Batches on the CPU -> the same on a CUDA device, through pinned memory, while it is at work on earlier ones."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.pace = Pace(self.mark)

    def mark(self) -> Wait:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event.synchronize

    def __call__(self, batch: Tensor) -> Tensor:
        self.pace.step()
        pinned = batch.pin_memory()  # torch keeps such memory, and takes it again when the copy is done
        current = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self.stream):
            sent = pinned.to(self.device, non_blocking=True)
        current.wait_stream(self.stream)
        sent.record_stream(current)
        return sent


class Beside:
    """Lets another thread work on what is made on a CUDA device, without waiting for what is begun there afterwards.

    `hand` is called by the thread that made a thing, `taking` by the other one around its work. On other devices both
    do nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def hand(self, item: T) -> tuple[T, torch.cuda.Event | None]:
        """A thing, with a mark of when it is there."""
        if self.stream is None:
            return item, None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.stream.device))
        return item, event

    @contextmanager
    def taking(self, handed: tuple[T, torch.cuda.Event | None]) -> Iterator[T]:
        """A thing that was handed over; its memory is free for other use when the `with` block ends."""
        item, event = handed
        if self.stream is None or event is None:
            yield item
            return
        self.stream.wait_event(event)
        with torch.cuda.stream(self.stream):
            yield item
        self.stream.synchronize()
