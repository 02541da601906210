"""Moving average of the weights."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor


class MovingAverage(WeightAveraging):
    """Exponential moving average of weights and buffers; Lightning validates with it and keeps it at the end.

    decay: of the average per step, at most. It starts low, as (1 + n) / (10 + n) after n steps, so that a short run's
    average is not made of what the weights were before they had learnt anything.
    """

    def __init__(self, decay: float) -> None:
        def mean(averaged: Tensor, current: Tensor, steps: Tensor | int) -> Tensor:
            share = min(decay, (1 + int(steps)) / (10 + int(steps)))
            # In this form what does not change, as the positional encoding, is kept to the last bit.
            return averaged + (1 - share) * (current - averaged)

        super().__init__(avg_fn=mean)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # A run that is resumed after its last epoch has no training left at whose end Lightning would do this.
        self.on_train_end(trainer, pl_module)
