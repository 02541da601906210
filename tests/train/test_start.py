"""What a network starts from: a timm classifier, or another D2LS whose classes and bands may be others."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from timm.layers.drop import DropPath
from timm.models import adapt_input_conv
from torch import Tensor

from d2ls_infer.errors import MissingFileError, UsageError
from d2ls_infer.labels import LabelMap
from d2ls_infer.nn import D2LS, D2LSConfig
from d2ls_infer.train.start import adapt_bands, adopt, drop_paths, load_backbone, quieten

BACKBONE = "mobilenetv3_small_050"
STEM = "encoder.backbone.conv_stem.weight"


def make_network(backbone: str = BACKBONE, seed: int = 0, **changes: Any) -> D2LS:
    torch.manual_seed(seed)
    return D2LS(D2LSConfig(**{"backbone": backbone, "num_classes": 3, "embed_dim": 32, "stages": 1, **changes}))


def copied(network: D2LS) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in network.state_dict().items()}


# Attention


def test_a_quiet_interactor_leaves_image_and_dictionary_as_they_are() -> None:
    network = make_network(stages=2).eval()
    dictionary, features = torch.randn(2, 3, 32), torch.randn(2, 32, 4, 5)
    with torch.inference_mode():
        loud = network.decoder(dictionary, features)
        quieten(network)
        quiet = network.decoder(dictionary, features)
        # Norms alone are left, and of a normed vector they change nothing.
        image = F.layer_norm(features.flatten(2).transpose(1, 2), (32,))
        classes = network.decoder.dictionary_head(F.layer_norm(dictionary, (32,)))
        expected = network.decoder.upsampler(image, classes, 4, 5)
    torch.testing.assert_close(quiet, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(loud, expected, atol=1e-2)


def test_a_quiet_interactor_learns_to_speak() -> None:
    network = make_network().train()
    quieten(network)
    output = network(torch.randn(2, 3, 32, 32))
    output.logits.square().mean().backward()
    for attention in (network.decoder.blocks[0].dictionary_queries_image, network.decoder.final_attention):
        assert attention.out.weight.grad.abs().max() > 0


# Backbones


@pytest.mark.parametrize(
    ("backbone", "places"),
    [(BACKBONE, 1), ("tf_efficientnet_lite0", 1), ("test_convnext", 1), ("swin_tiny_patch4_window7_224", 2)],
)
def test_later_branches_are_left_out_more_often_and_none_of_a_trained_network(backbone: str, places: int) -> None:
    network = make_network(backbone, num_classes=2).encoder.backbone.eval()
    pixels = torch.randn(1, 3, 64, 64)
    before = network(pixels)
    drop_paths(network, 0.3)
    rates = [part.drop_prob for part in network.modules() if isinstance(part, DropPath)]
    blocks = len(rates) // places
    assert rates == pytest.approx([0.3 * (index // places) / (blocks - 1) for index in range(len(rates))])
    assert blocks > 3
    assert all(map(torch.equal, network(pixels), before))
    network.train()
    assert not torch.equal(network(pixels)[-1], network(pixels)[-1])


def test_a_backbone_without_branches_cannot_leave_any_out() -> None:
    with pytest.raises(UsageError, match="drop_path: this backbone has no residual branches"):
        drop_paths(make_network("test_resnet").encoder.backbone, 0.1)


def test_backbone_takes_the_classifiers_weights(backbone_file: Path) -> None:
    classifier, network = load_file(backbone_file), make_network()
    before = copied(network)
    load_backbone(network, backbone_file)
    for key, value in network.encoder.backbone.state_dict().items():
        assert torch.equal(value, classifier[key]), key
    for key, value in network.state_dict().items():
        if not key.startswith("encoder.backbone."):
            assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("bands", [1, 4, 8])
def test_stem_is_adapted_to_the_number_of_bands(backbone_file: Path, bands: int) -> None:
    network = make_network(in_channels=bands)
    load_backbone(network, backbone_file)
    expected = adapt_input_conv(bands, load_file(backbone_file)["conv_stem.weight"])
    torch.testing.assert_close(network.state_dict()[STEM], expected)


@pytest.mark.parametrize("backbone", ["resnet18", "convnext_atto"])
def test_backbones_of_other_families_take_their_weights_too(tmp_path: Path, backbone: str) -> None:
    torch.manual_seed(5)
    classifier = timm.create_model(backbone).state_dict()
    save_file(classifier, tmp_path / "model.safetensors")
    network = make_network(backbone)
    load_backbone(network, tmp_path / "model.safetensors")
    # The features' names differ from the classifier's, so tensors are looked up by what they hold.
    known = {value.numpy().tobytes() for value in classifier.values()}
    for key, value in network.encoder.backbone.state_dict().items():
        assert value.numpy().tobytes() in known, key


def test_files_that_hold_no_weights_of_the_backbone_are_told(tmp_path: Path, backbone_file: Path) -> None:
    network = make_network()
    before = copied(network)
    with pytest.raises(MissingFileError, match=r"no such file: .*none\.safetensors"):
        load_backbone(network, tmp_path / "none.safetensors")
    file = tmp_path / "model.safetensors"
    for content in (b"", b"hello", backbone_file.read_bytes()[:1000]):
        file.write_bytes(content)
        with pytest.raises(UsageError, match=r"model\.safetensors is not a safetensors file, as timm's weights are"):
            load_backbone(network, file)
    save_file({f"blocks.{index}.weight": torch.zeros(2) for index in range(300)}, file)
    with pytest.raises(UsageError, match=f"does not hold the weights of {BACKBONE}: other tensors have other names"):
        load_backbone(network, file)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    resnet, other = tmp_path / "resnet.safetensors", make_network("resnet34")
    save_file(timm.create_model("resnet26").state_dict(), resnet)
    with pytest.raises(UsageError, match="resnet34"):
        load_backbone(other, resnet)


class Evil:
    executed = False

    def __reduce__(self) -> tuple[Any, ...]:
        return setattr, (Evil, "executed", True)


@pytest.mark.parametrize("name", ["model.pth", "model.bin", "model"])
def test_a_pickle_is_not_opened(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UsageError, match="is not a safetensors file"):
        load_backbone(make_network(), tmp_path / name)
    assert not Evil.executed


# Other models


OLD = LabelMap.of(["Field", "water", "road"])
NEW = LabelMap.of(["water", "roof", "field", "tree"])


def test_classes_that_stay_keep_their_rows_in_their_new_places() -> None:
    source, network = make_network(seed=1), make_network(seed=2, num_classes=4)
    before, theirs = copied(network), copied(source)
    assert adopt(network, source, labels=NEW, source_labels=OLD) == ("water", "field")
    after = network.state_dict()
    for key, rows in (
        ("dictionary.static", 1),
        ("dictionary.modulator.head.2.weight", 4),
        ("dictionary.modulator.head.2.bias", 4),
    ):
        # By hand: water was 1 and is 0, field was 0 and is 2, roof and tree are new.
        expected = before[key].clone()
        expected[0 * rows : 1 * rows] = theirs[key][1 * rows : 2 * rows]
        expected[2 * rows : 3 * rows] = theirs[key][0 * rows : 1 * rows]
        assert torch.equal(after[key], expected), key
    for key, value in after.items():
        if not key.startswith(("dictionary.static", "dictionary.modulator.head.2")):
            assert torch.equal(value, theirs[key]), key
    assert all(torch.equal(value, theirs[key]) for key, value in source.state_dict().items())


@torch.no_grad()
def test_model_of_the_same_classes_in_another_order_says_the_same_of_them() -> None:
    source, network = make_network(seed=1).eval(), make_network(seed=2).eval()
    adopt(network, source, labels=LabelMap.of(["road", "field", "water"]), source_labels=OLD)
    pixels = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(network(pixels), source(pixels)[:, [2, 0, 1]])


def test_none_of_the_classes_may_stay() -> None:
    source, network = make_network(seed=1), make_network(seed=2)
    before = copied(network)
    assert adopt(network, source, labels=LabelMap.of(["a", "b", "c"]), source_labels=OLD) == ()
    assert torch.equal(network.state_dict()["dictionary.static"], before["dictionary.static"])
    assert torch.equal(network.state_dict()[STEM], source.state_dict()[STEM])


@pytest.mark.parametrize(("former", "bands"), [(3, 1), (3, 4), (3, 8), (4, 3), (4, 1), (4, 4), (1, 3), (8, 3)])
def test_another_number_of_bands_adapts_the_stem(former: int, bands: int) -> None:
    source, network = make_network(seed=1, in_channels=former), make_network(seed=2, in_channels=bands)
    adopt(network, source, labels=OLD, source_labels=OLD)
    after, theirs = network.state_dict(), source.state_dict()
    for key, value in theirs.items():
        expected = adapt_bands(value, bands) if key == STEM and former != bands else value
        assert torch.equal(after[key], expected), key


@pytest.mark.parametrize("backbone", ["resnet18", "convnext_atto"])
def test_stems_of_other_families_are_found(backbone: str) -> None:
    source, network = make_network(backbone, seed=1), make_network(backbone, seed=2, in_channels=5)
    adopt(network, source, labels=OLD, source_labels=OLD)


@pytest.mark.parametrize("bands", [1, 2, 3, 4, 6, 7])
def test_three_bands_become_others_by_timms_rule(bands: int) -> None:
    weight = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(adapt_bands(weight, bands), adapt_input_conv(bands, weight))


@pytest.mark.parametrize(("former", "bands"), [(4, 1), (4, 8), (2, 6), (1, 3), (5, 5)])
def test_a_grey_image_gives_what_it_gave(former: int, bands: int) -> None:
    weight = torch.randn(2, former, 3, 3)
    torch.testing.assert_close(adapt_bands(weight, bands).sum(1), weight.sum(1))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"backbone": "resnet18"}, f"whose backbone is {BACKBONE}: that of this one is resnet18"),
        ({"embed_dim": 64}, "whose embed_dim is 32: that of this one is 64"),
        ({"stages": 2}, "whose stages is 1: that of this one is 2"),
        ({"reduction": 2}, "whose reduction is 4: that of this one is 2"),
    ],
)
def test_a_model_of_other_sizes_is_refused(changes: dict[str, Any], told: str) -> None:
    network = make_network(**changes)
    before = copied(network)
    with pytest.raises(UsageError, match=told):
        adopt(network, make_network(), labels=OLD, source_labels=OLD)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
