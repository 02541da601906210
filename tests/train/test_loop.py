"""The training loop: the same crops and weights whether a run is interrupted or not, and a loss that falls."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from d2ls_infer.nn import D2LS, D2LSConfig
from d2ls_infer.train.augment import AugmentConfig
from d2ls_infer.train.loop import (
    Crops,
    TrainConfig,
    learning_rate_factor,
    load_backbone,
    parameter_groups,
    train,
    train_step,
)

Pair = tuple[np.ndarray, np.ndarray]

BACKBONE = "mobilenetv3_small_050"
# From Python 3.12 on, the loader's fork beside torch's threads makes the interpreter warn.
pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")


def config_of(**changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "network": D2LSConfig(backbone=BACKBONE, num_classes=3, embed_dim=32, stages=1),
        "mean": (0.5, 0.5, 0.5),
        "std": (0.25, 0.25, 0.25),
        "steps": 4,
        "batch_size": 2,
        "warmup": 2,
        "ema_decay": 0.5,
        "decoder_dtype": torch.float32,
        "augment": AugmentConfig(crop=64),
    }
    return TrainConfig(**{**values, **changes})


@pytest.fixture(scope="module")
def backbone_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(5)
    path = tmp_path_factory.mktemp("backbone") / "classifier.safetensors"
    save_file({key: value.half() for key, value in timm.create_model(BACKBONE).state_dict().items()}, path)
    return path


def run(config: TrainConfig, pairs: list[Pair], backbone_file: Path, checkpoint: Path) -> dict[str, Tensor]:
    network = train(config, pairs, backbone_file=backbone_file, checkpoint=checkpoint)
    assert not network.training
    return network.state_dict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_interrupted_run_ends_with_the_weights_of_a_straight_one(
    tmp_path: Path, toy_pairs: list[Pair], backbone_file: Path, dtype: torch.dtype
) -> None:
    # A run of two steps that are both warm-up learns as the first half of one of four.
    config = config_of(decoder_dtype=dtype)
    straight = run(config, toy_pairs, backbone_file, tmp_path / "straight.ckpt")
    half = run(dataclasses.replace(config, steps=2), toy_pairs, backbone_file, tmp_path / "resumed.ckpt")
    resumed = run(config, toy_pairs, backbone_file, tmp_path / "resumed.ckpt")
    assert all(torch.equal(resumed[key], straight[key]) for key in straight)
    assert not all(torch.equal(half[key], straight[key]) for key in straight)


def test_finished_run_is_not_gone_on_with(tmp_path: Path, toy_pairs: list[Pair], backbone_file: Path) -> None:
    config, checkpoint = config_of(steps=2), tmp_path / "run.ckpt"
    first = run(config, toy_pairs, backbone_file, checkpoint)
    written = checkpoint.read_bytes()
    again = run(config, toy_pairs, backbone_file, checkpoint)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert checkpoint.read_bytes() == written
    assert [path.name for path in tmp_path.iterdir()] == ["run.ckpt"]


def test_seed_decides_the_run(tmp_path: Path, toy_pairs: list[Pair], backbone_file: Path) -> None:
    runs = [
        run(config_of(steps=1, seed=seed), toy_pairs, backbone_file, tmp_path / f"{index}.ckpt")
        for index, seed in enumerate((1, 1, 2))
    ]
    key = "dictionary.static"
    assert torch.equal(runs[0][key], runs[1][key])
    assert not torch.equal(runs[0][key], runs[2][key])


def test_kept_weights_are_the_moving_average(tmp_path: Path, toy_pairs: list[Pair], backbone_file: Path) -> None:
    config, checkpoint, key = config_of(ema_decay=0.75), tmp_path / "run.ckpt", "decoder.final_attention.q.weight"
    expected: Tensor | None = None
    for steps in (1, 2):
        kept = run(dataclasses.replace(config, steps=steps), toy_pairs, backbone_file, checkpoint)
        latest = torch.load(checkpoint, weights_only=True)["network"][key]
        expected = latest if expected is None else 0.75 * expected + 0.25 * latest
        torch.testing.assert_close(kept[key], expected)


def test_positional_encoding_is_not_learnt(tmp_path: Path, toy_pairs: list[Pair], backbone_file: Path) -> None:
    config, checkpoint, key = config_of(steps=2), tmp_path / "run.ckpt", "decoder.position.gaussian"
    kept = run(config, toy_pairs, backbone_file, checkpoint)
    torch.manual_seed(config.seed)
    assert torch.equal(kept[key], D2LS(config.network).state_dict()[key])


def test_crop_of_a_step_is_the_same_from_whatever_step_a_run_goes_on(toy_pairs: list[Pair]) -> None:
    config = config_of(steps=5, batch_size=3)
    whole, rest = Crops(toy_pairs, config, 0), Crops(toy_pairs, config, 2)
    assert (len(whole), len(rest)) == (15, 9)
    for index in (0, 4, 8):
        assert all(torch.equal(a, b) for a, b in zip(rest[index], whole[index + 6], strict=True))
    assert not torch.equal(whole[0][0], whole[1][0])


def test_crops_are_normalised(toy_pairs: list[Pair]) -> None:
    mean, std = (0.1, 0.2, 0.3), (0.5, 1.0, 2.0)
    plain = config_of(mean=(0.0,) * 3, std=(1.0,) * 3)
    pixels, mask = Crops(toy_pairs, plain, 0)[0]
    normalised, same = Crops(toy_pairs, dataclasses.replace(plain, mean=mean, std=std), 0)[0]
    assert torch.equal(mask, same)
    for band in range(3):
        torch.testing.assert_close(normalised[band], (pixels[band] - mean[band]) / std[band])


def test_loss_falls_on_images_whose_brightness_is_their_class(toy_pairs: list[Pair], backbone_file: Path) -> None:
    config = config_of(batch_size=4, learning_rate=3e-3)
    torch.manual_seed(0)
    network = D2LS(config.network)
    load_backbone(network, backbone_file)
    crops = [Crops(toy_pairs, config, 0)[index] for index in range(4)]
    pixels, target = torch.stack([image for image, _ in crops]), torch.stack([mask for _, mask in crops])
    optimizer = torch.optim.AdamW(parameter_groups(network, config))
    network.train()
    terms = [train_step(network, optimizer, pixels, target, config) for _ in range(25)]
    assert all(math.isfinite(value) for step in terms for value in step.values())
    for name in ("total", "dynamic_cross_entropy", "static_cross_entropy"):
        assert terms[-1][name] < 0.7 * terms[0][name], name


def test_backbone_and_the_rest_are_learnt_at_their_own_rates() -> None:
    config = config_of(learning_rate=1e-3, backbone_lr=0.1)
    network = D2LS(config.network)
    backbone, rest = parameter_groups(network, config)
    assert (backbone["lr"], rest["lr"]) == (pytest.approx(1e-4), 1e-3)
    grouped = {id(value) for value in [*backbone["params"], *rest["params"]]}
    assert len(backbone["params"]) + len(rest["params"]) == len(grouped)
    assert grouped == {id(value) for value in network.parameters()}
    assert {id(value) for value in backbone["params"]} == {id(value) for value in network.encoder.backbone.parameters()}


def test_learning_rate_warms_up_and_falls_by_half_a_cosine() -> None:
    config = config_of(steps=110, warmup=10, learning_rate=1e-2, final_lr=1e-4)
    factors = [learning_rate_factor(step, config) for step in range(111)]
    assert factors[:3] == pytest.approx([0.1, 0.2, 0.3])
    assert factors[9] == factors[10] == 1.0
    assert factors[60] == pytest.approx((1 + 0.01) / 2)
    assert factors[110] == pytest.approx(0.01)
    assert learning_rate_factor(200, config) == pytest.approx(0.01)
    assert factors[10:] == sorted(factors[10:], reverse=True)


@pytest.mark.parametrize(("steps", "warmup"), [(3, 0), (3, 3), (3, 10)])
def test_learning_rate_of_short_runs_is_never_zero_or_above_one(steps: int, warmup: int) -> None:
    config = config_of(steps=steps, warmup=warmup)
    assert all(0 < learning_rate_factor(step, config) <= 1 for step in range(steps))


# Starting weights


def network_of(backbone: str, in_channels: int) -> D2LS:
    return D2LS(D2LSConfig(backbone=backbone, num_classes=2, embed_dim=32, stages=1, in_channels=in_channels))


def test_backbone_takes_the_classifiers_weights(backbone_file: Path) -> None:
    torch.manual_seed(5)
    classifier = timm.create_model(BACKBONE).state_dict()
    network = network_of(BACKBONE, 3)
    load_backbone(network, backbone_file)
    for key, value in network.encoder.backbone.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            assert torch.equal(value, classifier[key].half().float()), key


@pytest.mark.parametrize("in_channels", [1, 4, 6])
def test_stem_is_adapted_to_the_number_of_bands(backbone_file: Path, in_channels: int) -> None:
    network, three = network_of(BACKBONE, in_channels), network_of(BACKBONE, 3)
    load_backbone(network, backbone_file)
    load_backbone(three, backbone_file)
    stem = network.encoder.backbone.state_dict()["conv_stem.weight"]
    known = three.encoder.backbone.state_dict()["conv_stem.weight"]
    if in_channels == 1:
        expected = known.sum(1, keepdim=True)
    else:  # bands repeat, and a grey image gives what it gave
        expected = known[:, [band % 3 for band in range(in_channels)]] * 3 / in_channels
    # The file holds half precision, in which timm adapts the stem.
    torch.testing.assert_close(stem, expected, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("backbone", ["resnet18", "convnext_atto"])
@pytest.mark.parametrize("in_channels", [3, 4])
def test_backbones_of_other_families_take_their_weights_too(tmp_path: Path, backbone: str, in_channels: int) -> None:
    torch.manual_seed(5)
    classifier = timm.create_model(backbone).state_dict()
    path = tmp_path / "classifier.safetensors"
    save_file(classifier, path)
    network = network_of(backbone, in_channels)
    load_backbone(network, path)
    # The features' names differ from the classifier's, so tensors are looked up by what they hold.
    known = {value.numpy().tobytes() for value in classifier.values()}
    strange = [
        key for key, value in network.encoder.backbone.state_dict().items() if value.numpy().tobytes() not in known
    ]
    assert strange == [] if in_channels == 3 else len(strange) == 1


def test_weights_of_another_backbone_are_refused(backbone_file: Path) -> None:
    with pytest.raises((RuntimeError, ValueError)):
        load_backbone(network_of("resnet18", 3), backbone_file)
