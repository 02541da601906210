"""`d2ls convert`: a checkpoint of the authors' code becomes a file that `load_model` takes, or a line says why not."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor

from d2ls_infer import load_model
from d2ls_infer.cli import main
from d2ls_infer.legacy import load_legacy
from d2ls_infer.weights import find_weights

KEYS: dict[str, list[int]] = json.loads((Path(__file__).parents[1] / "legacy_keys.json").read_text())
CLASSES = "background,building,road,water,barren,forest,agriculture"


def legacy_state(*, hollow: bool = True, in_channels: int = 3) -> dict[str, Tensor]:
    """A legacy state dict of ConvNeXt-Tiny with seven classes. A hollow one makes a small file."""
    shapes = {**KEYS, "backbone.0.0.0.weight": [96, in_channels, 4, 4]}
    generator = torch.Generator().manual_seed(0)
    if hollow:
        return {key: torch.full((1,), 0.5).expand(shape) for key, shape in shapes.items()}
    return {key: 0.1 * torch.randn(shape, generator=generator) for key, shape in shapes.items()}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": {f"net.{key}": value for key, value in legacy_state().items()}}, path)
    return path


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out.safetensors"


def convert(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["convert", *map(str, arguments)])


def assert_failed(result: Result, code: int, *parts: str) -> None:
    assert result.exit_code == code, result.output
    # Anything but SystemExit would be a traceback on the user's terminal.
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1
    assert all(part in errors[0] for part in parts), errors[0]


def test_converted_model_gives_the_logits_of_the_checkpoint(tmp_path: Path, output: Path) -> None:
    checkpoint = tmp_path / "best.ckpt"
    state = legacy_state(hollow=False)
    torch.save({"state_dict": {f"net.{key}": value for key, value in state.items()}, "epoch": 3}, checkpoint)
    result = convert(checkpoint, output, "--classes", CLASSES, "--gsd", "0.3", "--license", "CC-BY-4.0")
    assert result.exit_code == 0, result.output
    assert str(output) in result.stdout
    assert "convnext_tiny, 7 classes, 30.15 M parameters" in result.stdout
    segmenter, pixels = load_model(output, device="cpu"), torch.randn(1, 3, 32, 64)
    with torch.inference_mode():
        expected = load_legacy(checkpoint)(pixels)
        got = segmenter.network(pixels)
    assert expected.std() > 1e-3
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.ckpt", "out.safetensors"]


def test_file_describes_itself_as_it_was_told_to(checkpoint: Path, output: Path) -> None:
    result = convert(
        checkpoint, output, "--classes", " a, b,c,d,e,f,g", "--bands", "nir, red,green",
        "--colors", "#000000,#111111,#222222,#333333,#444444,#555555,#66aaFF",
        "--gsd", "0.09", "--license", "CC0-1.0", "--training-data", "Vaihingen",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    description = find_weights(output).description
    assert description.labels.names == tuple("abcdefg")
    assert description.labels.colors[6] == (0x66, 0xAA, 0xFF)
    assert description.labels.ignore_index == 255
    assert description.bands == ("nir", "red", "green")
    assert description.value_range == (0.0, 255.0)
    assert description.mean == (0.485, 0.456, 0.406)
    assert description.std == (0.229, 0.224, 0.225)
    assert description.gsd_m == 0.09
    assert description.license == "CC0-1.0"
    assert description.training_data == "Vaihingen"
    assert "last.ckpt" in description.source
    assert description.metrics == ()
    assert description.config["backbone"] == "convnext_tiny"


def test_what_is_not_told_is_said_to_be_unknown(checkpoint: Path, output: Path) -> None:
    assert convert(checkpoint, output, "--classes", CLASSES).exit_code == 0
    description = find_weights(output).description
    assert (description.license, description.training_data, description.gsd_m) == ("unknown", "unknown", None)
    assert description.bands == ("red", "green", "blue")
    assert len(set(description.labels.colors)) == 7


def test_output_is_replaced_only_when_asked_to(checkpoint: Path, output: Path) -> None:
    output.write_text("precious")
    assert_failed(convert(checkpoint, output, "--classes", CLASSES), 2, str(output), "--overwrite")
    assert output.read_text() == "precious"
    assert convert(checkpoint, output, "--classes", CLASSES, "--overwrite").exit_code == 0
    assert find_weights(output).description.labels.names[1] == "building"


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--classes", "a,b"], ["7 classes", "2"]),
        (["--classes", "a,b,c,d,e,f,a"], ["twice", "a"]),
        (["--classes", "a,b,c,d,e,f,"], ["empty"]),
        (["--classes", CLASSES, "--colors", "#000000"], ["7 class names but 1 colours"]),
        (["--classes", CLASSES, "--colors", "red"], ["#rrggbb", "red"]),
        (["--classes", CLASSES, "--bands", "red,green"], ["3 bands", "2"]),
        (["--classes", CLASSES, "--bands", "red,green,"], ["band"]),
        (["--classes", CLASSES, "--gsd", "-1"], ["-1"]),
        (["--classes", CLASSES, "--gsd", "nan"], ["nan"]),
        (["--classes", CLASSES, "--gsd", "half"], ["half"]),
        ([], ["--classes"]),
    ],
)
def test_options_that_do_not_fit_exit_with_2_and_write_nothing(
    checkpoint: Path, output: Path, options: list[str], parts: list[str]
) -> None:
    assert_failed(convert(checkpoint, output, *options), 2, *parts)
    assert [path.name for path in output.parent.iterdir()] == ["last.ckpt"]


def test_checkpoint_of_other_than_three_bands_is_refused_with_the_reason(tmp_path: Path, output: Path) -> None:
    checkpoint = tmp_path / "four.pt"
    torch.save(legacy_state(in_channels=4), checkpoint)
    result = convert(checkpoint, output, "--classes", CLASSES, "--bands", "red,green,blue,nir")
    # "takes 4 bands, but --bands names 4" would help nobody.
    assert_failed(result, 2, "four.pt", "4 bands", "3")


def test_missing_checkpoint_and_folder_exit_with_2(checkpoint: Path, tmp_path: Path, output: Path) -> None:
    missing = tmp_path / "none.ckpt"
    assert_failed(convert(missing, output, "--classes", CLASSES), 2, f"no such file: {missing}")
    target = tmp_path / "none" / "out.safetensors"
    assert_failed(convert(checkpoint, target, "--classes", CLASSES), 2, "no such folder", "none")


def test_folder_as_output_exits_with_2(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    assert_failed(convert(checkpoint, folder, "--classes", CLASSES, "--overwrite"), 2, str(folder))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "last.ckpt"]


def test_checkpoint_is_not_replaced_by_its_conversion(checkpoint: Path) -> None:
    before = checkpoint.read_bytes()
    assert_failed(convert(checkpoint, checkpoint, "--classes", CLASSES, "--overwrite"), 2, str(checkpoint))
    assert checkpoint.read_bytes() == before


class CreatesFolder:
    """Unpickling it makes a folder, in place of what an attacker would do."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("damage", ["code", "truncated", "text", "left over", "another network"])
def test_checkpoint_that_cannot_be_read_exits_with_1_and_writes_nothing(
    checkpoint: Path, output: Path, tmp_path: Path, damage: str
) -> None:
    if damage == "code":
        torch.save({"state_dict": legacy_state(), "x": CreatesFolder(tmp_path / "executed")}, checkpoint)
    elif damage == "truncated":
        checkpoint.write_bytes(checkpoint.read_bytes()[:-1000])
    elif damage == "text":
        checkpoint.write_text("hello\nworld\n")
    elif damage == "left over":
        torch.save({**legacy_state(), "decoder.more": torch.zeros(1)}, checkpoint)
    else:
        torch.save({"weight": torch.zeros(3)}, checkpoint)
    assert_failed(convert(checkpoint, output, "--classes", CLASSES), 1, "last.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
