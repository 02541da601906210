"""Train, measure and bundle the models that come with the package.

    python examples/training/bundled.py naip --data DATA --backbone FILE --output RUNS [--bundle]

DATA holds the set's `images/` and `masks/`. A run that was stopped goes on from its checkpoint. --bundle puts the file
into the package and its entry into weights_manifest.json.
"""

from __future__ import annotations

import argparse
import json
import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from d2ls_infer.datasets import LabelledImage, read_folder
from d2ls_infer.evaluate import evaluate
from d2ls_infer.labels import LabelMap
from d2ls_infer.manifest import Metric, ModelDescription
from d2ls_infer.metrics import ConfusionMatrix
from d2ls_infer.nn import D2LS, D2LSConfig, count_parameters, weights_of
from d2ls_infer.predict import load_model
from d2ls_infer.raster import read_array
from d2ls_infer.train.augment import AugmentConfig
from d2ls_infer.train.loop import TrainConfig, train
from d2ls_infer.weights import file_sha256, save_weights

PROJECT = Path(__file__).resolve().parents[2]
ISPRS = LabelMap(
    ("impervious surface", "building", "low vegetation", "tree", "car", "clutter"),
    ((255, 255, 255), (0, 0, 255), (0, 255, 255), (0, 255, 0), (255, 255, 0), (255, 0, 0)),
)
NAIP = LabelMap(
    ("background", "building", "road", "bare land", "forest", "water"),
    ((214, 217, 161), (227, 26, 28), (115, 115, 115), (196, 154, 108), (27, 120, 55), (31, 120, 180)),
)
ISPRS_LICENSE = "research use only (ISPRS benchmark)"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a bundled model is made from and with.

    train_split and val_split: names for `read_folder`. left_out: classes that the mean leaves out.
    """

    summary: str
    labels: LabelMap
    bands: tuple[str, ...]
    gsd_m: float
    train_split: str | tuple[str, ...]
    val_split: str | tuple[str, ...]
    val_name: str
    score: str
    left_out: tuple[int, ...] = ()
    license: str
    training_data: str
    steps: int
    augment: AugmentConfig
    backbone: str = "tf_efficientnet_lite2"

    def config(self) -> TrainConfig:
        channels = len(self.bands)
        network = D2LSConfig(backbone=self.backbone, num_classes=len(self.labels), in_channels=channels)
        half = (0.5,) * channels
        return TrainConfig(network=network, mean=half, std=half, steps=self.steps, augment=self.augment)


RECIPES = {
    "vaihingen": Recipe(
        summary="urban orthophotos, 9 cm, near infrared, red, green",
        labels=ISPRS,
        bands=("near infrared", "red", "green"),
        gsd_m=0.09,
        train_split=("tileA", "tileC"),
        val_split=("tileD",),
        val_name="tile D",
        score="f1",
        left_out=(5,),
        license=ISPRS_LICENSE,
        training_data="ISPRS Vaihingen true orthophotos (near infrared, red, green, 9 cm), tiles A and C",
        steps=750,
        augment=AugmentConfig(crop=256, scales=(0.75, 1.5)),
    ),
    "potsdam": Recipe(
        summary="urban orthophotos, 5 cm, red, green, blue",
        labels=ISPRS,
        bands=("red", "green", "blue"),
        gsd_m=0.05,
        train_split="train",
        val_split="val",
        val_name="75 patches",
        score="f1",
        left_out=(5,),
        license=ISPRS_LICENSE,
        training_data="ISPRS Potsdam true orthophotos (red, green, blue, 5 cm), 600 patches of 224 pixels",
        steps=700,
        augment=AugmentConfig(crop=224, scales=(0.85, 1.6)),
    ),
    "naip": Recipe(
        summary="rural and suburban aerial images, 0.6 m, red, green, blue, near infrared",
        labels=NAIP,
        bands=("red", "green", "blue", "near infrared"),
        gsd_m=0.6,
        train_split="train",
        val_split="val",
        val_name="29 tiles",
        score="iou",
        license="Apache-2.0",
        training_data="USDA NAIP imagery (public domain, 0.6 m), labels by yinx111, 169 tiles of 256 pixels",
        steps=700,
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

    recipe = RECIPES[arguments.name]
    config = recipe.config()
    pairs = [
        (read_array(image.image)[: len(recipe.bands)], read_array(image.mask)[0])
        for image in read_folder(arguments.data, recipe.train_split)
    ]
    checkpoint = arguments.output / f"{arguments.name}.ckpt"
    network = train(config, pairs, backbone_file=arguments.backbone, checkpoint=checkpoint)
    file = arguments.output / f"{arguments.name}.safetensors"
    save_measured(file, network, recipe, read_folder(arguments.data, recipe.val_split))
    if arguments.bundle:
        bundle(arguments.name, file, recipe, count_parameters(network))


def save_measured(file: Path, network: D2LS, recipe: Recipe, images: list[LabelledImage]) -> None:
    """Write the weights in half precision, measure what was written, and write them again with the numbers."""
    keep = ("decoder.position.gaussian", "running_mean", "running_var")
    state = {key: value if key.endswith(keep) else value.half() for key, value in weights_of(network).items()}
    save_weights(file, state, describe(network.config, recipe, ()))
    matrix = evaluate(load_model(file), images, progress=print)
    save_weights(file, state, describe(network.config, recipe, metrics(matrix, recipe)))


def describe(config: D2LSConfig, recipe: Recipe, measured: tuple[Metric, ...]) -> ModelDescription:
    channels = len(recipe.bands)
    return ModelDescription(
        config=config.to_dict(),
        labels=recipe.labels,
        bands=recipe.bands,
        value_range=(0.0, 255.0),
        mean=(0.5,) * channels,
        std=(0.5,) * channels,
        gsd_m=recipe.gsd_m,
        metrics=measured,
        license=recipe.license,
        training_data=recipe.training_data,
        source="examples/training/bundled.py; backbone started from ImageNet-1k weights (Apache-2.0)",
    )


def metrics(matrix: ConfusionMatrix, recipe: Recipe) -> tuple[Metric, ...]:
    """The mean that counts first, then overall accuracy and the score of each class."""
    scores = matrix.scores()
    values = {
        SCORE_NAMES[recipe.score]: scores.mean(recipe.score, without=recipe.left_out),
        "overall accuracy": scores.overall_accuracy,
    }
    short = {"f1": "F1", "iou": "IoU"}[recipe.score]
    values |= {f"{short} {name}": float(v) for name, v in zip(recipe.labels.names, getattr(scores, recipe.score), strict=True)}
    return tuple(
        Metric(name=name, value=round(100 * value, 2), split=recipe.val_name, protocol=PROTOCOL)
        for name, value in values.items()
    )


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
    torch.set_num_threads(torch.get_num_threads())
    main()
