"""Class names and colours: what goes out as JSON comes back, and what cannot be drawn is refused."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2ls_infer.errors import UsageError
from d2ls_infer.labels import LabelMap, parse_color, spread_color

names = st.lists(st.text(min_size=1).filter(str.strip), min_size=1, max_size=30, unique=True)
channels = st.integers(0, 255)
colors = st.tuples(channels, channels, channels)


@st.composite
def label_maps(draw: st.DrawFn) -> LabelMap:
    chosen = tuple(draw(names))
    drawn = tuple(draw(st.lists(colors, min_size=len(chosen), max_size=len(chosen))))
    return LabelMap(chosen, drawn, draw(st.integers(0, 255)))


@given(label_maps())
def test_labels_come_back_from_their_json(labels: LabelMap) -> None:
    items = json.loads(json.dumps(labels.to_list()))
    assert LabelMap.from_list(items, ignore_index=labels.ignore_index) == labels


@given(colors)
def test_color_comes_back_from_its_text_in_either_case(color: tuple[int, int, int]) -> None:
    text = LabelMap(("a",), (color,)).to_list()[0]["color"]
    assert parse_color(text) == parse_color(text.upper()) == color


def test_json_form_is_a_list_of_names_and_colors() -> None:
    labels = LabelMap(("road", "tree"), ((255, 0, 16), (0, 128, 0)))
    assert labels.to_list() == [{"name": "road", "color": "#ff0010"}, {"name": "tree", "color": "#008000"}]
    assert len(labels) == 2
    assert labels.ignore_index == 255


def test_labels_are_frozen_and_can_be_keys() -> None:
    labels = LabelMap.of(["a", "b"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        labels.names = ("c", "d")  # type: ignore[misc]
    assert hash(labels) == hash(LabelMap.of(["a", "b"]))


def test_spread_colors_are_distinct_for_all_classes_a_map_can_hold() -> None:
    labels = LabelMap.of([f"class {index}" for index in range(255)])
    assert len(set(labels.colors)) == 255
    assert labels.colors[3] == spread_color(3)


@pytest.mark.parametrize(
    ("given_names", "given_colors", "message"),
    [
        ((), (), "1 to 255 classes, got 0"),
        (tuple(map(str, range(256))), ((0, 0, 0),) * 256, "1 to 255 classes, got 256"),
        (("a", "b"), ((0, 0, 0),), "2 class names but 1 colours"),
        (("a", " "), ((0, 0, 0),) * 2, "empty"),
        (("a", "b", "a"), ((0, 0, 0),) * 3, "stand twice: a"),
        (("a",), ((0, 0, 256),), r"0 to 255, got \(0, 0, 256\)"),
        (("a",), ((0, -1, 0),), r"got \(0, -1, 0\)"),
        (("a",), ((0, 0),), r"three whole numbers .* got \(0, 0\)"),
        (("a",), ((0, 0, True),), "three whole numbers"),
        (("a",), ((0.0, 0, 0),), "three whole numbers"),
    ],
)
def test_labels_that_cannot_be_drawn_are_refused(
    given_names: tuple[str, ...], given_colors: tuple[Any, ...], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        LabelMap(given_names, given_colors)


@pytest.mark.parametrize("text", ["", "red", "#fff", "#12345g", "112233", "#1122334", "#112233\n", None, 5])
def test_text_that_is_no_color_is_refused(text: Any) -> None:
    with pytest.raises(UsageError, match=re.escape(f"got {text!r}")):
        parse_color(text)


@pytest.mark.parametrize(
    "items",
    [
        None,
        5,
        ["road"],
        [["road", "#ff0000"]],
        {"name": "road", "color": "#ff0000"},
        [{"name": "road"}],
        [{"color": "#ff0000"}],
        [{"name": 5, "color": "#ff0000"}],
        [{"name": None, "color": "#ff0000"}],
        [{"name": "road", "color": [255, 0, 0]}],
        [{"name": "road", "color": "#ff0000", "colour": "#00ff00"}],
    ],
)
def test_anything_else_than_a_list_of_names_and_colors_is_refused(items: Any) -> None:
    with pytest.raises(UsageError):
        LabelMap.from_list(items)


def test_classes_are_painted_in_their_colours_and_what_is_none_black() -> None:
    labels = LabelMap(("a", "b"), ((10, 20, 30), (40, 50, 60)))
    picture = labels.painted(np.array([[0, 1, 255]], np.uint8))
    assert picture.tolist() == [[[10, 40, 0]], [[20, 50, 0]], [[30, 60, 0]]]
