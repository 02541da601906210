"""The finished rows of a part of a scene, kept beside the map until it is put together."""

from __future__ import annotations

import json
import logging
import re
import sqlite3
import uuid
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from d2ls_infer.cluster.shared import PLACE, remove_shared
from d2ls_infer.errors import RasterError, UsageError
from d2ls_infer.journal import Journal, key_of, remove_journal
from d2ls_infer.outputs import Finished
from d2ls_infer.raster import local_file
from d2ls_infer.store import at_hand, names_in, remove

log = logging.getLogger(__name__)

PARTS = ".parts"
"""What is hung on to a map's name for the folder of its pieces."""


class Band(NamedTuple):
    """Rows of a scene, from `first` to `last`, which is not among them."""

    first: int
    last: int


@dataclass(frozen=True)
class BandDone:
    """What came of a band besides its rows.

    tiles: that were read for it; skipped: those without a valid pixel that begin in it. clipped, seen: how many valid
    values lay outside the range, and of how many. seconds: by stage, see `PredictResult`. worker: its address.

    Of a map that stays in pieces, raster: the name of the band's own map beside its piece; pixels, areas_m2: of each
    class in it.
    """

    tiles: int
    skipped: int
    clipped: int
    seen: int
    seconds: dict[str, float]
    worker: str
    raster: str = ""
    pixels: list[int] = field(default_factory=list)
    areas_m2: list[float] = field(default_factory=list)


class Piece(Journal):
    """The finished rows of one band; a context manager.

    A journal, of the same form as that of a run in one process, that stays when it is whole: then `done` says what came
    of the band. One that is not whole, of a worker that was lost, goes on after its last row. Raises UsageError where
    it is of another key, RasterError where it cannot be read or written.

    A worker that was given up because its network is cut, say, may still be at work: then two add to the same file.
    Their rows come in the same parts and are the same, so what is there stays.
    """

    INSERT = "INSERT OR IGNORE"

    def __init__(self, folder: Path, band: Band, key: Mapping[str, Any]) -> None:
        self.band = band
        super().__init__(folder / name_of(band), key, height=band.last, resume=True)
        self.rows = max(self.rows, band.first)

    @property
    def done(self) -> BandDone | None:
        """What came of the band; None while rows are missing."""
        if self.database is None or self.rows < self.band.last:
            return None
        with self.telling():
            if self.database.execute("SELECT 1 FROM sqlite_master WHERE name = 'done'").fetchone() is None:
                return None
            return BandDone(**json.loads(*self.database.execute("SELECT done FROM done").fetchone()))

    def begun(self) -> sqlite3.Connection:
        """A new journal, or the one that another worker has begun meanwhile; it is of our key, as all that are left."""
        if local_file(self.path) is None:
            return super().begun()
        self.take_up()
        return self.database or super().begun()

    def finish(self, done: BandDone) -> None:
        """Say that it is whole."""
        self.commit()
        assert self.database is not None, "a band has rows"
        assert self.rows == self.band.last, (self.rows, self.band)
        with self.telling():
            self.database.executescript(
                "BEGIN; CREATE TABLE IF NOT EXISTS done (one INTEGER PRIMARY KEY, done TEXT NOT NULL);"
            )
            self.database.execute("INSERT OR IGNORE INTO done VALUES (1, ?)", (json.dumps(asdict(done)),))
            self.database.commit()

    def __iter__(self) -> Iterator[Finished]:
        """All rows, from top to bottom, a few at a time."""
        assert self.database is not None, "nothing was kept"
        with self.telling():
            firsts = [first for (first,) in self.database.execute("SELECT first FROM rows ORDER BY first")]
        for first in firsts:
            yield self.at(first)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with nullcontext() if error is None else suppress(RasterError):  # the first error is the one to tell
            self.commit()
        self.close()


def parts_folder(output: Path) -> Path:
    """Where the pieces of a map lie: beside it."""
    return output.with_name(output.name + PARTS)


def name_of(band: Band) -> str:
    """The name of a band's piece, without its ending."""
    return f"{band.first:010d}-{band.last:010d}"


def raster_of(band: Band) -> str:
    """A name for a band's own map: a new one each time, so that nothing is written that an older VRT shows."""
    return f"{name_of(band)}-{uuid.uuid4().hex[:12]}.tif"


def remove_rasters(folder: Path, *, but: Collection[str]) -> None:
    """Remove the maps of bands, and what lies beside them, but for those of these names."""
    for name in names_in(folder):
        match = re.match(r"\d{10,}-\d{10,}-[0-9a-f]{12}", name)
        if match and f"{match[0]}.tif" not in but:
            with suppress(OSError):
                (folder / name).unlink()


def piece_path(folder: Path, band: Band) -> Path:
    """The file of a band's piece."""
    return folder / f"{name_of(band)}.journal"


def place_path(folder: Path, band: Band) -> Path:
    """The file that tells helpers which tile of a band its worker is at."""
    return folder / f"{name_of(band)}{PLACE}"


def bands_in(folder: Path) -> list[Band]:
    """The bands of which there are pieces, whole or not, from top to bottom."""
    names = (re.fullmatch(r"(\d{10,})-(\d{10,})\.journal", name) for name in names_in(folder))
    return sorted(Band(int(match[1]), int(match[2])) for match in names if match)


@contextmanager
def kept_piece(folder: Path, band: Band, key: Mapping[str, Any]) -> Iterator[Piece]:
    """A piece that is there; one in an object store is fetched, for as long as it takes."""
    with at_hand(piece_path(folder, band)), Piece(folder, band, key) as piece:
        yield piece


def begun_piece(folder: Path, band: Band, key: Mapping[str, Any]) -> Piece:
    """The piece of a band that is to be made.

    Other runs' pieces were removed when this run began: one that is there has been left since by a worker that was
    still at it, and is replaced.
    """
    with suppress(UsageError):
        return Piece(folder, band, key)
    remove_journal(piece_path(folder, band))
    return Piece(folder, band, key)


def known_pieces(folder: Path, key: Mapping[str, Any]) -> dict[Band, tuple[int, BandDone | None]]:
    """The bands of which an earlier run has left pieces: how many rows of each are known, and what came of it.

    Pieces that cannot be read, or share rows with the one above, are removed. Raises UsageError for another key.
    """
    found: dict[Band, tuple[int, BandDone | None]] = {}
    below = 0
    for band in bands_in(folder):
        try:
            with kept_piece(folder, band, key) as piece:
                rows, done = piece.rows - band.first, piece.done
                kept = piece.database is not None and band.first >= below
        except RasterError as error:
            log.warning("%s; it is made anew", error)
            kept = False
        if kept:
            found[band], below = (rows, done), band.last
        else:
            remove_piece(folder, band)
    return found


def key_of_pieces(folder: Path) -> dict[str, Any] | None:
    """The key of the run that left pieces; None where there are none that can be read."""
    for band in bands_in(folder):
        with at_hand(piece_path(folder, band)):
            if key := key_of(folder / name_of(band)):
                return key
    return None


def remove_piece(folder: Path, band: Band) -> None:
    """Remove one piece."""
    remove_journal(piece_path(folder, band))
    remove(piece_path(folder, band))


def remove_pieces(folder: Path) -> None:
    """Remove the pieces, and the folder if nothing else is in it."""
    for band in bands_in(folder):
        remove_piece(folder, band)
    remove_shared(folder)
    with suppress(OSError):
        folder.rmdir()


def gaps(known: Mapping[Band, Any], height: int) -> list[Band]:
    """The rows of a scene between and around the bands that are known."""
    edges = [0, *(row for band in sorted(known) for row in band), height]
    return [Band(first, last) for first, last in zip(edges[::2], edges[1::2], strict=True) if first < last]


def cut(gap: Band, starts: tuple[int, ...], rows: int) -> list[Band]:
    """A gap in bands that begin at every so many rows of tiles. starts: the scene's rows where rows of tiles begin."""
    inside = [row for row in starts if gap.first < row < gap.last]
    edges = [gap.first, *inside[rows - 1 :: rows], gap.last]
    return [Band(first, last) for first, last in pairwise(edges)]


LEAST_TILE_ROWS = 24
"""Rows of tiles in a band, where there are enough for all workers: where the one that it shares with the band above is
not handed over, it is scored for both, which is 4 % of the work."""

MOST_TILE_ROWS = 96
"""Beyond that, less than 1 % is to be won."""

BANDS_PER_WORKER = 4
"""So many bands each, where there are enough, so that no one waits long for the last."""

LEAST_HANDED_OVER = 2
"""The least where it is likely to be handed over; with 1, two workers would always be at the same row of tiles."""

BANDS_HANDED_OVER = 2
"""Bands each there: who has nothing to do helps with the last ones, and a border between two bands takes a second of
one core where 8 tiles lie side by side."""


def usual_tile_rows(tile_rows: int, workers: int, *, handed_over: bool) -> int:
    """How many rows of tiles a band has where nobody says, of a scene of so many, for so many workers.

    handed_over: whether bands are likely to have the scores of shared rows of tiles from each other.
    """
    least, bands = (LEAST_HANDED_OVER, BANDS_HANDED_OVER) if handed_over else (LEAST_TILE_ROWS, BANDS_PER_WORKER)
    if workers == 1:
        most = MOST_TILE_ROWS
    elif tile_rows < least * workers:
        most = -(-tile_rows // workers)
    else:
        most = max(least, min(MOST_TILE_ROWS, tile_rows // (bands * workers)))
    return -(-tile_rows // -(-tile_rows // most))  # as many bands, of like height
