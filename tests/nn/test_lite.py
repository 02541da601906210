"""EfficientNet-Lite of our own against timm's: the same tensors, values and gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn

from d2ls_infer.nn.encoder import STRIDES, Encoder, create_backbone
from d2ls_infer.nn.lite import VARIANTS, EfficientNetLite

Liven = Callable[[nn.Module], nn.Module]
RandomPixels = Callable[..., Tensor]


def both(name: str, bands: int, liven: Liven) -> tuple[EfficientNetLite, nn.Module]:
    """Ours and timm's, by the same weights and statistics."""
    torch.manual_seed(0)
    theirs = liven(timm.create_model(name, features_only=True, in_chans=bands, out_indices=(1, 2, 3, 4)))
    ours = EfficientNetLite(name, bands)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("name", VARIANTS)
def test_features_and_gradients_are_those_of_timm(liven: Liven, random_pixels: RandomPixels, name: str) -> None:
    ours, theirs = both(name, 4, liven)
    assert list(ours.state_dict()) == list(theirs.state_dict())  # also their order, which optimisers keep
    pixels = random_pixels(2, 4, 64, 96)
    with torch.no_grad():
        for found, expected in zip(ours.eval()(pixels), theirs.eval()(pixels), strict=True):
            assert torch.equal(found, expected)
    for network in (ours, theirs):
        sum(level.square().mean() for level in network.train()(pixels)).backward()  # type: ignore[union-attr]
    for (key, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert mine.grad is not None
        assert other.grad is not None
        scale = float(other.grad.abs().max())
        torch.testing.assert_close(mine.grad, other.grad, rtol=0, atol=1e-4 * scale, msg=key)


@pytest.mark.parametrize("name", VARIANTS)
def test_widths_are_those_of_the_features(random_pixels: RandomPixels, name: str) -> None:
    encoder = Encoder(name, 32).eval()
    assert isinstance(encoder.backbone, EfficientNetLite)
    with torch.inference_mode():
        levels = encoder.backbone_features(random_pixels(1, 3, 64, 32))
    assert encoder.channels == tuple(level.shape[1] for level in levels)
    assert [level.shape[-2:] for level in levels] == [(64 // stride, 32 // stride) for stride in STRIDES]


def test_random_weights_begin_as_those_of_timm() -> None:
    torch.manual_seed(0)
    theirs = timm.create_model("tf_efficientnet_lite0", features_only=True)
    ours = EfficientNetLite("tf_efficientnet_lite0", 3)
    for (key, mine), other in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        if mine.dim() < 4:
            assert torch.equal(mine, other), key
        else:  # drawn at random
            assert mine.std().item() == pytest.approx(other.std().item(), rel=0.25), key
            assert abs(mine.mean().item()) < 0.25 * mine.std().item(), key


@pytest.mark.parametrize("name", VARIANTS)
def test_turned_features_are_the_same(liven: Liven, random_pixels: RandomPixels, name: str) -> None:
    network, _ = both(name, 3, liven)
    network.eval().double()
    pixels = random_pixels(2, 3, 96, 32).double()
    with torch.no_grad():
        expected = network(pixels)
        network.turn()
        torch.testing.assert_close(network(pixels), expected, atol=1e-9, rtol=1e-9)


def test_a_turned_network_pads_no_tensor(random_pixels: RandomPixels) -> None:
    network = EfficientNetLite("tf_efficientnet_lite0", 3).eval()
    pixels = random_pixels(1, 3, 64, 64)

    def padded() -> int:
        with torch.no_grad(), torch.profiler.profile() as profile:
            network(pixels)
        return sum(event.count for event in profile.key_averages() if event.key == "aten::constant_pad_nd")

    assert padded() == 5
    network.turn()
    assert padded() == 0


def test_other_names_are_timms() -> None:
    assert not isinstance(create_backbone("efficientnet_lite0", in_channels=3, pretrained=False), EfficientNetLite)
