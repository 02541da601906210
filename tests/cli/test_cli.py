"""What all commands share: help, version, spelling, how an error looks."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from d2ls_infer.cli import D2LSGroup
from d2ls_infer.errors import D2LSError, MissingFileError, RasterError, UsageError, WeightsError
from d2ls_infer.manifest import load_manifest

COMMANDS = ("predict", "evaluate", "train", "models", "convert", "publish")
D2LS = Callable[..., Result]
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_lists_the_commands(d2ls: D2LS, flag: str) -> None:
    result = d2ls(flag)
    assert result.exit_code == 0
    assert result.stderr == ""
    for command in COMMANDS:
        assert command in result.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help(d2ls: D2LS, command: str) -> None:
    result = d2ls(command, "--help")
    assert result.exit_code == 0
    assert result.stdout.startswith(f"Usage: main {command}")
    assert "_" not in "".join(word for word in result.stdout.split() if word.startswith("--"))


def test_version_is_the_packages(d2ls: D2LS) -> None:
    assert d2ls("--version").stdout == f"d2ls, version {version('d2ls-infer')}\n"


@pytest.mark.parametrize(
    "arguments", [["map"], ["predict"], ["predict", "a.tif"], ["models", "more"], ["--tile-size", "3"]]
)
def test_what_click_does_not_understand_is_a_usage_error(d2ls: D2LS, arguments: list[str]) -> None:
    result = d2ls(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.splitlines()[-1].startswith("Error: ")


def test_models_lists_the_manifest(d2ls: D2LS) -> None:
    result = d2ls("models")
    assert result.exit_code == 0
    for entry in load_manifest().entries:
        assert entry.name in result.stdout


@pytest.mark.parametrize(
    ("error", "exit_code"),
    [
        (UsageError("no such\n  thing"), 2),
        (MissingFileError("no such\n  thing"), 2),
        (RasterError("no such\n  thing"), 1),
        (WeightsError("no such\n  thing"), 1),
        (D2LSError("no such\n  thing"), 1),
    ],
)
def test_an_error_is_one_line_and_its_exit_code(error: D2LSError, exit_code: int) -> None:
    group = D2LSGroup("group")

    @group.command()
    def fail() -> None:
        raise error

    result = CliRunner().invoke(group, ["fail"])
    assert result.exit_code == exit_code
    assert result.stdout == ""
    assert result.stderr == "Error: no such thing\n"


def test_a_bug_keeps_its_traceback() -> None:
    group = D2LSGroup("group")

    @group.command()
    def fail() -> None:
        raise ZeroDivisionError

    result = CliRunner().invoke(group, ["fail"])
    assert result.exit_code == 1
    assert isinstance(result.exception, ZeroDivisionError)


def test_an_interruption_is_not_a_success() -> None:
    group = D2LSGroup("group")

    @group.command()
    def fail() -> None:
        raise KeyboardInterrupt

    result = CliRunner().invoke(group, ["fail"])
    assert result.exit_code == 130
    assert isinstance(result.exception, SystemExit)
    assert result.stderr == "Error: stopped\n"


def test_the_command_is_installed(run_d2ls: Run) -> None:
    done = run_d2ls("--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"d2ls, version {version('d2ls-infer')}\n"


def test_the_package_runs_as_a_module(tmp_path: Path) -> None:
    """For those whose scripts folder is not on the path."""
    done = subprocess.run(
        [sys.executable, "-m", "d2ls_infer", "--version"], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"d2ls, version {version('d2ls-infer')}\n"


def test_an_unknown_model_is_told_at_once(run_d2ls: Run, tmp_path: Path) -> None:
    """Before the scene is looked at, and before torch is loaded."""
    name = load_manifest().entries[0].name
    done = run_d2ls("predict", "nowhere.tif", "--model", f"{name}x", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("Error: unknown model")
    assert done.stderr.count("\n") == 1
    assert f"did you mean {name}" in done.stderr
