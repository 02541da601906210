"""The decoder's inference form: in pieces or whole, and what it keeps."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from d2ls_infer.nn import D2LS, fold
from d2ls_infer.nn.folded_decoder import SIZES, pieces

MakeNetwork = Callable[..., D2LS]
Liven = Callable[..., D2LS]
RandomPixels = Callable[..., Tensor]


@pytest.mark.parametrize(("height", "width"), [(64, 96), (40, 200), (33, 32)])
@pytest.mark.parametrize("tokens", [24, 100, 1 << 20])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 1e-2)])
def test_an_image_in_pieces_gives_the_logits_of_the_whole(
    liven: Liven,
    make_network: MakeNetwork,
    random_pixels: RandomPixels,
    monkeypatch: pytest.MonkeyPatch,
    height: int,
    width: int,
    tokens: int,
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    folded, pixels = fold(liven(make_network()), dtype), random_pixels(2, 3, height, width)
    given = folded.embeddings(pixels).mean(0)
    expected, answered = (  # an image by itself, and of few tokens, is one piece
        torch.cat([folded(image[None], embeddings) for image in pixels]) for embeddings in (None, given)
    )
    monkeypatch.setattr("d2ls_infer.nn.folded_decoder.PIECE_TOKENS", tokens)
    cuts = pieces(torch.empty(2, 200, 4), 10)
    side = max(10, tokens // 10 * 10)
    assert cuts == [
        (slice(image, image + 1), slice(start, min(200, start + side)))
        for image in (0, 1)
        for start in range(0, 200, side)
    ]
    for found, whole in ((folded(pixels), expected), (folded(pixels, given), answered)):
        torch.testing.assert_close(found, whole, rtol=0, atol=tolerance * float(whole.abs().max()))


def test_positional_terms_are_kept_for_the_last_sizes(
    liven: Liven, make_network: MakeNetwork, random_pixels: RandomPixels
) -> None:
    folded = fold(liven(make_network()))
    sizes = [(32, 32 * n) for n in range(1, SIZES + 3)]
    first = [folded(random_pixels(1, 3, *size)) for size in sizes]
    positions = folded.decoder.positions
    assert [(4 * height, 4 * width) for height, width, _ in positions] == sizes[-SIZES:]
    kept = positions[8, 8 * len(sizes), torch.device("cpu")]
    again = [folded(random_pixels(1, 3, *size)) for size in (sizes[-1], sizes[0])]
    assert positions[8, 8 * len(sizes), torch.device("cpu")] is kept
    assert len(positions) == SIZES
    assert torch.equal(again[0], first[-1])
    assert torch.equal(again[1], first[0])


def test_positional_terms_made_in_inference_mode_serve_outside(
    liven: Liven, make_network: MakeNetwork, random_pixels: RandomPixels
) -> None:
    folded, pixels = fold(liven(make_network())), random_pixels(1, 3, 32, 32)
    with torch.inference_mode():
        expected = folded(pixels)
    assert torch.equal(folded(pixels.requires_grad_()), expected)
