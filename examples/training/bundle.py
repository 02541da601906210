"""Put trained weights into the package: the file, and its entry in weights_manifest.json.

    python examples/training/bundle.py dubai --measured runs/dubai/dubai.safetensors \
        --shipped runs/dubai-all/dubai.safetensors

The shipped file saw all labelled images, so nothing is left to measure it on: its numbers are those of the file that
was trained in the same way without the validation images, and it says so. Without --shipped that file itself goes in.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors.torch import load_file

from d2ls_infer.manifest import Metric
from d2ls_infer.nn import count_parameters
from d2ls_infer.weights import file_sha256, load_network, read_description, save_weights

PROJECT = Path(__file__).resolve().parents[2]
ISPRS_LICENSE = "research use only (ISPRS benchmark)"


@dataclass(frozen=True, kw_only=True)
class About:
    """What a bundled model says of itself. score: the metric that comes first, the one its benchmark gives.

    trained_on: the images of the measured file; and_on: those that the shipped file saw besides. note: what a user
    must know, said once at load. tile_size: of the tiles that it is best mapped by, where that is not the usual.
    """

    summary: str
    score: str
    license: str
    imagery: str
    trained_on: str
    and_on: str
    measured_on: str
    note: str = ""
    tile_size: int | None = None


MODELS = {
    "vaihingen": About(
        summary="urban orthophotos, 9 cm, near infrared, red, green",
        score="mean F1",
        license=ISPRS_LICENSE,
        imagery="ISPRS Vaihingen true orthophotos (near infrared, red, green, 9 cm), and 600 patches of ISPRS Potsdam "
        "with a near infrared that was made up",
        trained_on="tiles A and C",
        and_on="tile D",
        measured_on="tile D",
    ),
    "potsdam": About(
        summary="urban orthophotos, 5 cm, red, green, blue",
        score="mean F1",
        license=ISPRS_LICENSE,
        imagery="ISPRS Potsdam true orthophotos (red, green, blue, 5 cm), and three tiles of ISPRS Vaihingen with a "
        "blue that was made up",
        trained_on="600 patches of 224 pixels",
        and_on="75 more",
        measured_on="75 patches",
    ),
    "naip": About(
        summary="rural and suburban aerial images, 0.6 m, red, green, blue, near infrared",
        score="mIoU",
        license="Apache-2.0",
        imagery="USDA NAIP imagery (public domain, 0.6 m), labels by yinx111",
        trained_on="169 tiles of 256 pixels",
        and_on="29 more",
        measured_on="29 tiles",
    ),
    "naip-rgb": About(
        summary="rural and suburban aerial images, 0.6 m, red, green, blue",
        score="mIoU",
        license="Apache-2.0",
        imagery="USDA NAIP imagery (public domain, 0.6 m, without its near infrared), labels by yinx111",
        trained_on="169 tiles of 256 pixels",
        and_on="29 more",
        measured_on="29 tiles",
    ),
    "dubai": About(
        summary="a desert city from satellites, red, green, blue",
        score="mIoU",
        license="Apache-2.0",
        imagery="satellite images of Dubai (Semantic Segmentation of Aerial Imagery, Humans in the Loop and MBRSC)",
        trained_on="tiles 1 to 7",
        and_on="tile 8",
        measured_on="tile 8",
        tile_size=1536,
    ),
    "cloud": About(
        summary="preview: clouds and their shadows in Landsat 8 scenes, 30 m; few images",
        score="mIoU",
        license="Apache-2.0",
        imagery="USGS Landsat 8 Biome cloud validation (public domain, 30 m, reflectance at the top of the atmosphere)",
        trained_on="23 patches of 256 pixels",
        and_on="8 more",
        measured_on="8 patches",
        note="a preview, trained on 31 patches of 256 pixels; it misses many thin clouds and shadows",
    ),
    "loveda": About(
        summary="preview: rural land cover, 0.3 m, red, green, blue; few images, nearly all rural",
        score="mIoU",
        license="CC-BY-NC-SA-4.0",
        imagery="LoveDA (0.3 m) and NAIP land cover (0.6 m, enlarged, under LoveDA's classes), started from the model "
        "naip-rgb",
        trained_on="22 images and 3 crops, nearly all rural, 26 low-resolution pairs and 169 tiles",
        and_on="images 20 to 27 and 2996 and 29 tiles",
        measured_on="9 images",
        note="a preview, trained on 34 labelled images and crops of LoveDA, nearly all rural, 26 low-resolution pairs "
        "and 198 tiles of NAIP",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=MODELS)
    parser.add_argument("--measured", type=Path, required=True, help="file trained without the validation images")
    parser.add_argument("--shipped", type=Path, help="file trained with them too")
    arguments = parser.parse_args()

    about, measured = MODELS[arguments.name], read_description(arguments.measured)
    source = arguments.shipped or arguments.measured
    described = read_description(source)
    trained_on = f"{about.trained_on}, then with {about.and_on} too" if arguments.shipped else about.trained_on
    note = ", at first held out" if arguments.shipped else ""
    description = replace(
        described,
        license=about.license,
        note=about.note,
        stated_tile_size=about.tile_size or described.stated_tile_size,
        training_data=f"{about.imagery}, {trained_on}",
        source=f"examples/training/README.md; {described.source}",
        metrics=order(measured.metrics, about.score, f"{about.measured_on}{note}"),
    )
    target = PROJECT / "d2ls_infer" / "bundled" / f"{arguments.name}.safetensors"
    target.parent.mkdir(exist_ok=True)
    save_weights(target, load_file(source), description)
    entry = {
        "name": arguments.name,
        "aliases": [],
        "summary": about.summary,
        "file": f"bundled/{target.name}",
        "sha256": file_sha256(target),
        "size": target.stat().st_size,
        "num_params": count_parameters(load_network(target, description)),
        "description": description.to_dict(),
    }
    path = PROJECT / "weights_manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    by_name = {model["name"]: model for model in manifest["models"]} | {arguments.name: entry}
    models = [by_name[name] for name in MODELS if name in by_name]
    models += [model for name, model in by_name.items() if name not in MODELS]
    path.write_text(json.dumps(manifest | {"models": models}, indent=2) + "\n", encoding="utf-8")


def order(metrics: tuple[Metric, ...], first: str, split: str) -> tuple[Metric, ...]:
    """The benchmark's own metric first, and where all were measured."""
    named = [replace(metric, split=split) for metric in metrics]
    return tuple(sorted(named, key=lambda metric: not metric.name.startswith(first)))


if __name__ == "__main__":
    main()
