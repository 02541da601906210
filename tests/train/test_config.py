"""Settings of a run: the paper's, from TOML, and one clear line for each that is wrong."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any

import pytest

from d2ls_infer.datasets import DATASETS
from d2ls_infer.errors import MissingFileError, UsageError
from d2ls_infer.train.config import PAPER, TrainConfig, default_config, read_config

RECIPES = Path(__file__).resolve().parents[2] / "examples/training"


@pytest.mark.parametrize(
    ("dataset", "epochs", "learning_rate", "crop"),
    [
        ("loveda", 30, 8e-5, 512),
        ("uavid", 45, 1e-4, 512),
        ("potsdam", 45, 1e-4, 512),
        ("vaihingen", 45, 1e-4, 512),
        ("cloud", 100, 1e-4, 512),
        ("grass", 100, 1e-4, 256),
    ],
)
def test_settings_of_the_paper(dataset: str, epochs: int, learning_rate: float, crop: int) -> None:
    config = default_config(dataset)
    assert (config.epochs, config.learning_rate, config.crop) == (epochs, learning_rate, crop)


@pytest.mark.parametrize("dataset", [*DATASETS, "folder"])
def test_settings_that_the_papers_datasets_share(dataset: str) -> None:
    config = default_config(dataset)
    assert (config.backbone, config.embed_dim, config.stages, config.reduction) == ("convnext_base", 256, 3, 4)
    assert (config.batch_size, config.seed) == (4, 42)
    assert (config.weight_decay, config.final_learning_rate, config.backbone_rate) == (0.01, 1e-6, 1.0)
    assert (config.dynamic_weight, config.static_weight, config.contrastive_weight) == (1.0, 0.4, 1.0)
    assert config.static_dice
    assert (config.warmup_steps, config.clip_norm, config.lookahead) == (0, 0.0, False)
    assert config.scales == (0.5, 1.5)


def test_every_dataset_of_the_paper_is_known() -> None:
    assert set(PAPER) <= set(DATASETS)


def test_settings_cannot_be_changed_in_place() -> None:
    with pytest.raises(FrozenInstanceError):
        default_config("loveda").epochs = 3  # type: ignore[misc]


# Changes


def test_toml_goes_over_the_papers_settings(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        """
        backbone = "resnet18"
        bands = ["near infrared", "red"]
        learning_rate = 1         # a whole number is a real one too
        scales = [1, 2.5]
        lookahead = true
        ema_decay = 0
        crop = 64
        """,
        encoding="utf-8",
    )
    base = default_config("loveda")
    config = read_config(file, base)
    assert config == TrainConfig(
        epochs=30,
        backbone="resnet18",
        bands=("near infrared", "red"),
        learning_rate=1.0,
        scales=(1.0, 2.5),
        lookahead=True,
        ema_decay=0,
        crop=64,
    )
    assert type(config.learning_rate) is float
    assert [type(scale) for scale in config.scales] == [float, float]
    assert base == default_config("loveda")


@pytest.mark.parametrize("name", [file.name for file in sorted(RECIPES.glob("*.toml"))])
def test_recipes_among_the_examples_can_be_read(name: str) -> None:
    assert read_config(RECIPES / name, TrainConfig()) != TrainConfig()


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "run.toml").touch()
    assert read_config(tmp_path / "run.toml", default_config("grass")) == default_config("grass")


def test_settings_come_back_from_json() -> None:
    config = TrainConfig(bands=("red",), scales=(0.7, 1.2), ema_decay=0.9, lookahead=True)
    assert TrainConfig().updated(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("decay", ["auto", 0, 0.0, 0.5, 0.999])
def test_ema_decay_is_a_share_or_auto(decay: float | str) -> None:
    assert TrainConfig().updated({"ema_decay": decay}).ema_decay == decay


def test_every_setting_can_be_given() -> None:
    changes = {field.name: getattr(TrainConfig(), field.name) for field in fields(TrainConfig)}
    assert TrainConfig().updated(changes) == TrainConfig()


# What makes no sense

WRONG = [
    # names and types
    ("epoch = 3", r"unknown settings: epoch; known are backbone, embed_dim"),
    ("b = 1\na = 2", r"unknown settings: a, b; known are"),
    ("[crop]\nside = 3", r"crop is like 512; got \{'side': 3\}"),
    ('epochs = "3"', r"epochs is like 45; got '3'"),
    ("epochs = 3.0", r"epochs is like 45; got 3\.0"),
    ("epochs = true", r"epochs is like 45; got True"),
    ("learning_rate = true", r"learning_rate is like 0\.0001; got True"),
    ("learning_rate = [1e-3]", r"learning_rate is like 0\.0001; got \[0\.001\]"),
    ("lookahead = 1", r"lookahead is like False; got 1"),
    ("backbone = 50", r"backbone is like 'convnext_base'; got 50"),
    ('bands = "red"', r"bands is a list of names; got 'red'"),
    ("bands = [1, 2]", r"bands is a list of names; got 1"),
    ("scales = 1.5", r"scales is like \[0\.5, 1\.5\]; got 1\.5"),
    ("scales = [0.5, 1.0, 1.5]", r"scales is like \[0\.5, 1\.5\]; got \[0\.5, 1\.0, 1\.5\]"),
    ('scales = ["a", "b"]', r"scales is like .*; got 'a'"),
    ("ema_decay = [0.9]", r"ema_decay is like 'auto'; got \[0\.9\]"),
    # values
    ("epochs = 0", r"epochs is at least 1; got 0"),
    ("batch_size = -4", r"batch_size is at least 1; got -4"),
    ("crop = 0", r"crop is at least 1; got 0"),
    ("crop = 100", r"crop is a multiple of 32; try 96; got 100"),
    ("crop = 32\nconsistency = 1", r"crop is at least 64 with consistency; got 32"),
    ("crop = 10", r"crop is a multiple of 32; try 32; got 10"),
    ("crops_per_epoch = -1", r"crops_per_epoch is at least 0; got -1"),
    ("warmup_steps = -1", r"warmup_steps is at least 0; got -1"),
    ("weight_decay = -0.1", r"weight_decay is at least 0; got -0\.1"),
    ("clip_norm = -1", r"clip_norm is at least 0; got -1"),
    ("class_weights = [1, 'a']", "class_weights is a list of numbers; got 'a'"),
    ("class_weights = [1, 0]", r"class_weights are numbers above 0; got \[1\.0, 0\.0\]"),
    ("class_weights = 2", r"class_weights is a list of numbers; got 2"),
    ("clouds = 1.5", r"clouds is a share from 0 to 1; got 1\.5"),
    ("jitter = -1", r"jitter is at least 0; got -1"),
    ("seed = -1", r"seed is at least 0; got -1"),
    ("seed = 4294967296", r"seed is below 4294967296; got 4294967296"),
    ("backbone_rate = -1", r"backbone_rate is at least 0; got -1"),
    ("static_weight = -0.4", r"static_weight is at least 0; got -0\.4"),
    ("dynamic_weight = -1", r"dynamic_weight is at least 0; got -1"),
    ("contrastive_weight = -1", r"contrastive_weight is at least 0; got -1"),
    ("learning_rate = 0", r"learning_rate is above 0; got 0"),
    ("learning_rate = nan", r"learning_rate is a finite number; got nan"),
    ("weight_decay = inf", r"weight_decay is a finite number; got inf"),
    ("final_learning_rate = -1e-6", r"final_learning_rate is above 0; got -1e-06"),
    ("scales = [1.5, 0.5]", r"scales go from a lower to a higher factor; got \[1\.5, 0\.5\]"),
    ("scales = [0.0, 1.0]", r"scales go from a lower to a higher factor; got \[0\.0, 1\.0\]"),
    ("scales = [1.0, inf]", r"scales go from a lower to a higher factor; got \[1\.0, inf\]"),
    ("mosaic = 1.5", r"mosaic is a share from 0 to 1; got 1\.5"),
    ("balance = -0.5", r"balance is a share from 0 to 1; got -0\.5"),
    ("turn = 2", r"turn is a share from 0 to 1; got 2\.0"),
    ("ema_decay = 1.0", r'ema_decay lies from 0 to 1 or is "auto"; got 1\.0'),
    ("ema_decay = nan", r"ema_decay is a finite number; got nan"),
    ('ema_decay = "always"', r"""ema_decay lies from 0 to 1 or is "auto"; got 'always'"""),
    ('bands = ["red", "red"]', r"bands need names, each its own; got \['red', 'red'\]"),
    ('bands = ["red", ""]', r"bands need names, each its own; got \['red', ''\]"),
    ('backbone = ""', r"backbone must be the name of a timm model, got ''"),
    ("embed_dim = 100", r"embed_dim must be a multiple of 16, got 100; try 256"),
    ("stages = 0", r"stages must be a whole number of at least 1, got 0"),
    ("reduction = -1", r"reduction must be a whole number of at least 1, got -1"),
    # TOML
    ("epochs\ncrop = 32\n", r"Expected '=' after a key .*line 1"),
    ("epochs = 3\nepochs = 4\n", r"Cannot overwrite a value .*line 2"),
]


@pytest.mark.parametrize(("text", "told"), WRONG)
def test_a_wrong_setting_is_told_with_its_file(tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "run.toml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=rf"^{file}: {told}") as raised:
        read_config(file, TrainConfig())
    assert raised.value.exit_code == 2
    assert "\n" not in str(raised.value)


def test_a_file_that_is_none_is_told(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"no such file: .*run\.toml"):
        read_config(tmp_path / "run.toml", TrainConfig())
    with pytest.raises(MissingFileError, match="no such file"):
        read_config(tmp_path, TrainConfig())
    (tmp_path / "latin.toml").write_bytes('backbone = "Stra\xdfe"'.encode("latin-1"))
    with pytest.raises(UsageError, match=r"latin\.toml: .*utf-8"):
        read_config(tmp_path / "latin.toml", TrainConfig())


@pytest.mark.parametrize("changes", [{"epochs": 0}, {"batch_size": None}, {"nonsense": 1}])
def test_wrong_changes_are_refused_without_a_file_too(changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        TrainConfig().updated(changes)
