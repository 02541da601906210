"""Several hosts: the scheduler in one network namespace, workers in two others, the disk shared by all.

Needs Linux, root and `ip` of iproute2; skipped where namespaces cannot be made.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dask
import pytest
from cluster_toys import Touchy, be_scheduler, be_worker

from d2ls_infer import PredictResult, predict_many, predict_raster
from d2ls_infer.cluster import ClusterOptions
from d2ls_infer.cluster.clients import client_of

PORT = 8786
OPTIONS: dict[str, Any] = {"tile_size": 32, "overlap": 8, "confidence": True}
NETWORK = "198.18"  # for tests between networks, RFC 2544


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@dataclass
class Hosts:
    """Where the scheduler is, as we and the workers see it, and the namespaces."""

    address: str
    scheduler: str
    workers: tuple[str, str]

    def cut(self, worker: int) -> None:
        """Take the cable of a worker's host out."""
        ip("-n", self.scheduler, "link", "set", f"to{worker}", "down")


@pytest.fixture
def hosts(forked: Any) -> Iterator[Hosts]:
    """A scheduler and a worker on each of two other hosts, which see nothing but the scheduler's."""
    if shutil.which("ip") is None:
        pytest.skip("needs ip of iproute2")
    names = [f"d2ls-{os.getpid()}-{index}" for index in range(3)]  # the scheduler's, and two workers'
    client_end = f"d2ls{os.getpid()}"
    running: list[Any] = []
    try:
        try:
            for name in names:
                ip("netns", "add", name)
                ip("-n", name, "link", "set", "lo", "up")
            join(client_end, "", names[0], "to0", 0)
            for index in (1, 2):
                join("to-scheduler", names[index], names[0], f"to{index}", index)
        except (subprocess.CalledProcessError, OSError) as error:
            pytest.skip(f"no network namespaces can be made here: {getattr(error, 'stderr', '') or error}")
        running.append(forked.Process(target=be_scheduler, args=(PORT, names[0])))
        for index in (1, 2):
            address = f"tcp://{NETWORK}.{index}.1:{PORT}"
            running.append(forked.Process(target=be_worker, args=(address, names[index])))
        for process in running:
            process.start()
        yield Hosts(f"tcp://{NETWORK}.0.1:{PORT}", names[0], (names[1], names[2]))
    finally:
        for process in running:
            process.kill()
            process.join()
        for name in names:  # and with them the links into them
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def join(end: str, namespace: str, hub: str, hub_end: str, number: int) -> None:
    """A cable between a namespace, "" for ours, and that of the scheduler, whose end has the address 1."""
    here = ["-n", namespace] if namespace else []
    ip(*here, "link", "add", end, "type", "veth", "peer", "name", hub_end, "netns", hub)
    ip(*here, "address", "add", f"{NETWORK}.{number}.2/24", "dev", end)
    ip(*here, "link", "set", end, "up")
    ip("-n", hub, "address", "add", f"{NETWORK}.{number}.1/24", "dev", hub_end)
    ip("-n", hub, "link", "set", hub_end, "up")


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("cut", [False, True])
def test_the_bytes_are_those_of_one_process_also_when_a_host_is_cut_off(
    hosts: Hosts, scene: Path, tmp_path: Path, contents: Callable[[Path], dict[str, bytes]],
    caplog: pytest.LogCaptureFixture, cut: bool,
) -> None:  # fmt: skip
    one, many = tmp_path / "one", tmp_path / "many"
    one.mkdir()
    many.mkdir()
    predict_raster(Touchy(), scene, one, **OPTIONS)
    made: dict[str, int] = {}  # bands that ended before the cut and after it, by worker

    def tell(news: dict[str, Any]) -> None:
        if news["status"] == "band":
            made[news["worker"]] = made.get(news["worker"], 0) + 1
            if cut and len(made) == 2 and not lost:
                lost.append(next(iter(made)))
                hosts.cut(int(lost[0].split(".")[2]))

    lost: list[str] = []
    with dask.config.set({"distributed.comm.timeouts.connect": "20s"}), client_of(hosts.address) as client:
        client.wait_for_workers(2)
        addresses = sorted(client.nthreads())
        assert [address.rpartition(":")[0] for address in addresses] == [
            f"tcp://{NETWORK}.1.2", f"tcp://{NETWORK}.2.2",
        ]  # fmt: skip
        (found,) = predict_many(
            Touchy(0.05 if cut else 0.01, at_once=True), [scene], many, client=client, tell=tell,
            cluster=ClusterOptions(band_rows=30, stall_seconds=2), **OPTIONS,
        )  # fmt: skip
        assert isinstance(found, PredictResult), found
        assert set(made) == set(addresses)
        if cut:
            assert sorted(client.nthreads()) == [address for address in addresses if address != lost[0]]
            assert f"{lost[0]} has said nothing for 2 s" in caplog.text
    assert contents(many) == contents(one)
    assert not list(many.glob("*.parts"))
