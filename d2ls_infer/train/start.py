"""What a network starts from: an ImageNet backbone, or the weights of another D2LS model."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from timm.layers.drop import DropPath
from torch import Tensor, nn

from d2ls_infer.errors import MissingFileError, UsageError
from d2ls_infer.labels import LabelMap
from d2ls_infer.nn import D2LS
from d2ls_infer.nn.decoder import Attention
from d2ls_infer.nn.encoder import create_backbone

STEMS = ("conv_stem.weight", "stem_0.weight", "conv1.weight", "patch_embed.proj.weight")
"""Ends of the names of the first convolution in timm's backbones, whose shape depends on the number of bands."""


def load_backbone(network: D2LS, file: Path) -> None:
    """Put a timm state dict in, as timm does it: the stem adapted to the number of bands, the classifier left out.

    Raises MissingFileError, and UsageError for a file of another kind or backbone.
    """
    if not file.is_file():
        raise MissingFileError(f"no such file: {file}")
    config = network.config
    try:
        # timm would read a file of another ending as a pickle, some versions of it by running what it holds.
        if file.suffix != ".safetensors":
            raise SafetensorError("its name does not end so")
        with safe_open(file, "pt") as tensors:
            known = {plain(key) for key in tensors.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UsageError(f"{file} is not a safetensors file, as timm's weights are: {error}") from error
    wanted = {plain(key) for key in network.encoder.backbone.state_dict()}
    if len(wanted & known) < len(wanted) / 2:  # timm leaves what it does not find as it is, without an error
        raise UsageError(f"{file} does not hold the weights of {config.backbone}: other tensors have other names")
    backbone = create_backbone(config.backbone, in_channels=config.in_channels, pretrained=file)
    network.encoder.backbone.load_state_dict(backbone.state_dict())


@torch.no_grad()
def quieten(network: D2LS) -> None:
    """Let every attention of the decoder give zeros, until its output layer has learnt otherwise.

    With random weights the interactor first mixes all classes into all pixels, and has to unlearn that.
    """
    for part in network.decoder.modules():
        if isinstance(part, Attention):
            nn.init.zeros_(part.out.weight)
            nn.init.zeros_(part.out.bias)


def drop_paths(backbone: nn.Module, rate: float) -> None:
    """Let a timm backbone leave out residual branches while it is trained, the last one at `rate`, the first never.

    Stochastic depth (Huang et al., 2016), by timm's linear rule. Raises UsageError for a backbone without branches.
    """
    names = ("drop_path", "drop_path1", "drop_path2")  # as timm's blocks call the place for it
    places = [
        [(block, name) for name in names if isinstance(getattr(block, name, None), nn.Identity | DropPath)]
        for block in backbone.modules()
    ]
    blocks = [places_of_block for places_of_block in places if places_of_block]
    if not blocks:
        raise UsageError("drop_path: this backbone has no residual branches that could be left out")
    for index, block in enumerate(blocks):
        for module, name in block:
            setattr(module, name, DropPath(rate * index / max(1, len(blocks) - 1)).train(module.training))


@torch.no_grad()
def adopt(network: D2LS, source: D2LS, *, labels: LabelMap, source_labels: LabelMap) -> tuple[str, ...]:
    """Take over another model's weights; the names of the classes that were kept.

    A class of the same name keeps its static embedding and its part of the modulator; the others stay as they are,
    random. Another number of bands adapts the stem as timm does. Raises UsageError for another backbone or width.
    """
    for name in ("backbone", "embed_dim", "stages", "reduction"):
        ours, theirs = getattr(network.config, name), getattr(source.config, name)
        if ours != theirs:
            raise UsageError(f"cannot start from a model whose {name} is {theirs}: that of this one is {ours}")
    theirs_by_name = {name.lower(): index for index, name in enumerate(source_labels.names)}
    kept = [
        (index, theirs_by_name[name.lower()])
        for index, name in enumerate(labels.names)
        if name.lower() in theirs_by_name
    ]
    state = network.state_dict()
    for key, value in source.state_dict().items():
        if per_class(key):
            rows = 1 if key == "dictionary.static" else network.config.reduction
            new, former = (tensor.unflatten(0, (-1, rows)) for tensor in (state[key], value))  # (N, rows, ...)
            for ours, theirs in kept:
                new[ours] = former[theirs]
        elif value.shape != state[key].shape and key.endswith(STEMS):
            state[key] = adapt_bands(value, state[key].shape[1])
        else:
            state[key] = value
    network.load_state_dict(state)
    return tuple(labels.names[index] for index, _ in kept)


def adapt_bands(weight: Tensor, bands: int) -> Tensor:
    """(C, I, h, w) for I bands -> (C, bands, h, w), by timm's rule: in turn again, scaled; summed for a single one."""
    if bands == 1:
        return weight.sum(1, keepdim=True)
    former = weight.shape[1]
    return weight[:, [band % former for band in range(bands)]] * (former / bands)


def plain(key: str) -> str:
    """A tensor's name as it is in timm's classifiers and in its feature pyramids alike."""
    return key.replace(".", "_").removeprefix("model_")


def per_class(key: str) -> bool:
    """Whether a tensor has a part for each class."""
    return key == "dictionary.static" or key.startswith("dictionary.modulator.head.2.")
