"""The encoder: every backbone of the paper, and the fold of mapping and aggregator against the plain form."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2ls_infer.errors import UsageError
from d2ls_infer.nn.encoder import Encoder, create_backbone

RandomPixels = Callable[..., Tensor]

BACKBONES = {
    "convnext_tiny": (96, 192, 384, 768),
    "convnext_small": (96, 192, 384, 768),
    "convnext_base": (128, 256, 512, 1024),
    "swin_base_patch4_window7_224": (128, 256, 512, 1024),
    "swinv2_base_window8_256": (128, 256, 512, 1024),
    "mobilenetv3_large_100": (24, 40, 112, 960),
    "tf_efficientnetv2_m": (48, 80, 176, 512),
    "resnet101": (256, 512, 1024, 2048),
    "tf_efficientnet_lite0": (24, 40, 112, 320),
    "tf_efficientnet_lite2": (24, 48, 120, 352),
}


@pytest.mark.parametrize("name", BACKBONES)
def test_backbone_gives_four_levels_at_any_size(random_pixels: RandomPixels, name: str) -> None:
    torch.manual_seed(0)
    encoder = Encoder(name, 32).eval()
    assert encoder.channels == BACKBONES[name]
    with torch.inference_mode():
        for height, width in ((64, 96), (160, 32)):
            pixels = random_pixels(1, 3, height, width)
            levels = encoder.backbone_features(pixels)
            features, deepest = encoder(pixels)
            for level, channels, stride in zip(levels, BACKBONES[name], (4, 8, 16, 32), strict=True):
                assert level.shape == (1, channels, height // stride, width // stride)
            assert features.shape == (1, 32, height // 4, width // 4)
            assert torch.equal(deepest, levels[-1])
            assert features.isfinite().all()


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"])
def test_features_do_not_depend_on_the_size_that_came_before(random_pixels: RandomPixels, name: str) -> None:
    # Windowed attention could keep masks of the last size.
    torch.manual_seed(0)
    encoder = Encoder(name, 32).eval()
    pixels = random_pixels(1, 3, 64, 96)
    with torch.inference_mode():
        first = encoder(pixels)[0]
        encoder(random_pixels(1, 3, 320, 288))
        assert torch.equal(encoder(pixels)[0], first)


@pytest.mark.parametrize("name", ["convnext_atto", "resnet18", "swin_tiny_patch4_window7_224"])
def test_folded_form_equals_mapping_resizing_concatenation_and_aggregator(
    random_pixels: RandomPixels, name: str
) -> None:
    torch.manual_seed(0)
    encoder = Encoder(name, 32).eval().double()
    pixels = random_pixels(2, 3, 64, 96).double()
    with torch.no_grad():
        levels = encoder.backbone_features(pixels)
        mapped = []
        for level, mapping in zip(levels, encoder.mapping, strict=True):
            assert isinstance(mapping, nn.Conv2d)
            plain = level.permute(0, 2, 3, 1) @ mapping.weight[:, :, 0, 0].T + mapping.bias  # (B, h, w, C')
            mapped.append(F.interpolate(plain.permute(0, 3, 1, 2), (16, 24), mode="bilinear", align_corners=False))
        stacked = torch.cat(mapped[::-1], dim=1)  # level 4, 3, 2, 1
        expected = torch.einsum("oi,bihw->bohw", encoder.aggregator.weight[:, :, 0, 0], stacked)
        torch.testing.assert_close(encoder(pixels)[0], expected, atol=1e-10, rtol=1e-8)


def test_fold_keeps_the_gradients_of_the_plain_form(random_pixels: RandomPixels) -> None:
    torch.manual_seed(0)
    encoder = Encoder("convnext_atto", 32).double()
    pixels = random_pixels(1, 3, 32, 64).double()
    encoder(pixels)[0].square().sum().backward()
    folded = {name: value.grad for name, value in encoder.named_parameters()}
    encoder.zero_grad()
    mapped = [mapping(level) for level, mapping in zip(encoder.backbone_features(pixels), encoder.mapping, strict=True)]
    resized = [F.interpolate(level, (8, 16), mode="bilinear", align_corners=False) for level in mapped]
    encoder.aggregator(torch.cat(resized[::-1], dim=1)).square().sum().backward()
    for name, value in encoder.named_parameters():
        torch.testing.assert_close(value.grad, folded[name], atol=1e-9, rtol=1e-6, msg=name)


def test_aggregator_has_no_bias_and_the_mapping_has() -> None:
    encoder = Encoder("mobilenetv3_small_050", 32)
    assert encoder.aggregator.bias is None
    assert all(mapping.bias is not None for mapping in encoder.mapping)


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "tf_efficientnet_lite0"])
def test_depth_wise_backbones_stay_in_float32_on_a_cpu(random_pixels: RandomPixels, name: str) -> None:
    torch.manual_seed(0)
    encoder = Encoder(name, 32).eval()
    pixels = random_pixels(1, 3, 32, 32)
    with torch.inference_mode():
        exact = encoder.backbone_features(pixels)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            kept = encoder.backbone_features(pixels)
            features, _ = encoder(pixels)
    assert all(torch.equal(a, b) for a, b in zip(kept, exact, strict=True))
    assert features.dtype == torch.bfloat16


def test_other_backbones_run_in_bfloat16_under_autocast(random_pixels: RandomPixels) -> None:
    encoder = Encoder("resnet18", 32).eval()
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert {level.dtype for level in encoder.backbone_features(random_pixels(1, 3, 32, 32))} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("convnext_enormous", "unknown backbone 'convnext_enormous'"),
        ("hf-hub:somebody/something", "unknown backbone"),
        ("vit_tiny_patch16_224", r"strides \[16, 16, 16\], but \[4, 8, 16, 32\]"),
        ("levit_128", "strides"),
    ],
)
def test_backbone_without_the_four_strides_is_refused(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        create_backbone(name, in_channels=3, pretrained=False)
