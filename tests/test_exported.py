"""Files for other runtimes: the labels of the network, what they say of themselves, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from d2ls_infer import backends, exported, load_model, predict_raster
from d2ls_infer.cli import main
from d2ls_infer.errors import D2LSError, OutputExistsError, UsageError, WeightsError
from d2ls_infer.exported import ENDINGS, Agreement, check_export, evenly, export_model, sample_tiles
from d2ls_infer.graphs import GraphFile, read_metadata
from d2ls_infer.manifest import ModelDescription
from d2ls_infer.nn import D2LS, D2LSConfig, weights_of
from d2ls_infer.raster import read_array
from d2ls_infer.smoothing import smoothed
from d2ls_infer.weights import find_weights, save_weights

SIDE = 64

# What the exporters and runtimes say of themselves is not ours to mend.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
]


def skip_without(file_format: str) -> None:
    backend = {"onnx": "onnxruntime", "openvino": "openvino"}[file_format]
    if not backends.is_installed(backend):
        pytest.skip(f"needs {backend}: pip install 'd2ls-infer[{backends.EXTRAS[backend]}]'")


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory, write_raster: Callable[..., Path]) -> Path:
    smooth = np.linspace(0, 250, 3 * 130 * 140).reshape(3, 130, 140).astype(np.uint8)
    return write_raster(tmp_path_factory.mktemp("scene") / "scene.tif", smooth)


@pytest.fixture(scope="module", params=["onnx", "openvino"])
def graph(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_weights: Path, scene: Path
) -> tuple[Path, str]:
    """An exported file, and what the command said."""
    skip_without(request.param)
    path = tmp_path_factory.mktemp("graph") / f"tiny{ENDINGS[request.param]}"
    options = ["--format", request.param, "--tile-size", str(SIDE), "--scene", str(scene), "-o", str(path)]
    result = CliRunner().invoke(main, ["export", "-m", str(tiny_weights), *options])
    assert result.exit_code == 0, result.output
    assert {file.name for file in path.parent.iterdir()} == {path.name} | (
        {"tiny.bin"} if request.param == "openvino" else set()
    )
    return path, result.output


@pytest.fixture(scope="module")
def model(graph: tuple[Path, str]) -> Any:
    """The file, as a segmenter."""
    return load_model(graph[0])


def test_the_command_tells_how_far_labels_are_the_same(graph: tuple[Path, str]) -> None:
    path, told = graph
    assert f"{path}: tiny, tiles of 64 px, float32" in told
    assert f"of {9 * SIDE * SIDE} labels are those of the network in float32" in told
    assert "as it should be: 99.9 % of the labels, and areas within 0.1 %" in told
    assert "forest" in told


def test_a_file_says_what_it_is(graph: tuple[Path, str], model: Any, tiny_weights: Path) -> None:
    found, weights = read_metadata(graph[0]), find_weights(tiny_weights)
    assert ModelDescription.from_dict(json.loads(found["d2ls"])) == weights.description
    assert find_weights(graph[0]).description == replace(weights.description, stated_tile_size=SIDE)
    assert json.loads(found["labels"]) == list(weights.description.labels.names)
    assert json.loads(found["bands"]) == ["red", "green", "blue"]
    assert json.loads(found["value_range"]) == [0, 255]
    assert json.loads(found["gsd_m"]) is None
    assert found["license"] == "CC0-1.0"
    assert found["d2ls_weights_sha256"] == weights.sha256
    assert model.tile_size == SIDE


def test_raw_values_in_probabilities_out(model: Any, tiny_weights: Path) -> None:
    raw = torch.randint(0, 255, (2, 3, SIDE, SIDE), dtype=torch.uint8)
    found = model.score(raw)
    torch.testing.assert_close(found.sum(1), torch.ones(2, SIDE, SIDE), rtol=0, atol=1e-5)
    torch.testing.assert_close(found, load_model(tiny_weights, device="cpu").score(raw), rtol=0, atol=1e-3)


@pytest.mark.parametrize("file_format", ["onnx", "openvino"])
def test_a_file_raises_values_to_the_gamma_of_the_model(file_format: str, tiny_weights: Path, tmp_path: Path) -> None:
    skip_without(file_format)
    dark, path = tmp_path / "dark.safetensors", tmp_path / f"dark{ENDINGS[file_format]}"
    description = replace(find_weights(tiny_weights).description, gamma=0.5, value_range=(50.0, 255.0))
    save_weights(dark, load_file(tiny_weights), description)
    export_model(find_weights(dark), path, file_format=file_format, tile_size=SIDE)
    raw = torch.randint(0, 255, (1, 3, SIDE, SIDE), dtype=torch.uint8)
    expected = load_model(dark, device="cpu").score(raw)
    torch.testing.assert_close(load_model(path).score(raw), expected, rtol=0, atol=2e-5)
    # Random weights tell images hardly apart.
    assert (load_model(tiny_weights, device="cpu").score(raw) - expected).abs().max() > 5e-4


def test_a_file_is_a_model(graph: tuple[Path, str], tiny_weights: Path, scene: Path, tmp_path: Path) -> None:
    expected, found = tmp_path / "expected.tif", tmp_path / "found.tif"
    predict_raster(load_model(tiny_weights, device="cpu"), scene, expected, tile_size=SIDE)
    result = CliRunner().invoke(
        main, ["predict", str(scene), "-m", str(graph[0]), "--tile-size", str(SIDE), "-o", str(found), "-q"]
    )
    assert result.exit_code == 0, result.output
    assert (read_array(found) == read_array(expected)).mean() >= 0.999


def test_smaller_tiles_are_filled_up_and_larger_ones_refused(model: Any) -> None:
    assert model.score(torch.zeros(1, 3, 20, 64, dtype=torch.uint8)).shape == (1, 4, 20, 64)
    with pytest.raises(UsageError, match="exported for tiles of 64 pixels, got 64 x 65; give --tile-size 64"):
        model.score(torch.zeros(1, 3, 64, 65, dtype=torch.uint8))


def test_a_file_keeps_its_runtime_and_precision(graph: tuple[Path, str]) -> None:
    other = {".onnx": "openvino", ".xml": "onnxruntime"}[graph[0].suffix]
    with pytest.raises(UsageError, match=f"not for {other}; leave out --backend"):
        load_model(graph[0], backend=other)
    with pytest.raises(UsageError, match="are in float32; leave out --precision"):
        load_model(graph[0], precision="bfloat16")
    with pytest.raises(UsageError, match="smooths its scores itself; export it with --no-smooth"):
        load_model(graph[0], smooth=False)
    with pytest.raises(UsageError, match="device 'gpu' is not there"):
        load_model(graph[0], device="gpu")


def test_a_file_may_leave_scores_raw(tiny_weights: Path, tmp_path: Path) -> None:
    if not backends.is_installed("onnxruntime"):
        pytest.skip("needs onnxruntime: pip install 'd2ls-infer[onnx]'")
    path = tmp_path / "raw.onnx"
    export_model(find_weights(tiny_weights), path, file_format="onnx", tile_size=SIDE, smooth=False)
    batch = torch.randint(0, 255, (1, 3, SIDE, SIDE), dtype=torch.uint8)
    for smooth in (True, False):
        expected = load_model(tiny_weights, device="cpu", smooth=smooth).score(batch)
        torch.testing.assert_close(load_model(path, smooth=smooth).score(batch), expected, rtol=0, atol=1e-3)


def test_int8_is_made_of_an_encoder_in_float32(
    tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    network = D2LS(D2LSConfig(backbone="resnet18", num_classes=4, embed_dim=32, stages=1))
    description = replace(find_weights(tiny_weights).description, config=network.config.to_dict())
    save_weights(tmp_path / "resnet.safetensors", weights_of(network), description)
    given: list[Any] = []

    def quantised(model: Any, tiles: Any) -> Any:
        given.append(model)
        return model

    monkeypatch.setattr(exported, "quantised", quantised)
    monkeypatch.setattr(exported, "find_spec", lambda name: name)  # nncf, of which nothing is wanted here
    weights, tiles = find_weights(tmp_path / "resnet.safetensors"), [torch.zeros(1, 3, SIDE, SIDE)]
    export_model(
        weights, tmp_path / "a.xml", file_format="openvino", precision="bfloat16", tile_size=SIDE, int8=True,
        calibrate=tiles,
    )  # fmt: skip
    operations = given[0].get_ordered_ops()
    types = {kind: {str(op.get_element_type()) for op in operations if op.get_type_name() == kind}
             for kind in ("Convolution", "MatMul")}  # fmt: skip
    assert types["Convolution"] == {"<Type: 'float32'>"}
    assert "<Type: 'bfloat16'>" in types["MatMul"]


def test_a_file_of_before_smoothing_is_smoothed_after_it(
    graph: tuple[Path, str], model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert GraphFile.of(graph[0]).smooth
    assert model.smooth
    raw = torch.randint(0, 255, (1, 3, SIDE, SIDE), dtype=torch.uint8)
    former = replace(GraphFile.of(graph[0]), smooth=False)
    monkeypatch.setattr(GraphFile, "of", lambda path: former)
    torch.testing.assert_close(load_model(graph[0]).score(raw), smoothed(model.score(raw)))
    assert torch.equal(load_model(graph[0], smooth=False).score(raw), model.score(raw))


def test_an_exported_file_is_not_exported_again(graph: tuple[Path, str], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is an exported file; a weights file is wanted"):
        export_model(find_weights(graph[0]), tmp_path / "again.pt2", file_format="torch.export")


def test_a_damaged_file_is_told(graph: tuple[Path, str], tmp_path: Path) -> None:
    damaged = tmp_path / graph[0].name
    damaged.write_bytes(b"nothing of the kind")
    damaged.with_suffix(".bin").write_bytes(b"")
    with pytest.raises(WeightsError, match="is not a"):
        load_model(damaged)


def test_a_model_of_openvino_wants_its_weights_beside_it(tmp_path: Path) -> None:
    (tmp_path / "alone.xml").write_text("<net/>")
    with pytest.raises(WeightsError, match=r"has no alone.bin beside it"):
        load_model(tmp_path / "alone.xml")
    (tmp_path / "alone.bin").write_bytes(b"")
    with pytest.raises(WeightsError, match="does not describe itself"):
        load_model(tmp_path / "alone.xml")


def test_a_program_of_torch_holds_its_metadata(tiny_weights: Path, scene: Path, tmp_path: Path) -> None:
    weights, path = find_weights(tiny_weights), tmp_path / "tiny.pt2"
    tiles = sample_tiles(weights.description, [str(scene)], SIDE, 2)
    agreement = export_model(weights, path, file_format="torch.export", tile_size=SIDE, tiles=tiles)
    assert agreement is not None
    assert agreement.pixels == 2 * SIDE * SIDE
    assert agreement.is_good
    extra = {"d2ls.json": ""}
    torch.export.load(path, extra_files=extra)
    assert json.loads(extra["d2ls.json"])["d2ls_weights_sha256"] == weights.sha256


def test_a_folder_that_takes_nothing_is_told(
    tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("d2ls_infer.exported.tempfile.TemporaryDirectory", refuse)
    path = tmp_path / "tiny.pt2"
    with pytest.raises(D2LSError, match=r"tiny\.pt2 cannot be written: .*Read-only file system"):
        export_model(find_weights(tiny_weights), path, file_format="torch.export", tile_size=SIDE)


def test_what_is_there_stays(tmp_path: Path) -> None:
    for name, file_format in (("a.pt2", "torch.export"), ("a.bin", "openvino")):
        (tmp_path / name).write_bytes(b"mine")
        if file_format == "openvino" and not backends.is_installed("openvino"):
            continue
        with pytest.raises(OutputExistsError, match=rf"{name} exists; give --overwrite"):
            check(tmp_path / ("a" + ENDINGS[file_format]), file_format=file_format)
    assert (tmp_path / "a.pt2").read_bytes() == b"mine"


def check(output: Path, **options: object) -> None:
    settings = {"file_format": "torch.export", "precision": "float32", "tile_size": 64, "int8": False}
    check_export(output, **{"overwrite": False} | settings | options)  # type: ignore[arg-type]


def test_what_makes_no_sense_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="unknown format 'tflite'"):
        check(tmp_path / "a.tflite", file_format="tflite")
    with pytest.raises(UsageError, match=r"ends in .pt2, got a.onnx"):
        check(tmp_path / "a.onnx")
    with pytest.raises(UsageError, match="int8 is for --format openvino"):
        check(tmp_path / "a.pt2", int8=True)
    with pytest.raises(UsageError, match="a multiple of 32 pixels, got 500"):
        check(tmp_path / "a.pt2", tile_size=500)
    with pytest.raises(UsageError, match="no such folder"):
        check(tmp_path / "nowhere" / "a.pt2")
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'd2ls-infer\[onnx\]'"):
        check(tmp_path / "a.onnx", file_format="onnx")


def test_tiles_are_whole_and_valid(scene: Path, tiny_weights: Path) -> None:
    about = find_weights(tiny_weights).description
    tiles = sample_tiles(about, [str(scene)], SIDE, 3)
    assert [tile.shape for tile in tiles] == [(1, 3, SIDE, SIDE)] * 3
    with pytest.raises(UsageError, match="has no valid tile of 512 pixels"):
        sample_tiles(about, [str(scene)], 512, 3)


def test_tiles_are_from_all_over_a_scene_and_from_all_scenes(scene: Path, tiny_weights: Path) -> None:
    about = find_weights(tiny_weights).description
    whole = sample_tiles(about, [str(scene)], SIDE, 9)
    assert torch.equal(torch.cat(sample_tiles(about, [str(scene)], SIDE, 5)), torch.cat(whole)[[0, 1, 3, 5, 7]])
    assert torch.equal(torch.cat(sample_tiles(about, [str(scene)] * 3, SIDE, 4)), torch.cat(whole)[[0, 4, 0, 0]])
    assert len(sample_tiles(about, [str(scene)] * 3, SIDE, 2)) == 2


@pytest.mark.parametrize("most", [1, 2, 3, 8])
def test_some_of_many_lie_at_most_twice_as_far_apart_as_others(most: int) -> None:
    for count in range(1, 70):
        found = evenly(iter(range(count)), most)
        assert len(found) == min(count, most)
        gaps = np.diff([*found, count])
        assert found[0] == 0
        assert gaps.max() <= 2 * gaps[: max(1, most - 1)].min()


def test_too_few_labels_or_areas_that_are_off_are_not_good() -> None:
    assert Agreement(100, 0.999, (0.001, -0.001), 0.999).is_good
    assert not Agreement(100, 0.998, (0.0, 0.0), 0.999).is_good
    assert not Agreement(100, 0.9999, (0.0, -0.002), 0.999).is_good
