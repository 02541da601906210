"""`d2ls models`: what the manifest lists."""

from __future__ import annotations

import click

from d2ls_infer.cli.options import table
from d2ls_infer.manifest import WeightsEntry, load_manifest


@click.command()
def models() -> None:
    """List the models that --model takes by name, with what was measured."""
    header = ["model", "classes", "bands", "GSD", "size", "measured", "licence", "for"]
    click.echo(table(header, [row(entry) for entry in load_manifest().entries]))


def row(entry: WeightsEntry) -> list[str]:
    """One line of the table; dashes where a model has no weights yet."""
    description = entry.description
    names = "/".join((entry.name, *entry.aliases))
    if description is None or entry.size is None:
        return [names, "-", "-", "-", "-", "not trained yet", "-", entry.summary]
    metric = description.metrics[0] if description.metrics else None
    return [
        names,
        str(len(description.labels)),
        ", ".join(description.bands),
        f"{description.gsd_m:g} m" if description.gsd_m else "any",
        f"{entry.size / 1e6:.1f} MB",
        f"{metric.name} {metric.value:.1f} % ({metric.split})" if metric else "-",
        description.license,
        entry.summary,
    ]
