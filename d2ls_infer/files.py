"""Small files that are there whole, or not at all, and where this user's files lie."""

from __future__ import annotations

import os
import uuid
from pathlib import Path


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under a name that nobody else has, then give it its own: nobody ever sees half of it.

    Of several that write it at the same time, the last one stays. Raises OSError.
    """
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def user_folder(variable: str, usual: str) -> Path | None:
    """The folder that a variable of the environment names, else the usual one, which lies at home.

    None for a user without a home, as in some containers.
    """
    if named := os.environ.get(variable):
        return Path(named)
    try:
        return Path(usual).expanduser()
    except RuntimeError:
        return None


def cache_folder() -> Path:
    """What can be made anew lies in ~/.cache/d2ls, or under XDG_CACHE_HOME; without a home, where we are."""
    return (user_folder("XDG_CACHE_HOME", "~/.cache") or Path(".cache")).absolute() / "d2ls"
