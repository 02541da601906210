"""The whole network: against the reference vectors, at any size, in every precision, and its weights in and out."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from d2ls_infer.errors import UsageError, WeightsError
from d2ls_infer.legacy import load_legacy
from d2ls_infer.nn import D2LS, D2LSConfig, TrainingOutput, autocast, count_parameters, load_weights, weights_of
from d2ls_infer.nn.d2ls import pad_to_stride
from d2ls_infer.train.losses import contrastive

MakeNetwork = Callable[..., D2LS]
RandomPixels = Callable[..., Tensor]

REFERENCE = Path(__file__).parents[2].parent / "shared" / "reference"
VECTORS = REFERENCE / "convnext_tiny_n7_l3_96x128_b2_train.npz"
KEYS = REFERENCE / "convnext_tiny_legacy_keys.json"


def reference_tensor(key: str, shape: list[int]) -> Tensor:
    """The rule that fills the reference's weights, so that no weight file is needed."""
    seed = int.from_bytes(hashlib.sha256(key.encode("utf-8")).digest()[:8], "little")
    a = np.random.Generator(np.random.PCG64(seed)).standard_normal(shape)
    last = key.rpartition(".")[2]
    if last == "layer_scale":
        a = 0.5 + 0.1 * a
    elif last == "bias":
        a = 0.05 * a
    elif len(shape) == 1:
        a = 1 + 0.1 * a
    elif last != "positional_encoding_gaussian_matrix":
        a = a / np.sqrt(np.prod(shape[1:]))
    return torch.from_numpy(a)


@pytest.fixture(scope="module")
def reference_network(tmp_path_factory: pytest.TempPathFactory) -> D2LS:
    if not (KEYS.is_file() and VECTORS.is_file()):
        pytest.skip(f"the reference vectors are not there: {REFERENCE}")
    state = {key: reference_tensor(key, shape).float() for key, shape in json.loads(KEYS.read_text()).items()}
    checkpoint = tmp_path_factory.mktemp("reference") / "tiny.pt"
    torch.save(state, checkpoint)
    network = load_legacy(checkpoint)
    checkpoint.unlink()  # 180 MB that nobody reads again
    return network


@pytest.fixture(scope="module")
def vectors(reference_network: D2LS) -> dict[str, Tensor]:
    with np.load(VECTORS) as file:
        return {key: torch.from_numpy(np.asarray(file[key])) for key in file.files}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-5)])
def test_network_equals_the_reference(
    reference_network: D2LS, vectors: dict[str, Tensor], dtype: torch.dtype, tolerance: float
) -> None:
    network = reference_network.to(dtype)
    pixels = vectors["input"].to(dtype)
    try:
        with torch.no_grad():
            output = network.train()(pixels)
            eval_logits = network.eval()(pixels)
            attention = network.dictionary(network.encoder(pixels)[1])[2]
    finally:
        network.float().eval()
    for got, name in (
        (output.logits, "logits"),
        (eval_logits, "logits"),
        (output.static_logits, "static_logits"),
        (output.dynamic_dictionary, "dynamic_dictionary"),
        (attention, "attention"),
        (contrastive(output.dynamic_dictionary), "contrastive"),
    ):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), vectors[name].double(), atol=tolerance, rtol=0, msg=name)


def test_convnext_base_with_seven_classes_has_90_09_million_parameters() -> None:
    network = D2LS(D2LSConfig(backbone="convnext_base", num_classes=7))
    total, backbone = count_parameters(network), count_parameters(network.encoder.backbone)
    assert backbone == 87_564_416
    assert f"{(total - backbone) / 1e6:.2f} of {total / 1e6:.2f} M" == "2.52 of 90.09 M"


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1), (32, 64), (33, 65), (31, 100), (64, 16), (17, 96)])
def test_logits_have_the_size_of_the_pixels(
    make_network: MakeNetwork, random_pixels: RandomPixels, size: tuple[int, int]
) -> None:
    network = make_network(num_classes=3)
    with torch.no_grad():
        logits = network(random_pixels(2, 3, *size))
        training = network.train()(random_pixels(2, 3, *size))
    assert logits.shape == training.logits.shape == training.static_logits.shape == (2, 3, *size)
    assert logits.isfinite().all()


@pytest.mark.parametrize("size", [(32, 32), (64, 32), (96, 160)])
def test_multiples_of_32_are_not_padded(random_pixels: RandomPixels, size: tuple[int, int]) -> None:
    pixels = random_pixels(1, 3, *size)
    assert pad_to_stride(pixels) is pixels


@pytest.mark.parametrize(
    ("size", "padded", "modes"),
    [
        ((33, 65), (64, 96), ("reflect", "reflect")),
        ((31, 100), (32, 128), ("reflect", "reflect")),
        ((17, 16), (32, 32), ("reflect", "edge")),  # 16 columns reflect to 31 at most
        ((1, 7), (32, 32), ("edge", "edge")),
        ((5, 40), (32, 64), ("edge", "reflect")),
    ],
)
def test_padding_reflects_where_the_side_is_long_enough_and_else_repeats_the_edge(
    random_pixels: RandomPixels, size: tuple[int, int], padded: tuple[int, int], modes: tuple[str, str]
) -> None:
    pixels = random_pixels(2, 3, *size)
    expected = pixels.numpy()
    for axis, mode in enumerate(modes, start=2):
        amounts = [(0, 0)] * 4
        amounts[axis] = (0, padded[axis - 2] - size[axis - 2])
        expected = np.pad(expected, amounts, mode=mode)
    np.testing.assert_array_equal(pad_to_stride(pixels).numpy(), expected)


def test_logits_of_an_odd_size_are_those_of_the_padded_pixels(
    make_network: MakeNetwork, random_pixels: RandomPixels
) -> None:
    network, pixels = make_network(), random_pixels(1, 3, 33, 70)
    padded = torch.from_numpy(np.pad(pixels.numpy(), ((0, 0), (0, 0), (0, 31), (0, 26)), mode="reflect"))
    with torch.no_grad():
        torch.testing.assert_close(network(pixels), network(padded)[..., :33, :70])


def test_logits_do_not_depend_on_the_rest_of_the_batch(make_network: MakeNetwork, random_pixels: RandomPixels) -> None:
    network, pixels = make_network(), random_pixels(3, 3, 64, 32)
    with torch.no_grad():
        together = network(pixels)
        apart = torch.cat([network(pixels[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("in_channels", [1, 4, 8])
@pytest.mark.parametrize("backbone", ["convnext_atto", "tf_efficientnet_lite0"])
def test_network_takes_any_number_of_bands(
    make_network: MakeNetwork, random_pixels: RandomPixels, backbone: str, in_channels: int
) -> None:
    network = make_network(backbone=backbone, in_channels=in_channels, stages=1)
    with torch.no_grad():
        assert network(random_pixels(1, in_channels, 32, 64)).shape == (1, 5, 32, 64)


def test_training_mode_gives_both_branches_and_eval_mode_the_dynamic_one(
    make_network: MakeNetwork, random_pixels: RandomPixels
) -> None:
    network, pixels = make_network(), random_pixels(2, 3, 64, 64)
    with torch.no_grad():
        logits = network(pixels)
        output = network.train()(pixels)
    assert isinstance(logits, Tensor)
    assert isinstance(output, TrainingOutput)
    torch.testing.assert_close(logits, output.logits, atol=1e-6, rtol=1e-5)
    assert output.dynamic_dictionary.shape == (2, 5, 32)
    assert not torch.allclose(output.logits, output.static_logits)


def test_both_branches_share_the_decoder(make_network: MakeNetwork, random_pixels: RandomPixels) -> None:
    network, pixels = make_network().train(), random_pixels(2, 3, 64, 64)
    with torch.no_grad():
        output = network(pixels)
        features, deepest = network.encoder(pixels)
        static, dynamic, _ = network.dictionary(deepest)
        torch.testing.assert_close(output.logits, network.decoder(dynamic, features))
        torch.testing.assert_close(output.static_logits, network.decoder(torch.stack([static] * 2), features))


def test_every_parameter_learns_in_training(make_network: MakeNetwork, random_pixels: RandomPixels) -> None:
    network = make_network().train()
    output = network(random_pixels(2, 3, 64, 64))
    (output.logits.square().mean() + output.static_logits.square().mean()).backward()
    without = [name for name, value in network.named_parameters() if value.grad is None or not value.grad.any()]
    assert without == []


def test_bfloat16_stays_close_to_float32(make_network: MakeNetwork, random_pixels: RandomPixels) -> None:
    network, pixels = make_network(), random_pixels(2, 3, 64, 64)
    with torch.inference_mode():
        exact = network(pixels)
        with autocast(torch.device("cpu"), torch.bfloat16):
            rough = network(pixels)
    assert rough.dtype == torch.bfloat16
    assert (rough - exact).square().mean().sqrt() < 0.02 * exact.std()


@pytest.mark.parametrize("backbone", ["convnext_atto", "mobilenetv3_small_050", "tf_efficientnet_lite0"])
def test_network_in_float64_stays_close_to_float32(
    make_network: MakeNetwork, random_pixels: RandomPixels, backbone: str
) -> None:
    network, pixels = make_network(backbone=backbone), random_pixels(1, 3, 32, 64)
    with torch.inference_mode():
        single = network(pixels)
        double = network.double()(pixels.double())
    assert double.dtype == torch.float64
    torch.testing.assert_close(single.double(), double, atol=1e-4, rtol=1e-4)


def test_autocast_to_float32_changes_nothing(make_network: MakeNetwork, random_pixels: RandomPixels) -> None:
    network, pixels = make_network(), random_pixels(1, 3, 32, 32)
    with torch.inference_mode():
        exact = network(pixels)
        with autocast(torch.device("cpu"), torch.float32):
            assert torch.equal(network(pixels), exact)


# Configuration


def test_config_comes_back_from_its_dict() -> None:
    config = D2LSConfig(backbone="resnet18", num_classes=4, embed_dim=64, stages=2, reduction=8, in_channels=5)
    assert D2LSConfig.from_dict(config.to_dict()) == config
    assert D2LSConfig.from_dict({"backbone": "resnet18", "num_classes": 4}) == D2LSConfig(
        backbone="resnet18", num_classes=4, embed_dim=256, stages=3, reduction=4, in_channels=3
    )


def test_config_is_frozen() -> None:
    config = D2LSConfig(backbone="resnet18", num_classes=4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.stages = 4  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_classes": 0}, "num_classes must be a whole number of at least 1, got 0"),
        ({"num_classes": True}, "num_classes .* got True"),
        ({"num_classes": 3.0}, r"num_classes .* got 3\.0"),
        ({"num_classes": "3"}, "num_classes .* got '3'"),
        ({"num_classes": None}, "num_classes .* got None"),
        ({"stages": 0}, "stages"),
        ({"reduction": -1}, "reduction .* got -1"),
        ({"in_channels": 0}, "in_channels"),
        ({"embed_dim": 40}, "embed_dim must be a multiple of 16, got 40; try"),
        ({"embed_dim": float("nan")}, "embed_dim .* got nan"),
        ({"backbone": ""}, "backbone"),
        ({"backbone": 3}, "backbone .* got 3"),
        ({"widht": 3}, "unknown keys .*: widht"),
    ],
)
def test_config_names_the_value_that_makes_no_sense(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        D2LSConfig.from_dict({"backbone": "resnet18", "num_classes": 4, **changes})


def test_config_names_missing_keys() -> None:
    with pytest.raises(UsageError, match=r"missing keys .*: backbone, num_classes"):
        D2LSConfig.from_dict({"stages": 3})


# Weights in and out


@pytest.fixture
def state(make_network: MakeNetwork) -> dict[str, Tensor]:
    network = make_network(backbone="mobilenetv3_small_050", stages=1)
    return {key: value.clone() for key, value in weights_of(network).items()}


@pytest.fixture
def blank(make_network: MakeNetwork) -> D2LS:
    network = make_network(backbone="mobilenetv3_small_050", stages=1)
    with torch.no_grad():
        for value in weights_of(network).values():
            value.fill_(0.25)
    return network


def test_weights_come_back(state: dict[str, Tensor], blank: D2LS) -> None:
    load_weights(blank, state)
    got = weights_of(blank)
    assert got.keys() == state.keys()
    assert all(torch.equal(got[key], state[key]) for key in state)


def test_weights_are_all_that_inference_reads(make_network: MakeNetwork) -> None:
    network = make_network(backbone="mobilenetv3_small_050")
    left_out = set(network.state_dict()) - set(weights_of(network))
    assert left_out
    assert all(key.endswith(".num_batches_tracked") for key in left_out)
    assert "decoder.position.gaussian" in weights_of(network)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_any_precision_load_as_float32(state: dict[str, Tensor], blank: D2LS, dtype: torch.dtype) -> None:
    load_weights(blank, {key: value.to(dtype) for key, value in state.items()})
    for key, value in weights_of(blank).items():
        assert value.dtype == torch.float32
        assert torch.equal(value, state[key].to(dtype).float()), key


STATIC, GAUSSIAN, RUNNING = (
    "dictionary.static",
    "decoder.position.gaussian",
    "encoder.backbone.bn1.running_var",
)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({STATIC: None, GAUSSIAN: None}, f"missing {GAUSSIAN}, {STATIC}"),
        ({RUNNING: None}, f"missing {RUNNING}"),
        ({"head.weight": torch.zeros(1)}, "left over head.weight"),
        ({STATIC: torch.zeros(4, 32)}, rf"{STATIC} has shape \(4, 32\), not \(5, 32\)"),
        ({STATIC: torch.zeros(5, 32).index_fill(0, torch.tensor(2), torch.nan)}, f"{STATIC} .*not finite"),
        ({STATIC: torch.full((5, 32), torch.inf)}, f"{STATIC} .*not finite"),
        ({STATIC: torch.zeros(5, 32, dtype=torch.int64)}, STATIC),
        ({STATIC: torch.zeros(5, 32, dtype=torch.bool)}, STATIC),
        ({STATIC: torch.zeros(5, 32, dtype=torch.complex64)}, STATIC),
    ],
)
def test_weights_that_do_not_fit_are_named_and_nothing_is_loaded(
    state: dict[str, Tensor], blank: D2LS, changes: dict[str, Tensor | None], message: str
) -> None:
    changed = {key: value for key, value in {**state, **changes}.items() if value is not None}
    with pytest.raises(WeightsError, match=message):
        load_weights(blank, changed)
    assert all((value == 0.25).all() for value in weights_of(blank).values())


def test_all_problems_of_the_weights_are_told_at_once(state: dict[str, Tensor], blank: D2LS) -> None:
    del state[GAUSSIAN]
    state["extra"] = torch.zeros(1)
    state[STATIC] = torch.zeros(1, 32)
    with pytest.raises(WeightsError) as caught:
        load_weights(blank, state)
    assert all(part in str(caught.value) for part in (GAUSSIAN, "extra", STATIC))


def test_values_that_only_float64_can_hold_are_refused(state: dict[str, Tensor], blank: D2LS) -> None:
    state[STATIC] = torch.full((5, 32), 1e300, dtype=torch.float64)
    with pytest.raises(WeightsError, match=STATIC):
        load_weights(blank, state)
