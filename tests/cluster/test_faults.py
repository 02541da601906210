"""What goes wrong on a cluster: nothing is lost, nothing finished is done twice, the map is the same bytes.

D2LS_FUZZ=20 kills workers in twenty times as many runs as the suite does.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
from cluster_toys import Stuck, Touchy, be_scheduler, be_worker

from d2ls_infer import FailedScene, PredictResult, predict_many, predict_raster
from d2ls_infer.cluster import ClusterOptions
from d2ls_infer.cluster.clients import client_of
from d2ls_infer.cluster.pieces import (
    Band,
    Piece,
    bands_in,
    cut,
    gaps,
    known_pieces,
    parts_folder,
    piece_path,
    usual_tile_rows,
)
from d2ls_infer.cluster.worker import BandDone
from d2ls_infer.errors import D2LSError, RasterError, UsageError
from d2ls_infer.outputs import Finished, Outputs

Write = Callable[..., Path]
Pixels = Callable[..., np.ndarray]
Crowd = Callable[[int], Any]
EFFORT = float(os.environ.get("D2LS_FUZZ", "1"))
OPTIONS: dict[str, Any] = {"tile_size": 32, "overlap": 8, "confidence": True}

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="sends signals of POSIX"),
    pytest.mark.usefixtures("quiet"),
]


@pytest.fixture
def whole(scene: Path, tmp_path: Path) -> dict[str, bytes]:
    """The files of a run in one process."""
    (tmp_path / "one").mkdir()
    predict_raster(Touchy(), scene, tmp_path / "one", **OPTIONS)
    return files(tmp_path / "one")


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def kept(folder: Path) -> list[tuple[str, int]]:
    """The pieces in a folder, and when rows were last added to them."""
    found = []
    for path in folder.glob("*.parts/*.journal"):
        with suppress(OSError):  # it was just removed
            found.append((path.name, path.stat().st_mtime_ns))
    return sorted(found)


def processes(client: Any) -> list[int]:
    return list(client.run(os.getpid).values())


# Workers


def test_workers_that_are_killed_at_random_moments(
    scene: Path, tmp_path: Path, whole: dict[str, bytes], crowd: Crowd
) -> None:
    random = np.random.default_rng(7)
    kills = 0
    with crowd(2) as client:
        for number in range(max(1, round(2 * EFFORT))):
            folder = tmp_path / f"many {number}"
            folder.mkdir()
            ended = threading.Event()

            def kill(ended: threading.Event = ended, folder: Path = folder) -> None:
                nonlocal kills
                before = kept(folder)
                while not ended.wait(0.01):
                    if kept(folder) == before:  # so that some rows are made between two of them
                        continue
                    ended.wait(random.uniform(0, 1))
                    pids: list[int] = []
                    with suppress(OSError):  # one was lost while it was asked
                        pids = processes(client)
                    if pids:  # else both are being started anew
                        with suppress(ProcessLookupError):
                            os.kill(pids[random.integers(len(pids))], signal.SIGKILL)
                            kills += 1
                    before = kept(folder)

            killer = threading.Thread(target=kill)
            killer.start()
            try:
                found = list(predict_many(
                    Touchy(0.02, at_once=True), [scene], folder, client=client,
                    cluster=ClusterOptions(band_rows=[31, 113, 60][number % 3]), **OPTIONS,
                ))  # fmt: skip
            finally:
                ended.set()
                killer.join()
            assert isinstance(found[0], PredictResult), found
            assert files(folder) == whole
    assert kills > 0


def test_bands_that_the_scheduler_lets_go_of_are_handed_out_again(
    client: Any, scene: Path, tmp_path: Path, whole: dict[str, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    """As it does, on a busy machine, of one whose worker is killed just as it is done."""
    from distributed import Future

    (tmp_path / "many").mkdir()
    let_go: list[str] = []

    def tell(news: dict[str, Any]) -> None:
        if news["status"] == "band" and not let_go:
            let_go.extend(key for key, state in client.futures.items() if state.status == "pending")
            client.cancel([Future(key, client) for key in let_go], force=True)

    (found,) = predict_many(
        Touchy(0.05), [scene], tmp_path / "many", client=client, tell=tell, cluster=ClusterOptions(band_rows=60),
        **OPTIONS,
    )  # fmt: skip
    assert let_go
    assert isinstance(found, PredictResult), found
    assert caplog.text.count("the scheduler has let go of it") == len(let_go)
    assert files(tmp_path / "many") == whole


@pytest.mark.parametrize("how", ["stopped", "stuck"])
def test_a_worker_that_hangs_is_started_anew(
    scene: Path, tmp_path: Path, whole: dict[str, bytes], crowd: Crowd, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    (tmp_path / "many").mkdir()
    with crowd(2) as client:
        first = processes(client)[0]

        def tell(news: dict[str, Any]) -> None:
            if how == "stopped" and news["status"] == "begun":
                os.kill(first, signal.SIGSTOP)

        segmenter = Touchy(0.01) if how == "stopped" else Stuck(tmp_path / "once")
        (found,) = predict_many(
            segmenter, [scene], tmp_path / "many", client=client, tell=tell,
            cluster=ClusterOptions(band_rows=60, stall_seconds=1.5), **OPTIONS,
        )  # fmt: skip
    assert isinstance(found, PredictResult), found
    assert "has said nothing for 1.5 s; it is started anew" in caplog.text
    assert files(tmp_path / "many") == whole


def test_a_disk_that_is_full_on_one_worker(
    scene: Path, tmp_path: Path, whole: dict[str, bytes], crowd: Crowd, caplog: pytest.LogCaptureFixture
) -> None:
    def fill() -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))

    (tmp_path / "many").mkdir()
    with crowd(2) as client:
        client.run(fill, workers=sorted(client.nthreads())[:1])
        (found,) = predict_many(
            Touchy(), [scene], tmp_path / "many", client=client, cluster=ClusterOptions(band_rows=60), **OPTIONS
        )
    assert isinstance(found, PredictResult), found
    assert "try 1 of 3 failed" in caplog.text
    assert files(tmp_path / "many") == whole


def test_what_workers_of_an_earlier_run_leave_meanwhile_is_replaced(
    client: Any, scene: Path, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    """A worker of a run that has just failed keeps what it has made, perhaps when the next run has begun."""
    many, band = tmp_path / "many", Band(280, 300)
    many.mkdir()

    def tell(news: dict[str, Any]) -> None:
        folder = parts_folder(many / "scene_d2ls-touchy.tif")
        if news["status"] == "band" and not piece_path(folder, band).exists():
            with Piece(folder, band, {"options": {"overlap": 9}}) as piece:
                piece.add(Finished.of(280, {"labels": np.zeros((4, 70), np.uint8)}))

    (found,) = predict_many(
        Touchy(0.02), [scene], many, client=client, tell=tell, cluster=ClusterOptions(band_rows=20), **OPTIONS
    )
    assert isinstance(found, PredictResult), found
    assert files(many) == whole


# Sources


@pytest.mark.parametrize("sha256", [Touchy.sha256, ""], ids=["named", "unnamed"])
def test_a_source_that_cannot_be_read_is_tried_three_times_and_stops_no_other(
    client: Any, scene: Path, tmp_path: Path, write_raster: Write, pixels: Pixels, caplog: pytest.LogCaptureFixture,
    sha256: str,
) -> None:  # fmt: skip
    bad = write_raster(tmp_path / "bad.tif", pixels(3, 300, 70), compress="deflate", blockysize=16)
    content = bytearray(bad.read_bytes())
    content[-3000:] = b"\0" * 3000
    bad.write_bytes(content)
    segmenter = Touchy()
    segmenter.sha256 = sha256
    found = list(predict_many(
        segmenter, [bad, scene], client=client, cluster=ClusterOptions(band_rows=60), **OPTIONS
    ))  # fmt: skip
    (failed,) = [item for item in found if isinstance(item, FailedScene)]
    (made,) = [item for item in found if isinstance(item, PredictResult)]
    assert (failed.source, made.source) == (str(bad), str(scene))
    assert isinstance(failed.error, RasterError)
    assert "bad.tif, rows" in str(failed.error)
    assert "try 1 of 3 failed" in caplog.text
    assert "try 2 of 3 failed" in caplog.text
    # Of a segmenter that does not say what it is, nobody could take up the pieces.
    assert ("% of the map are kept in" in caplog.text) == ("--resume" in caplog.text) == bool(sha256)
    assert [path.name for path in tmp_path.glob("*.parts")] == (["bad_d2ls-touchy.tif.parts"] if sha256 else [])


# Where the map is put together


@pytest.mark.parametrize("band_rows", [20, 300], ids=["half made", "all made"])
def test_a_map_that_cannot_be_written_ends_its_scene_at_once(
    client: Any, scene: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    band_rows: int,
) -> None:  # fmt: skip
    """It is written while its bands are made: those that are left are let go, and what was made is kept."""

    def full(outputs: Outputs, rows: Finished) -> None:
        raise RasterError("cannot write map.tif: No space left on device")

    news: list[dict[str, Any]] = []
    monkeypatch.setattr(Outputs, "add", full)
    (failed,) = predict_many(
        Touchy(0.05, at_once=True), [scene], tmp_path / "map.tif", client=client, tell=news.append,
        cluster=ClusterOptions(band_rows=band_rows), **OPTIONS,
    )  # fmt: skip
    assert isinstance(failed, FailedScene)
    assert "No space left on device" in str(failed.error)
    assert 0 < sum(item["status"] == "band" for item in news) < 15
    assert "% of the map are kept in" in caplog.text
    assert [path.name for path in tmp_path.glob("map*")] == ["map.tif.parts"]
    monkeypatch.undo()
    result = predict_raster(
        Touchy(), scene, tmp_path / "map.tif", client=client, resume=True, cluster=ClusterOptions(band_rows=band_rows),
        **OPTIONS,
    )  # fmt: skip
    assert result.resumed_rows > 0
    predict_raster(Touchy(), scene, tmp_path / "one.tif", **OPTIONS)
    assert (tmp_path / "map.tif").read_bytes() == (tmp_path / "one.tif").read_bytes()


# The scheduler, and the client


@contextmanager
def scheduler(forked: Any, port: int) -> Iterator[tuple[Any, list[Any]]]:
    """A scheduler and two workers as processes of their own, and a client that soon knows when they are lost."""
    running = [forked.Process(target=be_scheduler, args=(port,))]
    running += [forked.Process(target=be_worker, args=(f"tcp://127.0.0.1:{port}",)) for _ in range(2)]
    try:
        for process in running:
            process.start()
        with (
            dask.config.set({"distributed.comm.timeouts.connect": "3s"}),
            client_of(f"tcp://127.0.0.1:{port}") as client,
        ):
            yield client, running
    finally:
        for process in running:
            process.kill()
            process.join()


def free_port() -> int:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def test_a_client_that_is_closed_has_lost_the_scheduler(crowd: Crowd, scene: Path, tmp_path: Path) -> None:
    with crowd(1) as client:

        def tell(news: dict[str, Any]) -> None:
            if news["status"] == "band":
                client.close()

        with pytest.raises(D2LSError, match=r"the scheduler is lost; .* --resume goes on"):
            list(predict_many(
                Touchy(0.05), [scene], tmp_path / "map.tif", client=client, tell=tell,
                cluster=ClusterOptions(band_rows=60), **OPTIONS,
            ))  # fmt: skip


def test_the_scheduler_is_lost_and_the_run_started_again(
    forked: Any, scene: Path, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    many, port = tmp_path / "many", free_port()
    many.mkdir()
    how: dict[str, Any] = {"cluster": ClusterOptions(band_rows=60), **OPTIONS}
    with scheduler(forked, port) as (client, running):
        client.wait_for_workers(2)

        def tell(news: dict[str, Any]) -> None:
            if news["status"] == "band":
                running[0].kill()

        with pytest.raises(D2LSError, match=r"the scheduler is lost; .* --resume goes on"):
            list(predict_many(Touchy(0.05, at_once=True), [scene], many, client=client, tell=tell, **how))
    (kept,) = many.iterdir()
    before = {band: (kept / f"{band.first:010d}-{band.last:010d}.journal").stat() for band in bands_in(kept)}
    assert before
    with scheduler(forked, port) as (client, _):
        (failed,) = predict_many(Touchy(), [scene], many, client=client, resume=True, **{**how, "overlap": 9})
        assert isinstance(failed, FailedScene)
        assert re.search(r"holds \d+ % of a map made with other overlap \(it was 8\)", str(failed.error))
        assert isinstance(failed.error, UsageError)
        (result,) = predict_many(Touchy(), [scene], many, client=client, resume=True, **how)
    assert isinstance(result, PredictResult), result
    assert result.resumed_rows > 0
    assert files(many) == whole


def test_a_run_that_is_stopped_goes_on(
    client: Any, scene: Path, tmp_path: Path, whole: dict[str, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    many = tmp_path / "many"
    many.mkdir()
    news: list[dict[str, Any]] = []

    def tell(item: dict[str, Any]) -> None:
        news.append(item)
        if len([item for item in news if item["status"] == "band"]) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(predict_many(
            Touchy(0.01), [scene], many, client=client, tell=tell, cluster=ClusterOptions(band_rows=30), **OPTIONS
        ))  # fmt: skip
    assert "% of the map are kept in" in caplog.text
    made = [(item["first"], item["last"]) for item in news if item["status"] == "band"]
    time.sleep(0.5)  # what was worked at sees that nobody wants it
    news.clear()
    (result,) = predict_many(
        Touchy(), [scene], many, client=client, resume=True, tell=news.append,
        cluster=ClusterOptions(band_rows=70), **OPTIONS,
    )  # fmt: skip
    assert isinstance(result, PredictResult), result
    assert result.resumed_rows >= sum(last - first for first, last in made)
    again = [(item["first"], item["last"]) for item in news if item["status"] == "band"]
    assert not set(made) & set(again)
    assert files(many) == whole


# Pieces


def test_a_piece_goes_on_where_it_was_left(tmp_path: Path) -> None:
    rows = np.arange(20, dtype=np.uint8).reshape(4, 5)
    key, band = {"a": 1}, Band(8, 16)
    with Piece(tmp_path, band, key) as piece:
        piece.add(Finished.of(8, {"labels": rows}))
    assert known_pieces(tmp_path, key) == {band: (4, None)}
    done = BandDone(6, 1, 2, 3, {"read": 0.5}, "tcp://somewhere")
    with Piece(tmp_path, band, key) as piece:
        assert (piece.rows, piece.done) == (12, None)
        piece.add(Finished.of(12, {"labels": rows}))
        piece.finish(done)
    assert known_pieces(tmp_path, key) == {band: (8, done)}
    with Piece(tmp_path, band, key) as piece:
        assert [part.first for part in piece] == [8, 12]
        assert all(np.array_equal(part.labels, rows) for part in piece)
    with pytest.raises(UsageError, match="made with other a"):
        known_pieces(tmp_path, {"a": 2})


def test_two_workers_that_add_to_one_piece_do_not_hinder_each_other(tmp_path: Path) -> None:
    """One was given up and lives on; both make the same rows."""
    rows = [Finished.of(8 + 4 * index, {"labels": np.full((4, 5), index, np.uint8)}) for index in range(3)]
    band, done = Band(8, 20), BandDone(6, 1, 2, 3, {"read": 0.5}, "tcp://somewhere")
    with Piece(tmp_path, band, {}) as given_up, Piece(tmp_path, band, {}) as other:
        for part in rows:
            for piece in (given_up, other):
                piece.add(part)
                piece.commit()
        other.finish(done)
        given_up.finish(done)
    with Piece(tmp_path, band, {}) as piece:
        assert piece.done == done
        assert [part.first for part in piece] == [8, 12, 16]
        assert all(np.array_equal(part.labels, made.labels) for part, made in zip(piece, rows, strict=True))


def test_pieces_that_are_of_no_use_are_removed(tmp_path: Path) -> None:
    folder = parts_folder(tmp_path / "map.tif")
    folder.mkdir()
    for band in (Band(0, 4), Band(2, 6)):
        with Piece(folder, band, {}) as piece:
            piece.add(Finished.of(band.first, {"labels": np.zeros((4, 5), np.uint8)}))
    (folder / "0000000006-0000000009.journal").write_bytes(b"noise" * 1000)
    assert known_pieces(folder, {}) == {Band(0, 4): (4, None)}
    assert bands_in(folder) == [Band(0, 4)]


def test_gaps_and_bands_cover_every_row_once() -> None:
    known = {Band(10, 20): None, Band(0, 4): None}
    found = gaps(known, 50)
    assert found == [Band(4, 10), Band(20, 50)]
    assert cut(found[1], (0, 12, 24, 36, 48), 2) == [Band(20, 36), Band(36, 50)]
    assert cut(found[0], (0, 12, 24), 1) == [Band(4, 10)]
    assert gaps({Band(0, 50): None}, 50) == []


@pytest.mark.parametrize(
    ("tile_rows", "workers", "rows"), [(1, 5, 1), (16, 2, 8), (50, 1, 50), (100, 1, 50), (48, 2, 24), (9600, 2, 96)]
)
def test_a_band_is_high_where_the_scene_is(tile_rows: int, workers: int, rows: int) -> None:
    assert usual_tile_rows(tile_rows, workers, handed_over=False) == rows


@pytest.mark.parametrize(
    ("tile_rows", "workers", "rows"), [(1, 5, 1), (11, 2, 2), (100, 1, 50), (48, 2, 12), (9600, 2, 96)]
)
def test_bands_are_lower_where_their_shared_tiles_are_scored_once(tile_rows: int, workers: int, rows: int) -> None:
    assert usual_tile_rows(tile_rows, workers, handed_over=True) == rows
