"""What more than one worker needs: made by the one that comes first, and handed to the others beside the pieces."""

from __future__ import annotations

import hashlib
import json
import logging
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2ls_infer.context import Seen
from d2ls_infer.tiling import Around, Tile

log = logging.getLogger(__name__)

ENDING = ".shared"

PLACE = f".place{ENDING}"
"""Of the file that tells which tile of a band its worker is at."""

PATIENCE = 2.0
"""How long something is waited for that another worker makes, in the times that the like of it has taken here."""

POLL_SECONDS = 0.01
"""How often we look whether it is there."""

PLACE_SECONDS = 0.5
"""How often a worker says at most which tile of a band it is at."""

NOWHERE, BELOW_ALL = (-1, -1), (1 << 62, 0)
"""Places before the first tile, and behind the last."""

LOOK_SECONDS = 5.0
"""How long we wait for what another worker sees in a row of crops; that takes half a second of one core."""

MOST_AHEAD_BYTES = 2 << 30
"""How much of scores a helper leaves at most for the worker that has the band."""


class Shelf:
    """Arrays in files beside the pieces of a map. key: what they depend on.

    Who makes one marks it meanwhile, so that others wait for it or make something else. Nothing depends on a mark:
    where what it promises does not come, because a worker was lost, say, the one that waits makes it.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any]) -> None:
        self.folder = folder
        self.digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:16]

    def path(self, name: str) -> Path:
        """Where an array lies."""
        return self.folder / f"{name}-{self.digest}{ENDING}"

    def mark(self, name: str) -> Path:
        """What says that somebody makes it."""
        return self.folder / f"{name}-{self.digest}{ENDING}.begun"

    def begin(self, name: str) -> bool:
        """Mark it as ours to make; False where it is there, or somebody is at it."""
        try:
            self.mark(name).touch(exist_ok=False)
        except FileExistsError:
            return False
        except OSError as error:  # a disk that is full, say: then nobody else knows
            log.debug("%s cannot be marked: %s", self.path(name), error)
        if not self.path(name).exists():
            return True
        self.end(name)
        return False

    def end(self, name: str) -> None:
        """Take the mark away."""
        with suppress(OSError):
            self.mark(name).unlink()

    def keep(self, name: str, arrays: Sequence[np.ndarray]) -> bool:
        """Put arrays there, all at once; False where that cannot be done."""
        path = self.path(name)
        partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
        try:
            with partial.open("wb") as file:
                for array in arrays:
                    np.save(file, array, allow_pickle=False)
            partial.replace(path)
        except OSError as error:
            log.debug("%s is not kept: %s", path, error)
            with suppress(OSError):
                partial.unlink()
            return False
        return True

    def take(self, name: str, count: int, *, remove: bool) -> list[np.ndarray] | None:
        """So many arrays; None where they are not there, or not whole."""
        path = self.path(name)
        try:
            with path.open("rb") as file:
                arrays = [np.load(file, allow_pickle=False) for _ in range(count)]
        except (OSError, ValueError, EOFError):
            return None
        if remove:
            with suppress(OSError):
                path.unlink()
        return arrays

    def wait(self, name: str, seconds: float) -> None:
        """Wait while somebody makes it, no longer than that; then its mark counts no more."""
        until = time.monotonic() + seconds
        while self.mark(name).exists():
            if time.monotonic() > until:
                self.end(name)
                return
            time.sleep(POLL_SECONDS)


class SharedScores:
    """Scores of batches of tiles, as long as handing over pays; see `blend`.

    It pays where writing the scores and reading them again takes less time than making them: the first batches tell,
    on each worker. What cannot be written or read is scored again.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = device
        self.pays = True
        self.seconds = 0.0  # that the last batch took

    def of(self, shelf: Shelf, rows: Collection[int], place: Path | None = None) -> Around:
        """For who maps a band. rows: where the rows of tiles begin that other bands need too; their scores are kept.

        Others are taken where a helper has left them. place: where it looks how far we are.
        """
        said = -PLACE_SECONDS

        def around(tiles: Sequence[Tile], score: Callable[[], Tensor]) -> Tensor:
            nonlocal said
            if not self.pays:
                return score()
            if place is not None and time.monotonic() - said >= PLACE_SECONDS:
                said = time.monotonic()
                say_place(place, tiles[0][:2])
            name = name_of(tiles)
            shelf.wait(name, PATIENCE * self.seconds)
            if (found := shelf.take(name, 1, remove=True)) is not None:
                return torch.from_numpy(found[0]).to(self.device)
            if tiles[0].row in rows:
                return self.kept(shelf, name, score)
            started = time.perf_counter()
            scores = score()
            self.seconds = time.perf_counter() - started
            return scores

        return around

    def kept(
        self, shelf: Shelf, name: str, score: Callable[[], Tensor], wanted: Callable[[], bool] = lambda: True
    ) -> Tensor:
        """New scores, which are kept, if they are wanted when they are there."""
        shelf.begin(name)
        try:
            started = time.perf_counter()
            scores = score()
            values = scores.detach().float().cpu().numpy()  # as blending takes them
            made = time.perf_counter()
            self.seconds = made - started
            if wanted():
                kept = shelf.keep(name, [values])
                self.pays = kept and 2 * (time.perf_counter() - made) < self.seconds
        finally:
            shelf.end(name)
        return scores

    def left(self, shelf: Shelf, place: Path, tiles: Sequence[Tile], score: Callable[[], Tensor]) -> int:
        """For a helper: make the scores of a batch, unless somebody is at it; how many bytes were left."""
        name = name_of(tiles)
        if not shelf.begin(name):
            return 0
        # Where the band is finished meanwhile, its folder may be gone: that does not tell whether handing over pays.
        scores = self.kept(shelf, name, score, wanted=lambda: tiles[0][:2] >= place_of(place) > NOWHERE)
        return scores.numel() * scores.element_size()


class SharedLooks:
    """What is seen of a scene before its tiles are scored, by the workers together; in place of `map`, see `observed`.

    Only for contexts that are tensors of numpy's types: what else one may be, and whether it may travel, we do not
    know.
    """

    def __init__(self, shelf: Shelf, device: torch.device | str) -> None:
        self.shelf, self.device = shelf, device

    def __call__(self, look: Callable[[tuple[int, int]], Seen], spans: Iterable[tuple[int, int]]) -> Iterator[Seen]:
        spans = list(spans)
        made = {span: self.made(look, span) for span in spans if self.shelf.begin(self.name(span))}
        for span in spans:
            yield made[span] if span in made else self.taken(look, span)

    def name(self, span: tuple[int, int]) -> str:
        """Of what is seen in these rows."""
        return f"seen-{span[0]:010d}"

    def made(self, look: Callable[[tuple[int, int]], Seen], span: tuple[int, int]) -> Seen:
        """Look ourselves, and tell the others."""
        try:
            seen = look(span)
            contexts = [context for _, context in seen]
            if contexts and all(isinstance(one, Tensor) and one.dtype != torch.bfloat16 for one in contexts):
                told = np.array([mostly_valid for mostly_valid, _ in seen])
                self.shelf.keep(self.name(span), [told, torch.stack(contexts).detach().cpu().numpy()])
        finally:
            self.shelf.end(self.name(span))
        return seen

    def taken(self, look: Callable[[tuple[int, int]], Seen], span: tuple[int, int]) -> Seen:
        """What another worker sees."""
        self.shelf.wait(self.name(span), LOOK_SECONDS)
        found = self.shelf.take(self.name(span), 2, remove=False)
        if found is None:
            return self.made(look, span)
        told, contexts = found
        return [
            (bool(mostly_valid), torch.from_numpy(context).to(self.device))
            for mostly_valid, context in zip(told, contexts, strict=True)
        ]


def name_of(tiles: Sequence[Tile]) -> str:
    """Of the scores of a batch."""
    return f"{tiles[0].row:010d}-{tiles[0].col:010d}-{len(tiles)}"


def say_place(place: Path, where: tuple[int, int]) -> None:
    """Tell helpers of the tile that we are at: its row and column."""
    with suppress(OSError):
        place.write_text("{} {}".format(*where))


def place_of(place: Path) -> tuple[int, int]:
    """Row and column of the tile that a worker is at, or `NOWHERE`, where it has not said so."""
    with suppress(OSError, ValueError):
        row, col = map(int, place.read_text().split())
        return row, col
    return NOWHERE


def remove_shared(folder: Path) -> None:
    """Remove what nobody has taken."""
    for path in folder.glob(f"*{ENDING}*"):
        with suppress(OSError):
            path.unlink()
