"""What other processes than that of the tests import: segmenters, and what such a process does."""

from __future__ import annotations

import asyncio
import ctypes
import hashlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import dask
import torch
from distributed import Scheduler, Worker
from torch import Tensor

from d2ls_infer import cli, journal
from d2ls_infer.labels import LabelMap

CLONE_NEWNET = 0x40000000  # of Linux, <sched.h>; `os.setns` is there from Python 3.12


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

    def __init__(self, folder: Path, seconds: float) -> None:
        super().__init__(seconds)
        self.folder = folder

    def score(self, batch: Tensor) -> Tensor:
        content = hashlib.sha256(batch.float().numpy().tobytes()).hexdigest()
        (self.folder / f"{content} {os.getpid()}-{time.monotonic_ns()}").touch()
        return super().score(batch)


class Looking(Touchy):
    """Scores by the mean brightness of what it has seen of the scene, and leaves a file for each crop in a folder."""

    observes = True

    def __init__(self, folder: Path, seconds: float = 0.05) -> None:
        super().__init__(0.01)
        self.folder, self.look_seconds = folder, seconds

    def observe(self, batch: Tensor) -> Tensor:
        time.sleep(self.look_seconds)
        (self.folder / f"{os.getpid()}-{time.monotonic_ns()}").touch()
        return batch.float().mean((0, 2, 3)) / 3

    def merge(self, contexts: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(contexts)).mean(0)

    def score(self, batch: Tensor, context: Tensor | None = None) -> Tensor:
        scores = super().score(batch)
        return scores if context is None else (scores + context.view(1, -1, 1, 1) / 100).softmax(1)


def command(arguments: list[str], out: Path, err: Path) -> None:
    """Be the command line, with its standard output in one file and its standard error in another."""
    write_into(out, err)
    dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"})  # what made this makes its workers too
    sys.argv = ["d2ls", *arguments]
    cli.main()


def be_scheduler(port: int, namespace: str = "") -> None:
    """Be a scheduler, until it is killed: on loopback, or on all networks of a namespace."""
    enter(namespace)
    serve(Scheduler, host="0.0.0.0" if namespace else "127.0.0.1", port=port, dashboard=False)


def be_worker(address: str, namespace: str = "") -> None:
    """Be a worker of a scheduler, which nothing looks after, until it is killed."""
    enter(namespace)
    serve(Worker, address, nthreads=1, dashboard=False, death_timeout=20)


def enter(namespace: str) -> None:
    """Move this process, which has one thread yet, into a network namespace; "" leaves it where it is."""
    if namespace:
        with Path(f"/run/netns/{namespace}").open() as file:
            if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {namespace}")


def serve(server: Callable[..., Any], *arguments: Any, **options: Any) -> None:
    write_into(Path(os.devnull), Path(os.devnull))

    async def run() -> None:
        async with server(*arguments, **options) as running:
            await running.finished()

    asyncio.run(run())


def write_into(out: Path, err: Path) -> None:
    for stream, path in ((sys.stdout, out), (sys.stderr, err)):
        with path.open("w") as file:
            os.dup2(file.fileno(), stream.fileno())


def put_into_environment(values: dict[str, str]) -> None:
    """On a worker; a method of `os.environ` would travel with a copy of it."""
    os.environ.update(values)
