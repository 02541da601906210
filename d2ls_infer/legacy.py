"""Checkpoints of the authors' code -> our state dict. Nothing in such a file is ever executed."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from d2ls_infer.errors import MissingFileError, WeightsError
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

# Legacy key -> our key, tried in order. Backbone keys are those of timm's `features_only` ConvNeXt.
RENAMES: tuple[tuple[str, str], ...] = (
    (r"backbone\.0\.0\.0\.", r"encoder.backbone.stem_0."),
    (r"backbone\.0\.0\.1\.", r"encoder.backbone.stem_1."),
    (r"pe_layer\.positional_encoding_gaussian_matrix$", r"decoder.position.gaussian"),
    (r"linear_c\.(\d)\.proj\.", r"encoder.mapping.\1."),
    (r"aggregator\.", r"encoder.aggregator."),
    (r"decoder\.token\.basic_queries\.weight$", r"dictionary.static"),
    (r"decoder\.token\.token_mlp\.", r"dictionary.expand."),
    (r"decoder\.feature_modulator\.mlp1\.proj\.", r"dictionary.modulator.project."),
    (r"decoder\.feature_modulator\.gmp_branch\.1\.", r"dictionary.modulator.max_branch."),
    (r"decoder\.feature_modulator\.gap_branch\.1\.", r"dictionary.modulator.avg_branch."),
    (r"decoder\.feature_modulator\.mlp2\.", r"dictionary.modulator.head."),
    (
        r"decoder\.interactor\.layers\.(\d+)\.cross_attn_token_to_image\.(q|k|v|out)_proj\.",
        r"decoder.blocks.\1.dictionary_queries_image.\2.",
    ),
    (
        r"decoder\.interactor\.layers\.(\d+)\.cross_attn_image_to_token\.(q|k|v|out)_proj\.",
        r"decoder.blocks.\1.image_queries_dictionary.\2.",
    ),
    (r"decoder\.interactor\.layers\.(\d+)\.norm2\.", r"decoder.blocks.\1.norm_dictionary."),
    (r"decoder\.interactor\.layers\.(\d+)\.norm4\.", r"decoder.blocks.\1.norm_image."),
    (r"decoder\.interactor\.final_attn_token_to_image\.(q|k|v|out)_proj\.", r"decoder.final_attention.\1."),
    (r"decoder\.interactor\.norm_final_attn\.", r"decoder.final_norm."),
    (r"decoder\.upsampler\.1\.", r"decoder.upsampler.norm."),
    (r"decoder\.output_hypernetwork_mlps\.layers\.0\.", r"decoder.dictionary_head.0."),
    (r"decoder\.output_hypernetwork_mlps\.layers\.1\.", r"decoder.dictionary_head.2."),
    (r"decoder\.output_hypernetwork_mlps\.layers\.2\.", r"decoder.dictionary_head.4."),
)
# Within a ConvNeXt block, and in the downsampling between two stages.
BLOCK = {
    "layer_scale": "gamma",
    "block.0.": "conv_dw.",
    "block.2.": "norm.",
    "block.3.": "mlp.fc1.",
    "block.5.": "mlp.fc2.",
}


def load_legacy(path: Path) -> D2LS:
    """A Lightning checkpoint or bare state dict of the authors' code -> the network with its weights, in eval mode.

    Backbone, number of classes and of stages are read from the shapes. Raises MissingFileError, and WeightsError for a
    file that holds anything but tensors and plain values, or whose keys or shapes do not fit (they are named).
    """
    state = read_legacy_state(path)
    config = infer_config(state)
    network = D2LS(config)
    wanted = weights_of(network)
    converted = convert_state(state)
    for key, value in converted.items():
        # Linear layers that are 1x1 convolutions here, and layer scales of shape [C, 1, 1].
        if key in wanted and squeezed(value.shape) == squeezed(wanted[key].shape):
            converted[key] = value.reshape(wanted[key].shape)
    try:
        load_weights(network, converted)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error
    return network.eval()


def read_legacy_state(path: Path) -> dict[str, Tensor]:
    """The file's state dict, keys without `net.`. Lists of code to run, which a pickle can hold, are refused."""
    if not path.is_file():
        raise MissingFileError(f"no such file: {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).strip().splitlines()[0]
        raise WeightsError(f"{path} holds more than tensors and plain values and was not read: {reason}") from error
    except (RuntimeError, EOFError, KeyError, ValueError, OSError) as error:
        raise WeightsError(f"{path} is not a checkpoint, or is damaged: {error}") from error
    state = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"{path} holds no state dict (a mapping of names to tensors)")
    # A Lightning checkpoint keeps other things beside the network (losses, metrics); only `net.` is the network.
    if any(key.startswith(PREFIX) for key in state):
        return {key.removeprefix(PREFIX): value for key, value in state.items() if key.startswith(PREFIX)}
    return dict(state)


def infer_config(state: Mapping[str, Tensor]) -> D2LSConfig:
    """Backbone, N, L, C', r and the number of bands, from the shapes of a legacy state dict."""
    try:
        width, in_channels = state["backbone.0.0.0.weight"].shape[:2]
        num_classes, embed_dim = state["decoder.token.basic_queries.weight"].shape
        expanded = state["decoder.token.token_mlp.weight"].shape[0]
    except (KeyError, ValueError) as error:
        raise WeightsError(f"not a D2LS checkpoint of the authors' code: {error} is missing or misshapen") from error
    depth = 1 + max((int(m[1]) for key in state if (m := re.match(r"backbone\.0\.5\.(\d+)\.", key))), default=-1)
    stages = 1 + max(
        (int(m[1]) for key in state if (m := re.match(r"decoder\.interactor\.layers\.(\d+)\.", key))), default=-1
    )
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
        reduction=expanded // embed_dim,
        in_channels=in_channels,
    )


def convert_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Legacy keys -> ours, unused ones dropped. A key without a counterpart keeps its name (and fails to fit later)."""
    return {convert_key(key): value for key, value in state.items() if not UNUSED.match(key)}


def convert_key(key: str) -> str:
    """One legacy key -> our key."""
    if stage := re.match(r"backbone\.0\.([1-7])\.", key):
        index, rest = int(stage[1]), key[stage.end() :]
        if index % 2 == 0:  # downsampling opens timm's next stage
            return f"encoder.backbone.stages_{index // 2}.downsample.{rest}"
        block, _, inner = rest.partition(".")
        for old, new in BLOCK.items():
            if inner.startswith(old):
                return f"encoder.backbone.stages_{index // 2}.blocks.{block}.{new}{inner.removeprefix(old)}"
    for pattern, replacement in RENAMES:
        new_key, hits = re.subn("^" + pattern, replacement, key)
        if hits:
            return new_key
    return key


def squeezed(shape: torch.Size) -> tuple[int, ...]:
    """A shape without its sides of 1: what stays the same between a linear layer and a 1x1 convolution."""
    return tuple(side for side in shape if side != 1)
