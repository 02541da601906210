"""What a run takes in memory: measured for the network, worked out for the rest."""

from __future__ import annotations

import re
import sys
from contextlib import suppress
from pathlib import Path

from d2ls_infer.errors import UsageError
from d2ls_infer.raster import READ_BYTES, Scene
from d2ls_infer.tiling import PIECE_BYTES, TileGrid

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
UNITS |= {f"{unit}i": 1024**power for power, unit in enumerate("kmgt", 1)}

PIECES = 24
"""Pieces of finished rows, and what is worked out of them, that are in memory at a time: some wait to be written."""

KEPT = 1.7
"""What the process holds on to for each byte that is in use: up to 1.25 was seen, at widths of 2,048 to 16,384;
once 1.5 to 1.65, on a machine whose cores were wanted by others too."""


STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
"""Where Linux tells what this process takes, and sets the peak back to that: see proc(5)."""


def parse_bytes(text: str | int) -> int:
    """ "2G", "1500MB", "2GiB" or a number -> bytes. Raises UsageError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?", str(text).strip().lower())
    if match is None or (count := int(float(match[1]) * UNITS.get(match[2], 0))) < 1:
        raise UsageError(f"memory is a number of bytes such as 1500M, 2G or 2GiB; got {text!r}")
    return count


def peak_bytes() -> int:
    """The most that this process has had in memory since `forget_peak`, or since it began where that does nothing.

    Raises UsageError where the system does not tell.
    """
    with suppress(OSError, IndexError):
        return int(re.findall(r"VmHWM:\s*(\d+) kB", STATUS.read_text())[0]) * 1024
    try:
        import resource
    except ImportError as error:
        raise UsageError("this system does not tell how much memory a process takes; leave out --max-memory") from error
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def forget_peak() -> None:
    """Let `peak_bytes` begin with what is in memory now, on Linux: what an earlier scene took is none of this one's."""
    with suppress(OSError):
        CLEAR_REFS.write_text("5")


def rows_bytes(
    grid: TileGrid, scene: Scene, *, classes: int, disagreement: bool, layers: int, batch_size: int = 1
) -> int:
    """What reading, blending and writing take besides the network and polygons. layers: bands of all rasters written.

    Planes are float32: the mean of each class, with disagreement its lowest and highest score too, and the weight.
    """
    planes = classes * (3 if disagreement else 1) + 1
    blended = 4 * planes * grid.tile_height * grid.width
    pixel = len(scene.bands) * (1 if scene.as_it_is else 4) + 1  # its values, and whether it is valid
    read = (grid.tile_height + grid.overlap_px) * grid.width * pixel
    tile = grid.tile_height * grid.tile_width
    # Tiles that wait, that were put together, and that were read ahead; and what blending one makes on the way.
    waiting = (3 * batch_size + 1) * tile * pixel
    waiting += 4 * 4 * classes * tile
    scaled = 0 if scene.as_it_is else 3 * min(READ_BYTES, 8 * len(scene.bands) * grid.tile_height * grid.width)
    written = 2 * 512 * scene.width * layers
    return int(
        KEPT * (blended + read + waiting + scaled + written + PIECES * PIECE_BYTES + scene.settings["GDAL_CACHEMAX"])
    )
