"""Moving average of the weights."""

from __future__ import annotations

from typing import TypeAlias

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor

Tensors: TypeAlias = tuple[Tensor, ...] | list[Tensor]


class MovingAverage(WeightAveraging):
    """Exponential moving average of weights and buffers; Lightning validates with it and keeps it at the end.

    decay: of the average per step, at most. It starts low, as (1 + n) / (10 + n) after n steps, so that a short run's
    average is not made of what the weights were before they had learnt anything.
    """

    def __init__(self, decay: float) -> None:
        def mean(averaged: Tensors, current: Tensors, steps: Tensor | int) -> None:
            steps = torch.as_tensor(steps)
            # Worked out where the weights are: to ask for the number of steps would wait for the device.
            rest = 1 - ((1 + steps) / (10 + steps)).clamp(max=decay)
            # In this form what does not change, as the positional encoding, is kept to the last bit.
            change = torch._foreach_mul(torch._foreach_sub(current, averaged), rest)
            torch._foreach_add_(averaged, [part.to(averaged[0].dtype) for part in change])  # counters are whole

        super().__init__(multi_avg_fn=mean)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # A run that is resumed after its last epoch has no training left at whose end Lightning would do this.
        self.on_train_end(trainer, pl_module)
