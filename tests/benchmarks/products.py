"""Matrix products in Triton with what follows them in the same kernel, to be compared with cuBLAS by `gpu.py`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def gelu_product(rows: Tensor, weight: Tensor, bias: Tensor, *, block: tuple[int, int, int], **launch: int) -> Tensor:
    """`gelu(rows @ weight.T + bias)`, exactly, in the rows' type."""
    out = torch.empty((len(rows), len(weight)), dtype=rows.dtype, device=rows.device)
    start(rows, weight, bias, out, block, True, False, launch)
    return out


def added_product(total: Tensor, rows: Tensor, weight: Tensor, *, block: tuple[int, int, int], **launch: int) -> Tensor:
    """`total += rows @ weight.T`."""
    start(rows, weight, rows, total, block, False, True, launch)
    return total


def start(
    rows: Tensor, weight: Tensor, bias: Tensor, out: Tensor, block: tuple[int, int, int],
    gelu: bool, added: bool, launch: dict[str, int],
) -> None:  # fmt: skip
    (m, k), n = rows.shape, len(weight)
    grid = (triton.cdiv(m, block[0]) * triton.cdiv(n, block[1]),)
    product_kernel[grid](rows, weight, bias, out, m, n, k, *block, gelu, added, **launch)


@triton.jit
def product_kernel(
    rows, weight, bias, out, m, n, k,
    ROWS: tl.constexpr, COLS: tl.constexpr, STEP: tl.constexpr, GELU: tl.constexpr, ADDED: tl.constexpr,
):  # fmt: skip
    # Programs in groups of 8 blocks of rows, which share what they read.
    program, wide = tl.program_id(0), tl.cdiv(n, COLS)
    first = program // (8 * wide) * 8
    tall = min(tl.cdiv(m, ROWS) - first, 8)
    row = (first + program % (8 * wide) % tall) * ROWS + tl.arange(0, ROWS)
    col = program % (8 * wide) // tall * COLS + tl.arange(0, COLS)
    step = tl.arange(0, STEP)
    a = rows + (row % m)[:, None] * k + step[None, :]
    b = weight + (col % n)[None, :] * k + step[:, None]
    total = tl.zeros((ROWS, COLS), tl.float32)
    for _ in range(tl.cdiv(k, STEP)):
        total = tl.dot(tl.load(a), tl.load(b), total)
        a += STEP
        b += STEP
    at = out + row[:, None].to(tl.int64) * n + col[None, :]
    known = (row < m)[:, None] & (col < n)[None, :]
    if GELU:
        total += tl.load(bias + col % n)[None, :].to(tl.float32)
        total = 0.5 * total * (1 + tl.erf(total * 0.7071067811865476))
    if ADDED:
        total += tl.load(at, known, 0.0).to(tl.float32)
    tl.store(at, total.to(out.dtype.element_ty), known)
