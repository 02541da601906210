"""The inference form against the network it is made of: equal logits, nothing of the network touched."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from d2ls_infer.nn import D2LS, FoldedD2LS, fold, inference_form
from d2ls_infer.nn.folded import Unfolded
from d2ls_infer.nn.folded_backbone import PiecewiseBlock

MakeNetwork = Callable[..., D2LS]
Liven = Callable[..., D2LS]
RandomPixels = Callable[..., Tensor]

LITE = "tf_efficientnet_lite0"
CONVNEXT = "convnext_tiny"  # the smallest with linear layers; convnext_atto has convolutions in their place
BACKBONES = ("convnext_atto", LITE, "resnet18", "mobilenetv3_small_050")


def assert_close(found: Tensor, expected: Tensor) -> None:
    """To float32's rounding: a bias, a scale or a channel out of place is off by more than the logits' spread."""
    assert found.shape == expected.shape
    assert found.dtype == torch.float32
    assert expected.std() > 1e-2, "logits that are all alike would say nothing"
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("num_classes", [1, 2, 7])
def test_folded_logits_are_the_networks(
    liven: Liven, make_network: MakeNetwork, random_pixels: RandomPixels, backbone: str, stages: int, num_classes: int
) -> None:
    network = liven(make_network(backbone=backbone, stages=stages, num_classes=num_classes))
    pixels = random_pixels(1, 3, 64, 96)
    assert_close(fold(network)(pixels), network(pixels))


@torch.no_grad()
@pytest.mark.parametrize("backbone", ["convnext_atto", LITE])
@pytest.mark.parametrize("size", [(1, 1), (7, 45), (33, 65), (100, 31), (160, 32)])
@pytest.mark.parametrize("batch", [1, 3])
def test_folded_logits_are_the_networks_at_any_size(
    liven: Liven,
    make_network: MakeNetwork,
    random_pixels: RandomPixels,
    backbone: str,
    size: tuple[int, int],
    batch: int,
) -> None:
    network = liven(make_network(backbone=backbone))
    pixels = random_pixels(batch, 3, *size)
    assert_close(fold(network)(pixels), network(pixels))


@torch.no_grad()
def test_folded_logits_are_the_networks_at_the_width_of_the_paper(
    liven: Liven, make_network: MakeNetwork, random_pixels: RandomPixels
) -> None:
    network = liven(make_network(backbone=CONVNEXT, embed_dim=256, stages=3, reduction=3, in_channels=4))
    pixels = random_pixels(1, 4, 64, 64)
    folded = fold(network)
    assert sum(isinstance(module, PiecewiseBlock) for module in folded.modules()) == 18
    assert_close(folded(pixels), network(pixels))


@torch.no_grad()
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_layout_of_the_pixels_does_not_matter(
    liven: Liven, make_network: MakeNetwork, random_pixels: RandomPixels, layout: torch.memory_format
) -> None:
    network = liven(make_network())
    pixels = random_pixels(2, 3, 64, 64).contiguous(memory_format=layout)
    assert_close(fold(network)(pixels), network(pixels))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_image_does_not_depend_on_the_rest_of_its_batch(
    liven: Liven, make_network: MakeNetwork, random_pixels: RandomPixels, dtype: torch.dtype
) -> None:
    folded = fold(liven(make_network()), dtype)
    pixels = random_pixels(3, 3, 64, 45)
    together = folded(pixels)
    apart = torch.cat([folded(image[None]) for image in pixels])
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(together, apart, rtol=0, atol=tolerance * float(apart.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backbone", ["convnext_atto", LITE])
def test_products_in_half_precision_are_nearly_the_same(
    liven: Liven, make_network: MakeNetwork, random_pixels: RandomPixels, backbone: str, dtype: torch.dtype
) -> None:
    network = liven(make_network(backbone=backbone))
    pixels = random_pixels(1, 3, 64, 64)
    found, expected = fold(network, dtype)(pixels), network(pixels)
    assert found.dtype == torch.float32
    assert 0 < (found - expected).abs().max() < 0.1 * expected.abs().max()


def test_depth_wise_backbones_keep_their_weights_in_float32(make_network: MakeNetwork) -> None:
    kept = {value.dtype for value in fold(make_network(backbone=LITE), torch.bfloat16).encoder.parameters()}
    cast = fold(make_network(), torch.bfloat16).encoder
    assert kept == {torch.float32}
    assert {m.weight.dtype for m in cast.modules() if isinstance(m, nn.Conv2d | nn.Linear)} == {torch.bfloat16}


@pytest.mark.parametrize("backbone", ["convnext_atto", LITE])
@pytest.mark.parametrize("training", [False, True])
def test_the_network_stays_as_it_is(
    liven: Liven, make_network: MakeNetwork, random_pixels: RandomPixels, backbone: str, training: bool
) -> None:
    network = liven(make_network(backbone=backbone)).train(training)
    before = copy.deepcopy(network.state_dict())
    layout = {name: value.stride() for name, value in network.named_parameters()}
    folded = fold(network, torch.bfloat16)
    folded(random_pixels(1, 3, 32, 32))
    after = network.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert {name: value.stride() for name, value in network.named_parameters()} == layout
    assert all(value.requires_grad for value in network.parameters())
    assert all(module.training == training for module in network.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    theirs = {value.data_ptr() for value in network.state_dict().values() if value.numel()}
    assert not theirs & {value.data_ptr() for value in folded.state_dict().values() if value.numel()}


def test_nothing_in_it_learns_or_changes_with_use(
    liven: Liven, make_network: MakeNetwork, random_pixels: RandomPixels
) -> None:
    folded = fold(liven(make_network(backbone=LITE)))
    before = copy.deepcopy(folded.state_dict())
    pixels = random_pixels(2, 3, 64, 64)
    given = pixels.clone()
    first = folded(pixels)
    assert torch.equal(folded(pixels), first)
    assert torch.equal(pixels, given)
    assert not first.requires_grad
    assert not any(value.requires_grad for value in folded.parameters())
    assert not any(module.training for module in folded.modules())
    assert all(torch.equal(value, before[name]) for name, value in folded.state_dict().items())


def test_a_network_in_training_is_folded_as_it_is_in_eval_mode(
    liven: Liven, make_network: MakeNetwork, random_pixels: RandomPixels
) -> None:
    network, pixels = liven(make_network(backbone=LITE)), random_pixels(1, 3, 64, 64)
    expected = fold(network)(pixels)
    assert torch.equal(fold(network.train())(pixels), expected)


def test_it_is_smaller_than_the_network(make_network: MakeNetwork) -> None:
    def values(module: nn.Module) -> int:
        return sum(value.numel() for value in module.state_dict().values())

    for backbone in ("convnext_atto", LITE):
        network = make_network(backbone=backbone, embed_dim=256)
        assert values(fold(network)) < values(network)


# What it costs


class Widest(TorchDispatchMode):
    """The most values per item that any operation gives out."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                self.most = max(self.most, value.numel())
        return result


def test_no_tensor_is_four_times_the_width_at_stride_4(make_network: MakeNetwork, random_pixels: RandomPixels) -> None:
    """The concatenated levels, the published form's widest tensor, are of that size. The backbone is narrow here."""
    embed_dim, pixels = 256, random_pixels(1, 3, 128, 128)
    folded = fold(make_network(embed_dim=embed_dim, stages=1))
    folded(pixels)  # the positional terms are made, once
    with Widest() as widest:
        folded(pixels)
    assert widest.most == embed_dim * 32 * 32


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_accelerator_gives_nearly_the_same(
    liven: Liven, make_network: MakeNetwork, random_pixels: RandomPixels, dtype: torch.dtype
) -> None:
    network, pixels = liven(make_network()), random_pixels(1, 3, 64, 64)
    folded: FoldedD2LS = fold(network, dtype)
    expected = fold(network)(pixels)
    folded(pixels)  # positional terms on the CPU, which must not be taken for those elsewhere
    device = torch.accelerator.current_accelerator()
    found = folded.to(device)(pixels.to(device)).cpu()
    torch.testing.assert_close(found, expected, rtol=0, atol=0.1 * float(expected.abs().max()))


class Doubled(D2LS):
    """Another network, made of this one."""

    def forward(self, pixels: Tensor) -> Any:
        return 2 * super().forward(pixels)  # type: ignore[operator]


class Uniform(nn.Module):
    """A modulator that looks at nothing."""

    def forward(self, deepest: Tensor) -> Tensor:
        return torch.full((len(deepest), 4, 4), 0.25)


@pytest.mark.parametrize("changed", ["class", "modulator", "decoder"])
def test_what_folding_does_not_know_runs_as_it_is(
    make_network: MakeNetwork, random_pixels: RandomPixels, changed: str
) -> None:
    network = make_network(num_classes=4).train()
    if changed == "class":
        network.__class__ = Doubled
    elif changed == "modulator":
        network.dictionary.modulator = Uniform()
    else:
        network.decoder.__class__ = type("Other", (type(network.decoder),), {})
    pixels = random_pixels(2, 3, 64, 64)
    form = inference_form(network, torch.float32)
    assert isinstance(form, Unfolded)
    torch.testing.assert_close(form(pixels), network.eval()(pixels))
    assert inference_form(form, torch.float32) is form


def test_the_network_itself_is_folded_once(make_network: MakeNetwork) -> None:
    form = inference_form(make_network(), torch.float32)
    assert isinstance(form, FoldedD2LS)
    assert inference_form(form, torch.float32) is form


@torch.no_grad()
def embeddings_of(network: D2LS, pixels: Tensor) -> Tensor:
    """(B, L + 2, N, C'): what the network's own parts give as they run."""
    found: list[Tensor] = []
    norms = [*(block.norm_dictionary for block in network.decoder.blocks), network.decoder.final_norm]
    handles = [network.dictionary.register_forward_hook(lambda module, inputs, output: found.append(output[1]))]
    handles += [norm.register_forward_hook(lambda module, inputs, output: found.append(output)) for norm in norms]
    network(pixels)
    for handle in handles:
        handle.remove()
    return torch.stack(found, 1)


@torch.no_grad()
@pytest.mark.parametrize("stages", [1, 3])
def test_embeddings_are_those_of_the_network_after_each_step(
    liven: Liven, make_network: MakeNetwork, random_pixels: RandomPixels, stages: int
) -> None:
    network = liven(make_network(backbone=LITE, stages=stages, num_classes=4)).eval()
    pixels = random_pixels(2, 3, 96, 64)
    assert_close(fold(network).embeddings(pixels), embeddings_of(network, pixels))


@torch.no_grad()
@pytest.mark.parametrize("stages", [1, 3])
def test_given_embeddings_answer_pixels_that_lie_nowhere(
    liven: Liven, make_network: MakeNetwork, random_pixels: RandomPixels, stages: int
) -> None:
    network = liven(make_network(backbone=LITE, stages=stages, num_classes=4)).eval()
    pixels = random_pixels(2, 3, 96, 64)
    given = embeddings_of(network, random_pixels(1, 3, 64, 64))[0]

    features, _ = network.encoder(pixels)
    image = features.flatten(2).transpose(1, 2)
    nowhere = torch.zeros(image.shape[1:])
    dictionary, *tokens, last = (each.expand(2, -1, -1) for each in given)
    for block, latest in zip(network.decoder.blocks, tokens, strict=True):
        attention = block.image_queries_dictionary
        image = block.norm_image(attention.image_queries_tokens(image, nowhere, latest + dictionary, latest))
    expected = network.decoder.upsampler(image, network.decoder.dictionary_head(last), *features.shape[-2:])

    assert_close(fold(network)(pixels, given), expected)


@torch.no_grad()
def test_by_given_embeddings_a_pixel_does_not_know_the_rest_of_its_tile(
    liven: Liven, make_network: MakeNetwork, random_pixels: RandomPixels
) -> None:
    """Far from where two tiles differ, and from their edges, their logits are the same; by their own they are not."""
    network = fold(liven(make_network(backbone="convnext_atto", num_classes=4, stages=3)))
    one = random_pixels(1, 3, 64, 1024)
    other = one.clone()
    other[..., :32] = random_pixels(1, 3, 64, 32)
    far = (..., slice(768, None))
    given = network.embeddings(one)[0]
    assert (network(one) - network(other))[far].abs().max() > 1e-4
    torch.testing.assert_close(network(one, given)[far], network(other, given)[far], rtol=0, atol=1e-4)


def test_images_that_share_a_dictionary_are_answered_by_the_mean(
    liven: Liven, make_network: MakeNetwork, random_pixels: RandomPixels
) -> None:
    network = liven(make_network(backbone=LITE, num_classes=4, stages=1)).eval()
    pixels = random_pixels(2, 3, 64, 64)
    with torch.no_grad():
        alone = network(pixels[:1], shared=True)
        twice = network(torch.cat((pixels[:1], pixels[:1])), shared=True)
        both = network(pixels, shared=True)
    assert_close(twice[:1], alone)
    assert (both[:1] - alone).abs().max() > 1e-3
