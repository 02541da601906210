"""Ways to make tiles agree, their price in scores included: others.py FILE DATASET --root DIR [--ways NAME,NAME,...]

FILE: weights that have not seen the images of DATASET's split `val`. Each of these is mapped three times with each way:
as a whole, and from 96 and 288 pixels further down and to the right (96 and 160, where it is smaller than 1100 pixels),
which shifts the tiles. Printed are the share of the pixels of its inner part that get another class than on the whole,
the mean IoU and mean F1 of the whole maps, and the seconds that everything took. `raw`: scores are not smoothed.

Those at the end need more than options: a dictionary from the neighbourhood of each tile; one from all pixels at once,
which is what attention accumulated exactly over all tiles would give; and a window that weighs each distance to the
tile's edge by the inverse of the share of pixels that change class there, measured on the same images.
"""

import argparse
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from d2ls_infer import load_model
from d2ls_infer.context import CROP_PX
from d2ls_infer.datasets import find_dataset
from d2ls_infer.evaluate import translation
from d2ls_infer.labels import NODATA
from d2ls_infer.metrics import ConfusionMatrix
from d2ls_infer.seams import measure_seams
from d2ls_infer.seams.counts import count_changes, total
from d2ls_infer.segmenter import InContext, decide, predict_array, tiles_of
from d2ls_infer.tiling import Tile, blend
from d2ls_infer.tiling.blend import TAPERS

Way = Callable[[np.ndarray], np.ndarray]
REACH_PX = 256
"""How far beyond a tile its neighbourhood goes."""


def crop(pixels: np.ndarray, row: int, col: int, height: int, width: int) -> torch.Tensor:
    """(1, bands, height, width)."""
    return torch.from_numpy(np.ascontiguousarray(pixels[None, :, row : row + height, col : col + width]))


def by_neighbourhood(model, pixels: np.ndarray) -> np.ndarray:
    """Tiles of 512 px, each by the mean dictionary of the crops around it."""
    height, width = pixels.shape[1:]
    grid = tiles_of(model, height, width, 512, 0.25)
    lattice = [
        (row, col)
        for row in range(0, max(1, height - CROP_PX + 1), CROP_PX)
        for col in range(0, max(1, width - CROP_PX + 1), CROP_PX)
    ]
    seen = {place: model.observe(crop(pixels, *place, CROP_PX, CROP_PX)) for place in lattice}

    def around(tiles: list[Tile], score) -> torch.Tensor:
        (tile,) = tiles
        near = [
            context
            for (row, col), context in seen.items()
            if tile.row - REACH_PX <= row + CROP_PX / 2 <= tile.row + tile.height + REACH_PX
            and tile.col - REACH_PX <= col + CROP_PX / 2 <= tile.col + tile.width + REACH_PX
        ]
        return model.score(crop(pixels, *tile), model.merge(near))

    valid = np.ones((grid.tile_height, grid.tile_width), bool)
    tiles = ((tile, (crop(pixels, *tile)[0].numpy(), valid)) for tile in grid)
    rows = blend(model.score, tiles, grid, channels=len(model.labels), around=around)
    return np.concatenate([decide(part.scores, part.covered) for part in rows])


def by_all_pixels(model, pixels: np.ndarray) -> np.ndarray:
    """Tiles of 1024 px, by the dictionary of the whole image in one piece."""
    context = model.observe(crop(pixels, 0, 0, *pixels.shape[1:]))
    return predict_array(InContext(model, context), pixels, tile_size=1024)


def measured_window(model, images: list) -> Callable[[torch.Tensor], torch.Tensor]:
    """Weights by the distance to the tile's centre (0) and edge (1), of tiles of 1024 px by the scene's dictionary."""
    curves = [measure_seams(model, image.image, tile_size=1024, dictionary="scene").curve for image in images]
    sums = [(group[0].low, total(list(group))) for group in zip(*curves, strict=True)]
    middle = [low + (high - low) / 2 for (low, _), (high, _) in pairwise([*sums, (512, None)])]
    share = [max(1, item.changed) / max(1, item.of) for _, item in sums]
    print(
        "% that change, by distance:",
        "  ".join(f"{d:.0f} px {100 * s:.2f}" for d, s in zip(middle, share, strict=True)),
    )

    def taper(distance: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(1 / np.interp((1 - distance.numpy()) * 512, middle, share))

    return taper


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("dataset")
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--ways", help="Parts of the names of those to run.")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    model, dataset = load_model(arguments.file), find_dataset(arguments.dataset)
    raw = load_model(arguments.file, smooth=False)
    images = list(dataset.images(arguments.root, "val"))
    tile = {"dictionary": "tile", "tile_size": 512}
    scene = {"dictionary": "scene", "tile_size": 1024}
    ways: dict[str, Way] = {
        "512 px, 25 %, Hann, each tile's, raw": partial(raw.predict, **tile),
        "512 px, 50 %, Hann, each tile's, raw": partial(raw.predict, **tile, overlap=0.5),
        "1024 px, each tile's, raw": partial(raw.predict, **{**tile, "tile_size": 1024}),
        "512 px, the scene's": partial(model.predict, **{**scene, "tile_size": 512}),
        "512 px, each tile's": partial(model.predict, **tile),
        "1024 px, the scene's, raw": partial(raw.predict, **scene),
        "1024 px, the scene's": partial(model.predict, **scene),
        "the default": model.predict,
        "1024 px, the scene's, cut between centres": partial(model.predict, **scene, blend="none"),
        "512 px, of the neighbourhood": partial(by_neighbourhood, model),
        "1024 px, of all pixels at once": partial(by_all_pixels, model),
        "1024 px, the scene's, measured window": partial(model.predict, **scene, blend="linear"),
    }
    labels = replace(dataset.labels, ignore_index=NODATA)
    to_truth = translation(model.labels, labels)
    for name, way in ways.items():
        if arguments.ways and not any(part in name for part in arguments.ways.split(",")):
            continue
        if "measured" in name:
            TAPERS["linear"] = measured_window(model, images)  # in its place, for the rest of this run
        started, matrix, changed, compared = time.perf_counter(), ConfusionMatrix(labels), 0, 0
        for image in images:
            pixels = np.ascontiguousarray(image.read_image(model.bands))
            height, width = pixels.shape[1:]
            shifts = (96, 288) if min(height, width) >= 1100 else (96, 160)
            margin = shifts[-1]
            whole = way(pixels)
            matrix.add(image.read_mask(), to_truth[whole])
            for shift in shifts if min(height, width) > 3 * margin else ():
                other = way(np.ascontiguousarray(pixels[:, shift:, shift:]))
                inner = whole[margin : height - margin, margin : width - margin]
                counts = count_changes(
                    inner, other[margin - shift : height - margin - shift, margin - shift : width - margin - shift]
                )
                changed, compared = changed + counts.changed, compared + counts.of
        scores = matrix.scores()
        iou, f1 = (100 * scores.mean(kind, without=dataset.left_out) for kind in ("iou", "f1"))
        share = 100 * changed / max(1, compared)
        print(
            f"{name:40} {share:5.2f} %  mIoU {iou:.2f}  mean F1 {f1:.2f}  {time.perf_counter() - started:6.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
