"""Many scenes, one after the other: what is wrong with one does not stop the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from d2ls_infer.errors import D2LSError, UsageError
from d2ls_infer.job import PredictResult, checked, default_output
from d2ls_infer.load import load_segmenter
from d2ls_infer.options import PredictOptions
from d2ls_infer.plan import Plan, plan_raster
from d2ls_infer.predict import Progress, check_whole_rasters, predict_raster
from d2ls_infer.segmenter import Segmenter, name_of
from d2ls_infer.store import named, place
from d2ls_infer.weights import WeightsFile, find_weights

T = TypeVar("T")

Model = Segmenter | WeightsFile | str | Path
"""A segmenter; or what one is loaded from, once there is a scene to map."""

Follow = Callable[[str], AbstractContextManager[Progress | None]]
"""Called with each scene's name before its first tile; gives what is to be told of its tiles."""


@dataclass(frozen=True)
class FailedScene:
    """A scene of which no map was made, and why."""

    source: str
    error: D2LSError


def predict_many(
    model: Model,
    sources: Iterable[str | Path],
    output: str | Path | None = None,
    *,
    overwrite: bool = False,
    resume: bool = False,
    load: Callable[[WeightsFile], Segmenter] = load_segmenter,
    follow: Follow = lambda name: nullcontext(),
    **options: Any,
) -> Iterator[PredictResult | FailedScene]:
    """Map each of the scenes, see `predict_raster`; gives a result for each, or what is wrong with it.

    All are looked at first: those that cannot be mapped come before the first is mapped. Raises UsageError for what is
    wrong with all of them: options that make no sense, several scenes for one output.
    """

    def act(segmenter: Segmenter, source: str, path: Path) -> PredictResult:
        with follow(Path(source).name) as progress:
            return predict_raster(
                segmenter, source, path, overwrite=overwrite, resume=resume, progress=progress, **options
            )

    settings = PredictOptions(**options)
    check_whole_rasters(settings)
    return each_scene(act, model, sources, output, settings, load, overwrite=overwrite or resume)


def plan_many(
    model: Model,
    sources: Iterable[str | Path],
    output: str | Path | None = None,
    *,
    overwrite: bool = False,
    load: Callable[[WeightsFile], Segmenter] = load_segmenter,
    **options: Any,
) -> Iterator[Plan | FailedScene]:
    """What `predict_many` would do with the same arguments; nothing is written."""

    def act(segmenter: Segmenter, source: str, path: Path) -> Plan:
        return plan_raster(segmenter, source, path, overwrite=overwrite, **options)

    return each_scene(act, model, sources, output, PredictOptions(**options), load, overwrite=overwrite)


def each_scene(
    act: Callable[[Segmenter, str, Path], T],
    model: Model,
    sources: Iterable[str | Path],
    output: str | Path | None,
    options: PredictOptions,
    load: Callable[[WeightsFile], Segmenter],
    *,
    overwrite: bool,
) -> Iterator[T | FailedScene]:
    """What `act` gives for the segmenter, each scene and the path of its map; first the scenes that cannot be mapped.

    Raises UsageError where they cannot have a map each.
    """
    found = find_weights(model) if isinstance(model, str | Path) else model
    ready, failed = looked_at(found, sources, output, options, overwrite=overwrite)

    def results() -> Iterator[T | FailedScene]:
        yield from failed
        if not ready:
            return
        segmenter = load(found) if isinstance(found, WeightsFile) else found
        for source, path, _ in ready:
            try:
                result = act(segmenter, source, path)
            except D2LSError as error:
                yield FailedScene(source, error)
            else:
                yield result

    return results()


class Ready(NamedTuple):
    """A scene that can be mapped, the path of its map, and how many pixels it has."""

    source: str
    output: Path
    pixels: int


def looked_at(
    model: Segmenter | WeightsFile,
    sources: Iterable[str | Path],
    output: str | Path | None,
    options: PredictOptions,
    *,
    overwrite: bool,
) -> tuple[list[Ready], list[FailedScene]]:
    """The scenes that can be mapped, and those that cannot. Raises UsageError where they cannot have a map each."""
    known: Any = model.description if isinstance(model, WeightsFile) else model
    name = name_of(model)
    ready, failed = [], []
    for source, path in places(list(map(str, sources)), None if output is None else place(output), name, options):
        try:
            with checked(known, name, source, path, options, overwrite=overwrite) as job:
                ready.append(Ready(source, path, job.scene.height * job.scene.width))
        except D2LSError as error:
            failed.append(FailedScene(source, error))
    return ready, failed


def places(sources: list[str], output: Path | None, name: str, options: PredictOptions) -> list[tuple[str, Path]]:
    """Each scene with the path of its map. Raises UsageError where they cannot have one each."""
    folder = output if output is not None and output.is_dir() else None
    if len(sources) > 1 and output is not None and folder is None:
        raise UsageError(f"{len(sources)} scenes, but one output: {named(output)} is not a folder")
    whole = output if folder is None else None
    found = [(source, options.named(whole or default_output(source, name, folder))) for source in sources]
    files = [file for _, path in found for file in options.files(path).values()]
    counts = Counter(file.resolve() for file in files)
    if twice := {str(named(file)) for file in files if counts[file.resolve()] > 1}:
        raise UsageError(f"several scenes would be written to {', '.join(sorted(twice))}")
    return found
