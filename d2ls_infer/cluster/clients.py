"""Clients of Dask: of workers on this machine, one for each of its GPUs, or of a scheduler that is there."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from typing import Any

import dask
import torch
from distributed import Client, LocalCluster, Nanny, Scheduler, SpecCluster

from d2ls_infer.cluster.run import STALL_SECONDS, ClusterOptions
from d2ls_infer.errors import D2LSError, UsageError

# Rows that wait are bound by us, and Dask's limit, a share of the machine's memory for each worker, would kill workers
# whose model alone takes more.
MEMORY_LIMIT = 0

ANY_PORT = ":0"

ALLOCATION = {"MALLOC_MMAP_MAX_": 0, "MALLOC_TRIM_THRESHOLD_": 1 << 30, "MALLOC_ARENA_MAX": 1}
"""Of glibc's malloc: keep what was once mapped, for all threads alike. Dask has workers give every 64 KB back at once,
and each tensor be mapped anew: a tile takes up to twice as long."""

TICK = "1s"
"""How often Dask's processes see whether they are late."""

END_SECONDS = 15.0
"""How long workers are waited for in the end."""


@contextmanager
def open_client(
    cluster: str | None = None,
    devices: str | None = None,
    *,
    band_rows: int | None = None,
    stall_seconds: float | None = None,
) -> Iterator[tuple[Client, ClusterOptions]]:
    """The client of a cluster, as the command line names it, and how scenes are handed to it.

    cluster: "local:N", or the address of a scheduler; devices: "0,1,2". Workers that are made here are gone at the end.
    Raises UsageError for what is neither, D2LSError where no scheduler is.
    """
    how = ClusterOptions(band_rows=band_rows, stall_seconds=STALL_SECONDS if stall_seconds is None else stall_seconds)
    if devices is not None:
        with workers_of_devices(parse_devices(devices)) as client:
            yield client, replace(how, one_host=True)
    elif (count := parse_local(str(cluster))) is not None:
        with local_workers(count) as client:
            yield client, replace(how, one_host=True, threads=max(1, torch.get_num_threads() // count))
    else:
        with client_of(str(cluster)) as client:
            yield client, how


@contextmanager
def local_workers(count: int) -> Iterator[Client]:
    """Workers as processes of this machine, with one thread for their tasks."""
    with undisturbed():
        cluster = LocalCluster(
            n_workers=count, processes=True, threads_per_worker=1, memory_limit=MEMORY_LIMIT, dashboard_address=ANY_PORT
        )
    with ending(cluster), Client(cluster) as client:
        client.wait_for_workers(count)
        yield client


def undisturbed() -> AbstractContextManager[Any]:
    """Workers that are made inside have `ALLOCATION` in their environment, and take no samples of what they do.

    Nor do they, their scheduler and what looks after them look at their clock every 20 ms: for scheduler and two
    workers that takes 4 % of a core.
    """
    wanted: dict[str, Any] = {
        f"distributed.nanny.pre-spawn-environ.{name}": value for name, value in ALLOCATION.items()
    }
    wanted |= {"distributed.worker.profile.enabled": False, "distributed.admin.tick.interval": TICK}
    made: AbstractContextManager[Any] = dask.config.set(wanted)
    return made


@contextmanager
def ending(cluster: SpecCluster) -> Iterator[None]:
    """End the workers in the end, without a word of those that take their time and are killed: nothing is lost by it.

    One that is just being started anew may keep it from ending; then it ends with this process.
    """
    logger = logging.getLogger("distributed.nanny")
    quiet = lambda record: "still alive after" not in record.getMessage()  # noqa: E731
    logger.addFilter(quiet)
    try:
        yield
    finally:
        with suppress(TimeoutError):
            cluster.close(timeout=END_SECONDS)
        logger.removeFilter(quiet)


@contextmanager
def workers_of_devices(devices: list[int]) -> Iterator[Client]:
    """A worker for each CUDA device, which it alone sees. Raises UsageError for one that is not there."""
    there = torch.cuda.device_count()
    if absent := [device for device in devices if device >= there]:
        raise UsageError(f"no CUDA device {', '.join(map(str, absent))}: there are {there}")
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = seen.split(",") if seen else [str(device) for device in range(there)]
    workers = {
        device: {
            "cls": Nanny,
            "options": {
                "nthreads": 1,
                "memory_limit": MEMORY_LIMIT,
                "resources": {"GPU": 1},
                "env": {"CUDA_VISIBLE_DEVICES": names[device]},
            },
        }
        for device in devices
    }
    scheduler = {"cls": Scheduler, "options": {"host": "127.0.0.1", "dashboard_address": ANY_PORT}}
    with undisturbed():
        cluster = SpecCluster(workers=workers, scheduler=scheduler)
    with ending(cluster), Client(cluster) as client:
        client.wait_for_workers(len(devices))
        yield client


@contextmanager
def client_of(address: str) -> Iterator[Client]:
    """The client of a scheduler. Raises D2LSError where there is none."""
    try:
        client = Client(address)
    except (OSError, ValueError) as error:
        raise D2LSError(f"no scheduler of Dask at {address}: {' '.join(str(error).split())}") from error
    with client:
        yield client


def parse_local(text: str) -> int | None:
    """ "local:4" -> 4; None for an address. Raises UsageError for what is neither."""
    if match := re.fullmatch(r"local:(\d+)", text):
        if (count := int(match[1])) > 0:
            return count
    elif re.fullmatch(r"(tcp|tls|ws|wss|ucx|ucxx)://\S+", text):
        return None
    raise UsageError(f"a cluster is local:N, N worker processes, or an address such as tcp://host:8786; got {text!r}")


def parse_devices(text: str) -> list[int]:
    """ "0,1,2" -> [0, 1, 2]. Raises UsageError for anything else."""
    if not re.fullmatch(r"\d+(,\d+)*", text) or len(set(text.split(","))) != text.count(",") + 1:
        raise UsageError(f"devices are numbers of CUDA devices, each once, such as 0,1,2; got {text!r}")
    return [int(part) for part in text.split(",")]
