"""A journal of finished rows beside a map that is being made, so that a run that was stopped can go on."""

from __future__ import annotations

import json
import logging
import sqlite3
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from d2ls_infer.errors import RasterError, UsageError
from d2ls_infer.outputs import Finished
from d2ls_infer.raster import local_file

log = logging.getLogger(__name__)

COMMIT_SECONDS = 5.0
"""How often finished rows are put on disk: so much work is lost at most, and a shorter run leaves no journal."""

COMMIT_BYTES = 32 << 20
"""What may wait in memory until then."""

TABLES = """
CREATE TABLE run (key TEXT NOT NULL);
CREATE TABLE rows (first INTEGER PRIMARY KEY, count INTEGER NOT NULL);
CREATE TABLE layers (first INTEGER, name TEXT, shape TEXT NOT NULL, data BLOB NOT NULL, PRIMARY KEY (first, name));
"""


def journal_path(output: Path) -> Path:
    """Where the journal of a map lies: beside it."""
    return output.with_name(output.name + ".journal")


def remove_journal(path: Path) -> None:
    """Remove the file, and what SQLite left beside it when it was killed."""
    for file in (path, Path(f"{path}-journal")):
        with suppress(OSError):
            file.unlink(missing_ok=True)


def key_of(output: Path) -> dict[str, Any] | None:
    """The key of the journal beside a map; None where there is none, or none that can be read."""
    if local_file(journal_path(output)) is None:  # the name may be so long that there cannot be one
        return None
    with suppress(sqlite3.Error, TypeError, ValueError), closing(sqlite3.connect(journal_path(output))) as database:
        key: dict[str, Any] = json.loads(*database.execute("SELECT key FROM run").fetchone())
        return key
    return None


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What two keys do not have in common; of options, which ones and what they were."""
    names = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    if "options" not in names:
        return names
    old, new = before.get("options", {}), now.get("options", {})
    told = [f"{name} (it was {old.get(name)})" for name in sorted(old | new) if old.get(name) != new.get(name)]
    return [name for name in names if name != "options"] + told


class Journal:
    """The finished rows of one run; a context manager.

    A SQLite file beside the map: what was committed to it is whole, whenever the process is killed. `key` says what the
    result depends on; with `resume`, rows of an earlier run with the same key are taken up, and `rows` says how many of
    them, from the top, are known. Raises UsageError that names the differences where the key is another one. Without
    `resume`, the journal starts anew once there is something to keep. When the `with` block ends without an error the
    journal is removed; otherwise it stays, if it holds anything, and a warning says so.
    """

    INSERT = "INSERT"
    """How rows go into it."""

    def __init__(self, output: Path, key: Mapping[str, Any], *, height: int, resume: bool = False) -> None:
        self.path, self.height, self.rows = journal_path(output), height, 0
        self.key = json.dumps(key, sort_keys=True, default=str)
        self.forget()
        self.database: sqlite3.Connection | None = None
        if resume:
            self.take_up()
        elif local_file(self.path):
            log.warning("%s, of a run that was stopped, is replaced; --resume would have gone on there", self.path)

    def take_up(self) -> None:
        """Open the journal of an earlier run, if there is one of this run's key."""
        if local_file(self.path) is None:
            return
        with self.telling():
            self.database = sqlite3.connect(self.path, check_same_thread=False)
            if self.database.execute("SELECT 1 FROM sqlite_master").fetchone() is None:  # killed as it was made
                self.close()
                return
            (found,) = self.database.execute("SELECT key FROM run").fetchone()
            (rows,) = self.database.execute("SELECT max(first + count) FROM rows").fetchone()
        if found == self.key:
            self.rows = int(rows or 0)
            log.info("%s: going on after row %d of %d", self.path, self.rows, self.height)
            return
        self.close()
        other = ", ".join(differences(json.loads(found), json.loads(self.key)))
        raise UsageError(
            f"{self.path} holds {100 * int(rows or 0) / self.height:.0f} % of a map made with other {other}; "
            "without --resume this run starts anew in its place"
        )

    def at(self, first: int) -> Finished:
        """The known rows that begin at row `first`, as they were handed to `add`."""
        assert self.database is not None, "nothing was taken up"
        query = "SELECT name, shape, data FROM layers WHERE first = ?"
        with self.telling():
            layers = {
                name: np.frombuffer(zlib.decompress(data), np.uint8).reshape(json.loads(shape))
                for name, shape, data in self.database.execute(query, (first,))
            }
        if "labels" not in layers:
            raise RasterError(f"the journal {self.path} has no rows that begin at {first}; remove it and start anew")
        return Finished.of(first, layers)

    def add(self, rows: Finished) -> None:
        """Keep finished rows, with all values that were asked for."""
        layers = [
            (rows.first, name, json.dumps(values.shape), zlib.compress(values.tobytes(), 1))
            for name, values in rows.values().items()
        ]
        self.waiting.append((rows.first, len(rows.labels), layers))
        self.waiting_bytes += sum(len(data) for *_, data in layers)
        if self.is_time():
            self.commit()

    def is_time(self) -> bool:
        """Whether so much work waits that it should not be lost, or takes too much memory."""
        return time.monotonic() - self.waiting_since >= COMMIT_SECONDS or self.waiting_bytes >= COMMIT_BYTES

    def commit(self) -> None:
        """Put what waits on disk."""
        if not self.waiting:
            return
        with self.telling():
            self.database = self.database or self.begun()
            with self.database:
                self.database.executemany(f"{self.INSERT} INTO rows VALUES (?, ?)", [part[:2] for part in self.waiting])
                layers = [layer for part in self.waiting for layer in part[2]]
                self.database.executemany(f"{self.INSERT} INTO layers VALUES (?, ?, ?, ?)", layers)
        self.rows = sum(self.waiting[-1][:2])
        self.forget()

    def begun(self) -> sqlite3.Connection:
        """A new journal in place of another run's; tables and key come into it together, or not at all."""
        remove_journal(self.path)
        database = sqlite3.connect(self.path, check_same_thread=False)
        database.executescript(f"BEGIN; {TABLES}")
        database.execute("INSERT INTO run VALUES (?)", (self.key,))
        database.commit()
        return database

    def forget(self) -> None:
        """Let nothing wait, from now on."""
        self.waiting: list[tuple[int, int, list[tuple[int, str, str, bytes]]]] = []  # first row, rows, their layers
        self.waiting_bytes, self.waiting_since = 0, time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            remove_journal(self.path)
            return
        with suppress(RasterError):  # the first error is the one to tell
            if self.database is not None or self.is_time():
                self.commit()
        self.close()
        if self.rows:
            log.warning(
                "%.0f %% of the map are kept in %s; the same command with --resume (in Python: resume=True) goes on",
                100 * self.rows / self.height, self.path,
            )  # fmt: skip

    def close(self) -> None:
        """Let go of the file."""
        if self.database is not None:
            self.database.close()
            self.database = None

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Turn an error of SQLite into a line that names the journal."""
        try:
            yield
        except (sqlite3.Error, zlib.error, ValueError, TypeError) as error:
            raise RasterError(f"the journal {self.path} cannot be used: {error}; remove it and start anew") from error
