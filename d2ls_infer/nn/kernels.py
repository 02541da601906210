"""Kernels for CUDA, in Triton, where torch's own passes over memory cost more than the arithmetic.

Triton comes with torch where there is CUDA; nothing else of the package needs it. With `TRITON_INTERPRET=1` in the
environment the kernels run on a CPU, slowly, which is how they are tested. All take contiguous tensors.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PER_THREAD = 8
"""Neighbouring channels that a thread loads at once, 16 bytes of them in half precision."""


def depthwise_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    outside: Tensor,
    gain: Tensor,
    shift: Tensor,
    eps: float,
    *,
    rows: int = 2,
    groups: int = 4,
) -> Tensor:
    """x (B, H, W, C), weight (49, C) -> (B, H, W, C) in the weight's type: convolution of 7 x 7, then norm over C.

    outside: (C,) what stands around the image; bias, gain and shift: (C,), of the convolution and the norm. Sums are in
    float32. rows and groups: how many rows of the image (1 or 2) a program works on, and groups of columns of each.
    """
    batch, height, width, channels = x.shape
    out = torch.empty(x.shape, dtype=weight.dtype, device=x.device)
    block = triton.next_power_of_2(channels)
    warps = 4 if block <= 256 else 8
    lanes = max(1, 32 * PER_THREAD * warps // block)
    grid = (triton.cdiv(width, groups * lanes), triton.cdiv(height, rows), batch)
    depthwise_norm_kernel[grid](
        x, weight, bias, outside, gain, shift, out, height, width, channels, eps,
        groups, lanes, block, rows, num_warps=warps,
    )  # fmt: skip
    return out


@triton.jit
def depthwise_norm_kernel(
    x, weight, bias, outside, gain, shift, out, height, width, channels, eps,
    GROUPS: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    # As many lanes as the threads have, each with 8 channels: so weights that all pixels share are loaded into the
    # thread that needs them, once for all of its groups.
    lane = tl.arange(0, LANES)[None, :, None]
    cols = tl.program_id(0) * (GROUPS * LANES) + tl.arange(0, GROUPS)[:, None, None] * LANES + lane
    first = tl.program_id(1) * ROWS
    x += tl.program_id(2).to(tl.int64) * height * width * channels
    out += tl.program_id(2).to(tl.int64) * height * width * channels
    channel = tl.arange(0, BLOCK)[None, None, :]
    known = channel < channels
    for_lanes = channel + 0 * lane
    known_lanes = for_lanes < channels
    around = tl.load(outside + for_lanes, known_lanes, 0.0)
    above = tl.zeros((GROUPS, LANES, BLOCK), tl.float32)
    below = tl.zeros((GROUPS, LANES, BLOCK), tl.float32)
    for step in range(6 + ROWS):  # rows of the image around the program's; each is loaded once for both of them
        row = first + step - 3
        inside = (row >= 0) & (row < height)
        for side in tl.static_range(7):
            col = cols + (side - 3)
            there = inside & (col >= 0) & (col < width)
            value = tl.load(x + (row * width + col) * channels + channel, there & known, 0.0).to(tl.float32)
            value = tl.where(there, value, around)
            taps = weight + (step * 7 + side) * channels + for_lanes
            above += value * tl.load(taps, known_lanes & (step < 7), 0.0).to(tl.float32)
            if ROWS == 2:
                below += value * tl.load(taps - 7 * channels, known_lanes & (step >= 1), 0.0).to(tl.float32)
    added = tl.load(bias + for_lanes, known_lanes, 0.0)
    scale, moved = tl.load(gain + for_lanes, known_lanes, 0.0), tl.load(shift + for_lanes, known_lanes, 0.0)
    places = out + (first * width + cols) * channels + channel
    written = known & (cols < width)
    normed = normalised(above + added, known, channels, eps) * scale + moved
    tl.store(places, normed.to(out.dtype.element_ty), written)
    if ROWS == 2:
        normed = normalised(below + added, known, channels, eps) * scale + moved
        tl.store(places + width * channels, normed.to(out.dtype.element_ty), written & (first + 1 < height))


@triton.jit
def normalised(values, known, channels, eps):
    """(..., c) float32 with mean 0 and variance 1 over the channels that are known; the others come as 0."""
    mean = tl.sum(values, 2, keep_dims=True) / channels
    centred = tl.where(known, values - mean, 0.0)
    variance = tl.sum(centred * centred, 2, keep_dims=True) / channels
    return centred * tl.rsqrt(variance + eps)


def resized_sum(finest: Tensor, others: list[Tensor]) -> Tensor:
    """(B, h, w, C) float32 and three of other heights and widths -> the first, with the others resized added to it.

    Bilinear, as `F.interpolate` does it without `align_corners`. The first is overwritten.
    """
    batch, height, width, channels = finest.shape
    sizes = [side for other in others for side in other.shape[1:3]]
    grid = (triton.cdiv(width, 16), height, batch)
    assert len(others) == 3
    resized_sum_kernel[grid](
        finest, *others, height, width, *sizes, channels, triton.next_power_of_2(channels), 16, num_warps=4
    )
    return finest


@triton.jit
def resized_sum_kernel(
    total, second, third, fourth, height, width, height2, width2, height3, width3, height4, width4, channels,
    BLOCK: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    row, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)[:, None]
    channel = tl.arange(0, BLOCK)[None, :]
    known = (cols < width) & (channel < channels)
    places = total + ((image * height + row) * width + cols) * channels + channel
    value = tl.load(places, known, 0.0)
    value += resized(second, image, row, cols, height, width, height2, width2, channels, channel, known)
    value += resized(third, image, row, cols, height, width, height3, width3, channels, channel, known)
    value += resized(fourth, image, row, cols, height, width, height4, width4, channels, channel, known)
    tl.store(places, value, known)


@triton.jit
def resized(source, image, row, cols, height, width, source_height, source_width, channels, channel, known):
    """(cols, channels) of one row of the resized source (B, source_height, source_width, channels)."""
    y = tl.maximum((row + 0.5) * source_height / height - 0.5, 0.0)
    x = tl.maximum((cols + 0.5) * source_width / width - 0.5, 0.0)
    top, left = y.to(tl.int32), x.to(tl.int32)
    below, right = y - top, x - left
    bottom = tl.minimum(top + 1, source_height - 1)
    beside = tl.minimum(left + 1, source_width - 1)
    source += image * source_height * source_width * channels + channel
    upper = tl.load(source + (top * source_width + left) * channels, known, 0.0) * (1 - right)
    upper += tl.load(source + (top * source_width + beside) * channels, known, 0.0) * right
    lower = tl.load(source + (bottom * source_width + left) * channels, known, 0.0) * (1 - right)
    lower += tl.load(source + (bottom * source_width + beside) * channels, known, 0.0) * right
    return upper * (1 - below) + lower * below


MOST_CLASSES = 16
"""With more, the scores of a few pixels fill no registers any more, and projecting tokens is no longer cheap."""

CHUNK = 512
"""Pixels that a program of `pooled` looks at; there are at least 64 pixels, and always whole 64s."""


PARTS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
"""Two bfloat16 hold 16 bits of a float32, whatever its size; two float16 hold more, up to 65,504."""


def pooled(probe: Tensor, image: Tensor, placed: Tensor, parts: torch.dtype = torch.bfloat16) -> Tensor:
    """What tokens find in an image: softmax over the pixels of (probe . image + placed), and the pixels' mean by it.

    probe (B, heads * N, C) in the type of the products, image (B, M, C) float32, M a multiple of 64,
    placed (B, heads * N, M) -> (B, heads * N, C) float32. With a probe in float32 the scores are
    nearly as exact: products are of two `parts` each.
    """
    batch, pixels, channels = image.shape
    queries = probe.shape[1]
    block = max(16, triton.next_power_of_2(queries))
    chunks = triton.cdiv(pixels, CHUNK)
    found = torch.empty((batch, chunks, queries, channels), device=image.device)
    weights = torch.empty((2, batch, chunks, queries), device=image.device)
    exact = probe.dtype == torch.float32
    pooled_kernel[(chunks, batch)](
        probe, image, placed, found, weights, pixels, queries, weights.stride(0),
        channels, block, CHUNK, *((32, PARTS[parts]) if exact else (64, None)), num_warps=8, num_stages=2,
    )  # fmt: skip
    out = torch.empty((batch, queries, channels), device=image.device)
    merged_kernel[(queries, batch)](found, weights, out, chunks, queries, weights.stride(0), channels, num_warps=4)
    return out


@triton.jit
def pooled_kernel(
    probe, image, placed, found, weights, pixels, queries, half,
    CHANNELS: tl.constexpr, QUERIES: tl.constexpr, CHUNK: tl.constexpr, STEP: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    chunk, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    query, channel, step = tl.arange(0, QUERIES), tl.arange(0, CHANNELS), tl.arange(0, STEP)
    known = query < queries
    image += batch * pixels * CHANNELS
    placed += batch * queries * pixels
    at = (batch * queries + query)[:, None] * CHANNELS + channel[None, :]
    asked = tl.load(probe + at, known[:, None], 0.0)
    if PART is not None:
        rest = (asked - asked.to(PART).to(tl.float32)).to(PART)
        asked = asked.to(PART)
    most = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    mixed = tl.zeros((QUERIES, CHANNELS), tl.float32)
    for start in range(chunk * CHUNK, min((chunk + 1) * CHUNK, pixels), STEP):
        pixel = start + step
        values = tl.load(image + pixel[:, None] * CHANNELS + channel[None, :])
        rounded = values.to(asked.dtype)
        scores = tl.load(placed + query[:, None] * pixels + pixel[None, :], known[:, None], 0.0).to(tl.float32)
        scores = tl.dot(asked, tl.trans(rounded), scores)
        if PART is not None:
            scores = tl.dot(rest, tl.trans(rounded), scores)
            scores = tl.dot(asked, tl.trans((values - rounded.to(tl.float32)).to(PART)), scores)
        higher = tl.maximum(most, tl.max(scores, 1))
        shares = tl.exp(scores - higher[:, None])
        kept = tl.exp(most - higher)
        total = total * kept + tl.sum(shares, 1)
        mixed = tl.dot(shares.to(rounded.dtype), rounded, mixed * kept[:, None])
        most = higher
    out = (batch * tl.num_programs(0) + chunk) * queries + query
    tl.store(weights + out, most, known)
    tl.store(weights + half + out, total, known)
    tl.store(found + out[:, None] * CHANNELS + channel[None, :], mixed, known[:, None])


@triton.jit
def merged_kernel(found, weights, out, chunks, queries, half, CHANNELS: tl.constexpr):
    """The chunks of an image as one."""
    query, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, CHANNELS)
    most = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    mixed = tl.zeros((CHANNELS,), tl.float32)
    for chunk in range(chunks):
        at = (batch * chunks + chunk) * queries + query
        own = tl.load(weights + at)
        higher = tl.maximum(most, own)
        kept, added = tl.exp(most - higher), tl.exp(own - higher)
        total = total * kept + tl.load(weights + half + at) * added
        mixed = mixed * kept + tl.load(found + at * CHANNELS + channel) * added
        most = higher
    tl.store(out + (batch * queries + query) * CHANNELS + channel, mixed / total)


def answered(
    image: Tensor, probe: Tensor, placed: Tensor, values: Tensor, gain: Tensor, shift: Tensor, eps: float, heads: int
) -> Tensor:
    """What an image finds in tokens, added to it and normed over C: image (B, M, C) float32, overwritten.

    probe and values (B, heads * N, C) in the type of the products, placed (B, heads * N, M) or with one place for all
    pixels, (B, heads * N, 1); the softmax is over the N of each head. M is a multiple of 64.
    """
    batch, pixels, channels = image.shape
    classes = probe.shape[1] // heads
    block = max(2, triton.next_power_of_2(classes))
    answered_kernel[(pixels // 64, batch)](
        image, probe, placed, values, gain, shift, eps, pixels, classes,
        placed.shape[-1], int(placed.shape[-1] > 1), channels, heads, block, 64, num_warps=8,
    )  # fmt: skip
    return image


@triton.jit
def answered_kernel(
    image, probe, placed, values, gain, shift, eps, pixels, classes, places, along,
    CHANNELS: tl.constexpr, HEADS: tl.constexpr, CLASSES: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    pixel, channel = tl.program_id(0) * STEP + tl.arange(0, STEP), tl.arange(0, CHANNELS)
    key = tl.arange(0, HEADS * CLASSES)  # classes of a head side by side, a power of two of them
    known = key % CLASSES < classes
    key = key // CLASSES * classes + key % CLASSES
    at = image + (batch * pixels + pixel[:, None]) * CHANNELS + channel[None, :]
    queries = HEADS * classes
    tokens = (batch * queries + key)[:, None] * CHANNELS + channel[None, :]
    own = tl.load(at)
    asked = tl.load(probe + tokens, known[:, None], 0.0)
    lies = placed + (batch * queries + key)[None, :] * places + pixel[:, None] * along
    scores = tl.load(lies, known[None, :], 0.0).to(tl.float32)
    scores = tl.dot(own.to(asked.dtype), tl.trans(asked), scores)
    scores = tl.where(known[None, :], scores, float("-inf"))
    scores = tl.reshape(scores, (STEP, HEADS, CLASSES))
    shares = tl.exp(scores - tl.max(scores, 2, keep_dims=True))
    shares = tl.reshape(shares / tl.sum(shares, 2, keep_dims=True), (STEP, HEADS * CLASSES))
    told = tl.load(values + tokens, known[:, None], 0.0)
    own = tl.dot(shares.to(told.dtype), told, own)
    mean = tl.sum(own, 1, keep_dims=True) / CHANNELS
    own -= mean
    variance = tl.sum(own * own, 1, keep_dims=True) / CHANNELS
    own *= tl.rsqrt(variance + eps)
    tl.store(at, own * tl.load(gain + channel)[None, :] + tl.load(shift + channel)[None, :])


def upsampled(
    image: Tensor, spread: Tensor, gain: Tensor, shift: Tensor, eps: float, height: int, width: int
) -> Tensor:
    """Image tokens (B, h * w, C) float32 and class vectors -> logits (B, N, 4h, 4w) float32.

    spread: (B, N, C / 4, 4), of each class the vectors for a pixel's four parts of the four parts. gain and shift:
    (C / 4,), of the norm.
    """
    batch, pixels, channels = image.shape
    classes = spread.shape[1]
    logits = torch.empty((batch, classes, 4 * height, 4 * width), device=image.device)
    block = max(4, triton.next_power_of_2(classes))
    upsampled_kernel[(pixels // 32, batch)](
        image, spread, gain, shift, logits, eps, pixels, width, classes, channels // 4, block, 32, num_warps=8
    )
    return logits


@triton.jit
def upsampled_kernel(
    image, spread, gain, shift, logits, eps, pixels, width, classes,
    CHANNELS: tl.constexpr, CLASSES: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    part, channel = tl.arange(0, 4 * STEP), tl.arange(0, CHANNELS)  # a pixel's four parts are its channels in a row
    first = (batch * pixels + tl.program_id(0) * STEP) * 4
    values = tl.load(image + (first + part[:, None]) * CHANNELS + channel[None, :])
    mean = tl.sum(values, 1, keep_dims=True) / CHANNELS
    values -= mean
    variance = tl.sum(values * values, 1, keep_dims=True) / CHANNELS
    values *= tl.rsqrt(variance + eps)
    values = gelu(gelu(values * tl.load(gain + channel)[None, :] + tl.load(shift + channel)[None, :]))
    vector = tl.arange(0, 4 * CLASSES)
    kind, again = vector // 4, vector % 4
    known = kind < classes
    vectors = spread + ((batch * classes + kind[None, :]) * CHANNELS + channel[:, None]) * 4 + again[None, :]
    found = tl.dot(values, tl.load(vectors, known[None, :], 0.0), input_precision="tf32x3")
    pixel = tl.program_id(0) * STEP + part // 4
    row = pixel // width * 4 + part % 4 // 2 * 2
    col = pixel % width * 4 + part % 2 * 2
    rows = row[:, None] + again[None, :] // 2
    cols = col[:, None] + again[None, :] % 2
    at = logits + (batch * classes + kind[None, :]) * (16 * pixels) + rows * (4 * width) + cols
    tl.store(at, found, known[None, :])


@triton.jit
def gelu(values):
    return 0.5 * values * (1 + tl.erf(values * 0.7071067811865476))
