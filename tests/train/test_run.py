"""Whole runs: what they learn, that an interruption changes nothing of it, and the file that they write."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from d2ls_infer import load_model
from d2ls_infer.datasets import Dataset, LabelledImage, folder_dataset
from d2ls_infer.errors import D2LSError, MissingFileError, OutputExistsError, UsageError
from d2ls_infer.evaluate import evaluate
from d2ls_infer.labels import LabelMap
from d2ls_infer.licence import is_restricted
from d2ls_infer.manifest import ModelDescription
from d2ls_infer.nn import D2LS, D2LSConfig, TrainingOutput
from d2ls_infer.train.average import MovingAverage
from d2ls_infer.train.config import TrainConfig
from d2ls_infer.train.curves import Curves
from d2ls_infer.train.data import CropDataset
from d2ls_infer.train.losses import d2ls_loss
from d2ls_infer.train.module import D2LSModule, parameter_groups, rate_factor
from d2ls_infer.train.pool import ImagePool
from d2ls_infer.train.run import RunOptions, fit, make_trainer, train
from d2ls_infer.weights import read_description, save_weights

MakeConfig = Callable[..., TrainConfig]
MakeAbout = Callable[..., ModelDescription]
State = dict[str, Tensor]
BACKBONE = "mobilenetv3_small_050"


def options_of(output: Path, **changes: Any) -> RunOptions:
    return RunOptions(output=output, **{"accelerator": "cpu", "workers": 0, "progress": False, **changes})


def new_network(about: ModelDescription) -> D2LS:
    torch.manual_seed(42)
    return D2LS(D2LSConfig.from_dict(about.config))


def states_equal(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[key]) for key, value in a.items())


# What is learnt


def test_a_run_is_adamw_on_the_loss_with_the_schedule_clipping_and_the_average(
    tmp_path: Path, toy_pool: ImagePool, make_config: MakeConfig, make_about: MakeAbout
) -> None:
    about = make_about()
    config = make_config(
        epochs=2, warmup_steps=2, clip_norm=0.5, backbone_rate=0.5, weight_decay=0.1, ema_decay=0.9,
        static_weight=0.7, contrastive_weight=2.0, dynamic_weight=0.9, static_dice=False,
    )  # fmt: skip
    network = new_network(about)
    fit(network, about, toy_pool, (), config, options_of(tmp_path))
    logged = json.loads((tmp_path / "curves.json").read_text())

    plain = new_network(about).to(memory_format=torch.channels_last).train()
    groups = parameter_groups(plain, config)
    rates = [group["lr"] for group in groups]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.1)
    average: State = {}
    for step in range(4):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * rate_factor(step, 4, config)
        crops = CropDataset(toy_pool, config, about, step // 2)
        pixels, target = (torch.stack([crops[step % 2 * 2 + i][part] for i in range(2)]) for part in (0, 1))
        output = plain(pixels.contiguous(memory_format=torch.channels_last))
        assert isinstance(output, TrainingOutput)
        terms = d2ls_loss(
            output, target, ignore_index=255, static_weight=0.7, contrastive_weight=2.0, dynamic_weight=0.9,
            static_dice=False,
        )  # fmt: skip
        optimizer.zero_grad()
        terms["total"].backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
        share = min(0.9, (1 + step) / (10 + step)) if step else 0.0
        for key, value in plain.state_dict().items():
            average[key] = share * average.get(key, value) + (1 - share) * value
        if step % 2 == 0:
            first = {name: float(value.detach()) for name, value in terms.items()}
        else:
            for name, value in terms.items():
                mean = (first[name] + float(value.detach())) / 2
                assert logged[f"train/{name}"][step // 2] == [step // 2 + 1, pytest.approx(mean, rel=1e-4)], name
    for key, value in network.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            np.testing.assert_allclose(value.numpy(), average[key].numpy(), rtol=1e-4, atol=1e-6, err_msg=key)
    assert not states_equal(network.state_dict(), new_network(about).state_dict())


def test_without_the_average_the_last_weights_are_kept(
    tmp_path: Path, toy_pool: ImagePool, make_config: MakeConfig, make_about: MakeAbout
) -> None:
    network = new_network(make_about())
    fit(network, make_about(), toy_pool, (), make_config(epochs=1, ema_decay=0), options_of(tmp_path))
    kept = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert states_equal({f"network.{key}": value for key, value in network.state_dict().items()}, kept)


@pytest.mark.parametrize(("steps", "decay", "expected"), [
    (999, "auto", True), (1000, "auto", False), (5, 0.0, False), (5, 0.9, True), (5000, 0.9, True),
])  # fmt: skip
def test_weights_are_averaged_where_epochs_are_short_unless_told(
    tmp_path: Path, make_config: MakeConfig, steps: int, decay: float | str, expected: bool
) -> None:
    trainer = make_trainer(
        make_config(ema_decay=decay), options_of(tmp_path), Curves(tmp_path), steps=steps, validated=True
    )
    assert any(isinstance(callback, MovingAverage) for callback in trainer.callbacks) == expected  # type: ignore[attr-defined]


@pytest.mark.parametrize(("epochs", "every"), [(1, 1), (10, 1), (11, 2), (30, 3), (100, 10)])
def test_a_run_is_validated_ten_times_at_most(tmp_path: Path, make_config: MakeConfig, epochs: int, every: int) -> None:
    config = make_config(epochs=epochs)
    trainer = make_trainer(config, options_of(tmp_path), Curves(tmp_path), steps=1, validated=True)
    assert trainer.check_val_every_n_epoch == every


@pytest.mark.parametrize(
    "changes", [{"devices": "many"}, {"devices": 0}, {"strategy": "magic"}, {"accelerator": "abacus"}]
)
def test_what_lightning_cannot_do_is_told(tmp_path: Path, make_config: MakeConfig, changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"devices .*, strategy .*: "):
        make_trainer(make_config(), options_of(tmp_path, **changes), Curves(tmp_path), steps=1, validated=True)


# Interruptions


class Interrupt:
    """Draws a random number in each training step, as dropout does, and calls `act` in step `at`, counted from 1."""

    def __init__(self, at: int = 0, act: Callable[[], None] | None = None) -> None:
        self.at, self.act = at, act
        self.drawn: list[float] = []

    def __call__(self, module: D2LS, _: object) -> None:
        if module.training:
            self.drawn.append(float(torch.rand(())))
            if len(self.drawn) == self.at and self.act is not None:
                self.act()


def press_ctrl_c() -> None:
    raise KeyboardInterrupt


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def run(
    folder: Path, pool: ImagePool, images: list[LabelledImage], about: ModelDescription, config: TrainConfig,
    *, interrupt: Interrupt | None = None, resume: bool = False,
) -> State:  # fmt: skip
    network = new_network(about)
    network.register_forward_pre_hook(interrupt or Interrupt())
    fit(network, about, pool, images, config, options_of(folder, resume=resume))
    return network.state_dict()


# Four epochs of two steps, but for those with Lookahead, whose slow weights are set in the sixth step: four of four.
KINDS: dict[str, tuple[dict[str, Any], int]] = {
    "average, between epochs": ({"ema_decay": "auto"}, 5),
    "average, within an epoch": (
        {"ema_decay": 0.9, "warmup_steps": 3, "clip_norm": 1.0, "balance": 0.5, "jitter": 0.2},
        6,
    ),
    "last weights": ({"ema_decay": 0.0}, 6),
    "lookahead and average": ({"ema_decay": 0.9, "lookahead": True, "crops_per_epoch": 8}, 11),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_was_interrupted_ends_as_if_it_had_not_been(
    tmp_path: Path, toy_pool: ImagePool, toys: Path, toy_dataset: Dataset, make_config: MakeConfig,
    make_about: MakeAbout, kind: str,
) -> None:  # fmt: skip
    changes, at = KINDS[kind]
    config, about, images = make_config(**changes), make_about(), toy_dataset.images(toys, "val")
    steps = config.crops_per_epoch // 2
    whole, before, after = Interrupt(), Interrupt(at, press_ctrl_c), Interrupt()
    expected = run(tmp_path / "whole", toy_pool, images, about, config, interrupt=whole)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(D2LSError, match=r"^stopped in epoch 3 of 4; go on with --resume$") as raised:
        run(tmp_path / "parts", toy_pool, images, about, config, interrupt=before)
    assert raised.value.exit_code == 130
    assert signal.getsignal(signal.SIGINT) == handler
    assert len(json.loads((tmp_path / "parts/curves.json").read_text())["train/total"]) == 2

    got = run(tmp_path / "parts", toy_pool, images, about, config, interrupt=after, resume=True)
    assert states_equal(got, expected)
    curves = [json.loads((tmp_path / name / "curves.json").read_text()) for name in ("whole", "parts")]
    assert curves[0] == curves[1]
    assert set(curves[0]) == {
        "train/total", "train/dynamic_cross_entropy", "train/dynamic_dice", "train/contrastive",
        "train/static_cross_entropy", "train/static_dice", "train/learning_rate",
        "val/mean_iou", "val/mean_f1", "val/overall_accuracy",
    }  # fmt: skip
    assert all([epoch for epoch, _ in points] == [1, 2, 3, 4] for points in curves[0].values())
    # What was drawn in the unfinished epoch is drawn again.
    assert len(set(whole.drawn)) == len(whole.drawn) == 4 * steps
    assert before.drawn == whole.drawn[:at]
    assert after.drawn == whole.drawn[2 * steps :]
    assert (tmp_path / "parts/curves.png").read_bytes().startswith(b"\x89PNG")


def test_sigterm_is_no_success_either(
    tmp_path: Path, toy_pool: ImagePool, make_config: MakeConfig, make_about: MakeAbout
) -> None:
    config, about = make_config(epochs=2), make_about()
    with pytest.raises(D2LSError, match=r"^stopped in epoch 1 of 2; none was finished, so start anew$"):
        run(tmp_path, toy_pool, [], about, config, interrupt=Interrupt(1, terminate))
    assert not (tmp_path / "last.ckpt").exists()
    run(tmp_path, toy_pool, [], about, config)
    assert (tmp_path / "last.ckpt").exists()


@pytest.mark.parametrize("decay", [0.9, 0.0])
def test_resuming_a_finished_run_gives_what_it_gave(
    tmp_path: Path, toy_pool: ImagePool, make_config: MakeConfig, make_about: MakeAbout, decay: float
) -> None:
    config, about, later = make_config(epochs=2, ema_decay=decay), make_about(), Interrupt()
    expected = run(tmp_path, toy_pool, [], about, config)
    curves = (tmp_path / "curves.json").read_bytes()
    got = run(tmp_path, toy_pool, [], about, config, interrupt=later, resume=True)
    assert later.drawn == []
    assert states_equal(got, expected)
    assert (tmp_path / "curves.json").read_bytes() == curves


# The whole of it


def begin(
    root: Path, dataset: Dataset, config: TrainConfig, output: Path, *, split: str = "train", val: str | None = "val",
    resume: bool = False, progress: bool = False, **more: Any,
) -> Path:  # fmt: skip
    return train(
        dataset,
        dataset.images(root, split),
        dataset.images(root, val) if val else [],
        config,
        options_of(output, resume=resume, progress=progress),
        validated_on=val or "none",
        **more,
    )


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, toys: Path, toy_dataset: Dataset, make_config: MakeConfig,
    backbone_file: Path,
) -> Path:  # fmt: skip
    output = tmp_path_factory.mktemp("trained") / "runs/toys"
    return begin(toys, toy_dataset, make_config(), output, backbone_file=backbone_file)


def test_what_a_run_leaves_behind(trained: Path) -> None:
    names = ["config.json", "curves.json", "curves.png", "folder.safetensors", "last.ckpt"]
    assert sorted(path.name for path in trained.parent.iterdir()) == names


def test_the_file_says_what_it_is(trained: Path, make_config: MakeConfig) -> None:
    model = load_model(trained, device="cpu")
    about = model.description
    assert about.config == {
        "backbone": BACKBONE, "num_classes": 3, "embed_dim": 32, "stages": 1, "reduction": 4, "in_channels": 3,
    }  # fmt: skip
    assert about.labels == LabelMap.of(["water", "field", "roof"])
    assert about.bands == ("red", "green", "blue")
    assert about.value_range == (0.0, 255.0)
    assert about.mean == (0.485, 0.456, 0.406)  # as timm trained it
    assert about.std == (0.229, 0.224, 0.225)
    assert about.gsd_m == 2.0
    assert about.training_data == "folder, 3 images"
    assert about.source == "d2ls train, 4 epochs; backbone started from ImageNet weights"
    settings = json.loads((trained.parent / "config.json").read_text())
    assert TrainConfig().updated(settings) == make_config()


def test_the_numbers_are_those_of_an_evaluation(trained: Path, toys: Path, toy_dataset: Dataset) -> None:
    model = load_model(trained, device="cpu", precision="float32")
    scores = evaluate(model, toy_dataset.images(toys, "val")).full.scores()
    expected = {
        "mIoU": np.mean(scores.iou), "mean F1": np.mean(scores.f1), "overall accuracy": scores.overall_accuracy,
        **{f"IoU {name}": value for name, value in zip(model.labels.names, scores.iou, strict=True)},
        **{f"F1 {name}": value for name, value in zip(model.labels.names, scores.f1, strict=True)},
    }  # fmt: skip
    metrics = model.description.metrics
    assert {metric.name: metric.value for metric in metrics} == {
        name: round(100 * float(value), 2) for name, value in expected.items()
    }
    assert {metric.split for metric in metrics} == {"val, 2 images"}
    assert {metric.protocol for metric in metrics} == {
        "tiles of 512 px, 25 % overlap, Hann blending, no test-time augmentation, float32, scores smoothed"
    }


def test_weights_are_stored_in_half_precision_but_for_those_that_would_suffer(trained: Path) -> None:
    kinds = {key: value.dtype for key, value in load_file(trained).items()}
    whole = {key for key, kind in kinds.items() if kind == torch.float32}
    assert set(kinds.values()) == {torch.float16, torch.float32}
    assert "decoder.position.gaussian" in whole
    assert all(key.endswith(("gaussian", "running_mean", "running_var")) for key in whole)
    assert not any(key.endswith("num_batches_tracked") for key in kinds)


def test_a_quiet_start_is_for_runs_that_start_from_no_model(
    trained: Path, toys: Path, toy_dataset: Dataset, make_config: MakeConfig, backbone_file: Path, tmp_path: Path
) -> None:
    config = make_config(epochs=1, quiet_start=True, interactor_rate=0.0)

    def outputs(**start: Path) -> list[Tensor]:
        file = begin(toys, toy_dataset, config, tmp_path / "-".join(start), val=None, **start)
        return [value for key, value in load_file(file).items() if key.endswith("out.weight")]

    anew, further = outputs(backbone_file=backbone_file), outputs(init=trained)
    assert len(anew) == len(further) > 0
    assert not any(value.any() for value in anew)
    assert all(value.any() for value in further)


def test_branches_are_left_out_of_a_run(
    toys: Path, toy_dataset: Dataset, make_config: MakeConfig, backbone_file: Path, tmp_path: Path
) -> None:
    def learnt(rate: float) -> dict[str, Tensor]:
        config = make_config(epochs=1, drop_path=rate)
        return load_file(begin(toys, toy_dataset, config, tmp_path / str(rate), val=None, backbone_file=backbone_file))

    whole, thinned = learnt(0.0), learnt(0.9)
    assert whole.keys() == thinned.keys()
    assert not torch.equal(whole["dictionary.static"], thinned["dictionary.static"])


def test_a_run_is_not_written_over(
    trained: Path, toys: Path, toy_dataset: Dataset, make_config: MakeConfig, backbone_file: Path, tmp_path: Path
) -> None:
    before = {path.name: path.read_bytes() for path in trained.parent.iterdir()}
    with pytest.raises(OutputExistsError, match=r"holds a run; go on with --resume, or name another --output"):
        begin(toys, toy_dataset, make_config(), trained.parent, backbone_file=backbone_file)
    assert {path.name: path.read_bytes() for path in trained.parent.iterdir()} == before
    (tmp_path / "folder.safetensors").write_text("mine")
    with pytest.raises(OutputExistsError, match=r"folder\.safetensors exists; name another --output"):
        begin(toys, toy_dataset, make_config(), tmp_path, backbone_file=backbone_file)
    with pytest.raises(OutputExistsError, match=r"folder\.safetensors is a file; name a folder for --output"):
        begin(toys, toy_dataset, make_config(), tmp_path / "folder.safetensors", backbone_file=backbone_file)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.safetensors"]
    assert (tmp_path / "folder.safetensors").read_text() == "mine"


def test_a_finished_run_writes_the_same_file_again(
    trained: Path, toys: Path, toy_dataset: Dataset, make_config: MakeConfig
) -> None:
    before = trained.read_bytes()
    trained.unlink()
    assert begin(toys, toy_dataset, make_config(), trained.parent, resume=True) == trained
    assert trained.read_bytes() == before


def test_another_run_is_not_gone_on_with(
    trained: Path, toys: Path, toy_dataset: Dataset, make_config: MakeConfig
) -> None:
    before = (trained.parent / "config.json").read_bytes()
    other = make_config(epochs=6, scales=(0.5, 2.0))
    with pytest.raises(
        UsageError, match=r"other settings: epochs was 4, is 6; scales was \[0\.5, 1\.5\], is \[0\.5, 2\.0\]"
    ):
        begin(toys, toy_dataset, other, trained.parent, resume=True)
    assert (trained.parent / "config.json").read_bytes() == before
    dataset = folder_dataset(LabelMap.of(["field", "water", "roof"]), gsd_m=2.0)
    with pytest.raises(UsageError, match="was another: labels was"):
        begin(toys, dataset, make_config(), trained.parent, resume=True)
    with pytest.raises(UsageError, match="was another: training_data was folder, 3 images, is folder, 5 images"):
        begin(toys, toy_dataset, make_config(), trained.parent, split="all", resume=True)


def test_settings_that_end_early_are_told(
    tmp_path: Path, toys: Path, toy_dataset: Dataset, make_config: MakeConfig
) -> None:
    (tmp_path / "last.ckpt").touch()
    (tmp_path / "config.json").write_text('{"backbone": "resnet18", "epochs"')
    with pytest.raises(UsageError, match=r"config\.json is damaged: .*; start anew with another --output"):
        begin(toys, toy_dataset, make_config(), tmp_path, resume=True)


def test_nothing_to_resume_is_told(tmp_path: Path, toys: Path, toy_dataset: Dataset, make_config: MakeConfig) -> None:
    with pytest.raises(MissingFileError, match=r"nothing to resume in .*: no last\.ckpt"):
        begin(toys, toy_dataset, make_config(), tmp_path / "none", resume=True)
    assert not (tmp_path / "none").exists()


def test_progress_is_on_standard_error(
    tmp_path: Path, toys: Path, toy_dataset: Dataset, make_config: MakeConfig, backbone_file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    config = make_config(epochs=1)
    file = begin(toys, toy_dataset, config, tmp_path, val=None, progress=True, backbone_file=backbone_file)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "Epoch 0" in printed.err
    # Without images to validate on there is nothing to say of how good it is.
    assert read_description(file).metrics == ()
    assert not any(name.startswith("val/") for name in json.loads((tmp_path / "curves.json").read_text()))


def test_a_class_that_occurs_nowhere_is_learnt_and_has_no_score(
    tmp_path: Path, toys: Path, make_config: MakeConfig, backbone_file: Path
) -> None:
    dataset = replace(folder_dataset(LabelMap.of(["water", "field", "roof", "glacier"])), left_out=(1,))
    file = begin(toys, dataset, make_config(epochs=1, lookahead=True), tmp_path, backbone_file=backbone_file)
    model = load_model(file, device="cpu", precision="float32")
    scores = evaluate(model, dataset.images(toys, "val")).full.scores()
    found = {metric.name: metric.value for metric in model.description.metrics}
    assert {"IoU water", "F1 roof"} <= set(found)
    assert ("IoU glacier" in found) == bool(np.isfinite(scores.iou[3]))  # it may have been predicted
    assert found["mIoU without field"] == pytest.approx(50 * (scores.iou[0] + scores.iou[2]), abs=0.006)
    assert "mIoU" not in found


# Bands


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory, write_raster: Callable[..., Path]) -> tuple[Path, Dataset]:
    """Three scenes of eight bands of uint16 up to 10000, which are not what timm's backbones were trained on."""
    root = tmp_path_factory.mktemp("scenes")
    rng = np.random.default_rng(2)
    for kind in ("images", "masks"):
        (root / kind).mkdir()
    for name in "abc":
        mask = rng.integers(0, 3, (40, 40), dtype=np.uint8)
        mask[0] = 255
        image = rng.normal(1000.0 * np.arange(1, 9)[:, None, None], 100 + 500.0 * mask).clip(0, 20000)
        write_raster(root / "images" / f"{name}.tif", image.astype(np.uint16))
        write_raster(root / "masks" / f"{name}.tif", mask[None])
    (root / "train.txt").write_text("a\nb\n")
    (root / "val.txt").write_text("c\n")
    bands = tuple(f"b{number}" for number in range(1, 9))
    return root, folder_dataset(LabelMap.of(["water", "field", "roof"]), bands=bands, value_range=(0.0, 10000.0))


@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_other_imagery_is_normalised_by_what_was_measured(
    tmp_path: Path, scenes: tuple[Path, Dataset], make_config: MakeConfig, backbone_file: Path, gamma: float
) -> None:
    root, dataset = scenes
    config = make_config(epochs=1, gamma=gamma, mosaic=0.0, scales=(1.0, 1.0))
    model = load_model(begin(root, dataset, config, tmp_path, backbone_file=backbone_file), device="cpu")
    about, pairs = model.description, [image.read() for image in dataset.images(root, "train")]
    values = np.concatenate([image[:, mask != 255] for image, mask in pairs], axis=1).clip(0, 10000) / 10000
    values **= gamma
    assert about.gamma == gamma
    assert about.bands == tuple(f"b{number}" for number in range(1, 9))
    assert about.value_range == (0.0, 10000.0)
    assert about.config["in_channels"] == 8
    np.testing.assert_allclose(about.mean, values.mean(1), atol=1e-4)
    np.testing.assert_allclose(about.std, values.std(1), atol=1e-4)
    # A network sees the same values in training as afterwards.
    pool = ImagePool(pairs.__getitem__, len(pairs))
    crop, _ = CropDataset(pool, config, about, 0)[0]
    raw = np.concatenate([image.reshape(8, -1) for image, _ in pairs], axis=1).clip(0, 10000).astype(np.float32)
    seen = model.normalise(torch.from_numpy(raw)[None, :, None])[0, :, 0]
    for band in range(8):
        nearest = (crop[band].reshape(-1, 1) - seen[band]).abs().amin(1)
        assert nearest.max() < 1e-5


def test_some_of_the_bands_can_be_chosen_in_any_order(
    tmp_path: Path, scenes: tuple[Path, Dataset], make_config: MakeConfig, backbone_file: Path
) -> None:
    root, dataset = scenes
    config = make_config(epochs=1, bands=("b8", "b2"))
    about = read_description(begin(root, dataset, config, tmp_path, val=None, backbone_file=backbone_file))
    assert about.bands == ("b8", "b2")
    assert about.mean == (pytest.approx(0.8, abs=0.02), pytest.approx(0.2, abs=0.02))
    with pytest.raises(UsageError, match="the images have no band 'red'; they have b1, b2"):
        begin(root, dataset, make_config(bands=("red",)), tmp_path / "other", backbone_file=backbone_file)


def test_images_of_several_kinds_are_refused(
    tmp_path: Path, scenes: tuple[Path, Dataset], toys: Path, toy_dataset: Dataset, make_config: MakeConfig
) -> None:
    images = [*scenes[1].images(scenes[0], "train"), *toy_dataset.images(toys, "train")]
    with pytest.raises(UsageError, match="training needs images of one kind; these differ in bands or values"):
        train(toy_dataset, images, [], make_config(), options_of(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"class_weights": (1.0, 2.0)}, "class_weights are 2 for 3 classes"),
        ({"clouds": 0.5}, r"clouds needs the classes cloud shadow, .*; there is no cloud shadow"),
    ],
)
def test_settings_that_do_not_fit_the_classes_are_told(
    tmp_path: Path, toys: Path, toy_dataset: Dataset, make_config: MakeConfig, backbone_file: Path,
    changes: dict[str, Any], told: str,
) -> None:  # fmt: skip
    with pytest.raises(UsageError, match=told):
        begin(toys, toy_dataset, make_config(**changes), tmp_path / "run", backbone_file=backbone_file)
    assert not (tmp_path / "run").exists()


def test_class_weights_change_what_is_learnt(
    tmp_path: Path, toys: Path, toy_dataset: Dataset, make_config: MakeConfig, backbone_file: Path
) -> None:
    plain, weighed = (
        load_file(
            begin(
                toys, toy_dataset, make_config(epochs=1, class_weights=weights), tmp_path / f"run{len(weights)}",
                backbone_file=backbone_file,
            )
        )
        for weights in ((), (1.0, 9.0, 1.0))
    )  # fmt: skip
    assert not states_equal(plain, weighed)


def test_validation_needs_labels(
    tmp_path: Path,
    toys: Path,
    toy_dataset: Dataset,
    make_config: MakeConfig,
    unlabelled_image: LabelledImage,
    backbone_file: Path,
) -> None:
    images = toy_dataset.images(toys, "train")
    with pytest.raises(UsageError, match="the test image z comes without labels; name others, or none"):
        train(toy_dataset, images, [unlabelled_image], make_config(), options_of(tmp_path / "run"), validated_on="test")
    options = options_of(tmp_path / "run")
    with pytest.raises(UsageError, match="no such file"):  # an image that cannot be read ends it before training too
        train(toy_dataset, [unlabelled_image], [], make_config(), options, backbone_file=backbone_file)
    assert not (tmp_path / "run").exists()


# Starts


def test_a_model_can_be_trained_on_for_other_classes_and_bands(
    trained: Path, tmp_path: Path, scenes: tuple[Path, Dataset], make_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    root, dataset = scenes
    dataset = replace(dataset, labels=LabelMap.of(["tree", "Water", "road"]))
    dark = tmp_path / "folder.safetensors"
    save_weights(dark, load_file(trained), replace(read_description(trained), gamma=0.5, license="research use only"))
    started: dict[str, State] = {}

    def remember(self: D2LSModule) -> None:
        started["network"] = {key: value.clone() for key, value in self.network.state_dict().items()}

    monkeypatch.setattr(D2LSModule, "on_fit_start", remember)
    caplog.set_level("INFO", "d2ls_infer")
    # The config's network is another one; the model's own sizes count.
    config = make_config(epochs=1, backbone="resnet18", embed_dim=64, stages=2)
    file = begin(root, dataset, config, tmp_path / "run", val=None, init=dark)
    assert "started from folder, which knows Water" in caplog.text
    about, state, former = read_description(file), started["network"], load_file(trained)
    assert about.config == {
        "backbone": BACKBONE, "num_classes": 3, "embed_dim": 32, "stages": 1, "reduction": 4, "in_channels": 8,
    }  # fmt: skip
    assert about.source == "d2ls train, 1 epochs; started from the model folder"
    assert about.license == "unknown; and as it started from folder: research use only"
    assert is_restricted(about.license)
    assert about.training_data.endswith("; started from folder, which was trained on folder, 3 images")
    assert "the scores say little" not in caplog.text  # there are none
    assert torch.equal(state["dictionary.static"][1], former["dictionary.static"][0].float())
    head = "dictionary.modulator.head.2.weight"
    assert torch.equal(state[head][4:8], former[head][0:4].float())
    assert not torch.equal(state["dictionary.static"][0], former["dictionary.static"][1].float())
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (settings["backbone"], settings["embed_dim"], settings["stages"]) == (BACKBONE, 32, 1)
    assert settings["gamma"] == about.gamma == 0.5


def test_weights_that_cannot_be_fetched_are_told(
    tmp_path: Path, toys: Path, toy_dataset: Dataset, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UsageError, match=f"no weights of {BACKBONE} to be had: .*; give --backbone-weights"):
        begin(toys, toy_dataset, make_config(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_unknown_backbone_is_told_before_anything_is_read(
    tmp_path: Path, toys: Path, toy_dataset: Dataset, make_config: MakeConfig
) -> None:
    images = [replace(image, image=tmp_path / "nowhere.tif") for image in toy_dataset.images(toys, "train")]
    with pytest.raises(UsageError, match="unknown backbone 'resnet1'"):
        train(toy_dataset, images, [], make_config(backbone="resnet1"), options_of(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
