"""Which files are made, how they are called, and what makes no sense."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from d2ls_infer.errors import UsageError
from d2ls_infer.outputs import OutputOptions

MAP = Path("maps/scene.v1_d2ls-naip.tif")


def test_a_map_is_all_by_default() -> None:
    assert OutputOptions().files(MAP) == {"classes": MAP}


def test_files_are_called_by_what_they_hold() -> None:
    options = OutputOptions(
        confidence=True, probabilities=True, entropy=True, disagreement=True, stac=True,
        vector=".gpkg", report=".html", preview=".png",
    )  # fmt: skip
    stem = "scene.v1_d2ls-naip"
    assert {name: path.name for name, path in options.files(MAP).items()} == {
        "classes": f"{stem}.tif",
        "confidence": f"{stem}_confidence.tif",
        "probabilities": f"{stem}_probabilities.tif",
        "entropy": f"{stem}_entropy.tif",
        "disagreement": f"{stem}_disagreement.tif",
        "vector": f"{stem}_polygons.gpkg",
        "report": f"{stem}_report.html",
        "preview": f"{stem}_preview.png",
        "stac": f"{stem}_stac.json",
    }
    assert {path.parent for path in options.files(MAP).values()} == {Path("maps")}


def test_a_file_of_its_own_name_is_where_it_is_told() -> None:
    options = OutputOptions(vector="other/a.PARQUET", report=Path("b.html"), preview="/c.png")
    files = options.files(MAP)
    assert [files[name] for name in ("vector", "report", "preview")] == [
        Path("other/a.PARQUET"), Path("b.html"), Path("/c.png"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"vector": "polygons.shp"}, ["--vector", ".gpkg or .fgb or .parquet", "'polygons.shp'"]),
        ({"vector": "gpkg"}, ["--vector", "'gpkg'"]),
        ({"vector": "folder/"}, ["--vector"]),
        ({"report": "report.pdf"}, ["--report", ".html"]),
        ({"report": "scene.tif"}, ["--report", "'scene.tif'"]),
        ({"preview": "map.jpg"}, ["--preview", ".png"]),
        ({"report": True}, ["--report", ".html", "'True'"]),
        ({"vector": 3}, ["--vector", "'3'"]),
        ({"min_area_m2": 5.0}, ["--min-area", "--vector"]),
        ({"simplify_m": 5.0}, ["--simplify", "--vector"]),
        ({"vector": ".gpkg", "min_area_m2": 0.0}, ["--min-area", "more than 0", "got 0"]),
        ({"vector": ".gpkg", "simplify_m": -1.0}, ["--simplify", "got -1"]),
        ({"vector": ".gpkg", "simplify_m": float("nan")}, ["--simplify", "nan"]),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        OutputOptions(**options)
    for word in words:
        assert word in str(caught.value)


def test_two_outputs_are_never_one_file() -> None:
    with pytest.raises(UsageError, match="several outputs"):
        OutputOptions(report="a/../x.html", preview=".png").files(Path("x.html"))
