"""What a repository on the hub holds: the weights file, config.json, and a model card that says what they are."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from d2ls_infer.licence import is_restricted, spdx_of
from d2ls_infer.manifest import HubFile, Metric, WeightsEntry

TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"

METRIC_TYPES = {"iou": "mean_iou", "f1": "f1", "accuracy": "accuracy", "precision": "precision", "recall": "recall"}
"""The hub's names of metrics, by what ours begin with."""


def write_folder(folder: Path, weights: Path, entry: WeightsEntry, repo: str) -> None:
    """Fill a folder with what is uploaded to a repository: the three files, of which config.json is the network's."""
    assert entry.description is not None
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(weights, folder / HubFile.filename)
    config = json.dumps(dict(entry.description.config), sort_keys=True, indent=2)  # as PyTorchModelHubMixin writes it
    (folder / "config.json").write_text(config, encoding="utf-8")
    (folder / "README.md").write_text(model_card(entry, repo), encoding="utf-8")


def model_card(entry: WeightsEntry, repo: str) -> str:
    """The card of a model: what the hub reads, as YAML, and what people read."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    about = entry.description
    assert about is not None
    known = spdx_of(about.license)
    results = [
        EvalResult(
            task_type="image-segmentation",
            dataset_type=slug(entry.name),
            dataset_name=entry.name,
            dataset_split=metric.split,
            metric_type=metric_type(metric),
            metric_name=metric.name,
            metric_value=metric.value,
            metric_args={"protocol": metric.protocol},
        )
        for metric in about.metrics
    ]
    data = ModelCardData(
        library_name="d2ls-infer",
        pipeline_tag="image-segmentation",
        tags=["remote-sensing", "semantic-segmentation", "d2ls"],
        model_name=entry.name,
        eval_results=results or None,
        license=known.lower() if known else "other",
        license_name=None if known else slug(about.license),
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=entry.name,
        summary=entry.summary,
        num_params=entry.num_params,
        repo=repo,
        about=about,
        labels=about.labels.to_list(),
        restricted=is_restricted(about.license),
    )
    return str(card)


def metric_type(metric: Metric) -> str:
    """The hub's name of a metric."""
    found = re.match(rf"(?:mean |overall |m)?({'|'.join(METRIC_TYPES)})\b", metric.name.lower())
    return METRIC_TYPES[found[1]] if found else slug(metric.name)


def slug(text: str) -> str:
    """Letters, digits and dashes: what the hub takes as a name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "unknown"
