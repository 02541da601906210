"""Threads beside the network: order, errors and ends are as without them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from d2ls_infer.background import Behind, ahead


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("d2ls-")]


@given(st.lists(st.integers(), max_size=40), st.integers(1, 5))
def test_items_come_in_their_order(items: list[int], depth: int) -> None:
    assert list(ahead(iter(items), depth)) == items
    assert threads() == []


@pytest.mark.parametrize("wanted", [1, 2, 3])
def test_the_threads_leave_torchs_own_to_the_network(wanted: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(wanted)
    try:
        seen: list[int] = []

        def look(item: int) -> int:
            torch.rand(8, 512, 512).amax(0)  # large enough to be shared out
            seen.append(torch.get_num_threads())
            return item

        with Behind(look, 1) as behind:
            for item in ahead(map(look, range(3)), 1):
                behind.give(item)
            assert torch.get_num_threads() == wanted
        assert seen == [1] * 6
        with ThreadPoolExecutor(1) as later:
            assert later.submit(torch.get_num_threads).result() == wanted
    finally:
        torch.set_num_threads(before)


def test_items_are_made_in_another_thread_and_not_too_far_ahead() -> None:
    made: list[str] = []

    def items() -> Iterator[int]:
        for index in range(20):
            made.append(threading.current_thread().name)
            yield index

    found = ahead(items(), 3)
    assert next(found) == 0
    time.sleep(0.1)
    assert 3 <= len(made) <= 5  # three wait, one is taken, one is in the thread's hand
    assert set(made) == {"d2ls-ahead"}
    assert list(found) == list(range(1, 20))


@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt()])
def test_an_error_comes_after_what_was_made_before_it(error: BaseException) -> None:
    def items() -> Iterator[int]:
        yield from range(5)
        raise error

    found: list[int] = []

    def take() -> None:
        for item in ahead(items(), 2):
            found.append(item)

    with pytest.raises(type(error)):
        take()
    assert found == [0, 1, 2, 3, 4]
    assert threads() == []


def test_the_thread_ends_when_nobody_wants_more() -> None:
    ended = []

    def items() -> Iterator[int]:
        try:
            yield from range(1000)
        finally:
            ended.append(True)

    source = items()
    found = ahead(source, 2)
    assert next(found) == 0
    found.close()
    assert threads() == []
    source.close()
    assert ended == [True]


@given(st.lists(st.integers(), max_size=40), st.integers(1, 5))
def test_everything_is_done_in_order_by_the_end(items: list[int], depth: int) -> None:
    done: list[int] = []
    with Behind(done.append, depth) as worker:
        for item in items:
            worker.give(item)
    assert done == items
    assert threads() == []


@pytest.mark.parametrize("given_after", [0, 30])
def test_an_error_of_the_work_is_raised_and_ends_it(given_after: int) -> None:
    done = []

    def act(item: int) -> None:
        if item == 3:
            raise ValueError("broken")
        done.append(item)

    def give_all() -> None:
        with Behind(act, 2) as worker:
            for item in range(4 + given_after):
                worker.give(item)

    with pytest.raises(ValueError, match="broken"):
        give_all()
    assert done == [0, 1, 2]
    assert threads() == []


def test_after_an_error_outside_what_was_given_is_done() -> None:
    """Rows that are finished are worth keeping."""
    go_on, done = threading.Event(), []

    def act(item: int) -> None:
        go_on.wait()
        done.append(item)

    def fill() -> None:
        with Behind(act, 5) as worker:
            for item in range(4):
                worker.give(item)
            threading.Timer(0.05, go_on.set).start()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill()
    assert done == [0, 1, 2, 3]
    assert threads() == []
