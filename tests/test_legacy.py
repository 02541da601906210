"""Checkpoints of the authors' code: what is in them comes over whole, and nothing in them is ever executed."""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from d2ls_infer.errors import D2LSError, MissingFileError, WeightsError
from d2ls_infer.legacy import infer_config, load_legacy, read_legacy_state
from d2ls_infer.nn import D2LSConfig, weights_of

# Every key of a legacy state dict with ConvNeXt-Tiny, N = 7, L = 3, and its shape.
KEYS: dict[str, list[int]] = json.loads(Path(__file__).with_name("legacy_keys.json").read_text())
BASE_KEYS = Path(__file__).parents[1].parent / "shared" / "reference" / "convnext_base_legacy_keys.json"
UNUSED = re.compile(r"decoder\.interactor\.layers\.\d+\.(self_attn|norm1|mlp|norm3)\.")


def legacy_shapes(*, num_classes: int = 7, stages: int = 3) -> dict[str, list[int]]:
    shapes = {}
    for key, shape in KEYS.items():
        layer = re.match(r"decoder\.interactor\.layers\.(\d+)\.", key)
        if layer is None or int(layer[1]) < stages:
            shapes[key] = shape
    shapes["decoder.token.basic_queries.weight"] = [num_classes, 256]
    shapes["decoder.feature_modulator.mlp2.2.weight"] = [4 * num_classes, 512]
    shapes["decoder.feature_modulator.mlp2.2.bias"] = [4 * num_classes]
    return shapes


def hollow_state(shapes: Mapping[str, list[int]]) -> dict[str, Tensor]:
    """Tensors of these shapes that all hold one number, so that a file of them is small."""
    return {key: torch.full((1,), 0.5).expand(shape) for key, shape in shapes.items()}


def random_state(shapes: Mapping[str, list[int]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {key: 0.1 * torch.randn(shape, generator=generator) for key, shape in shapes.items()}


def saved(folder: Path, content: Any, *, zipped: bool = True) -> Path:
    path = folder / "checkpoint.ckpt"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return random_state(legacy_shapes(num_classes=4, stages=2))


# What is read


def test_every_live_tensor_has_its_place(tmp_path: Path, state: dict[str, Tensor]) -> None:
    network = load_legacy(saved(tmp_path, state))
    assert network.config == D2LSConfig(backbone="convnext_tiny", num_classes=4, stages=2)
    assert not network.training
    ours = weights_of(network)
    live = {key: value for key, value in state.items() if not UNUSED.match(key)}
    assert len(ours) == len(live)
    unplaced = [
        key
        for key, value in live.items()
        if not any(
            value.numel() == mine.numel() and torch.equal(value.flatten(), mine.flatten()) for mine in ours.values()
        )
    ]
    assert unplaced == []


PLACES = {
    "backbone.0.0.0.weight": "encoder.backbone.stem_0.weight",
    "backbone.0.0.1.bias": "encoder.backbone.stem_1.bias",
    "backbone.0.1.2.layer_scale": "encoder.backbone.stages_0.blocks.2.gamma",
    "backbone.0.3.0.block.0.weight": "encoder.backbone.stages_1.blocks.0.conv_dw.weight",
    "backbone.0.5.8.block.2.weight": "encoder.backbone.stages_2.blocks.8.norm.weight",
    "backbone.0.5.8.block.2.bias": "encoder.backbone.stages_2.blocks.8.norm.bias",
    "backbone.0.7.1.block.3.weight": "encoder.backbone.stages_3.blocks.1.mlp.fc1.weight",
    "backbone.0.7.1.block.5.bias": "encoder.backbone.stages_3.blocks.1.mlp.fc2.bias",
    "backbone.0.2.0.weight": "encoder.backbone.stages_1.downsample.0.weight",
    "backbone.0.6.1.weight": "encoder.backbone.stages_3.downsample.1.weight",
    "linear_c.0.proj.weight": "encoder.mapping.0.weight",
    "linear_c.3.proj.bias": "encoder.mapping.3.bias",
    "aggregator.weight": "encoder.aggregator.weight",
    "pe_layer.positional_encoding_gaussian_matrix": "decoder.position.gaussian",
    "decoder.token.basic_queries.weight": "dictionary.static",
    "decoder.token.token_mlp.bias": "dictionary.expand.bias",
    "decoder.feature_modulator.mlp1.proj.weight": "dictionary.modulator.project.weight",
    "decoder.feature_modulator.gmp_branch.1.weight": "dictionary.modulator.max_branch.weight",
    "decoder.feature_modulator.gap_branch.1.weight": "dictionary.modulator.avg_branch.weight",
    "decoder.feature_modulator.mlp2.0.bias": "dictionary.modulator.head.0.bias",
    "decoder.feature_modulator.mlp2.2.bias": "dictionary.modulator.head.2.bias",
    "decoder.interactor.layers.0.cross_attn_token_to_image.q_proj.weight": (
        "decoder.blocks.0.dictionary_queries_image.q.weight"
    ),
    "decoder.interactor.layers.1.cross_attn_image_to_token.out_proj.bias": (
        "decoder.blocks.1.image_queries_dictionary.out.bias"
    ),
    "decoder.interactor.layers.1.norm2.weight": "decoder.blocks.1.norm_dictionary.weight",
    "decoder.interactor.layers.1.norm4.weight": "decoder.blocks.1.norm_image.weight",
    "decoder.interactor.final_attn_token_to_image.v_proj.weight": "decoder.final_attention.v.weight",
    "decoder.interactor.norm_final_attn.bias": "decoder.final_norm.bias",
    "decoder.upsampler.1.weight": "decoder.upsampler.norm.weight",
    "decoder.output_hypernetwork_mlps.layers.1.weight": "decoder.dictionary_head.2.weight",
    "decoder.output_hypernetwork_mlps.layers.2.weight": "decoder.dictionary_head.4.weight",
}


def test_tensors_come_over_to_the_part_they_belong_to(tmp_path: Path, state: dict[str, Tensor]) -> None:
    ours = weights_of(load_legacy(saved(tmp_path, state)))
    misplaced = [key for key, place in PLACES.items() if not torch.equal(state[key].flatten(), ours[place].flatten())]
    assert misplaced == []


def test_lightning_checkpoint_and_bare_state_dict_give_the_same_network(
    tmp_path: Path, state: dict[str, Tensor]
) -> None:
    bare = weights_of(load_legacy(saved(tmp_path, state)))
    checkpoint = {
        "epoch": 29,
        "global_step": 1000,
        "pytorch-lightning_version": "2.0.0",
        "state_dict": OrderedDict(
            {
                **{f"net.{key}": value for key, value in state.items()},
                # The module keeps its losses and metrics beside the network.
                "loss.main_loss.weight": torch.ones(4),
                "metrics_train.confusion": torch.zeros(4, 4, dtype=torch.int64),
            }
        ),
        "optimizer_states": [{"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4}]}],
        "lr_schedulers": [{"base_lrs": [1e-4], "_step_count": 2}],
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.5), "best_model_path": "last.ckpt"}},
    }
    lightning = weights_of(load_legacy(saved(tmp_path, checkpoint)))
    assert all(torch.equal(lightning[key], bare[key]) for key in bare)


def test_checkpoint_of_the_old_file_format_is_read(tmp_path: Path) -> None:
    tensors = {"net.a": torch.arange(3.0)}
    path = saved(tmp_path, {"state_dict": tensors}, zipped=False)
    assert torch.equal(read_legacy_state(path)["a"], tensors["net.a"])


def test_half_precision_comes_over_as_float32(tmp_path: Path) -> None:
    state = {key: value.half() for key, value in hollow_state(legacy_shapes()).items()}
    assert {value.dtype for value in weights_of(load_legacy(saved(tmp_path, state))).values()} == {torch.float32}


def test_parts_without_a_role_may_be_left_out(tmp_path: Path) -> None:
    shapes = {key: shape for key, shape in legacy_shapes().items() if not UNUSED.match(key)}
    assert len(shapes) < len(KEYS)
    assert load_legacy(saved(tmp_path, hollow_state(shapes))).config.stages == 3


@pytest.mark.parametrize(("num_classes", "stages"), [(7, 3), (4, 2), (8, 4), (5, 1)])
def test_classes_and_stages_are_read_from_the_shapes(num_classes: int, stages: int) -> None:
    shapes = legacy_shapes(num_classes=num_classes, stages=min(stages, 3))
    if stages == 4:
        shapes |= {key.replace("layers.0", "layers.3"): shape for key, shape in shapes.items() if "layers.0" in key}
    assert infer_config(hollow_state(shapes)) == D2LSConfig(
        backbone="convnext_tiny", num_classes=num_classes, embed_dim=256, stages=stages, reduction=4, in_channels=3
    )


@pytest.mark.parametrize(
    ("backbone", "width", "depth"),
    [("convnext_tiny", 96, 9), ("convnext_small", 96, 27), ("convnext_base", 128, 27), ("convnext_large", 192, 27)],
)
def test_backbone_is_read_from_the_shapes(backbone: str, width: int, depth: int) -> None:
    shapes = {key: shape for key, shape in KEYS.items() if not key.startswith("backbone.0.5.")}
    shapes |= {f"backbone.0.5.{block}.layer_scale": [4 * width, 1, 1] for block in range(depth)}
    shapes["backbone.0.0.0.weight"] = [width, 3, 4, 4]
    assert infer_config(hollow_state(shapes)).backbone == backbone


def test_base_checkpoint_is_read_whole(tmp_path: Path) -> None:
    if not BASE_KEYS.is_file():
        pytest.skip(f"the list of legacy keys is not there: {BASE_KEYS}")
    network = load_legacy(saved(tmp_path, hollow_state(json.loads(BASE_KEYS.read_text()))))
    assert network.config == D2LSConfig(backbone="convnext_base", num_classes=7)


# What is refused


def without(key: str) -> dict[str, Tensor]:
    return {name: value for name, value in hollow_state(KEYS).items() if name != key}


def with_tensor(key: str, value: Tensor) -> dict[str, Tensor]:
    return {**hollow_state(KEYS), key: value}


@pytest.mark.parametrize("key", [place for place in PLACES if "layer" in place or place.endswith("bias")][::4])
def test_missing_tensor_is_named_as_the_file_would_name_it(tmp_path: Path, key: str) -> None:
    with pytest.raises(WeightsError, match=re.escape(key)) as caught:
        load_legacy(saved(tmp_path, without(key)))
    assert "checkpoint.ckpt" in str(caught.value)


@pytest.mark.parametrize(
    "key",
    [
        "decoder.extra.weight",
        "aggregator.bias",
        "linear_c.4.proj.weight",
        "backbone.0.1.0.block.9.weight",
        "backbone.0.9.weight",
        "encoder.aggregator.weight",  # our own name, but not one of the authors'
    ],
)
def test_left_over_tensor_is_named(tmp_path: Path, key: str) -> None:
    with pytest.raises(WeightsError, match=re.escape(key)):
        load_legacy(saved(tmp_path, with_tensor(key, torch.zeros(256, 1024, 1, 1))))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("decoder.token.token_mlp.bias", torch.zeros(7)),
        ("linear_c.0.proj.weight", torch.zeros(96, 256)),  # transposed
        ("backbone.0.1.0.layer_scale", torch.full((96, 1, 1), torch.nan)),
        ("decoder.upsampler.1.bias", torch.zeros(64, dtype=torch.int32)),
    ],
)
def test_tensor_that_does_not_fit_is_named_as_in_the_file(tmp_path: Path, key: str, value: Tensor) -> None:
    with pytest.raises(WeightsError, match=re.escape(key)):
        load_legacy(saved(tmp_path, with_tensor(key, value)))


def test_unknown_backbone_is_told_with_the_known_ones(tmp_path: Path) -> None:
    state = with_tensor("backbone.0.0.0.weight", torch.zeros(64, 3, 4, 4))
    with pytest.raises(WeightsError, match=r"stem width 64 and 9 blocks .* tiny, small, base, large") as caught:
        load_legacy(saved(tmp_path, state))
    assert "checkpoint.ckpt" in str(caught.value)


@pytest.mark.parametrize(
    "state",
    [
        {"weight": torch.zeros(3)},
        {"backbone.0.0.0.weight": torch.zeros(3)},
        with_tensor("decoder.token.basic_queries.weight", torch.zeros(7, 256, 1)),
        with_tensor("decoder.token.basic_queries.weight", torch.zeros(7, 40)),
        with_tensor("decoder.token.basic_queries.weight", torch.zeros(7, 0)),
        with_tensor("decoder.token.token_mlp.weight", torch.tensor(0.0)),
        {key: value for key, value in hollow_state(KEYS).items() if ".layers." not in key},
    ],
    ids=["another network", "stem", "three sides", "odd width", "no width", "a scalar", "no stages"],
)
def test_state_dict_of_something_else_is_refused_with_its_file(tmp_path: Path, state: dict[str, Tensor]) -> None:
    with pytest.raises(WeightsError, match=r"checkpoint\.ckpt"):
        load_legacy(saved(tmp_path, state))


@pytest.mark.parametrize(
    "content",
    [
        None,
        [1, 2],
        torch.zeros(3),
        {},
        {"state_dict": {}},
        {"state_dict": None},
        {"a": torch.zeros(1), "b": 3},
        {0: torch.zeros(1)},
    ],
    ids=["none", "list", "tensor", "empty", "empty state", "no state", "a number", "no names"],
)
def test_file_without_a_state_dict_is_refused(tmp_path: Path, content: Any) -> None:
    with pytest.raises(WeightsError, match="holds no state dict"):
        read_legacy_state(saved(tmp_path, content))


class CreatesFolder:
    """Unpickling it makes a folder, in place of what an attacker would do."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["beside", "within"])
def test_code_in_a_checkpoint_is_refused_and_not_executed(tmp_path: Path, zipped: bool, place: str) -> None:
    trace = tmp_path / "executed"
    state: dict[str, Any] = {"net.a": torch.zeros(1)}
    if place == "within":
        state["net.b"] = CreatesFolder(trace)
    content = {"state_dict": state, "hyper_parameters": CreatesFolder(trace) if place == "beside" else {}}
    path = saved(tmp_path, content, zipped=zipped)
    with pytest.raises(WeightsError, match=r"checkpoint\.ckpt"):
        load_legacy(path)
    assert not trace.exists()


def test_refusal_names_what_was_refused_and_gives_no_advice_to_execute_it(tmp_path: Path) -> None:
    with pytest.raises(WeightsError) as caught:
        load_legacy(saved(tmp_path, {"state_dict": {"a": torch.zeros(1)}, "x": CreatesFolder(tmp_path / "executed")}))
    message = str(caught.value)
    assert "mkdir" in message
    assert not any(advice in message for advice in ("weights_only", "two options", "will likely succeed", "\x1b"))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello",
        b"No such thing as a checkpoint\n",
        b"this is a text file\n",
        b"\xff\xd8\xff\xe0" + bytes(100),
        b"\x80\x02X\x05",
        b"\x80\x02.",
        bytes(2048),
        (2).to_bytes(8, "little") + b"{}",
    ],
    ids=["empty", "text", "text N", "text t", "jpeg", "cut pickle", "empty pickle", "zeros", "safetensors"],
)
def test_file_that_is_no_checkpoint_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "something"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match="something"):
        load_legacy(path)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_checkpoint_is_refused(tmp_path: Path, share: float, zipped: bool) -> None:
    path = saved(tmp_path, {"net.a": torch.rand(100, 100)}, zipped=zipped)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(WeightsError, match=r"checkpoint\.ckpt"):
        load_legacy(path)


def test_zip_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "archive.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("folder/readme.txt", "hello")
    with pytest.raises(WeightsError, match=r"archive\.zip"):
        load_legacy(path)


def test_missing_file_and_folder_are_told(tmp_path: Path) -> None:
    for path in (tmp_path / "none.ckpt", tmp_path):
        with pytest.raises(MissingFileError, match="no such file") as caught:
            load_legacy(path)
        assert isinstance(caught.value, D2LSError)
        assert isinstance(caught.value, FileNotFoundError)
