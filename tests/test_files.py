"""Files that are there whole, or not at all."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from d2ls_infer.files import cache_folder, user_folder, write_whole
from d2ls_infer.manifest import own_manifest
from d2ls_infer.store import staging_root


def test_a_file_is_made_or_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for content in (b"one", b"two"):
        write_whole(path, content)
        assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_after_an_error_the_older_file_is_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"precious")

    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        write_whole(path, b"new")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"a.json": b"precious"}


@pytest.mark.skipif(sys.platform == "win32", reason="Windows refuses one of two that replace a file at once")
def test_of_several_that_write_a_file_at_once_one_stays_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, contents = tmp_path / "a.json", [bytes([index]) * 10**6 for index in range(4)]
    written, replace = threading.Barrier(4, timeout=20), Path.replace

    def replace_once_all_are_written(partial: Path, target: Path) -> Path:
        written.wait()
        return replace(partial, target)

    monkeypatch.setattr(Path, "replace", replace_once_all_are_written)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda content: write_whole(path, content), contents))
    assert path.read_bytes() in contents
    assert list(tmp_path.iterdir()) == [path]


def test_files_of_a_user_without_a_home_lie_where_we_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", homeless)
    monkeypatch.chdir(tmp_path)
    for variable in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(variable, raising=False)
    assert user_folder("XDG_CACHE_HOME", "~/.cache") is None
    assert cache_folder() == tmp_path / ".cache" / "d2ls"
    assert staging_root() == tmp_path / ".cache" / "d2ls" / "stores"
    assert own_manifest() is None
    monkeypatch.setenv("XDG_CACHE_HOME", "elsewhere")
    assert cache_folder() == tmp_path / "elsewhere" / "d2ls"
