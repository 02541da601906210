"""How fast the inference form is against the published one, and whether it gives the same labels.

    OMP_NUM_THREADS=2 python tests/benchmarks/forward.py [--runs 5] [--threads 2] [--images DIR] [MODEL ...]

MODEL is a backbone of timm, with random weights and seven classes, or a model of the manifest; --images takes a folder
of pictures or GeoTIFFs that such a model's labels are compared on. Runs of the forms alternate. Seconds are the least
of the runs: of the clock, and of the processor, which other work on the machine changes less (the two are only alike
with --threads 1, since waiting threads count too). Exits with 1 where a goal is missed.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from d2ls_infer.nn import D2LS, D2LSConfig, FoldedD2LS, autocast, fold
from d2ls_infer.nn.d2ls import pad_to_stride
from d2ls_infer.nn.decoder import Attention, Decoder, per_head
from d2ls_infer.nn.encoder import Encoder
from d2ls_infer.segmenter import D2LSSegmenter
from d2ls_infer.weights import find_weights, load_network

MODELS = ("convnext_base", "vaihingen", "dubai")
SPEED_GOALS = {"convnext_base": {"folded float32": 1.3, "folded bfloat16": 4.0}}
MOST_DECODER = 0.2  # of the forward's time, with ConvNeXt-Base
LEAST_AGREEMENT, MOST_AREA = 0.999, 0.001  # of the pixels; of all pixels, by which a class's area may differ


# The published form: every product in the order the paper has it. The layers are ours, their order is theirs.


def published(network: D2LS, pixels: Tensor) -> Tensor:
    height, width = pixels.shape[-2:]
    features, deepest = published_encoder(network.encoder, pad_to_stride(pixels))
    _, dynamic, _ = network.dictionary(deepest)
    return published_decoder(network.decoder, dynamic, features)[..., :height, :width]


def published_encoder(encoder: Encoder, pixels: Tensor) -> tuple[Tensor, Tensor]:
    levels = encoder.backbone_features(pixels)
    mapped = []
    for level, mapping in zip(levels, encoder.mapping, strict=True):
        weight, bias = mapping.get_parameter("weight").flatten(1), mapping.get_parameter("bias")
        pixelwise = F.linear(level.permute(0, 2, 3, 1), weight, bias).permute(0, 3, 1, 2)
        mapped.append(F.interpolate(pixelwise, levels[0].shape[-2:], mode="bilinear", align_corners=False))
    return encoder.aggregator(torch.cat(mapped[::-1], dim=1)), levels[-1]


def published_attention(layer: Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    q, k, v = (
        per_head(part(x), axis=2).transpose(1, 2) for part, x in ((layer.q, query), (layer.k, key), (layer.v, value))
    )
    weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
    update: Tensor = layer.out((weights @ v).transpose(1, 2).flatten(2))
    return update


def published_decoder(decoder: Decoder, dictionary: Tensor, features: Tensor) -> Tensor:
    height, width = features.shape[-2:]
    position = decoder.position(height, width)
    image, tokens = features.flatten(2).transpose(1, 2), dictionary
    for block in decoder.blocks:
        update = published_attention(block.dictionary_queries_image, tokens + dictionary, image + position, image)
        tokens = block.norm_dictionary(tokens + update)
        update = published_attention(block.image_queries_dictionary, image + position, tokens + dictionary, tokens)
        image = block.norm_image(image + update)
    update = published_attention(decoder.final_attention, tokens + dictionary, image + position, image)
    tokens = decoder.final_norm(tokens + update)
    x = F.pixel_shuffle(image.transpose(1, 2).unflatten(2, (height, width)), 2)
    x = decoder.upsampler.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    x = F.gelu(F.pixel_shuffle(F.gelu(x), 2))
    return (decoder.dictionary_head(tokens) @ x.flatten(2)).unflatten(2, x.shape[-2:])


# Speed


class Timer:
    """Least seconds of the clock and of the processor, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, tuple[float, float]] = {}

    def run(self, name: str, work: Callable[[], object]) -> None:
        clock, processor = time.perf_counter(), time.process_time()
        work()
        found = time.perf_counter() - clock, time.process_time() - processor
        least = self.seconds.get(name, found)
        self.seconds[name] = min(least[0], found[0]), min(least[1], found[1])


def backbone_of(folded: FoldedD2LS, pixels: Tensor) -> list[Tensor]:
    with autocast(pixels.device, folded.dtype):
        return folded.encoder.backbone_features(pixels)


@torch.inference_mode()
def speed(name: str, network: D2LS, size: int, runs: int) -> list[str]:
    """Print the table of a network; gives what it misses."""
    pixels = torch.randn(1, network.config.in_channels, size, size, generator=torch.Generator().manual_seed(1))
    channels_last = pixels.contiguous(memory_format=torch.channels_last)
    forms: dict[str, Callable[[], object]] = {
        "published float32": lambda: published(network, pixels),
        "unfolded float32": lambda: network(pixels),
    }
    for folded in (fold(network), fold(network, torch.bfloat16)):
        form = f"folded {str(folded.dtype).removeprefix('torch.')}"
        forms[form] = lambda folded=folded: folded(channels_last)
        forms[f"{form}, backbone"] = lambda folded=folded: backbone_of(folded, channels_last)
    for work in forms.values():
        work()
    timer = Timer()
    for _ in range(runs):
        for form, work in forms.items():
            timer.run(form, work)
    print(f"\n{name}: {network.config.backbone}, {network.config.num_classes} classes, {size} px")
    print(f"{'':28}{'clock':>9}{'ratio':>8}{'processor':>11}{'ratio':>8}{'decoder':>9}")
    missed, base = [], timer.seconds["published float32"]
    for form in (form for form in forms if "backbone" not in form):
        clock, processor = timer.seconds[form]
        share = ""
        if backbone := timer.seconds.get(f"{form}, backbone"):
            decoder = 1 - backbone[1] / processor
            share = f"{decoder:8.0%}"
            if name in SPEED_GOALS and decoder > MOST_DECODER:
                missed.append(f"{name}, {form}: the decoder takes {decoder:.0%}, goal {MOST_DECODER:.0%}")
        ratios = base[0] / clock, base[1] / processor
        print(f"{form:28}{clock:8.3f}s{ratios[0]:8.2f}{processor:10.3f}s{ratios[1]:8.2f} {share}")
        goal = SPEED_GOALS.get(name, {}).get(form, 0)
        if max(ratios) < goal:
            missed.append(f"{name}, {form}: {max(ratios):.2f} times the published form's speed, goal {goal}")
    return missed


# Labels


def tiles_of(folder: Path, bands: int, size: int) -> list[Tensor]:
    """(1, bands, size, size) tiles of all images that have the bands."""
    import rasterio

    tiles = []
    for path in sorted(path for path in folder.iterdir() if path.suffix.lower() in (".tif", ".jpg", ".png")):
        with rasterio.open(path) as image:
            if image.count < bands:
                continue
            pixels = torch.from_numpy(image.read(range(1, bands + 1)))
        for row in range(0, max(1, pixels.shape[1] - size + 1), size):
            for col in range(0, max(1, pixels.shape[2] - size + 1), size):
                tiles.append(pixels[None, :, row : row + size, col : col + size])
    return tiles


@torch.inference_mode()
def agreement(name: str, segmenter: D2LSSegmenter, network: D2LS, tiles: list[Tensor]) -> list[str]:
    """Print how far the labels of the inference forms are the network's in float32; gives what is missed."""
    classes, missed = len(segmenter.labels), []
    expected = torch.cat([network(segmenter.normalise(tile)).argmax(1).flatten() for tile in tiles])
    areas = expected.bincount(minlength=classes)
    for dtype in (torch.float32, torch.bfloat16):
        folded = fold(network, dtype)
        found = torch.cat([folded(segmenter.normalise(tile)).argmax(1).flatten() for tile in tiles])
        same = float((found == expected).double().mean())
        off = found.bincount(minlength=classes) - areas
        area = float(off.abs().max() / len(expected))
        own = ", ".join(f"{100 * float(a / b):+.2f}" if b else "-" for a, b in zip(off, areas, strict=True))
        print(
            f"{name}, folded {str(dtype).removeprefix('torch.')}: {same:.4%} of {len(expected)} labels are the same; "
            f"no area is off by more than {area:.4%} of the image; in % of the class's own: {own}"
        )
        if same < LEAST_AGREEMENT or area > MOST_AREA:
            missed.append(f"{name}, {dtype}: {same:.3%} of the labels are the same, areas are off by up to {area:.3%}")
    return missed


def main() -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", default=MODELS)
    parser.add_argument("--images", type=Path, help="a folder of images to compare labels on")
    parser.add_argument("--tiles", type=int, default=8, help="how many tiles of them, evenly picked")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--runs", type=int, default=5, help="runs of each form; 0 leaves the times out")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    missed = []
    for name in options.models:
        torch.manual_seed(0)
        if "_" in name:
            network = D2LS(D2LSConfig(backbone=name, num_classes=7)).eval()
        else:
            weights = find_weights(name)
            network = load_network(weights.path, weights.description)
            if options.images:
                from rasterio.errors import NotGeoreferencedWarning

                from d2ls_infer import load_model

                warnings.simplefilter("ignore", NotGeoreferencedWarning)
                segmenter = load_model(name, device="cpu", precision="float32")
                tiles = tiles_of(options.images, len(segmenter.bands), options.size)
                tiles = tiles[:: max(1, len(tiles) // options.tiles)][: options.tiles]
                missed += agreement(name, segmenter, network, tiles)
        if options.runs:
            missed += speed(name, network, options.size, options.runs)
    print(*(["", "missed:", *missed] if missed else ["", "all goals are met"]), sep="\n")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
