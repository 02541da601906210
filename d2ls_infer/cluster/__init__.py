"""Mapping past one process, on Dask: optional (`pip install "d2ls-infer[cluster]"`), imported where it is asked for.

A scene is cut into bands of rows. Each is mapped by the same loop as a whole scene, out of the tiles that touch it, by
a worker that reads its own part of the scene and keeps its finished rows beside the map; the client puts them together.
"""

from __future__ import annotations

from importlib import import_module

from d2ls_infer.errors import UsageError

try:
    for name in ("dask", "distributed", "xarray"):
        import_module(name)
except ImportError as error:
    raise UsageError(f"work on a cluster needs more packages: pip install 'd2ls-infer[cluster]' ({error})") from error

from d2ls_infer.cluster.clients import open_client
from d2ls_infer.cluster.run import ClusterOptions, map_scenes

__all__ = ["ClusterOptions", "map_scenes", "open_client"]
