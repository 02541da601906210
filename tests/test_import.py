"""What an import and a `--help` load: nothing heavy, so that the command line answers at once."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

HEAVY = ("torch", "timm", "rasterio", "numpy", "safetensors", "huggingface_hub", "scipy", "PIL", "tqdm")


def loaded_by(code: str) -> set[str]:
    """The top-level modules in a fresh interpreter after that code."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}})"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return set(done.stdout.splitlines()[-1].split())


def command(*arguments: str) -> str:
    return f"from d2ls_infer.cli import main\nmain({list(arguments)}, standalone_mode=False)"


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert not loaded_by("import d2ls_infer; d2ls_infer.__version__") & set(HEAVY)


@pytest.mark.parametrize("arguments", [["--help"], ["predict", "--help"], ["models"]], ids=" ".join)
def test_help_and_the_list_of_models_load_nothing_heavy(arguments: Sequence[str]) -> None:
    assert not loaded_by(command(*arguments)) & set(HEAVY)


def test_a_bundled_model_maps_a_scene_without_what_it_does_not_need(tmp_path: Path) -> None:
    scene = Path(__file__).parent.parent / "examples" / "naip_scene.tif"
    names = loaded_by(command("predict", str(scene), "--model", "naip", "-o", str(tmp_path / "map.tif")))
    # timm takes longer to import than the map to be made, and a good part of it is torchvision.
    assert {"torch", "rasterio"} <= names
    assert not names & {"timm", "torchvision", "jinja2", "scipy", "lightning", "matplotlib"}


def test_the_public_names_are_there() -> None:
    import d2ls_infer

    for name in d2ls_infer.__all__:
        assert getattr(d2ls_infer, name) is not None


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    import d2ls_infer

    with pytest.raises(AttributeError, match="has no attribute 'predict_everything'"):
        getattr(d2ls_infer, "predict_everything")  # noqa: B009 - a plain access would look like a slip
    assert not hasattr(d2ls_infer, "__path_of_nothing__")
