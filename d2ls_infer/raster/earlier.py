"""A map that an earlier run has finished."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rasterio.windows import Window

from d2ls_infer.errors import D2LSError
from d2ls_infer.raster.dataset import local_file, open_dataset, reading
from d2ls_infer.raster.scene import Scene

ROWS = 256


def was_made_of(path: Path, scene: Scene, tags: Mapping[str, str]) -> bool:
    """Whether a file is a map that lies where a scene does, and has those tags."""
    try:
        with open_dataset(str(path)) as dataset:
            found = dataset.tags()
            place = (dataset.height, dataset.width, dataset.transform, dataset.crs)
    except D2LSError:
        return False
    same = place == (scene.height, scene.width, scene.transform, scene.crs)
    return same and all(found.get(name) == text for name, text in tags.items())


def map_rows(path: Path) -> Iterator[tuple[int, np.ndarray]]:
    """The rows of a map, some at a time: the first one's number, and (rows, width) uint8."""
    with open_dataset(str(path)) as dataset, reading(str(path)):
        for first in range(0, dataset.height, ROWS):
            window = Window(0, first, dataset.width, min(ROWS, dataset.height - first))
            yield first, dataset.read(1, window=window)


def stamps(scene: Scene, *others: str | Path | None) -> list[list[Any]]:
    """What tells whether a scene's files, and others, are still the same: name, bytes and time of change of each.

    Of what is not a local file only the name.
    """
    names = [scene.path, *scene.dataset.files, *(other for other in others if other is not None)]
    found = []
    for name in dict.fromkeys(map(str, names)):
        file = local_file(name)
        about = file.stat() if file is not None and file.exists() else None
        found.append([str(file.resolve()) if file else name, *([about.st_size, about.st_mtime_ns] if about else [])])
    return found
