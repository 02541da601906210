"""Scores of the tiles that two bands need, handed from the worker that makes them to the one that comes later."""

from __future__ import annotations

import hashlib
import json
import logging
import time
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2ls_infer.tiling import Around, Tile

log = logging.getLogger(__name__)

ENDING = ".scores"


class SharedScores:
    """Files beside the pieces of a map, one for each batch of tiles, as long as handing over pays; see `blend`.

    It pays where writing the scores and reading them again takes less time than making them: the first batches tell,
    on each worker. What cannot be written or read is scored again.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = device
        self.pays = True

    def of(self, folder: Path, key: Mapping[str, Any], rows: Collection[int]) -> Around:
        """For a band. key: what the scores depend on. rows: where the rows of tiles begin that other bands need too."""
        digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:16]

        def around(tiles: Sequence[Tile], score: Callable[[], Tensor]) -> Tensor:
            if not self.pays or tiles[0].row not in rows:
                return score()
            path = folder / f"{tiles[0].row:010d}-{tiles[0].col:010d}-{len(tiles)}-{digest}{ENDING}"
            scores = self.taken(path)
            return self.kept(path, score) if scores is None else scores

        return around

    def taken(self, path: Path) -> Tensor | None:
        """What another band has kept, which nobody needs after this one; None where there is nothing."""
        try:
            scores = torch.from_numpy(np.load(path, allow_pickle=False))
        except (OSError, ValueError, EOFError):  # not there, or not whole
            return None
        with suppress(OSError):
            path.unlink()
        return scores.to(self.device)

    def kept(self, path: Path, score: Callable[[], Tensor]) -> Tensor:
        """New scores, which are kept."""
        started = time.perf_counter()
        scores = score()
        values = scores.cpu().numpy()
        made = time.perf_counter()
        partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
        try:
            with partial.open("wb") as file:
                np.save(file, values, allow_pickle=False)
            partial.replace(path)
        except OSError as error:  # a disk that is full, say: the other band makes them itself
            log.debug("%s is not kept: %s", path, error)
            self.pays = False
            with suppress(OSError):
                partial.unlink()
        else:
            self.pays = 2 * (time.perf_counter() - made) < made - started
        return scores


def remove_scores(folder: Path) -> None:
    """Remove what nobody has taken."""
    for path in [*folder.glob(f"*{ENDING}"), *folder.glob(f"*{ENDING}.*.partial")]:
        with suppress(OSError):
            path.unlink()
