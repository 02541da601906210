"""Settings of a training run: typed, frozen, from the paper's values per dataset, a TOML file or the command line."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from d2ls_infer.errors import MissingFileError, UsageError
from d2ls_infer.nn import D2LSConfig

NOT_BELOW_0 = (
    "crops_per_epoch", "warmup_steps", "weight_decay", "clip_norm", "jitter", "seed", "backbone_rate",
    "interactor_rate", "drop_path", "dynamic_weight", "static_weight", "contrastive_weight", "consistency",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that a run's result depends on besides its data. The defaults are the paper's (Section 4.2).

    Network: backbone (a timm name), embed_dim C', stages L, reduction r; see `D2LSConfig`. bands: names of the bands to
    train on; empty takes all that the dataset's images have. gamma: the power that their values on 0..1 are raised to;
    below 1 it shows dark things better.
    Length: epochs; an epoch is `crops_per_epoch` random crops, or, where that is 0, as many as fit side by side into
    the images.
    Optimiser: AdamW with `learning_rate` (for the backbone that times `backbone_rate`, for the attentions of image and
    dictionary times `interactor_rate`), linear warm-up over `warmup_steps`, half a cosine down to
    `final_learning_rate`, `weight_decay`, gradients clipped to the norm `clip_norm` (0: not), Lookahead around it if
    asked for. ema_decay: decay per step of the averaged weights, the ones that are kept; 0 keeps the last ones; "auto"
    averages (0.995) where an epoch has fewer than 1,000 steps.
    quiet_start: whether those attentions give nothing at first, so that image and dictionary begin as they come and
    learn to query each other; a model to start from has learnt that already.
    drop_path: how often the last residual branch of the backbone is left out of a step (stochastic depth); the first
    never, those between in proportion; 0 leaves it to timm, which does so for few backbones.
    Crops: side `crop` in pixels, a multiple of 32; `scales`, the range of the random magnification; `mosaic`, how often
    a crop is put together from four; `balance`, how often it is placed on a class drawn with all classes alike, which
    shows rare ones more often; `jitter`, the largest change of contrast (a factor) and of brightness (in standard
    deviations of the crop); `turn`, how often it is turned by any angle; `clouds`, how often clouds of another crop are
    laid over it, with the shadows they cast (for the classes of `cloud`). Rotations by 90 degrees and flips always.
    Loss: `dynamic_weight` and `static_weight` (Eq. 2) and `contrastive_weight`; `static_dice` False leaves cross
    entropy alone on the static branch, as the released configurations have it. class_weights: what a pixel of each
    class counts in the cross entropy; empty where all count alike. shared_dictionary: how often a batch is taken for
    one scene whose tiles share their dictionary, see `Decoder`; it prepares a model for `--dictionary scene`.
    `consistency`, the weight of how far the probabilities of a crop differ from those of a part of it that begins up to
    half a crop further down and to the right, which is looked at besides where it is not 0; crops of 64 at least.
    Raises UsageError for values that make no sense.
    """

    backbone: str = "convnext_base"
    embed_dim: int = 256
    stages: int = 3
    reduction: int = 4
    bands: tuple[str, ...] = ()
    gamma: float = 1.0

    epochs: int = 45
    crops_per_epoch: int = 0
    batch_size: int = 4
    learning_rate: float = 1e-4
    backbone_rate: float = 1.0
    interactor_rate: float = 1.0
    quiet_start: bool = False
    drop_path: float = 0.0
    final_learning_rate: float = 1e-6
    warmup_steps: int = 0
    weight_decay: float = 0.01
    clip_norm: float = 0.0
    lookahead: bool = False
    ema_decay: float | str = "auto"

    crop: int = 512
    scales: tuple[float, float] = (0.5, 1.5)
    mosaic: float = 0.25
    balance: float = 0.0
    jitter: float = 0.0
    turn: float = 0.0
    clouds: float = 0.0

    dynamic_weight: float = 1.0
    static_weight: float = 0.4
    contrastive_weight: float = 1.0
    static_dice: bool = True
    class_weights: tuple[float, ...] = ()
    shared_dictionary: float = 0.0
    consistency: float = 0.0

    seed: int = 42

    def __post_init__(self) -> None:
        D2LSConfig(  # raises for what the network cannot have
            backbone=self.backbone,
            num_classes=1,
            embed_dim=self.embed_dim,
            stages=self.stages,
            reduction=self.reduction,
        )
        for field in fields(self):
            value = getattr(self, field.name)
            check(not isinstance(value, float) or math.isfinite(value), field.name, "is a finite number", value)
        for name in ("epochs", "batch_size", "crop"):
            check(getattr(self, name) >= 1, name, "is at least 1", getattr(self, name))
        for name in NOT_BELOW_0:
            check(getattr(self, name) >= 0, name, "is at least 0", getattr(self, name))
        for name in ("learning_rate", "final_learning_rate", "gamma"):
            check(getattr(self, name) > 0, name, "is above 0", getattr(self, name))
        check(self.seed < 2**32, "seed", "is below 4294967296", self.seed)
        named = all(self.bands) and len(set(self.bands)) == len(self.bands)
        check(named, "bands", "need names, each its own", list(self.bands))
        weights = list(self.class_weights)
        check(all(0 < weight < math.inf for weight in weights), "class_weights", "are numbers above 0", weights)
        try_crop = f"is a multiple of 32; try {max(32, round(self.crop / 32) * 32)}"
        check(self.crop % 32 == 0, "crop", try_crop, self.crop)
        check(not self.consistency or self.crop >= 64, "crop", "is at least 64 with consistency", self.crop)
        check(self.drop_path < 1, "drop_path", "is below 1", self.drop_path)
        low, high = self.scales
        check(0 < low <= high < math.inf, "scales", "go from a lower to a higher factor", list(self.scales))
        for name in ("mosaic", "balance", "turn", "clouds", "shared_dictionary"):
            check(0 <= getattr(self, name) <= 1, name, "is a share from 0 to 1", getattr(self, name))
        decay = self.ema_decay
        fit = decay == "auto" if isinstance(decay, str) else 0 <= decay < 1
        check(fit, "ema_decay", 'lies from 0 to 1 or is "auto"', decay)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def updated(self, changes: Mapping[str, Any]) -> TrainConfig:
        """The same with other values. Raises UsageError for names and types that it does not know."""
        kinds = {field.name: field.default for field in fields(self)}
        if unknown := sorted(set(changes) - set(kinds)):
            raise UsageError(f"unknown settings: {', '.join(unknown)}; known are {', '.join(kinds)}")
        return replace(self, **{name: convert(name, value, kinds[name]) for name, value in changes.items()})


def check(right: bool, name: str, rule: str, value: object) -> None:
    """Raise UsageError for a setting that breaks its rule."""
    if not right:
        raise UsageError(f"{name} {rule}; got {value!r}")


def convert(name: str, value: Any, default: Any) -> Any:
    """A value as the setting takes it: whole numbers pass as reals, lists as tuples. Raises UsageError otherwise."""
    kind = type(default)
    if name == "ema_decay" and type(value) in (int, float, str):
        return value
    if kind is tuple and isinstance(value, list | tuple):
        inner = str if name == "bands" else float
        if not default or len(value) == len(default):
            return tuple(convert(name, part, inner()) for part in value)
    elif kind is float and type(value) is int:
        return float(value)
    elif type(value) is kind:
        return value
    lists = {"bands": "a list of names", "class_weights": "a list of numbers"}
    wanted = lists.get(name, f"like {list(default) if kind is tuple else default!r}")
    raise UsageError(f"{name} is {wanted}; got {value!r}")


PAPER: dict[str, TrainConfig] = {
    "loveda": TrainConfig(epochs=30, learning_rate=8e-5),
    "uavid": TrainConfig(epochs=45),
    "potsdam": TrainConfig(epochs=45),
    "vaihingen": TrainConfig(epochs=45),
    "cloud": TrainConfig(epochs=100),
    "grass": TrainConfig(epochs=100, crop=256),
}
"""The paper's settings per dataset. Those that its text leaves open are the same for all."""


def default_config(dataset: str) -> TrainConfig:
    """The paper's settings of a dataset; for one that it does not have, those that its datasets share."""
    return PAPER.get(dataset, TrainConfig())


def read_config(path: Path, base: TrainConfig) -> TrainConfig:
    """A TOML file of settings over others. Raises MissingFileError, and UsageError that names what is wrong in it."""
    if not path.is_file():
        raise MissingFileError(f"no such file: {path}")
    try:
        return base.updated(tomllib.loads(path.read_text(encoding="utf-8")))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, UsageError) as error:
        raise UsageError(f"{path}: {error}") from error
