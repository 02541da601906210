"""Between host and device: how far ahead the host goes, and that nothing waits or gets lost on the way."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from d2ls_infer.transfers import BATCHES_AHEAD, Beside, Pace, Uploads, uploaded

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@given(st.integers(0, 20), st.integers(0, 4))
def test_the_host_is_never_further_ahead_than_said(batches: int, most: int) -> None:
    """And waits no more than it must: all but the last batches before this one are done."""
    begun, waited = 0, []

    def mark() -> Callable[[], None]:
        upto = begun
        return lambda: waited.append(upto)

    pace = Pace(mark, most)
    for index in range(batches):
        pace.step()
        done = waited[-1] if waited else 0
        assert done == max(0, index - most)
        begun += 1


def test_without_a_device_of_its_own_nothing_is_done() -> None:
    beside = Beside(torch.device("cpu"))
    item = object()
    with beside.taking(beside.hand(item)) as taken:
        assert taken is item
    tensor = torch.ones(3)
    assert uploaded(tensor, "cpu") is tensor


def test_uploads_travel_with_their_segmenter() -> None:
    device = torch.device("cuda:1")
    assert pickle.loads(pickle.dumps(Uploads(device))).device == device


@cuda
def test_batches_arrive_as_they_were() -> None:
    uploads = Uploads(torch.device("cuda"))
    batches = [torch.randint(0, 256, (4, 3, 128, 128), dtype=torch.uint8) for _ in range(5 * BATCHES_AHEAD)]
    sent = [uploads(batch) for batch in batches]
    for batch, there in zip(batches, sent, strict=True):
        assert there.is_cuda
        assert torch.equal(there.cpu(), batch)


@cuda
def test_what_is_handed_over_is_there() -> None:
    beside = Beside(torch.device("cuda"))
    torch.cuda._sleep(50_000_000)  # so that it is not there yet
    with beside.taking(beside.hand(torch.full((1000, 1000), 7.0, device="cuda"))) as taken:
        total = taken.sum()
    assert total.item() == 7e6


@cuda
def test_what_was_handed_over_is_not_written_over_while_it_is_looked_at() -> None:
    """The memory of what nobody holds any more is used again by the thread that made it."""
    beside = Beside(torch.device("cuda"))
    handed = beside.hand(torch.full((1000, 1000), 7.0, device="cuda"))
    with beside.taking(handed) as taken:
        torch.cuda._sleep(50_000_000)
        total = taken.sum()
    del handed, taken
    torch.full((1000, 1000), 8.0, device="cuda")
    assert total.item() == 7e6
