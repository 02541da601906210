"""What of a backbone is folded, and what is left as it is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from timm.models.convnext import ConvNeXtBlock
from torch import Tensor, nn

from d2ls_infer.nn.encoder import create_backbone
from d2ls_infer.nn.folded_backbone import PiecewiseBlock, folded_backbone, with_folded_norms

Liven = Callable[[nn.Module], nn.Module]
RandomPixels = Callable[..., Tensor]


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["tf_efficientnet_lite2", "resnet101", "tf_efficientnetv2_b0", "mobilenetv3_large_100"]
)
def test_all_batch_norms_are_folded(liven: Liven, random_pixels: RandomPixels, name: str) -> None:
    torch.manual_seed(0)
    backbone = liven(create_backbone(name, in_channels=3, pretrained=False)).eval()
    folded = with_folded_norms(backbone, 3)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    pixels = random_pixels(1, 3, 64, 32)
    for found, expected in zip(folded(pixels), backbone(pixels), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


class Forked(nn.Module):
    """A convolution that its norm shares with another reader."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.norm.weight.data.fill_(3)

    def forward(self, pixels: Tensor) -> list[Tensor]:
        x = self.convolution(pixels)
        return [self.norm(x) + x]


@torch.no_grad()
def test_a_convolution_that_others_read_too_is_left_alone(random_pixels: RandomPixels) -> None:
    backbone = Forked().eval()
    assert with_folded_norms(backbone, 3) is backbone
    assert isinstance(backbone.norm, nn.BatchNorm2d)


@torch.no_grad()
@pytest.mark.parametrize("after_another", [True, False])
@pytest.mark.parametrize("values", [1, 4 * 32, 1 << 30])  # pieces of one pixel, of four, of all
def test_block_by_pieces_is_the_block(
    random_pixels: RandomPixels, monkeypatch: pytest.MonkeyPatch, values: int, after_another: bool
) -> None:
    block = ConvNeXtBlock(8, 8, ls_init_value=0.5).eval()
    x = random_pixels(2, 8, 5, 7).contiguous(memory_format=torch.channels_last)
    expected = block(x)
    monkeypatch.setattr("d2ls_infer.nn.folded_backbone.PIECE_VALUES", values)
    found = PiecewiseBlock(block, after_another=after_another)(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (found.data_ptr() == x.data_ptr()) == after_another


@torch.no_grad()
def test_only_a_blocks_own_successor_takes_its_memory() -> None:
    backbone = folded_backbone(create_backbone("convnext_tiny", in_channels=3, pretrained=False).eval(), 3, None)
    blocks = {name: module for name, module in backbone.named_modules() if isinstance(module, PiecewiseBlock)}
    assert len(blocks) == 18
    assert all(block.after_another == (not name.endswith("blocks.0")) for name, block in blocks.items())
