from __future__ import annotations

import numpy as np
import pytest

Pair = tuple[np.ndarray, np.ndarray]


@pytest.fixture
def toy_pairs() -> list[Pair]:
    """Two images of different sizes whose brightness is their class: 20, 130 and 240 for the classes 0, 1 and 2."""
    rng = np.random.default_rng(0)
    pairs = []
    for height, width in ((96, 120), (80, 70)):
        mask = rng.integers(0, 3, (height // 10, width // 10), dtype=np.uint8).repeat(10, 0).repeat(10, 1)
        image = (20 + 110 * mask)[None].repeat(3, 0).astype(np.uint8)
        pairs.append((image, mask))
    return pairs
