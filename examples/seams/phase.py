"""How far a map depends on where its pixels lie in the cells of the network: phase.py FILE DATASET --root DIR

The network has strides of 4 to 32 pixels, and its upsampler makes the 4 x 4 pixels of a token by channels of their own.
So pixels are told otherwise where they lie otherwise in those cells, which shifts by a multiple of 32 do not show. The
upper left 1,024 x 1,024 pixels of each image of DATASET's split `val` are mapped as one tile, from the start and from
some pixels further down and to the right. Printed are the share of the pixels 64 or more from any edge that get another
class then, and the scores of the first maps.
"""

import argparse
import logging
from functools import partial
from pathlib import Path

from d2ls_infer import load_model
from d2ls_infer.datasets import find_dataset
from d2ls_infer.metrics import ConfusionMatrix
from d2ls_infer.seams.counts import Changes, count_changes, total

SHIFTS = (32, 16, 4, 7)
SIDE, MARGIN = 1024, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("dataset")
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--first", type=int, help="so many images, not all")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    dataset = find_dataset(arguments.dataset)
    images = list(dataset.images(arguments.root, "val"))[: arguments.first]
    for smooth in (False, True):
        model = load_model(arguments.file, smooth=smooth)
        matrix, changes = ConfusionMatrix(dataset.labels), {shift: [Changes(0, 0)] for shift in SHIFTS}
        mapped = partial(model.predict, tile_size=SIDE, dictionary="tile")
        for image in images:
            pixels = image.read_image(model.bands)[:, :SIDE, :SIDE]
            first = mapped(pixels)
            matrix.add(image.read_mask()[:SIDE, :SIDE], first)
            for shift in SHIFTS:
                inner = tuple(slice(MARGIN, side - MARGIN) for side in first.shape)
                other = mapped(pixels[:, shift:, shift:])
                moved = tuple(slice(MARGIN - shift, side - MARGIN - shift) for side in first.shape)
                changes[shift].append(count_changes(first[inner], other[moved]))
        scores = matrix.scores()
        iou, f1 = (100 * scores.mean(kind, without=dataset.left_out) for kind in ("iou", "f1"))
        shares = "  ".join(f"{shift} px {100 * total(found).share:.2f}" for shift, found in changes.items())
        print(
            f"{'smoothed' if smooth else 'raw':9} % that change: {shares}  mIoU {iou:.2f}  mean F1 {f1:.2f}", flush=True
        )


if __name__ == "__main__":
    main()
