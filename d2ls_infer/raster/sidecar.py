"""What lies beside a class map and says what its values mean: GDAL's sidecar and a style for QGIS."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from d2ls_infer.labels import NODATA, LabelMap, format_color

INTEGER, STRING = 0, 2
"""Types of a column of a raster attribute table: GDALRATFieldType."""

COLUMNS = (
    ("Value", INTEGER, 5),
    ("Class", STRING, 2),
    ("Count", INTEGER, 1),
    ("Red", INTEGER, 6),
    ("Green", INTEGER, 7),
    ("Blue", INTEGER, 8),
)
"""Name, type and use (GDALRATFieldUsage) of the columns of the table."""


def aux_xml(
    labels: LabelMap, counts: Sequence[int], base: Path | None = None, tags: Mapping[str, str] | None = None
) -> bytes:
    """GDAL's sidecar (`.aux.xml`): the names of the values of band 1, and their raster attribute table.

    counts: pixels of each class. base: a sidecar that GDAL itself has made; what it says is kept. tags: of the raster,
    beside those that it holds itself.
    """
    root = ElementTree.parse(base).getroot() if base is not None and base.exists() else Element("PAMDataset")
    band = root.find("PAMRasterBand[@band='1']")
    if band is None:
        band = SubElement(root, "PAMRasterBand", band="1")
    name_classes(band, labels, counts)
    if tags:
        metadata = SubElement(root, "Metadata")
        for name, text in tags.items():
            SubElement(metadata, "MDI", key=name).text = text
    ElementTree.indent(root)
    return ElementTree.tostring(root) + b"\n"


def name_classes(band: Element, labels: LabelMap, counts: Sequence[int]) -> None:
    """Put the names of the values and their attribute table into what GDAL's XML says of a band, in place of others."""
    for name in ("CategoryNames", "GDALRasterAttributeTable"):  # a COG's copy brings them along
        for old in band.findall(name):
            band.remove(old)
    names = SubElement(band, "CategoryNames")
    for name in labels.names:
        SubElement(names, "Category").text = name
    band.append(attribute_table(labels, counts))


def attribute_table(labels: LabelMap, counts: Sequence[int]) -> Element:
    """One row a class: value, name, pixels, colour."""
    table = Element("GDALRasterAttributeTable", tableType="thematic")
    for index, (name, kind, usage) in enumerate(COLUMNS):
        column = SubElement(table, "FieldDefn", index=str(index))
        for tag, text in (("Name", name), ("Type", str(kind)), ("Usage", str(usage))):
            SubElement(column, tag).text = text
    for value, (name, color, count) in enumerate(zip(labels.names, labels.colors, counts, strict=True)):
        row = SubElement(table, "Row", index=str(value))
        for cell in (value, name, int(count), *color):
            SubElement(row, "F").text = str(cell)
    return table


def style_path(path: Path) -> Path:
    """Where QGIS looks for the style of a raster: beside it, with its name up to the last point."""
    return path.with_suffix(".qml")


def qgis_style(labels: LabelMap) -> bytes:
    """A QGIS layer style (`.qml`) that draws band 1 in the classes' colours with their names as legend."""
    root = Element("qgis", version="3.22", styleCategories="Symbology", hasScaleBasedVisibilityFlag="0")
    pipe = SubElement(root, "pipe")
    renderer = SubElement(pipe, "rasterrenderer", type="paletted", band="1", opacity="1", alphaBand="-1")
    SubElement(renderer, "rasterTransparency")
    palette = SubElement(renderer, "colorPalette")
    for value, (name, color) in enumerate(zip(labels.names, labels.colors, strict=True)):
        SubElement(palette, "paletteEntry", value=str(value), color=format_color(color), alpha="255", label=name)
    SubElement(palette, "paletteEntry", value=str(NODATA), color="#000000", alpha="0", label="no data")
    SubElement(pipe, "rasterresampler", maxOversampling="2")
    SubElement(root, "blendMode").text = "0"
    ElementTree.indent(root)
    head = b"<!DOCTYPE qgis PUBLIC 'http://mrcc.com/qgis.dtd' 'SYSTEM'>\n"
    return head + ElementTree.tostring(root) + b"\n"
