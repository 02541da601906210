"""Train, measure and bundle the models that come with the package.

    python examples/training/bundled.py naip --data DATA --backbone FILE --output RUNS [--bundle]

DATA holds the set's `images/` and `masks/`. A run that was stopped goes on from its checkpoint. --bundle puts the file
into the package and its entry into weights_manifest.json.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
from dataclasses import dataclass, replace
from pathlib import Path

from d2ls_infer.datasets import LabelledImage, find_dataset
from d2ls_infer.evaluate import evaluate
from d2ls_infer.manifest import Metric, ModelDescription
from d2ls_infer.nn import D2LS, D2LSConfig, count_parameters, weights_of
from d2ls_infer.predict import load_model
from d2ls_infer.train.augment import AugmentConfig
from d2ls_infer.train.loop import TrainConfig, train
from d2ls_infer.weights import file_sha256, save_weights

PROJECT = Path(__file__).resolve().parents[2]
ISPRS_LICENSE = "research use only (ISPRS benchmark)"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a bundled model is made with. score: "f1" or "iou", the mean that the dataset's papers give."""

    summary: str
    val_name: str
    score: str
    license: str
    training_data: str
    steps: int
    augment: AugmentConfig
    learning_rate: float = 1e-3
    backbone: str = "tf_efficientnet_lite2"


# The bundled vaihingen and naip were trained when brightness still changed by a share of the value range (0.15), not of
# a crop's own spread; a run today gives close, not the same, weights.
RECIPES = {
    "vaihingen": Recipe(
        summary="urban orthophotos, 9 cm, near infrared, red, green",
        val_name="tile D",
        score="f1",
        license=ISPRS_LICENSE,
        training_data="ISPRS Vaihingen true orthophotos (near infrared, red, green, 9 cm), tiles A and C",
        steps=750,
        augment=AugmentConfig(crop=256, scales=(0.75, 1.5)),
    ),
    "potsdam": Recipe(
        summary="urban orthophotos, 5 cm, red, green, blue",
        val_name="75 patches",
        score="f1",
        license=ISPRS_LICENSE,
        training_data="ISPRS Potsdam true orthophotos (red, green, blue, 5 cm), 600 patches of 224 pixels",
        steps=800,
        # Whole patches: 224 px are 11 m on the ground, and less of them tells a roof from a road no longer.
        augment=AugmentConfig(crop=224, scales=(0.9, 1.15), mosaic=0.0, jitter=0.25),
        learning_rate=7e-4,
    ),
    "naip": Recipe(
        summary="rural and suburban aerial images, 0.6 m, red, green, blue, near infrared",
        val_name="29 tiles",
        score="iou",
        license="Apache-2.0",
        training_data="USDA NAIP imagery (public domain, 0.6 m), labels by yinx111, 169 tiles of 256 pixels",
        steps=500,  # the bundled file's first 300 steps ran on the schedule of a run of 700
        augment=AugmentConfig(crop=256, scales=(0.8, 1.5)),
    ),
}
SCORE_NAMES = {"f1": "mean F1 without clutter", "iou": "mIoU"}
PROTOCOL = "tiles of 512 px, 25 % overlap, Hann blending, no test-time augmentation, float32"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=RECIPES)
    parser.add_argument("--data", type=Path, required=True, help="folder with images/ and masks/")
    parser.add_argument("--backbone", type=Path, help="timm state dict of the backbone; else timm fetches it")
    parser.add_argument("--output", type=Path, required=True, help="folder for checkpoints and the weights file")
    parser.add_argument("--bundle", action="store_true", help="put the result into the package")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    arguments.output.mkdir(parents=True, exist_ok=True)

    recipe, dataset = RECIPES[arguments.name], find_dataset(arguments.name)
    images = dataset.images(arguments.data, "train")
    half = (0.5,) * len(dataset.bands)
    config = TrainConfig(
        network=D2LSConfig(backbone=recipe.backbone, num_classes=len(dataset.labels), in_channels=len(dataset.bands)),
        mean=half,
        std=half,
        steps=recipe.steps,
        learning_rate=recipe.learning_rate,
        augment=recipe.augment,
    )
    network = train(
        config,
        [image.read(dataset.bands) for image in images],
        backbone_file=arguments.backbone,
        checkpoint=arguments.output / f"{arguments.name}.ckpt",
    )
    about = ModelDescription(
        config=network.config.to_dict(),
        labels=dataset.labels,
        bands=dataset.bands,
        value_range=dataset.value_range,
        mean=half,
        std=half,
        gsd_m=dataset.gsd_m,
        metrics=(),
        license=recipe.license,
        training_data=recipe.training_data,
        source="examples/training/bundled.py; backbone started from ImageNet-1k weights (Apache-2.0)",
    )
    file = arguments.output / f"{arguments.name}.safetensors"
    save_measured(file, network, about, dataset.images(arguments.data, "val"), recipe, dataset.left_out)
    if arguments.bundle:
        bundle(arguments.name, file, recipe, count_parameters(network))


def save_measured(
    file: Path,
    network: D2LS,
    about: ModelDescription,
    images: list[LabelledImage],
    recipe: Recipe,
    left_out: tuple[int, ...],
) -> None:
    """Write the weights in half precision, measure what was written, and write them again with the numbers."""
    keep = ("decoder.position.gaussian", "running_mean", "running_var")
    state = {key: value if key.endswith(keep) else value.half() for key, value in weights_of(network).items()}
    save_weights(file, state, about)
    scores = evaluate(load_model(file), images, progress=lambda name, _: print(name)).full.scores()
    values = {
        SCORE_NAMES[recipe.score]: scores.mean(recipe.score, without=left_out),
        "overall accuracy": scores.overall_accuracy,
    }
    short = {"f1": "F1", "iou": "IoU"}[recipe.score]
    for name, value in zip(about.labels.names, getattr(scores, recipe.score), strict=True):
        values[f"{short} {name}"] = value
    measured = tuple(
        Metric(name=name, value=round(100 * float(value), 2), split=recipe.val_name, protocol=PROTOCOL)
        for name, value in values.items()
        if math.isfinite(value)
    )
    save_weights(file, state, replace(about, metrics=measured))


def bundle(name: str, file: Path, recipe: Recipe, num_params: int) -> None:
    """Copy the file into the package and replace its entry in the manifest."""
    from d2ls_infer.weights import read_description

    target = PROJECT / "d2ls_infer" / "bundled" / file.name
    target.parent.mkdir(exist_ok=True)
    target.write_bytes(file.read_bytes())
    entry = {
        "name": name,
        "aliases": [],
        "summary": recipe.summary,
        "file": f"bundled/{file.name}",
        "sha256": file_sha256(target),
        "size": target.stat().st_size,
        "num_params": num_params,
        "description": read_description(target).to_dict(),
    }
    path = PROJECT / "weights_manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    by_name = {model["name"]: model for model in manifest["models"]}
    by_name[name] = by_name.get(name, {}) | entry
    by_name[name].pop("unpublished", None)
    path.write_text(json.dumps(manifest | {"models": list(by_name.values())}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
