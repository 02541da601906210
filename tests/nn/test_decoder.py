"""The decoder's parts, each against a plain form written out from the paper."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2ls_infer.nn.decoder import Attention, Decoder, InteractionBlock, PositionalEncoding, Upsampler

WIDTH, HEADS = 32, 8


def random(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain_attention(layer: Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Head by head and image by image, with the softmax written out."""
    q, k, v = layer.q(query), layer.k(key), layer.v(value)
    width = WIDTH // 2 // HEADS
    images = []
    for b in range(len(q)):
        heads = []
        for head in range(HEADS):
            part = slice(head * width, (head + 1) * width)
            scores = q[b, :, part] @ k[b, :, part].T / math.sqrt(width)
            weights = scores.exp() / scores.exp().sum(1, keepdim=True)
            heads.append(weights @ v[b, :, part])
        images.append(torch.cat(heads, dim=1))
    update: Tensor = layer.out(torch.stack(images))
    return update


def plain_norm(layer: nn.LayerNorm, x: Tensor, eps: float) -> Tensor:
    center = x - x.mean(-1, keepdim=True)
    return center / (center.square().mean(-1, keepdim=True) + eps).sqrt() * layer.weight + layer.bias


def plain_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def plain_shuffle(x: Tensor) -> Tensor:
    """out[c, 2y + i, 2x + j] = in[4c + 2i + j, y, x]."""
    batch, channels, height, width = x.shape
    out = x.new_empty(batch, channels // 4, 2 * height, 2 * width)
    for i in range(2):
        for j in range(2):
            out[:, :, i::2, j::2] = x[:, 2 * i + j :: 4]
    return out


def plain_upsampling(layer: Upsampler, image: Tensor) -> Tensor:
    """(B, C', h, w) -> (B, C'/16, 4h, 4w), pixel by pixel as Eq. 16 has it."""
    x = plain_norm(layer.norm, plain_shuffle(image).permute(0, 2, 3, 1), 1e-6)
    return plain_gelu(plain_shuffle(plain_gelu(x).permute(0, 3, 1, 2)))


def assert_same_with_gradients(layer: nn.Module, got: Tensor, expected: Tensor, *inputs: Tensor) -> None:
    """Two ways to the same values are also the same to learn from."""
    torch.testing.assert_close(got, expected)
    weigh = random(*got.shape, seed=77)
    leaves = [*inputs, *layer.parameters()]
    for ours, plain in zip(
        torch.autograd.grad((got * weigh).sum(), leaves, allow_unused=True),
        torch.autograd.grad((expected * weigh).sum(), leaves, allow_unused=True),
        strict=True,
    ):
        assert ours is not None
        assert plain is not None
        torch.testing.assert_close(ours, plain)


def randomise_norms(module: nn.Module) -> None:
    # Fresh norms have gain 1 and offset 0, which would hide that one is left out.
    for index, layer in enumerate(module.modules()):
        if isinstance(layer, nn.LayerNorm):
            with torch.no_grad():
                layer.weight.copy_(1 + 0.3 * random(*layer.weight.shape, seed=index))
                layer.bias.copy_(0.3 * random(*layer.bias.shape, seed=100 + index))


@pytest.mark.parametrize("pixels", [1, 9])
@pytest.mark.parametrize("tokens", [1, 4])
def test_attention_of_tokens_is_the_softmax_of_scaled_products(tokens: int, pixels: int) -> None:
    torch.manual_seed(0)
    layer = Attention(WIDTH).double()
    query = random(2, tokens, WIDTH).requires_grad_()
    image = (3 * random(2, pixels, WIDTH, seed=4)).requires_grad_()
    position = random(pixels, WIDTH, seed=5).requires_grad_()
    got = layer.tokens_query_image(query, image, position)
    expected = plain_attention(layer, query, image + position, image)
    assert got.shape == (2, tokens, WIDTH)
    assert_same_with_gradients(layer, got, expected, query, image, position)


@pytest.mark.parametrize("pixels", [1, 9])
@pytest.mark.parametrize("tokens", [1, 4])
def test_attention_of_the_image_is_added_to_it(tokens: int, pixels: int) -> None:
    torch.manual_seed(0)
    layer = Attention(WIDTH).double()
    image = (3 * random(2, pixels, WIDTH)).requires_grad_()
    position = random(pixels, WIDTH, seed=4).requires_grad_()
    key, value = (random(2, tokens, WIDTH, seed=seed).requires_grad_() for seed in (5, 6))
    got = layer.image_queries_tokens(image, position, key, value)
    expected = image + plain_attention(layer, image + position, key, value)
    assert got.shape == (2, pixels, WIDTH)
    assert_same_with_gradients(layer, got, expected, image, position, key, value)


@torch.no_grad()
def test_attention_of_large_scores_is_finite_in_float32() -> None:
    torch.manual_seed(0)
    layer = Attention(WIDTH)
    query, image, position = (300 * random(1, 3, WIDTH, seed=seed).float() for seed in range(3))
    assert layer.tokens_query_image(query, image, position[0]).isfinite().all()
    assert layer.image_queries_tokens(image, position[0], query, query).isfinite().all()


def test_attention_is_half_as_wide_inside_and_has_biases() -> None:
    layer = Attention(WIDTH)
    for part in (layer.q, layer.k, layer.v):
        assert part.weight.shape == (WIDTH // 2, WIDTH)
        assert part.bias is not None
    assert layer.out.weight.shape == (WIDTH, WIDTH // 2)
    assert layer.out.bias is not None


@torch.no_grad()
def test_block_updates_the_dictionary_first_and_then_the_image() -> None:
    torch.manual_seed(0)
    block = InteractionBlock(WIDTH).double()
    randomise_norms(block)
    tokens, image, token_position = random(2, 4, WIDTH), random(2, 6, WIDTH, seed=4), random(2, 4, WIDTH, seed=5)
    position = random(6, WIDTH, seed=6)
    placed = image + position[None]
    new_tokens = plain_norm(
        block.norm_dictionary,
        tokens + plain_attention(block.dictionary_queries_image, tokens + token_position, placed, image),
        1e-5,
    )
    new_image = plain_norm(
        block.norm_image,
        image + plain_attention(block.image_queries_dictionary, placed, new_tokens + token_position, new_tokens),
        1e-5,
    )
    got = block(tokens, image, token_position, position)
    torch.testing.assert_close(got[0], new_tokens)
    torch.testing.assert_close(got[1], new_image)


@torch.no_grad()
@pytest.mark.parametrize("stages", [1, 3])
def test_decoder_is_its_blocks_one_more_attention_and_a_product(stages: int) -> None:
    torch.manual_seed(0)
    decoder = Decoder(WIDTH, stages).double()
    randomise_norms(decoder)
    dictionary, features = random(2, 4, WIDTH), random(2, WIDTH, 3, 5, seed=4)
    position = decoder.position(3, 5).double()
    image = features.permute(0, 2, 3, 1).reshape(2, 15, WIDTH)
    tokens = dictionary
    for block in decoder.blocks:
        tokens, image = block(tokens, image, dictionary, position)
    update = plain_attention(decoder.final_attention, tokens + dictionary, image + position, image)
    tokens = plain_norm(decoder.final_norm, tokens + update, 1e-5)
    for index in (0, 2):
        tokens = decoder.dictionary_head[index](tokens).clamp_min(0)
    tokens = decoder.dictionary_head[4](tokens)  # (B, N, C'/16)
    pixels = plain_upsampling(decoder.upsampler, image.reshape(2, 3, 5, WIDTH).permute(0, 3, 1, 2))
    expected = (tokens[:, :, :, None, None] * pixels[:, None]).sum(2)
    got = decoder(dictionary, features)
    assert got.shape == (2, 4, 12, 20)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(("height", "width"), [(3, 5), (1, 1), (4, 1)])
def test_upsampler_shuffles_norms_shuffles_and_takes_the_product_with_the_classes(height: int, width: int) -> None:
    upsampler = Upsampler(WIDTH).double()
    randomise_norms(upsampler)
    # Small values: there the norm's eps, 1e-6 and not torch's 1e-5, decides.
    image = (1e-3 * random(2, height * width, WIDTH)).requires_grad_()
    classes = random(2, 3, WIDTH // 16, seed=4).requires_grad_()
    pixels = plain_upsampling(upsampler, image.transpose(1, 2).unflatten(2, (height, width)))
    expected = torch.einsum("bnc,bchw->bnhw", classes, pixels)
    got = upsampler(image, classes, height, width)
    assert got.shape == (2, 3, 4 * height, 4 * width)
    assert_same_with_gradients(upsampler, got, expected, image, classes)


def test_plain_upsampling_is_torchs() -> None:
    """The reference of these tests against another one."""
    upsampler = Upsampler(WIDTH).double()
    randomise_norms(upsampler)
    image = random(2, WIDTH, 3, 5)
    x = upsampler.norm(F.pixel_shuffle(image, 2).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(plain_upsampling(upsampler, image), F.gelu(F.pixel_shuffle(F.gelu(x), 2)))


def test_positional_encoding_at_a_pixel_calculated_by_hand() -> None:
    encoding = PositionalEncoding(16)
    encoding.gaussian.zero_()
    encoding.gaussian[0, 0] = 1  # from x alone
    encoding.gaussian[1, 1] = 1  # from y alone
    # Row 1 of 2 and column 2 of 4: x = 2 * 2.5 / 4 - 1 = 1/4, y = 2 * 1.5 / 2 - 1 = 1/2; phases pi/2 and pi.
    pixel = encoding(2, 4)[1 * 4 + 2]
    expected = [1.0, 0.0, 0, 0, 0, 0, 0, 0, 0.0, -1.0, 1, 1, 1, 1, 1, 1]  # eight sines, then eight cosines
    torch.testing.assert_close(pixel, torch.tensor(expected), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(3, 5), (1, 1), (7, 1), (64, 48)])
def test_projected_places_are_the_product_with_the_encoding(height: int, width: int) -> None:
    encoding = PositionalEncoding(WIDTH)
    weight = random(WIDTH // 2, WIDTH).float()
    got = encoding.projected(weight, height, width)
    expected = weight.double() @ encoding(height, width).double().T
    assert got.shape == (HEADS, WIDTH // 2 // HEADS, height * width)
    torch.testing.assert_close(got.flatten(0, 1).double(), expected, atol=1e-4, rtol=0)


def test_positional_encoding_is_part_of_the_checkpoint_and_not_learnt() -> None:
    decoder = Decoder(WIDTH, 1)
    assert "position.gaussian" in decoder.state_dict()
    assert "position.gaussian" not in dict(decoder.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_positional_encoding_is_the_same_in_a_network_of_any_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    decoder = Decoder(WIDTH, 1)
    before = decoder.position(5, 7)
    after = decoder.to(dtype).position(5, 7)
    assert after.dtype == torch.float32
    assert torch.equal(after, before)


def test_positional_encoding_is_the_same_under_autocast() -> None:
    torch.manual_seed(0)
    encoding = PositionalEncoding(WIDTH)
    before = encoding(5, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = encoding(5, 7)
    assert under.dtype == torch.float32
    assert torch.equal(under, before)


@torch.no_grad()
def test_static_branch_of_one_dictionary_for_all_images_is_accepted() -> None:
    torch.manual_seed(0)
    decoder = Decoder(WIDTH, 1).double()
    dictionary, features = random(4, WIDTH), random(3, WIDTH, 2, 2)
    together = decoder(dictionary.expand(3, 4, WIDTH), features)
    apart = [decoder(dictionary[None], features[b : b + 1]) for b in range(3)]
    torch.testing.assert_close(together, torch.cat(apart))
