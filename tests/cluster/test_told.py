"""What people who wait are told."""

from __future__ import annotations

from pathlib import Path

from d2ls_infer.cluster.pieces import Band, BandDone
from d2ls_infer.cluster.told import Told
from d2ls_infer.cluster.worker import BandTask
from d2ls_infer.options import PredictOptions


def test_a_scene_that_is_dropped_is_not_in_the_estimate(scene: Path) -> None:
    told = Told(lambda news: None)
    told.all, told.pixels, told.before = before = 1000, 300, 100  # of the others
    told.all += 50 * 10
    told.known(20 * 10)
    task = BandTask(str(scene), scene, PredictOptions(), {}, Band(20, 25))
    told.band(task, BandDone(1, 0, 0, 0, {}, "tcp://somewhere"), width=10)
    assert (told.all, told.pixels, told.before) == (1500, 550, 300)
    told.dropped(50 * 10, done=25 * 10, known=20 * 10)
    assert (told.all, told.pixels, told.before) == before
