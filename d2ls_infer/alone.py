"""One run at a time makes a map."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from d2ls_infer.errors import OutputBusyError, RasterError
from d2ls_infer.store import named

log = logging.getLogger(__name__)

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
"""What file systems say that have none."""


@contextmanager
def alone(output: Path) -> Iterator[None]:
    """Inside the `with` block no other run makes the map of that name, on this machine or where its folder is shared.

    It holds a lock on a file beside the map, `MAP.tif.lock`, which the system lets go of however the process ends. A
    file system without locks is told, and then nobody is kept away. Of an object store the lock is on this machine.

    Raises OutputBusyError where another run holds it, RasterError where the file cannot be made.
    """
    file = Path(f"{output}.lock")
    lock = FileLock(file, timeout=0, thread_local=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise OutputBusyError(
            f"another run is making {named(output)}, it holds {file}; wait for it, or give another name"
        ) from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise RasterError(f"cannot write {file}: {error.strerror or error}") from error
        log.warning("%s: there are no locks on this file system; see that no other run makes this map", file.parent)
    try:
        yield
    finally:
        with suppress(OSError):  # Windows keeps a file that is open, and filelock removes it there
            file.unlink()
        lock.release()
