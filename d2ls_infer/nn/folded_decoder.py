"""The decoder as it runs: what does not depend on the pixels worked out, the rest piece by piece on a CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2ls_infer.nn.decoder import HEADS, Attention, Decoder, InteractionBlock, PositionalEncoding, Upsampler, per_head
from d2ls_infer.nn.pixelwise import at_once, convolves, pixelwise

SIZES = 3
"""The sizes whose positional terms are kept: as many as the test-time augmentation has magnifications."""

PIECE_TOKENS = 2048
"""How many tokens of an image a CPU works on at once: what is made of them is still in its cache when it is used, and
takes memory that it just had. The system clears the pages of larger tensors first, which takes longer than the work."""


class FoldedDecoder(nn.Module):
    """Dictionary (B, N, C') and E0 (B, C', h, w), both float32 -> logits (B, N, 4h, 4w) float32. E0 may change.

    `positions` holds, for the last `SIZES` sizes, the positional term of each attention in the order they run. That is
    7 C' / 2 values a token of the image with three stages: 59 MB in float32 for 512 pixels squared.
    """

    def __init__(self, decoder: Decoder, order: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype, self.position = dtype, decoder.position
        # The scores of the first attention, of features that no norm has been over yet, are in the hundreds, where a
        # bfloat16 is off by 2 and the softmax by much more. Rounded, they turn more labels than all that follows.
        first = [torch.float32] + [dtype] * len(decoder.blocks)
        self.blocks = nn.ModuleList(
            FoldedBlock(block, order, dtype, tokens_dtype)  # type: ignore[arg-type]
            for block, tokens_dtype in zip(decoder.blocks, first, strict=False)
        )
        self.final_attention = TokensQueryImage(decoder.final_attention, order, dtype)
        self.final_norm = decoder.final_norm
        self.dictionary_head = decoder.dictionary_head
        self.upsampler = FoldedUpsampler(decoder.upsampler)
        self.positions: dict[tuple[int, int, torch.device], list[Tensor]] = {}

    def forward(self, dictionary: Tensor, features: Tensor) -> Tensor:
        image, tokens = self.interact(dictionary, features)
        logits: Tensor = self.upsampler(image, self.dictionary_head(tokens[-1]), *features.shape[-2:])
        return logits

    def interact(self, dictionary: Tensor, features: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Image tokens (B, h*w, C'), and the class embeddings after each step, L + 2 of (B, N, C')."""
        positions = iter(self.positions_of(*features.shape[-2:]))
        image = ImageTokens(features, self.dtype)
        tokens = [dictionary]
        for block in self.blocks:
            tokens.append(block(tokens[-1], image, dictionary, next(positions), next(positions)))
        update = self.final_attention(tokens[-1] + dictionary, image, next(positions))
        return image.exact, [*tokens, self.final_norm(tokens[-1] + update)]

    def classify(self, embeddings: Tensor, features: Tensor) -> Tensor:
        """Logits by given class embeddings (L + 2, N, C')."""
        dictionary, *tokens, last = embeddings[:, None].expand(-1, len(features), -1, -1)
        image = ImageTokens(features, self.dtype)
        for block, latest in zip(self.blocks, tokens, strict=True):
            assert isinstance(block, FoldedBlock)
            block.answer(image, latest, dictionary, None)
        logits: Tensor = self.upsampler(image.exact, self.dictionary_head(last), *features.shape[-2:])
        return logits

    def positions_of(self, height: int, width: int) -> list[Tensor]:
        size = (height, width, self.position.gaussian.device)
        found = self.positions.pop(size, None)
        if found is None:
            attentions = (TokensQueryImage, ImageQueriesTokens)
            found = [
                module.placed(self.position, height, width)
                for module in self.modules()
                if isinstance(module, attentions)
            ]
        self.positions[size] = found  # as the latest
        while len(self.positions) > SIZES:
            del self.positions[next(iter(self.positions))]
        return found


class ImageTokens:
    """(B, C', h, w) float32 -> the image's tokens (B, h*w, C'): as they add up, `exact`, and `rounded` to a type.

    In float32 both are one. What each stage makes of them takes their place.
    """

    def __init__(self, features: Tensor, dtype: torch.dtype) -> None:
        self.exact = features.permute(0, 2, 3, 1).flatten(1, 2).contiguous()
        self.rounded = self.exact.to(dtype)

    def replace(self, image: slice, tokens: slice, new: Tensor) -> None:
        """new (B, M, C') float32: for some images some tokens."""
        if new.shape == self.exact.shape:
            self.exact, self.rounded = new, new.to(self.rounded.dtype)
            return
        self.exact[image, tokens] = new
        if self.rounded is not self.exact:
            self.rounded[image, tokens] = new


class FoldedBlock(nn.Module):
    """One stage: D queries E, then E queries D. Shapes as in `InteractionBlock`; `image` changes, new tokens come back.

    dtype: of the products of the image's queries; tokens_dtype: of the tokens'.
    """

    def __init__(self, block: InteractionBlock, order: Tensor, dtype: torch.dtype, tokens_dtype: torch.dtype) -> None:
        super().__init__()
        self.dictionary_queries_image = TokensQueryImage(block.dictionary_queries_image, order, tokens_dtype)
        self.norm_dictionary = block.norm_dictionary
        self.image_queries_dictionary = ImageQueriesTokens(block.image_queries_dictionary, order, dtype)
        self.norm_image = block.norm_image
        self.norm_image.weight.copy_(self.norm_image.weight[order])
        self.norm_image.bias.copy_(self.norm_image.bias[order])

    def forward(
        self, tokens: Tensor, image: ImageTokens, token_position: Tensor, of_tokens: Tensor, of_image: Tensor
    ) -> Tensor:
        update = self.dictionary_queries_image(tokens + token_position, image, of_tokens)
        answered: Tensor = self.norm_dictionary(tokens + update)
        self.answer(image, answered, token_position, of_image)
        return answered

    def answer(self, image: ImageTokens, tokens: Tensor, token_position: Tensor, of_image: Tensor | None) -> None:
        """The second half alone. of_image: None for pixels that lie nowhere."""
        attention = self.image_queries_dictionary
        asked = attention.asked(tokens + token_position, tokens)
        of_image = attention.nowhere if of_image is None else of_image
        for images, some in pieces(image.exact):
            place = of_image[..., some] if of_image.shape[-1] > 1 else of_image
            update = attention(piece(image.rounded, images, some), [each[images] for each in asked], place)
            image.replace(images, some, self.norm_image(piece(image.exact, images, some) + update))


def pieces(image: Tensor, width: int = 1) -> list[tuple[slice, slice]]:
    """How a CPU cuts tokens (B, M, C'): the images and the tokens of each piece, in whole rows of `width`."""
    batch, count = image.shape[:2]
    step = max(1, PIECE_TOKENS // width) * width
    if at_once(image):
        return [(slice(0, batch), slice(0, count))]
    return [
        (slice(index, index + 1), slice(start, min(start + step, count)))
        for index in range(batch)
        for start in range(0, count, step)
    ]


def piece(tokens: Tensor, images: slice, some: slice) -> Tensor:
    """Of tokens (B, M, C') those of some images. Of a single one as if there were no others: products copy it else."""
    chosen = tokens[images, some]
    return chosen[0][None] if len(chosen) == 1 else chosen


class TokensQueryImage(nn.Module):
    """`Attention.tokens_query_image`: query (B, N, C') float32, the image's tokens -> (B, N, C') float32.

    Whatever adds the same to the scores of all pixels changes no softmax: the keys have no bias. The weights of the
    pixels sum to 1: the values' bias is the output's.
    """

    def __init__(self, attention: Attention, order: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.query = scaled(attention.q, attention.scale)
        self.key = attention.k.weight  # (C'/2, C')
        self.probe = nn.Parameter(per_head(self.key)[..., order])  # (heads, d, C')
        self.value = nn.Parameter(per_head(attention.v.weight)[..., order])
        self.out = attention.out
        self.out.bias.copy_(self.out(attention.v.bias))

    def placed(self, position: PositionalEncoding, height: int, width: int) -> Tensor:
        """What the places of M = h*w pixels are to each head, (heads, d, M) in `dtype`."""
        return position.projected(self.key, height, width).to(self.dtype)

    def forward(self, query: Tensor, image: ImageTokens, position: Tensor) -> Tensor:
        asked = image.exact if self.dtype == torch.float32 else image.rounded
        tokens = per_head(self.query(query), axis=2)  # (B, N, heads, d)
        probes = probes_of(tokens, self.probe).to(self.dtype)
        found = scores(tokens.to(self.dtype), probes, asked, position)  # (B, heads*N, M)
        if torch.compiler.is_exporting():
            # OpenVINO takes a softmax between two products for an attention with many queries: 2.5 times the time.
            weights = (found - found.amax(-1, keepdim=True)).exp()
            mixed = torch.bmm(weights, asked).float() / weights.float().sum(-1, keepdim=True)
        else:
            mixed = torch.bmm(found.softmax(-1).to(image.rounded.dtype), image.rounded).float()
        mixed = per_head(mixed, axis=1)  # (B, heads, N, C')
        update: Tensor = self.out(torch.einsum("bhnc,hdc->bnhd", mixed, self.value).flatten(2))
        return update


class ImageQueriesTokens(nn.Module):
    """`Attention.image_queries_tokens` without the sum: image (B, M, C') in `dtype`, what it asks -> (B, M, C')."""

    def __init__(self, attention: Attention, order: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.query = attention.q
        self.key = scaled(attention.k, attention.scale)
        self.value = attention.v
        self.probe = nn.Parameter(per_head(attention.q.weight)[..., order])  # (heads, d, C')
        self.out = nn.Parameter(per_head(attention.out.weight.T)[..., order])
        self.bias = nn.Parameter(attention.out.bias[order] / HEADS)  # the weights of each head sum to 1
        # Of a place whose encoding is 0, the mean of sines and cosines: what the layer's bias alone gives.
        self.nowhere = nn.Parameter(per_head(attention.q.bias[:, None]).to(dtype))  # (heads, d, 1)

    def placed(self, position: PositionalEncoding, height: int, width: int) -> Tensor:
        """What the places of M = h*w pixels are to each head, (heads, d, M) in `dtype`."""
        places = position.projected(self.query.weight, height, width)
        return places.add_(per_head(self.query.bias)[..., None]).to(self.dtype)

    def asked(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What is the same for all pixels: keys (B, N, heads, d), probes and values (B, heads*N, C')."""
        keys = per_head(self.key(key), axis=2)
        values = torch.einsum("bnhd,hdc->bhnc", per_head(self.value(value), axis=2), self.out) + self.bias
        return keys.to(self.dtype), probes_of(keys, self.probe).to(self.dtype), values.flatten(1, 2).to(self.dtype)

    def forward(self, image: Tensor, asked: Sequence[Tensor], position: Tensor) -> Tensor:
        keys, probes, values = asked
        found = scores(keys, probes, image, position)
        weights = per_head(found, axis=1).softmax(-2).flatten(1, 2)  # (B, heads*N, M)
        if convolves(weights):  # on a CPU images come one by one
            return pixelwise(weights[0].T.contiguous(), values[0].T)[None]
        return torch.bmm(weights.transpose(1, 2), values)


def probes_of(tokens: Tensor, probe: Tensor) -> Tensor:
    """Projected tokens (B, N, heads, d) -> what a pixel is multiplied with for its scores, (B, heads*N, C').

    Projecting the tokens and not the pixels, as `Attention` does, is the cheaper order up to 16 classes.
    """
    return torch.einsum("bnhd,hdc->bhnc", tokens, probe).flatten(1, 2)


def scores(tokens: Tensor, probes: Tensor, image: Tensor, position: Tensor) -> Tensor:
    """Products of tokens with every pixel of the image and its place: (B, heads*N, M), all of one type.

    position: (heads, d, M), or (heads, d, 1) where all pixels are at one place.
    """
    placed = torch.einsum("bnhd,hdm->bhnm", tokens, position).flatten(1, 2)
    if not convolves(image):
        return torch.baddbmm(placed, probes, image.transpose(1, 2))
    placed = placed.expand(*probes.shape[:2], image.shape[1])
    found = image.new_empty(placed.shape)
    for images, some in pieces(image):
        product = pixelwise(piece(image, images, some)[0], probes[images][0])
        torch.add(placed[images, :, some], product.T.contiguous(), out=found[images, :, some])
    return found


class FoldedUpsampler(nn.Module):
    """Image tokens (B, h*w, C') and class vectors (B, N, C'/16) -> logits (B, N, 4h, 4w), all float32.

    The last product in bfloat16 would turn as many labels as all the others together.
    """

    def __init__(self, upsampler: Upsampler) -> None:
        super().__init__()
        self.norm = upsampler.norm

    def forward(self, image: Tensor, classes: Tensor, height: int, width: int) -> Tensor:
        # Of each of a pixel's four parts, every fourth channel is of the same one of its four parts again.
        parts = torch.eye(4, device=classes.device)
        spread = torch.einsum("bnc,st->bsnct", classes, parts).flatten(3).flatten(1, 2)  # (B, 4*N, C'/4)
        if torch.compiler.is_exporting():  # graphs have no place to put planes into, but runtimes have a pixel shuffle
            x = self.shuffled(image)
            planes = torch.stack([torch.bmm(spread, part.transpose(1, 2)) for part in x.unbind(2)], 1)
            planes = planes.view(len(x), 2, 2, 2, 2, -1, height, width).permute(0, 5, 1, 3, 2, 4, 6, 7)
            return F.pixel_shuffle(planes.flatten(1, 5), 4)
        logits = image.new_empty(*classes.shape[:2], height, 4, width, 4)
        for images, some in pieces(image, width):
            rows = logits[images, :, some.start // width : some.stop // width]
            for first, part in enumerate(self.shuffled(piece(image, images, some)).unbind(2)):
                planes = torch.bmm(spread[images], part.transpose(1, 2)).view(len(part), 4, -1, *rows.shape[2:5:2])
                # Plane by plane: one copy of all would run along sides of 2 pixels, and takes 16 times as long.
                for second, plane in enumerate(planes.unbind(1)):
                    rows[..., first // 2 * 2 + second // 2, :, first % 2 * 2 + second % 2] = plane
        return logits.flatten(4).flatten(2, 3)

    def shuffled(self, image: Tensor) -> Tensor:
        """(B, M, C') -> (B, M, 4, C'/4): the four parts of each token, as the classes are multiplied with them."""
        return F.gelu(F.gelu(self.norm(torch.unflatten(image, -1, (4, -1)))))


def scaled(layer: nn.Linear, scale: float) -> nn.Linear:
    """The layer itself, its output now `scale` times what it was."""
    layer.weight.mul_(scale)
    layer.bias.mul_(scale)
    return layer
