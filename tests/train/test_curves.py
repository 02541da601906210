"""The curves of a run: what is logged, by epoch, in a file that any JSON reader takes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import lightning.pytorch as pl
import pytest
import torch
from PIL import Image

from d2ls_infer.train.curves import Curves, Points, draw, write_json

MODULE = cast(pl.LightningModule, None)


def trainer_at(epoch: int, *, first: bool = True, **logged: float) -> pl.Trainer:
    """What `Curves` sees of a trainer: the epoch from 0, and what was logged, also in epochs before."""
    metrics = {name.replace("_", "/", 1): torch.tensor(value) for name, value in logged.items()}
    return cast(pl.Trainer, SimpleNamespace(current_epoch=epoch, callback_metrics=metrics, is_global_zero=first))


def strict_json(file: Path) -> Any:
    def refuse(name: str) -> None:
        pytest.fail(f"{name} is no JSON")

    return json.loads(file.read_text(encoding="utf-8"), parse_constant=refuse)


def test_values_are_kept_by_epoch_those_of_the_validation_where_there_was_one(tmp_path: Path) -> None:
    curves = Curves(tmp_path)
    for epoch in range(4):
        # Lightning still knows the last validation's values in the epochs after it.
        trainer = trainer_at(epoch, train_total=epoch / 4, val_mean_iou=50.0 + epoch // 2, other=1.0)
        if epoch % 2 == 1:
            curves.on_validation_end(trainer, MODULE)
        curves.on_train_epoch_end(trainer, MODULE)
        found = strict_json(tmp_path / "curves.json")
        assert len(found["train/total"]) == epoch + 1
    assert found == {
        "train/total": [[1, 0.0], [2, 0.25], [3, 0.5], [4, 0.75]],
        "val/mean_iou": [[2, 50.0], [4, 51.0]],
    }
    assert [path.name for path in tmp_path.iterdir()] == ["curves.json"]


def test_curves_go_on_from_their_state(tmp_path: Path) -> None:
    whole, first = Curves(tmp_path), Curves(tmp_path)
    for epoch in range(2):
        for curves in (whole, first):
            curves.on_train_epoch_end(trainer_at(epoch, train_total=float(epoch)), MODULE)
    second = Curves(tmp_path)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for curves in (whole, second):
        curves.on_train_epoch_end(trainer_at(2, train_total=2.0), MODULE)
    assert [tuple(point) for point in second.points["train/total"]] == whole.points["train/total"]


def test_only_the_first_process_writes(tmp_path: Path) -> None:
    Curves(tmp_path).on_train_epoch_end(trainer_at(0, first=False, train_total=1.0), MODULE)
    assert list(tmp_path.iterdir()) == []


def test_a_value_that_is_no_number_is_null(tmp_path: Path) -> None:
    write_json({"train/total": [(1, 0.5), (2, float("nan")), (3, float("inf"))]}, tmp_path / "curves.json")
    assert strict_json(tmp_path / "curves.json") == {"train/total": [[1, 0.5], [2, None], [3, None]]}


@pytest.mark.parametrize(
    "points",
    [
        {},
        {"train/total": [(1, 1.0)], "train/learning_rate": [(1, 1e-4)]},
        {"train/total": [(e, 1 / e) for e in range(1, 60)], "val/mean_iou": [(e, 1.0 * e) for e in range(6, 60, 6)]},
        {"train/total": [(1, float("nan"))], "val/mean_iou": [(1, float("nan")), (2, 3.0)]},
    ],
)
def test_picture_is_drawn_of_whatever_was_logged(tmp_path: Path, points: dict[str, Points]) -> None:
    draw(points, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.format == "PNG"
        assert picture.width > picture.height > 300


def test_a_picture_that_cannot_be_written_leaves_the_former_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, target: Path) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "replace", full)
    (tmp_path / "curves.png").write_bytes(b"former")
    with pytest.raises(OSError, match="no space left"):
        draw({}, tmp_path / "curves.png")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"curves.png": b"former"}
