"""What mapping memory anew costs a tile on a CPU: python tests/benchmarks/pages.py [--model NAME] [--side 1024]

The same tile again and again, in processes that differ in their environment alone: as this package sets it (large
pages, by torch's switch), as torch has it by itself, and both with what Dask gives its workers, and with what
`d2ls_infer.cluster` gives them. Linux with glibc only.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

from d2ls_infer.cluster.clients import ALLOCATION

TILE = """
import resource, sys, time
import torch
from d2ls_infer import load_model
name, side, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(threads)
model = load_model(name, "cpu")
tile = torch.randint(0, 250, (1, len(model.bands), side, side), dtype=torch.uint8)
seconds = []
for _ in range(6):
    started = time.perf_counter()
    model.score(tile)
    seconds.append(time.perf_counter() - started)
used = resource.getrusage(resource.RUSAGE_SELF)
print(f"{min(seconds[1:]):.3f} s, peak {used.ru_maxrss / 1e3:,.0f} MB, {used.ru_minflt / 1e6:.1f} million page faults")
"""
DASK = {"MALLOC_TRIM_THRESHOLD_": 65536}
SMALL, LARGE = {"THP_MEM_ALLOC_ENABLE": "0"}, {"THP_MEM_ALLOC_ENABLE": "1"}
WAYS = {
    "torch by itself": SMALL,
    "large pages (this package)": LARGE,
    "a worker as Dask has it": SMALL | DASK,
    "the same, large pages": LARGE | DASK,
    "a worker as this package has it": LARGE | ALLOCATION,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="naip-rgb")
    parser.add_argument("--side", type=int, default=1024)
    arguments = parser.parse_args()
    for threads in sorted({1, os.cpu_count() or 1}):
        for name, values in WAYS.items():
            environment = os.environ | {key: str(value) for key, value in values.items()}
            command = [sys.executable, "-W", "ignore", "-c", TILE, arguments.model, str(arguments.side), str(threads)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            print(f"{threads} threads, {name:34} {done.stdout.strip()}", flush=True)


if __name__ == "__main__":
    main()
