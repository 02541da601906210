"""How far a map depends on where its tiles lie, for several ways of tiling: variants.py MODEL SCENE... [--picture PNG]

Several SCENEs are put together into one mosaic. It is mapped three times with each way of tiling: as a whole, and from
96 and 288 pixels further down and to the right (96 and 160, where it is smaller than 1100 pixels), which shifts the
tiles. Counted are the pixels of its inner part that get another class than on the whole. All ways are compared on the
same pixels; `d2ls seams` shifts by shares of a tile, and so compares other ones for tiles of another size.

The picture shows the place where the first way's maps differ most, by the first way and by the last.
"""

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import rasterio
from rasterio.merge import merge

from d2ls_infer import load_model
from d2ls_infer.options import PredictOptions
from d2ls_infer.outputs.pictures import in_colors
from d2ls_infer.raster import png_bytes
from d2ls_infer.seams.counts import count_changes, worst_square

PLAIN = {"smooth": False, "dictionary": "tile", "tile_size": 512}
WAYS = {
    "512 px, 25 %, Hann, each tile's dictionary, raw": PLAIN,
    "512 px, 37.5 %, raw": PLAIN | {"overlap": 0.375},
    "512 px, 50 %, raw": PLAIN | {"overlap": 0.5},
    "1024 px, raw": PLAIN | {"tile_size": 1024},
    "512 px, the scene's dictionary, raw": PLAIN | {"dictionary": "scene"},
    "512 px, each tile's dictionary": PLAIN | {"smooth": True},
    "1024 px, the scene's dictionary, raw": PLAIN | {"tile_size": 1024, "dictionary": "scene"},
    "the default": {},
}
"""Options of `predict`, and whether scores are smoothed (else they are raw); what is left out is as by default."""
SIDE = 384
"""Rows and columns of the picture's parts."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("scenes", type=Path, nargs="+")
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    models = {smooth: load_model(arguments.model, smooth=smooth) for smooth in (True, False)}
    model = models[True]
    pixels = read(arguments.scenes, model)
    height, width = pixels.shape[1:]
    shifts = (96, 288) if min(height, width) >= 1100 else (96, 160)
    margin = shifts[-1]
    print(f"{height} x {width} pixels, {height - 2 * margin} x {width - 2 * margin} of them compared")
    inner: dict[str, list[np.ndarray]] = {}
    for name, how in WAYS.items():
        options = dict(how)
        chosen = models[options.pop("smooth", True)]
        maps, seconds = [], 0.0
        for shift in (0, *shifts):
            started = time.perf_counter()
            labels = chosen.predict(pixels[:, shift:, shift:], **options)
            seconds = seconds or time.perf_counter() - started
            start = margin - shift
            maps.append(labels[start : height - margin - shift, start : width - margin - shift])
        share = np.mean([count_changes(maps[0], shifted).share for shifted in maps[1:]])
        print(f"{name:45} {100 * share:6.2f} %  {seconds:6.1f} s", flush=True)
        inner[name] = maps
    if arguments.picture is not None:
        rgb = pixels[:3, margin : height - margin, margin : width - margin]
        first, last = inner[next(iter(WAYS))], inner[list(WAYS)[-1]]
        arguments.picture.write_bytes(picture(rgb, first, last, model.labels))


def read(files: Sequence[Path], model) -> np.ndarray:
    """(bands, rows, columns) of one scene, or of a mosaic of several."""
    if len(files) > 1:
        mosaic, _ = merge(files)
        return np.asarray(mosaic[: len(model.bands)])
    with PredictOptions().open(files[0], bands=model.bands, value_range=model.value_range) as scene:
        return np.asarray(scene.rows(0, scene.height).values)


def picture(rgb: np.ndarray, first: list[np.ndarray], last: list[np.ndarray], labels) -> bytes:
    """The scene and, side by side, two maps of it by each of two ways, where those of the first differ most."""
    found = [worst_square(first[0], shifted, SIDE) for shifted in first[1:]]
    index = max(range(len(found)), key=lambda index: found[index])
    _, row, col = found[index]
    place = slice(row, row + SIDE), slice(col, col + SIDE)
    line = np.full((3, SIDE, 6), 255, np.uint8)
    parts = [rgb[:, *place]]
    for maps in (first, last):
        parts += [line, in_colors(maps[0][place], labels)[:3], line, in_colors(maps[index + 1][place], labels)[:3]]
    return png_bytes(np.concatenate(parts, axis=2))


if __name__ == "__main__":
    with rasterio.Env():
        sys.exit(main())
