"""Mapping past one process, on Dask: optional (`pip install "d2ls-infer[cluster]"`), and imported where it is asked for.

A scene is cut into bands of rows. Each is mapped by the same loop as a whole scene, out of the tiles that touch it, by
a worker that reads its own part of the scene and keeps its finished rows beside the map; the client puts them together.
"""

from __future__ import annotations

from d2ls_infer.errors import UsageError

try:
    import dask
    import distributed
    import xarray
except ImportError as error:
    raise UsageError(f"work on a cluster needs more packages: pip install 'd2ls-infer[cluster]' ({error})") from error

from d2ls_infer.cluster.run import ClusterOptions, map_scenes

__all__ = ["ClusterOptions", "dask", "distributed", "map_scenes", "xarray"]
