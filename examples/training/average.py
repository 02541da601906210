"""One model out of several of the same start: the mean of their weights, measured.

    python examples/training/average.py runs/mean/potsdam.safetensors runs/a/potsdam.safetensors \
        runs/b/potsdam.safetensors --dataset potsdam --root DATA/potsdam

Runs that go on from the same weights, with other seeds or settings, end in the same valley; their mean lies deeper in
it than they do ("model soups", Wortsman et al., 2022), and costs no more than one of them. Without --dataset it is not
measured.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from d2ls_infer.datasets import find_dataset
from d2ls_infer.train.run import save_measured
from d2ls_infer.weights import read_description


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--dataset")
    parser.add_argument("--root", type=Path)
    parser.add_argument("--split", default="val")
    arguments = parser.parse_args()

    states = [load_file(file) for file in arguments.files]
    mean = {
        key: torch.stack([state[key].double() for state in states]).mean(0).to(value.dtype)
        for key, value in states[0].items()
    }
    description = replace(read_description(arguments.files[0]), metrics=())
    dataset = find_dataset(arguments.dataset) if arguments.dataset else None
    images = dataset.images(arguments.root, arguments.split) if dataset else []
    left_out = dataset.left_out if dataset else ()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    save_measured(arguments.output, mean, description, images, measured_on=arguments.split, left_out=left_out)
    for metric in read_description(arguments.output).metrics:
        print(metric.name, metric.value)


if __name__ == "__main__":
    main()
