"""Checkpoints of the authors' code -> our state dict. Nothing in such a file is ever executed."""

from __future__ import annotations

import argparse
import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PosixPath, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from torch import Tensor

from d2ls_infer.errors import MissingFileError, UsageError, WeightsError
from d2ls_infer.nn import D2LS, D2LSConfig, load_weights, weights_of

PREFIX = "net."
# In the file, but without a part in the forward pass.
UNUSED = re.compile(r"decoder\.interactor\.layers\.\d+\.(self_attn|norm1|mlp|norm3)\.")

# torchvision's ConvNeXt: width of the stem and number of blocks of the third stage -> timm's name.
BACKBONES = {
    (96, 9): "convnext_tiny",
    (96, 27): "convnext_small",
    (128, 27): "convnext_base",
    (192, 27): "convnext_large",
}

# The authors' key -> ours. {} stands for one part of a key; the rest of the key follows unchanged.
STAGES = [
    template
    for stage, place in enumerate((1, 3, 5, 7))
    for template in (
        (f"backbone.0.{place - 1}.{{}}.", f"encoder.backbone.stages_{stage}.downsample.{{}}." if stage else ""),
        (f"backbone.0.{place}.{{}}.layer_scale", f"encoder.backbone.stages_{stage}.blocks.{{}}.gamma"),
        (f"backbone.0.{place}.{{}}.block.0.", f"encoder.backbone.stages_{stage}.blocks.{{}}.conv_dw."),
        (f"backbone.0.{place}.{{}}.block.2.", f"encoder.backbone.stages_{stage}.blocks.{{}}.norm."),
        (f"backbone.0.{place}.{{}}.block.3.", f"encoder.backbone.stages_{stage}.blocks.{{}}.mlp.fc1."),
        (f"backbone.0.{place}.{{}}.block.5.", f"encoder.backbone.stages_{stage}.blocks.{{}}.mlp.fc2."),
    )
    if template[1]
]
LAYER = "decoder.interactor.layers.{}."
RENAMES = [
    ("backbone.0.0.{}.", "encoder.backbone.stem_{}."),
    *STAGES,
    ("pe_layer.positional_encoding_gaussian_matrix", "decoder.position.gaussian"),
    ("linear_c.{}.proj.", "encoder.mapping.{}."),
    ("aggregator.", "encoder.aggregator."),
    ("decoder.token.basic_queries.weight", "dictionary.static"),
    ("decoder.token.token_mlp.", "dictionary.expand."),
    ("decoder.feature_modulator.mlp1.proj.", "dictionary.modulator.project."),
    ("decoder.feature_modulator.gmp_branch.1.", "dictionary.modulator.max_branch."),
    ("decoder.feature_modulator.gap_branch.1.", "dictionary.modulator.avg_branch."),
    ("decoder.feature_modulator.mlp2.", "dictionary.modulator.head."),
    (LAYER + "cross_attn_token_to_image.{}_proj.", "decoder.blocks.{}.dictionary_queries_image.{}."),
    (LAYER + "cross_attn_image_to_token.{}_proj.", "decoder.blocks.{}.image_queries_dictionary.{}."),
    (LAYER + "norm2.", "decoder.blocks.{}.norm_dictionary."),
    (LAYER + "norm4.", "decoder.blocks.{}.norm_image."),
    ("decoder.interactor.final_attn_token_to_image.{}_proj.", "decoder.final_attention.{}."),
    ("decoder.interactor.norm_final_attn.", "decoder.final_norm."),
    ("decoder.upsampler.1.", "decoder.upsampler.norm."),
    ("decoder.output_hypernetwork_mlps.layers.0.", "decoder.dictionary_head.0."),
    ("decoder.output_hypernetwork_mlps.layers.1.", "decoder.dictionary_head.2."),
    ("decoder.output_hypernetwork_mlps.layers.2.", "decoder.dictionary_head.4."),
]

HARMLESS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    argparse.Namespace,
    PosixPath,
    PurePosixPath,
    PureWindowsPath,
]
"""Types besides tensors and plain values that training scripts leave in their checkpoints, and that only hold data."""


def load_legacy(path: Path) -> D2LS:
    """A Lightning checkpoint or bare state dict of the authors' code -> the network with its weights, in eval mode.

    Backbone, number of classes and of stages are read from the shapes. Raises MissingFileError, and WeightsError for a
    file that holds anything but tensors and plain values, or whose keys or shapes do not fit (they are named as the
    file names them).
    """
    state = read_legacy_state(path)
    try:
        network = D2LS(infer_config(state))
        fill(network, state)
    except (WeightsError, UsageError) as error:
        raise WeightsError(f"{path}: {error}") from error
    return network.eval()


def read_legacy_state(path: Path) -> dict[str, Tensor]:
    """The file's state dict, keys without `net.`. What a pickle could run instead of holding data is refused."""
    if not path.is_file():
        raise MissingFileError(f"no such file: {path}")
    try:
        with torch.serialization.safe_globals(HARMLESS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f" ({found[1]})" if found else ""
        raise WeightsError(
            f"{path} holds more than tensors and plain values{what}; it was not read, since reading could run code"
        ) from error
    except Exception as error:  # torch's readers fail in many ways on files that are no checkpoints
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise WeightsError(f"{path} is not a checkpoint, or is damaged ({reason})") from error
    state = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or not state:
        raise WeightsError(f"{path} holds no state dict (a mapping of names to tensors)")
    if not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()):
        raise WeightsError(f"{path} holds no state dict (a mapping of names to tensors)")
    # A Lightning checkpoint keeps other things beside the network (losses, metrics); only `net.` is the network.
    if any(key.startswith(PREFIX) for key in state):
        return {key.removeprefix(PREFIX): value for key, value in state.items() if key.startswith(PREFIX)}
    return dict(state)


def infer_config(state: Mapping[str, Tensor]) -> D2LSConfig:
    """Backbone, N, L, C', r and the number of bands, from the shapes of a legacy state dict."""
    try:
        width, in_channels, _, _ = state["backbone.0.0.0.weight"].shape
        num_classes, embed_dim = state["decoder.token.basic_queries.weight"].shape
        expanded, _ = state["decoder.token.token_mlp.weight"].shape
    except KeyError as error:
        raise WeightsError(f"not a D2LS checkpoint of the authors' code: {error} is missing") from error
    except ValueError as error:
        raise WeightsError(f"not a D2LS checkpoint of the authors' code: a tensor is misshapen ({error})") from error
    depth, stages = count(state, r"backbone\.0\.5\.(\d+)\."), count(state, r"decoder\.interactor\.layers\.(\d+)\.")
    if (width, depth) not in BACKBONES:
        raise WeightsError(
            f"unknown backbone: stem width {width} and {depth} blocks in stage 3; known are the ConvNeXt "
            + ", ".join(name.removeprefix("convnext_") for name in BACKBONES.values())
        )
    return D2LSConfig(
        backbone=BACKBONES[width, depth],
        num_classes=num_classes,
        embed_dim=embed_dim,
        stages=stages,
        reduction=expanded // max(1, embed_dim),
        in_channels=in_channels,
    )


def count(state: Mapping[str, Tensor], pattern: str) -> int:
    """How many numbers, from 0, stand at the group of a pattern that keys begin with."""
    return 1 + max((int(found[1]) for key in state if (found := re.match(pattern, key))), default=-1)


def fill(network: D2LS, state: Mapping[str, Tensor]) -> None:
    """Put a legacy state dict into a network. Raises WeightsError that names keys as the file does."""
    wanted = weights_of(network)
    converted: dict[str, Tensor] = {}
    names = {key: legacy_key(key) for key in wanted}
    for key, value in state.items():
        if UNUSED.match(key):
            continue
        ours = convert_key(key)
        if ours is None or ours not in wanted:
            ours = f"left over: {key}"  # a name that is none of ours
            names[ours] = key
        # Linear layers that are 1x1 convolutions here, and layer scales of shape [C, 1, 1].
        fits = ours in wanted and squeezed(value.shape) == squeezed(wanted[ours].shape)
        converted[ours] = value.reshape(wanted[ours].shape) if fits else value
    load_weights(network, converted, names=names)


def convert_key(key: str) -> str | None:
    """The authors' key -> ours; None for one that has no counterpart."""
    return rename(key, [(theirs, ours) for theirs, ours in RENAMES])


def legacy_key(key: str) -> str:
    """Our key -> the authors'."""
    theirs = rename(key, [(ours, theirs) for theirs, ours in RENAMES])
    assert theirs is not None, key
    return theirs


def rename(key: str, templates: Sequence[tuple[str, str]]) -> str | None:
    """The key with its beginning, as one template has it, replaced by the other's."""
    for old, new in templates:
        pattern = re.escape(old).replace(r"\{\}", r"([^.]+?)")
        if found := re.match(pattern if old.endswith(".") else pattern + "$", key):
            return new.format(*found.groups()) + key[found.end() :]
    return None


def squeezed(shape: torch.Size) -> tuple[int, ...]:
    """A shape without its sides of 1: what stays the same between a linear layer and a 1x1 convolution."""
    return tuple(side for side in shape if side != 1)
