"""Why a pixel's class changes with the tile that it lies in: python examples/seams/causes.py SCENE MODEL [TILE_SIZE]

What a tile of D2LS tells a pixel besides what is seen around it: where it lies in the tile (the positional encoding of
the decoder), the tile's own dictionary, the tokens into which the interactor turns it, with attention over all of the
tile; and what convolutions see beyond the edge, which are zeros. Each of these is made the same for all tiles, alone
and with others, in the network as it was trained, and raw tiles are measured again by `measure_seams`. What is frozen
becomes its mean over the tiles of the plain grid.

A network that was trained with a part does not know what to do without it: how many pixels keep the class that they had
on the plain grid is told too. Where that is far from 100 %, the map is another one, and its changes say less.
"""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from d2ls_infer import D2LSSegmenter
from d2ls_infer.nn.folded import Unfolded
from d2ls_infer.options import PredictOptions
from d2ls_infer.seams import SeamReport, measure_seams
from d2ls_infer.seams.counts import Changes, total
from d2ls_infer.weights import find_weights, load_network

GROUPS = ((0, 32), (32, 64), (64, 96), (96, None))
"""Distances to the nearest tile edge, in pixels."""

SHIFTS = (0.125, 0.25, 0.5)
"""Of the tile grids; a small one leaves pixels that are far from the edges of both tiles."""


def unfolded(name: str) -> D2LSSegmenter:
    """A model whose parts are all there to be changed: in its usual form some are worked out beforehand."""
    weights = find_weights(name)
    network = Unfolded(load_network(weights.path, weights.description), torch.float32)
    return D2LSSegmenter(network, weights.description, name=weights.name, sha256=weights.sha256, smooth=False)


@contextmanager
def without_position(model: D2LSSegmenter) -> Iterator[None]:
    """All pixels of a tile at one place. Zero is the mean of the encoding, which is of sines and cosines."""
    handle = model.network.network.decoder.position.register_forward_hook(lambda module, inputs, output: output * 0)
    yield
    handle.remove()


@contextmanager
def frozen(model: D2LSSegmenter, parts: list[nn.Module], map_plain: Callable[[], np.ndarray]) -> Iterator[None]:
    """What some modules give for a tile, (B, N, C'), becomes the mean of what they give for all tiles of a map."""
    seen: dict[nn.Module, list[Tensor]] = {part: [] for part in parts}

    def values_of(output: Any) -> Tensor:
        """Of the dictionary generator the second output is the dynamic dictionary D0."""
        values: Tensor = output[1] if isinstance(output, tuple) else output
        return values

    def look(part: nn.Module, inputs: Any, output: Any) -> None:
        seen[part].append(values_of(output))

    def replace(part: nn.Module, inputs: Any, output: Any) -> Any:
        mean = torch.cat(seen[part]).mean(0).expand_as(values_of(output))
        return (output[0], mean, output[2]) if isinstance(output, tuple) else mean

    handles = [part.register_forward_hook(look) for part in parts]
    map_plain()
    for handle in handles:
        handle.remove()
    handles = [part.register_forward_hook(replace) for part in parts]
    yield
    for handle in handles:
        handle.remove()


def groups(report: SeamReport) -> list[Changes]:
    """All pixels, and those of each group of distances."""
    by_distance = [
        [item for item in report.curve if item.low >= low and (high is None or item.low < high)] for low, high in GROUPS
    ]
    return [total(items) for items in (report.curve, *by_distance)]


def main(scene: str, name: str, tile_size: int = 512) -> None:
    logging.disable(logging.WARNING)
    model = unfolded(name)
    options: dict[str, Any] = {"tile_size": tile_size, "overlap": 0}
    with PredictOptions().open(scene, bands=model.bands, value_range=model.value_range) as opened:
        pixels = opened.rows(0, opened.height).values

    def map_plain() -> np.ndarray:
        return model.predict(pixels, **options, blend="none")

    network = model.network.network
    dictionary: list[nn.Module] = [network.dictionary]
    # After a stage has asked the tile's pixels, its tokens go through a norm; so do the last ones.
    tokens = [*dictionary, *(block.norm_dictionary for block in network.decoder.blocks), network.decoder.final_norm]
    as_it_is = map_plain()
    ways: dict[str, list[Any]] = {
        "as it is": [],
        "position constant": [without_position(model)],
        "dictionary frozen": [frozen(model, dictionary, map_plain)],
        "dictionary and tokens frozen": [frozen(model, tokens, map_plain)],
        "position constant, all frozen": [without_position(model), frozen(model, tokens, map_plain)],
    }
    heads = ["all", *(f"{low} to {high - 1}" if high else f"{low} on" for low, high in GROUPS), "kept"]
    print("% that change class, by pixels to the nearest tile edge; and % that keep the class of the first row")
    print(f"{'':30}" + "".join(f"{head:>11}" for head in heads))
    for way, changes in ways.items():
        with ExitStack() as stack:
            for change in changes:
                stack.enter_context(change)
            kept = f"{100 * np.mean(map_plain() == as_it_is):.1f}"
            counted = groups(measure_seams(model, scene, shifts=SHIFTS, **options, blend="none"))
        shares = [f"{100 * part.share:.2f}" for part in counted]
        print(f"{way:30}" + "".join(f"{value:>11}" for value in (*shares, kept)), flush=True)
    print(f"{'pixels':30}" + "".join(f"{part.of:>11,}" for part in counted))


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    main(*sys.argv[1:3], *map(int, sys.argv[3:]))
