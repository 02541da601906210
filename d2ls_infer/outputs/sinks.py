"""The outputs of a scene: opened together, fed row by row, and all of them whole or none there."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np

from d2ls_infer.errors import OutputExistsError, RasterError, UsageError
from d2ls_infer.labels import LabelMap
from d2ls_infer.outputs.areas import AreaTally, ConfidenceTally
from d2ls_infer.outputs.finished import STEPS, Finished
from d2ls_infer.outputs.options import RASTERS, OutputOptions
from d2ls_infer.outputs.page import Page
from d2ls_infer.outputs.pictures import MapPicture, ScenePicture, in_colors
from d2ls_infer.outputs.stac import TITLES, stac_item
from d2ls_infer.raster import RasterMosaic, RasterWriter, Scene, Strip, check_output, png_bytes
from d2ls_infer.raster.sidecar import style_path
from d2ls_infer.raster.vector import PolygonWriter, check_installed, check_place
from d2ls_infer.raster.writer import check_space
from d2ls_infer.store import MAPS, address_of, clear, exists, upload_all
from d2ls_infer.tiling import Tile, TileGrid


class Sink(Protocol):
    """A file that is being made. It has its name only once it is published; `discard` in place of that removes it."""

    def write(self, rows: Finished) -> None:
        """Take the next rows."""

    def finish(self) -> None:
        """Make the file whole."""

    def publish(self) -> None:
        """Give it its name."""

    def discard(self) -> None:
        """Remove what was made."""


class Layer:
    """A raster whose bands are one of the values of the finished rows."""

    def __init__(self, writer: RasterWriter, values: Callable[[Finished], np.ndarray]) -> None:
        self.writer, self.values = writer, values
        self.finish, self.publish, self.discard = writer.finish, writer.publish, writer.discard

    def write(self, rows: Finished) -> None:
        self.writer.write(self.values(rows))


class Polygons:
    """The polygons of the classes, with their mean confidence."""

    def __init__(self, writer: PolygonWriter) -> None:
        self.writer = writer
        self.finish, self.publish, self.discard = writer.finish, writer.publish, writer.discard

    def write(self, rows: Finished) -> None:
        self.writer.write(rows.labels, rows.confidence)


class WholeFile:
    """A small file that is made at the end, of what others have gathered."""

    def __init__(self, path: Path, make: Callable[[], bytes]) -> None:
        self.path, self.make = path, make
        self.partial = path.with_name(path.name + ".partial")

    def write(self, rows: Finished) -> None:
        """It waits."""

    def finish(self) -> None:
        try:
            self.partial.write_bytes(self.make())
        except OSError as error:
            raise RasterError(f"cannot write {self.path}: {error}") from error

    def publish(self) -> None:
        try:
            self.partial.replace(self.path)
        except OSError as error:
            raise RasterError(f"cannot write {self.path}: {error}") from error

    def discard(self) -> None:
        with suppress(OSError):
            self.partial.unlink(missing_ok=True)


class Outputs:
    """Every file that is made of a scene, as one; a context manager.

    `add` takes finished rows, from top to bottom, `seeing` the tiles as they are read. At the end of the `with` block
    all files are made whole, and only then do they get their names, the map first; after an error before that, no file
    is left and older ones are as they were. Files for an object store are made where `d2ls_infer.store.place` says, and
    then uploaded, the map last; after an error none of them is there.

    files: what is written, by what it holds, with what lies beside the map. tally: areas of the classes so far. notes:
    what the report shall tell of the run besides. side_tags: of the map, but not in its own bytes. strips: of a map
    that is left in pieces, the maps of its rows; of it `add` takes what `needs_rows` says. threads: that compress each
    raster.
    """

    def __init__(
        self,
        output: Path,
        options: OutputOptions,
        *,
        scene: Scene,
        labels: LabelMap,
        name: str,
        tags: Mapping[str, str],
        side_tags: Mapping[str, str] | None = None,
        grid: TileGrid,
        bands: tuple[str, ...] = (),
        overwrite: bool = False,
        strips: Sequence[Strip] = (),
        threads: int = 1,
    ) -> None:
        self.threads, self.side_tags = threads, side_tags
        self.path, self.options, self.scene, self.labels, self.tags = output, options, scene, labels, tags
        self.strips = strips
        self.files = options.files(output)
        self.notes: dict[str, Any] = {}
        self.tally = AreaTally(scene, labels)
        self.sinks: list[Sink] = []
        self.gatherers: list[AreaTally | ConfidenceTally | MapPicture] = [self.tally]
        self.scene_picture = ScenePicture(grid, bands) if options.report else None
        clear(self.everything())  # of a run that was killed while it uploaded
        try:
            self.open_rasters(name, overwrite=overwrite)
            self.open_vector(overwrite=overwrite)
            self.open_pictures()
        except BaseException:
            self.discard()
            raise
        if options.stac:
            self.sinks.append(WholeFile(self.files["stac"], self.stac))

    def open_rasters(self, name: str, *, overwrite: bool) -> None:
        """The map, and the other rasters that are asked for."""
        common: dict[str, Any] = {"like": self.scene, "tags": self.tags, "overwrite": overwrite}
        description = f"class (D2LS {name})"
        writer = self.writer("classes", labels=self.labels, description=description, side_tags=self.side_tags, **common)
        self.sinks.append(Layer(writer, lambda rows: rows.labels))
        for kind in RASTERS:
            if kind in self.files:
                bands = self.labels.names if kind == "probabilities" else (TITLES[kind],)
                writer = self.writer(kind, description=bands, scale=1 / STEPS, **common)
                self.sinks.append(Layer(writer, lambda rows, kind=kind: getattr(rows, kind)))  # type: ignore[misc]

    def writer(self, kind: str, **about: Any) -> RasterWriter:
        """What makes a raster."""
        if not self.options.vrt:
            counts = self.tally.pixels if kind == "classes" else None
            return RasterWriter.create(
                self.files[kind], cog=self.options.cog, counts=counts, threads=self.threads, **about
            )
        strips = [strip._replace(path=self.options.of_piece().files(strip.path)[kind]) for strip in self.strips]
        return RasterMosaic.create(self.files[kind], strips=strips, counts=self.tally.pixels, **about)

    @property
    def needs_rows(self) -> bool:
        """Whether there is anything to be made of the rows; of a map in pieces there is not always."""
        return not self.options.vrt or bool({"vector", "preview", "report"} & set(self.files))

    def open_vector(self, *, overwrite: bool) -> None:
        """The polygons, where they are asked for."""
        if "vector" in self.files:
            writer = PolygonWriter(
                self.files["vector"],
                like=self.scene,
                labels=self.labels,
                steps=STEPS,
                min_area_m2=self.options.min_area_m2 or 0.0,
                simplify_m=self.options.simplify_m,
                tags=self.tags,
                overwrite=overwrite,
            )
            self.sinks.append(Polygons(writer))

    def open_pictures(self) -> None:
        """Preview and report, and what gathers what they show."""
        if not {"preview", "report"} & set(self.files):
            return
        picture = MapPicture(self.scene.height, self.scene.width)
        self.gatherers.append(picture)
        if "preview" in self.files:
            make = lambda: png_bytes(in_colors(picture.result(), self.labels))  # noqa: E731
            self.sinks.append(WholeFile(self.files["preview"], make))
        if "report" in self.files:
            confidence = ConfidenceTally()
            self.gatherers.append(confidence)
            self.sinks.append(WholeFile(self.files["report"], lambda: self.report(picture, confidence)))

    def report(self, picture: MapPicture, confidence: ConfidenceTally) -> bytes:
        """The page."""
        assert self.scene_picture is not None
        page = Page(
            scene=self.scene,
            labels=self.labels,
            areas=self.tally.result(),
            confidence=confidence,
            picture=self.scene_picture.result(),
            classes=picture.result(),
            files=self.files,
            tags=self.tags,
            notes=self.notes,
        )
        return page.render().encode()

    def stac(self) -> bytes:
        """The item."""
        files = self.files | {"style": style_path(self.path)}
        if not self.options.vrt:
            files["sidecar"] = Path(f"{self.path}.aux.xml")
        item = stac_item(files, scene=self.scene, labels=self.labels, tags=self.tags, cog=self.options.cog)
        return json.dumps(item, indent=2, ensure_ascii=False).encode() + b"\n"

    def seeing(self, tiles: Iterable[tuple[Tile, Any]]) -> Iterator[tuple[Tile, Any]]:
        """The tiles as they come, looked at for the report."""
        for tile, (values, valid) in tiles:
            if self.scene_picture is not None:
                self.scene_picture.add(tile, values, valid)
            yield tile, (values, valid)

    def add(self, rows: Finished) -> None:
        """The next rows."""
        for gatherer in self.gatherers:
            gatherer.add(rows)
        for sink in self.sinks:
            sink.write(rows)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.discard()
            return
        try:
            for sink in self.sinks:
                sink.finish()
            for sink in self.sinks:
                sink.publish()
            upload_all(self.everything())
        except BaseException:
            self.discard()
            raise
        finally:
            clear(self.everything())

    def everything(self) -> list[Path]:
        """All files that there may be, also those beside rasters of themselves; the map last."""
        files = [file for path in self.files.values() for file in (Path(f"{path}.aux.xml"), path) if file != self.path]
        return [*files, style_path(self.path), self.path]

    def discard(self) -> None:
        """Remove what was not finished."""
        for sink in self.sinks:
            sink.discard()


def check_outputs(
    output: Path,
    options: OutputOptions,
    *,
    source: str,
    overwrite: bool,
    scene: Scene | None = None,
    classes: int = 1,
) -> None:
    """Everything that can be known of all outputs before work starts; with a scene, what depends on it too.

    Raises what `check_output` does; UsageError for a map that is not named as one, clashing names, what is not
    installed, and a scene that polygons cannot be made of; RasterError for a disk that is full; StoreError for an
    object store that does not answer.
    """
    if not output.is_dir() and output.suffix.lower() not in (*MAPS, *([".vrt"] if options.vrt else [])):
        raise UsageError(f"{output} is no folder, and a map is a GeoTIFF: name it .tif, or make the folder first")
    files = options.files(output)
    style = style_path(output)
    if style in files.values():
        raise UsageError(f"several outputs would be written to {style}")
    for place in (source, *(scene.dataset.files if scene else ())):  # a VRT shows other files
        for path in (*files.values(), style):
            check_output(path, source=str(place), overwrite=overwrite or address_of(path) is not None)
    for path in (*files.values(), style):
        if not overwrite and address_of(path) and exists(path):
            raise OutputExistsError(
                f"{address_of(path)} exists; give --overwrite (in Python overwrite=True) to replace it"
            )
    if "vector" in files:
        check_installed(files["vector"], simplified=options.simplify_m is not None)
    if scene is not None:
        if "vector" in files:
            check_place(scene, measured=bool(options.min_area_m2 or options.simplify_m))
        check_space(output.parent, options.layers(classes) * scene.height * scene.width)
