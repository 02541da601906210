"""Training, by Lightning: optional (`pip install "d2ls-infer[train]"`), and imported by its own command alone.

A whole run:

    from pathlib import Path

    from d2ls_infer.datasets import find_dataset
    from d2ls_infer.train import RunOptions, default_config, train

    vaihingen = find_dataset("vaihingen")
    images, validation = (vaihingen.images("data/vaihingen", split) for split in ("train", "val"))
    train(vaihingen, images, validation, default_config("vaihingen"), RunOptions(output=Path("runs/vaihingen")))
"""

from d2ls_infer.errors import UsageError

try:
    import lightning  # noqa: F401
    import matplotlib  # noqa: F401
except ImportError as error:
    raise UsageError(f'training needs more packages: pip install "d2ls-infer[train]" ({error})') from error

from d2ls_infer.train.config import PAPER, TrainConfig, default_config, read_config
from d2ls_infer.train.run import RunOptions, train

__all__ = ["PAPER", "RunOptions", "TrainConfig", "default_config", "read_config", "train"]
