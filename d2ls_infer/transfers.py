"""Between the host and a CUDA device: neither waits for the other where it need not."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

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


def uploaded(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor on the CPU -> the same on a device; on CUDA in turn with the work there, which nobody waits for."""
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)  # torch keeps such memory until it is copied


class Uploads:
    """Batches on the CPU -> the same on a CUDA device, never far ahead of its work.

    They are copied in turn with that work. Beside it would be hardly faster: eight tiles of 512 px take 0.1 ms, the
    network 16 ms for them.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.pace = device, Pace(self.mark)

    def __reduce__(self) -> tuple[Any, ...]:
        return Uploads, (self.device,)  # marks do not travel

    def mark(self) -> Wait:
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event.synchronize

    def __call__(self, batch: Tensor) -> Tensor:
        self.pace.step()
        return uploaded(batch, self.device)


class Beside:
    """Lets another thread work on what is made on a CUDA device, without waiting for what is begun there afterwards.

    `hand` is called by the thread that made a thing, `taking` by the other one around its work. On other devices both
    do nothing. What is handed over must not change any more.
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
        try:
            with torch.cuda.stream(self.stream):
                yield item
        finally:
            self.stream.synchronize()
