"""A training step, the optimiser and its schedule."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor

from d2ls_infer.datasets import Dataset
from d2ls_infer.errors import UsageError
from d2ls_infer.labels import LabelMap
from d2ls_infer.manifest import ModelDescription
from d2ls_infer.nn import D2LS, D2LSConfig, TrainingOutput
from d2ls_infer.smoothing import smoothed
from d2ls_infer.train.config import TrainConfig
from d2ls_infer.train.data import CropDataset
from d2ls_infer.train.losses import d2ls_loss
from d2ls_infer.train.module import D2LSModule, Step, parameter_groups, rate_factor, replayed
from d2ls_infer.train.pool import ImagePool

MakeConfig = Callable[..., TrainConfig]
MakeAbout = Callable[..., ModelDescription]


@pytest.fixture
def network(make_about: MakeAbout) -> D2LS:
    torch.manual_seed(0)
    return D2LS(D2LSConfig.from_dict(make_about().config))


# Rates


def test_backbone_interactor_and_the_rest_are_learnt_at_their_own_rates(network: D2LS, make_config: MakeConfig) -> None:
    groups = parameter_groups(network, make_config(learning_rate=1e-3, backbone_rate=0.1, interactor_rate=0.2))
    backbone, interactor, rest = groups
    assert [group["lr"] for group in groups] == pytest.approx([1e-4, 2e-4, 1e-3])
    grouped = [id(value) for group in groups for value in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(value) for value in network.parameters()}
    decoder = network.decoder
    attentions = [*decoder.blocks.parameters(), *decoder.final_attention.parameters(), *decoder.final_norm.parameters()]
    assert {id(value) for value in backbone["params"]} == {id(value) for value in network.encoder.backbone.parameters()}
    assert {id(value) for value in interactor["params"]} == {id(value) for value in attentions}
    assert id(network.dictionary.static) in {id(value) for value in rest["params"]}


def test_learning_rate_warms_up_and_falls_by_half_a_cosine(make_config: MakeConfig) -> None:
    config = make_config(warmup_steps=10, learning_rate=1e-2, final_learning_rate=1e-4)
    factors = [rate_factor(step, 110, config) for step in range(111)]
    assert factors[:3] == pytest.approx([0.1, 0.2, 0.3])
    assert factors[9] == factors[10] == 1.0
    assert factors[60] == pytest.approx((1 + 0.01) / 2)
    assert factors[35] == pytest.approx(0.01 + 0.99 * (1 + math.cos(math.pi / 4)) / 2)
    assert factors[110] == pytest.approx(0.01)
    assert rate_factor(200, 110, config) == pytest.approx(0.01)
    assert factors[10:] == sorted(factors[10:], reverse=True)


def test_learning_rate_of_the_paper_goes_from_1e_4_to_1e_6() -> None:
    config = TrainConfig()
    rates = [config.learning_rate * rate_factor(step, 1000, config) for step in (0, 500, 1000)]
    assert rates == pytest.approx([1e-4, (1e-4 + 1e-6) / 2, 1e-6])


@pytest.mark.parametrize(("steps", "warmup"), [(3, 0), (3, 3), (3, 10), (1, 0)])
def test_learning_rate_of_short_runs_is_never_zero_or_above_one(
    make_config: MakeConfig, steps: int, warmup: int
) -> None:
    config = make_config(warmup_steps=warmup)
    assert all(0 < rate_factor(step, steps, config) <= 1 for step in range(steps))


# Steps


def test_random_numbers_of_a_step_depend_on_seed_epoch_and_step_alone(
    network: D2LS, make_config: MakeConfig, make_about: MakeAbout, monkeypatch: pytest.MonkeyPatch
) -> None:
    def drawn(seed: int, epoch: int, batch: int) -> float:
        module = D2LSModule(network, make_about(), make_config(seed=seed))
        monkeypatch.setattr(type(module), "current_epoch", epoch)
        module.on_train_batch_start(None, batch)
        return float(torch.rand(()))

    values = {key: drawn(*key) for key in itertools.product((1, 2), (0, 1), (0, 1))}
    assert len(set(values.values())) == 8
    torch.rand(7)
    assert {key: drawn(*key) for key in reversed(values)} == values


def test_loss_falls_on_images_whose_brightness_is_their_class(
    network: D2LS, toy_pool: ImagePool, make_config: MakeConfig, make_about: MakeAbout
) -> None:
    config = make_config(crop=64, learning_rate=3e-3)
    crops = CropDataset(toy_pool, config, make_about(), 0)
    pixels, target = (torch.stack(parts) for parts in zip(*(crops[index] for index in range(4)), strict=True))
    optimizer = torch.optim.AdamW(parameter_groups(network, config))
    network.train()
    terms: list[dict[str, Tensor]] = []
    for _ in range(25):
        output = network(pixels)
        assert isinstance(output, TrainingOutput)
        terms.append(d2ls_loss(output, target, ignore_index=255))
        optimizer.zero_grad()
        terms[-1]["total"].backward()
        optimizer.step()
    assert all(value.isfinite() for step in terms for value in step.values())
    for name in ("total", "dynamic_cross_entropy", "static_cross_entropy"):
        assert terms[-1][name] < 0.7 * terms[0][name], name


@pytest.mark.parametrize("shared", [0.0, 1.0])
def test_a_part_of_the_crop_is_to_be_told_as_in_the_whole(
    network: D2LS, toy_pool: ImagePool, make_config: MakeConfig, make_about: MakeAbout, shared: float
) -> None:
    config = make_config(crop=128, consistency=3.0, shared_dictionary=shared)
    module = D2LSModule(network.train(), make_about(), config)
    told: dict[str, Tensor] = {}
    module.log_dict = lambda logged, **_: told.update(logged)  # type: ignore[method-assign, assignment]
    module._trainer = SimpleNamespace(optimizers=[SimpleNamespace(param_groups=[{"lr": 1.0}])])  # type: ignore[assignment]
    crops = CropDataset(toy_pool, config, make_about(), 0)
    pixels, target = (torch.stack(parts) for parts in zip(*(crops[index] for index in range(2)), strict=True))
    seen: list[Tensor] = []
    network.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    total = module.training_step((pixels, target), 0)
    whole, part = seen
    assert torch.equal(whole, pixels)
    side = part.shape[-1]
    assert side in (96, 64)
    shift = 30 if side == 96 else 61
    assert shift % 4
    assert torch.equal(part, pixels[..., shift : shift + side, shift : shift + side])
    assert 0 < told["train/consistency"] < 2
    terms = {name.removeprefix("train/"): value for name, value in told.items()}
    dynamic = terms["dynamic_cross_entropy"] + terms["dynamic_dice"] + terms["contrastive"]
    static = terms["static_cross_entropy"] + terms["static_dice"]
    assert float(total.detach()) == pytest.approx(float(dynamic + 0.4 * static + 3 * terms["consistency"]), rel=1e-5)
    total.backward()
    assert all(value.grad is None or value.grad.isfinite().all() for value in network.parameters())


def test_on_a_cpu_a_step_runs_as_it_is(network: D2LS, make_config: MakeConfig) -> None:
    step = Step(network, make_config(), 255, shared=False, shift=0)
    assert replayed(step, torch.zeros(1, 3, 64, 64), torch.zeros(1, 64, 64, dtype=torch.int64), None) is step


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("shift", [0, 32])
def test_a_replayed_step_gives_the_terms_and_gradients_of_the_step(
    network: D2LS, make_config: MakeConfig, shift: int
) -> None:
    network.cuda().train()
    steps = [Step(network, make_config(consistency=1.0), 255, shared=False, shift=shift) for _ in range(2)]
    pixels, target = torch.randn(2, 3, 128, 128, device="cuda"), torch.randint(0, 3, (2, 128, 128), device="cuda")
    fast = replayed(steps[0], pixels, target, torch.cuda.graph_pool_handle())
    for _ in range(2):
        pixels, target = torch.randn_like(pixels), target.flip(1)
        found = []
        for step in (steps[1], fast):
            network.zero_grad()
            terms = step(pixels, target)
            terms[0].backward()
            found.append((terms.detach().clone(), [p.grad.clone() for p in network.parameters() if p.grad is not None]))
        for expected, got in zip(*found, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


def test_validation_counts_what_an_evaluation_counts(
    network: D2LS, toys: Path, toy_dataset: Dataset, make_config: MakeConfig, make_about: MakeAbout
) -> None:
    images = toy_dataset.images(toys, "val")
    module = D2LSModule(network, make_about(), make_config(), images)
    trainer = pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", enable_progress_bar=False)
    module.trainer = trainer
    for _ in range(2):  # the second epoch's validation starts anew
        module.on_validation_epoch_start()
        for index in range(len(images)):
            module.validation_step(index, index)
    counts = module.matrix.counts
    expected = np.zeros((3, 4), np.int64)
    network.eval()
    for image in images:
        pixels, mask = image.read()
        with torch.no_grad():
            logits = network((torch.from_numpy(pixels)[None].float() / 255 - 0.5) / 0.25)
        assert isinstance(logits, Tensor)
        predicted = smoothed(logits.softmax(1))[0].argmax(0).numpy()
        for truth in range(3):
            for found in range(3):
                expected[truth, found] += ((mask == truth) & (predicted == found)).sum()
    np.testing.assert_array_equal(counts, expected)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"labels": LabelMap.of(["field", "water", "roof"])}, "labels was .*'water'.* is .*'field'"),
        ({"mean": (0.1, 0.2, 0.3)}, r"mean was \[0\.5, 0\.5, 0\.5\], is \[0\.1, 0\.2, 0\.3\]"),
        ({"training_data": "others"}, "training_data was toys, is others"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    network: D2LS, make_config: MakeConfig, make_about: MakeAbout, changes: dict[str, object], told: str
) -> None:
    checkpoint: dict[str, object] = {}
    D2LSModule(network, make_about(), make_config()).on_save_checkpoint(checkpoint)
    D2LSModule(network, make_about(), make_config()).on_load_checkpoint(checkpoint)
    with pytest.raises(UsageError, match=f"the run to go on with was another: {told}"):
        D2LSModule(network, make_about(**changes), make_config()).on_load_checkpoint(checkpoint)
