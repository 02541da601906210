"""A folder of images and masks: every image with its own mask, or an error that names what is missing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2ls_infer.datasets import LabelledImage, folder_dataset, read_classes
from d2ls_infer.errors import MissingFileError, UsageError
from d2ls_infer.labels import LabelMap

MakeFolder = Callable[..., Path]
Plant = Callable[..., Path]

CLASSES = LabelMap.of(["field", "forest", "water"])


@pytest.fixture
def make_folder(tmp_path: Path) -> MakeFolder:
    """A folder of empty files: nothing here reads what is in them."""

    def make(*, images: list[str], masks: list[str], **splits: str) -> Path:
        for folder, names in (("images", images), ("masks", masks)):
            (tmp_path / folder).mkdir()
            for name in names:
                (tmp_path / folder / name).touch()
        for split, text in splits.items():
            (tmp_path / f"{split}.txt").write_text(text, encoding="utf-8")
        return tmp_path

    return make


def pairs_of(root: Path, split: str = "all") -> list[LabelledImage]:
    return folder_dataset(CLASSES).images(root, split)


def names_of(pairs: list[LabelledImage]) -> list[str]:
    return [pair.name for pair in pairs]


def files_of(root: Path) -> list[str]:
    return [file.name for pair in pairs_of(root) for file in (pair.image, pair.mask) if file]


def test_images_and_masks_of_one_name_are_a_pair_whatever_their_endings(make_folder: MakeFolder) -> None:
    root = make_folder(images=["b.jpg", "a.tif"], masks=["a.png", "b.png"])
    assert files_of(root) == ["a.tif", "a.png", "b.jpg", "b.png"]


def test_mask_without_an_image_is_left_alone(make_folder: MakeFolder) -> None:
    assert names_of(pairs_of(make_folder(images=["a.tif"], masks=["a.png", "b.png"]))) == ["a"]


def test_missing_mask_is_named(make_folder: MakeFolder) -> None:
    root = make_folder(images=["a.tif", "b.tif"], masks=["a.png"], train="a\nb")
    with pytest.raises(MissingFileError, match=r"no mask of the name 'b' in .*masks"):
        pairs_of(root, "train")


def test_split_file_lists_the_names_in_its_order(make_folder: MakeFolder) -> None:
    files = [f"{name}.png" for name in "abc"]
    root = make_folder(images=files, masks=files, train="c\na\n", val="b")
    assert names_of(pairs_of(root, "train")) == ["c", "a"]
    assert names_of(pairs_of(root, "val")) == ["b"]


def test_split_file_may_have_empty_lines_and_windows_line_ends(make_folder: MakeFolder) -> None:
    root = make_folder(images=["a.png", "b.png"], masks=["a.png", "b.png"], train="a\r\n\r\nb\r\n\r\n")
    assert names_of(pairs_of(root, "train")) == ["a", "b"]


def test_name_with_a_space_is_one_name(make_folder: MakeFolder) -> None:
    root = make_folder(images=["tile 1.png", "tile 2.png"], masks=["tile 1.png", "tile 2.png"], train="tile 2\n")
    assert names_of(pairs_of(root, "train")) == ["tile 2"]


def test_name_of_a_split_without_an_image_is_told(make_folder: MakeFolder) -> None:
    root = make_folder(images=["a.png"], masks=["a.png", "z.png"], train="a\nz\n")
    with pytest.raises(MissingFileError, match=r"no image of the name 'z' in .*images"):
        pairs_of(root, "train")


def test_a_missing_folder_and_nothing_to_read_are_told(make_folder: MakeFolder, tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"no such folder: .*none"):
        pairs_of(tmp_path / "none")
    root = make_folder(images=[], masks=[])
    with pytest.raises(MissingFileError, match="no labelled images of folder in "):
        pairs_of(root)
    (root / "train.txt").write_text("\n")
    with pytest.raises(UsageError, match=r"train\.txt names no images"):
        pairs_of(root, "train")


def test_hidden_files_and_folders_are_no_images(make_folder: MakeFolder) -> None:
    root = make_folder(images=["a.png", ".DS_Store"], masks=["a.png", "._a.png"])
    (root / "images" / "thumbnails").mkdir()
    assert files_of(root) == ["a.png", "a.png"]


def test_sidecars_that_gis_programs_leave_are_no_images(make_folder: MakeFolder) -> None:
    root = make_folder(
        images=["a.tif", "a.tfw", "a.tif.aux.xml", "a.tif.ovr", "a.prj", "a.wld"],
        masks=["a.png", "a.pgw", "a.png.aux.xml"],
    )
    assert files_of(root) == ["a.tif", "a.png"]


def test_two_images_of_one_name_are_refused(make_folder: MakeFolder) -> None:
    # Either could be meant, and a map of the wrong one would look fine.
    root = make_folder(images=["a.jpg", "a.tif"], masks=["a.png"])
    with pytest.raises(UsageError, match=r"a\.jpg.*a\.tif"):
        pairs_of(root)


def test_a_folder_with_split_files(plant: Plant, picture: Callable[..., np.ndarray]) -> None:
    names = ["a", "b", "c d"]
    root = plant(
        {f"images/{name}.jpg": picture() for name in [*names, "t"]}
        | {f"labels/{name}.png": np.eye(4, 6) for name in names}
    )
    for split, text in {"train": "c d\na\n", "val": "b.jpg", "test": "t"}.items():
        (root / f"{split}.txt").write_text(text)
    dataset = folder_dataset(CLASSES)
    assert {split: names_of(dataset.images(root, split)) for split in dataset.splits} == {
        "train": ["c d", "a"],
        "val": ["b"],
        "test": ["t"],
    }
    assert names_of(dataset.images(root, "all")) == ["a", "b", "c d"]
    image = dataset.images(root, "val")[0]
    assert (image.read_mask() == np.eye(4, 6)).all()
    assert image.bands == dataset.bands == ("red", "green", "blue")
    (root / "val.txt").unlink()
    with pytest.raises(
        MissingFileError, match=r"no val images of folder in .*looked for images/ .*val\.txt.*by chance\)$"
    ):
        dataset.images(root, "val")


def test_bands_and_range_are_what_is_said_of_them(plant: Plant, picture: Callable[..., np.ndarray]) -> None:
    root = plant({"images/a.tif": picture(2), "masks/a.tif": np.zeros((4, 6))})
    dataset = folder_dataset(CLASSES, bands=["vv", "vh"], value_range=(0.0, 1.0), gsd_m=10.0)
    (image,) = dataset.images(root, "all")
    assert image.read_image(["vh"])[:, 0, 0].tolist() == [11]
    assert (image.value_range, dataset.value_range, dataset.gsd_m) == ((0.0, 1.0), (0.0, 1.0), 10.0)


def test_a_value_that_is_no_class_is_named(plant: Plant, picture: Callable[..., np.ndarray]) -> None:
    root = plant({"images/a.png": picture(), "masks/a.png": np.full((4, 6), 3)})
    with pytest.raises(UsageError, match=r"a\.png: it holds the values 3, .*known are 0, 1, 2, 255"):
        folder_dataset(CLASSES).images(root, "all")[0].read_mask()


@settings(max_examples=20)
@given(
    names=st.sets(st.text("abcdefgh", min_size=1, max_size=6), min_size=30, max_size=40),
    added=st.sets(st.text("ijklm", min_size=1, max_size=6), max_size=10),
    seed=st.integers(0, 3),
)
def test_images_that_are_added_leave_the_others_where_they_were(
    tmp_path_factory: pytest.TempPathFactory, names: set[str], added: set[str], seed: int
) -> None:
    root = tmp_path_factory.mktemp("folder")
    dataset = folder_dataset(CLASSES, fraction=0.5, seed=seed)

    def split(files: set[str]) -> dict[str, set[str]]:
        for folder in ("images", "masks"):
            (root / folder).mkdir(exist_ok=True)
            for name in files:
                (root / folder / f"{name}.png").touch()
        return {split: set(names_of(dataset.images(root, split))) for split in ("train", "val")}

    before, after = split(names), split(added)
    assert before["train"] | before["val"] == names
    assert not before["train"] & before["val"]
    assert all(before[part] == after[part] - added for part in before)


def test_the_fraction_is_about_what_was_asked_for_and_the_seed_chooses(make_folder: MakeFolder) -> None:
    files = [f"{number}.png" for number in range(1000)]
    root = make_folder(images=files, masks=files)
    val = {seed: set(names_of(folder_dataset(CLASSES, fraction=0.2, seed=seed).images(root, "val"))) for seed in (1, 2)}
    assert all(150 < len(names) < 250 for names in val.values())
    assert len(val[1] & val[2]) < 80


@pytest.mark.parametrize(("fraction", "measured"), [(0.0001, 1), (0.9999, 2)])
def test_neither_split_is_empty(make_folder: MakeFolder, fraction: float, measured: int) -> None:
    files = ["a.png", "b.png", "c.png"]
    root = make_folder(images=files, masks=files)
    dataset = folder_dataset(CLASSES, fraction=fraction)
    train, val = (names_of(dataset.images(root, split)) for split in ("train", "val"))
    assert len(val) == measured
    assert sorted(train + val) == ["a", "b", "c"]


def test_one_image_is_not_split(make_folder: MakeFolder) -> None:
    root = make_folder(images=["a.png"], masks=["a.png"])
    for split in ("train", "val"):
        with pytest.raises(UsageError, match=r"one image in .* cannot be split; take --split all"):
            folder_dataset(CLASSES).images(root, split)
    assert names_of(folder_dataset(CLASSES).images(root, "all")) == ["a"]
    with pytest.raises(MissingFileError, match=r"no test images of folder"):
        folder_dataset(CLASSES).images(root, "test")


def test_an_image_without_a_mask_is_an_error_unless_it_is_a_test_image(make_folder: MakeFolder) -> None:
    root = make_folder(images=["a.png", "b.png", "c.png"], masks=["a.png"])
    with pytest.raises(MissingFileError, match=r"no mask of the name '[bc]'"):
        folder_dataset(CLASSES, fraction=0.9999).images(root, "val")
    assert names_of(folder_dataset(CLASSES).images(root, "all")) == ["a"]


def test_settings_that_make_no_sense_are_told() -> None:
    with pytest.raises(UsageError, match=r"lies between 0 and 1, got 1; try 0\.2"):
        folder_dataset(CLASSES, fraction=1.0)
    with pytest.raises(UsageError, match="the background 'road' is none of the classes: field, forest, water"):
        folder_dataset(CLASSES, background="road")


def test_rasters_and_polygons_may_lie_side_by_side(
    tmp_path: Path, write_raster: Callable[..., Path], picture: Callable[..., np.ndarray]
) -> None:
    pytest.importorskip("pyogrio")
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    write_raster(tmp_path / "images/a.tif", picture())
    write_raster(tmp_path / "images/b.tif", picture())
    write_raster(tmp_path / "masks/a.tif", np.full((1, 4, 6), 2, np.uint8))
    corner, size = (500_000.0, 4_600_000.0), 4.0  # of the rasters' grid, two pixels of 2 m
    ring = [[corner[0] + x * size, corner[1] - y * size] for x, y in ((0, 0), (1, 0), (1, 1), (0, 1), (0, 0))]
    (tmp_path / "masks/b.geojson").write_text(
        json.dumps(
            {
                "type": "FeatureCollection",
                "crs": {"type": "name", "properties": {"name": "urn:ogc:def:crs:EPSG::32618"}},
                "features": [
                    {
                        "type": "Feature",
                        "properties": {"kind": "forest"},
                        "geometry": {"type": "Polygon", "coordinates": [ring]},
                    }
                ],
            }
        )
    )
    first, second = folder_dataset(CLASSES, column="kind").images(tmp_path, "all")
    assert (first.read_mask() == 2).all()
    expected = np.full((4, 6), 255)
    expected[:2, :2] = 1
    assert second.read_mask().tolist() == expected.tolist()
    (_, filled) = folder_dataset(CLASSES, column="kind", background="water").images(tmp_path, "all")
    assert filled.read_mask().tolist() == np.where(expected == 255, 2, expected).tolist()


def test_classes_are_a_line_each_with_or_without_a_colour(tmp_path: Path) -> None:
    file = tmp_path / "classes.txt"
    file.write_text("\ufeff# what there is\nbare land\n\n water , #1F78b4 \n", encoding="utf-8")
    labels = read_classes(file)
    assert labels.names == ("bare land", "water")
    assert labels.colors == (LabelMap.of(["bare land"]).colors[0], (31, 120, 180))


def test_classes_without_a_colour_get_the_one_they_have_elsewhere(tmp_path: Path) -> None:
    file = tmp_path / "classes.txt"
    file.write_text("fence\nWater\nforest,#010203\n", encoding="utf-8")
    labels = read_classes(file, like=LabelMap.of(["water", "forest"]))
    assert labels.colors[1:] == (LabelMap.of(["water"]).colors[0], (1, 2, 3))
    assert labels.colors[0] not in LabelMap.of(["water", "forest"]).colors


def test_classes_come_back_from_json(tmp_path: Path) -> None:
    file = tmp_path / "classes.json"
    file.write_text(json.dumps(CLASSES.to_list(), indent=2))
    assert read_classes(file) == CLASSES


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a\n,#000000\n", r"classes, line 2: the name of the class is empty; write NAME or NAME,#rrggbb"),
        ("a\nb,red\n", r"""classes, line 2: a colour is written "#rrggbb", got 'red'"""),
        ("a\n\nb\na\n", r"classes, line 4: the class 'a' stands twice"),
        ("\n# nothing\n", r"classes: it names no classes; write one a line"),
        ('[{"name": "a",\n "color": }]', r"classes, line 2: not JSON: "),
        ('["a", "b"]', r"""classes: labels are a list of \{"name": \.\.\., "color": "#rrggbb"\}"""),
        ("[]", r"classes: a class map holds 1 to 255 classes, got 0"),
    ],
)
def test_a_wrong_file_of_classes_is_told_with_its_line(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "classes").write_text(text)
    with pytest.raises(UsageError, match=told):
        read_classes(tmp_path / "classes")


def test_a_file_of_classes_that_is_none_is_told(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"no such file: .*classes\.txt; it names the classes"):
        read_classes(tmp_path / "classes.txt")
    (tmp_path / "latin").write_bytes("Stra\xdfe".encode("latin-1"))
    with pytest.raises(UsageError, match="latin is not a text in UTF-8"):
        read_classes(tmp_path / "latin")
