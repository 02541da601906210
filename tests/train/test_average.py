"""The moving average of weights: what it is after each step, and what it leaves alone."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from d2ls_infer.train.average import MovingAverage


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.register_buffer("fixed", torch.randn(64))
        self.register_buffer("mean", torch.zeros(5))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))


def averaged(average: MovingAverage) -> AveragedModel:
    assert average._average_model is not None
    return average._average_model


@pytest.mark.parametrize("decay", [0.0, 0.15, 0.9])
def test_average_starts_low_and_rises_to_its_decay(decay: float) -> None:
    torch.manual_seed(0)
    module, average = Module(), MovingAverage(decay)
    average.setup(pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu"), module, "fit")
    start = module.fixed.clone()
    weight, mean = module.layer.weight.detach().double(), torch.zeros(5, dtype=torch.float64)
    for step in range(30):
        with torch.no_grad():
            module.layer.weight.normal_()
            module.mean.normal_()
            module.steps += 1
        averaged(average).update_parameters(module)
        share = min(decay, (1 + step) / (10 + step)) if step else 0.0  # the first step's weights are taken as they are
        weight = share * weight + (1 - share) * module.layer.weight.detach().double()
        mean = share * mean + (1 - share) * module.mean.double()
        got = averaged(average).module
        torch.testing.assert_close(got.layer.weight.double(), weight, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(got.mean.double(), mean, rtol=1e-4, atol=1e-6)
    assert torch.equal(got.fixed, start), "what does not change must not drift"
    assert got.steps.dtype == torch.int64


def test_model_gets_the_average_at_the_end_even_without_a_step_left() -> None:
    module, average = Module(), MovingAverage(0.5)
    trainer = pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    average.setup(trainer, module, "fit")
    with torch.no_grad():
        averaged(average).module.layer.weight.fill_(7)
    average.on_fit_end(trainer, module)
    assert (module.layer.weight == 7).all()
