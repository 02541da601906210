"""Predicting on a cluster, as the command line has it: its options, and what is told while it runs."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import click

from d2ls_infer.errors import UsageError

if TYPE_CHECKING:
    from d2ls_infer.batch import FailedScene
    from d2ls_infer.job import PredictResult

Command = TypeVar("Command", bound=Callable[..., Any])


def options(command: Command) -> Command:
    """--cluster, --devices, --band-rows and --stall."""
    for option in (
        click.option(
            "--stall", type=float, metavar="SECONDS",
            help="On a cluster: a worker that says nothing for so long is started anew.  [default: 300]",
        ),
        click.option(
            "--band-rows", type=int, metavar="N",
            help="On a cluster: rows of a scene that are one piece of work.  [default: whole rows of tiles]",
        ),
        click.option(
            "--devices", metavar="N,N,...", help="Map on several CUDA devices of this machine, a worker process each."
        ),
        click.option(
            "--cluster", metavar="local:N|ADDRESS",
            help="Map by N worker processes, or by the workers of a Dask scheduler (tcp://host:8786).",
        ),
    ):  # fmt: skip
        command = option(command)
    return command


def map_on_cluster(
    *arguments: Any,
    cluster: str | None,
    devices: str | None,
    band_rows: int | None,
    stall: float | None,
    as_json: bool,
    quiet: bool,
    **settings: Any,
) -> Iterator[PredictResult | FailedScene]:
    """What `map_scenes` gives for all but the client. Raises UsageError where both or neither cluster is named."""
    from d2ls_infer.cluster import map_scenes, open_client

    # Dask sets its own to tell of each worker that comes; --log-level has said how much of other libraries is told.
    logging.getLogger("distributed").setLevel(logging.getLogger().level)
    with (
        open_client(cluster, devices, band_rows=band_rows, stall_seconds=stall) as (client, how),
        telling(as_json=as_json, quiet=quiet) as tell,
    ):
        yield from map_scenes(client, *arguments, tell=tell, cluster=how, **settings)


def check(cluster: str | None, devices: str | None, **others: Any) -> bool:
    """Whether a cluster is asked for. Raises UsageError for two, and for options of one without it."""
    if cluster is not None and devices is not None:
        raise UsageError("--devices makes workers on this machine; leave out it or --cluster")
    if cluster is None and devices is None and (given := [name for name, value in others.items() if value is not None]):
        raise UsageError(f"--{given[0].replace('_', '-')} is for work on a cluster; give --cluster or --devices too")
    return cluster is not None or devices is not None


@contextmanager
def telling(*, as_json: bool, quiet: bool) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Gives what tells of a run: lines of JSON, or a bar over the pixels of all scenes on standard error."""
    from tqdm import tqdm

    if as_json:
        yield lambda news: click.echo(json.dumps(news))
        return
    with tqdm(desc="all scenes", unit="px", unit_scale=True, disable=True if quiet else None, leave=False) as bar:

        def tell(news: dict[str, Any]) -> None:
            if news["status"] == "begun":
                bar.total = news["pixels"]
                if news["dashboard"] and not quiet:
                    click.echo(f"dashboard: {news['dashboard']}", err=True)
            elif news["status"] == "progress":
                bar.total = news["all"]
                bar.set_postfix_str(f"{news['workers']} workers, {news['rate'] / 1e6:.2f} Mpx/s each", refresh=False)
                bar.update(news["pixels"] - bar.n)

        yield tell
