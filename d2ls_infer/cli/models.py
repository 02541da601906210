"""`d2ls models`: what --model takes, where it is, whether it is whole."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from d2ls_infer.cli import options
from d2ls_infer.cli.options import table
from d2ls_infer.errors import D2LSError, MissingFileError, UsageError, WeightsError
from d2ls_infer.licence import is_restricted, spdx_of
from d2ls_infer.manifest import Manifest, WeightsEntry, load_manifest, manifest_of

every = click.option("--all", "every", is_flag=True, help="Every model of the manifest.")


@click.group(invoke_without_command=True)
@options.manifest
@click.option("--json", "as_json", is_flag=True, help="As JSON, with all that the manifest says.")
@click.pass_context
def models(context: click.Context, manifest: Path | None, as_json: bool) -> None:
    """List the models that --model takes by name; with a command, more of one of them."""
    if context.invoked_subcommand is not None:
        # Given before the command or after it, an option means the same.
        context.default_map = {command: {"manifest": manifest} for command in models.commands}
        return
    entries = load_manifest(manifest).entries
    if as_json:
        click.echo(json.dumps([described(entry) for entry in entries], indent=2))
        return
    header = ["model", "classes", "bands", "GSD", "size", "source", "licence", "where", "measured"]
    click.echo(table(header, [row(entry) for entry in entries]))
    for entry in entries:
        if entry.unpublished:
            click.echo(f"{entry.name} is not published yet: {entry.unpublished}")


def row(entry: WeightsEntry) -> list[str]:
    """One line of the table; dashes where a model has no weights yet."""
    description = entry.description
    names = "/".join((entry.name, *entry.aliases))
    if description is None or entry.size is None:
        return [names, *"------", where(entry)[0], "-"]
    metric = description.metrics[0] if description.metrics else None
    return [
        names,
        str(len(description.labels)),
        few(description.bands),
        f"{description.gsd_m:g} m" if description.gsd_m else "any",
        f"{entry.size / 1e6:.1f} MB",
        source(entry),
        description.license,
        where(entry)[0],
        f"{metric.name} {metric.value:.1f} % ({metric.split.split(', ')[0]})" if metric else "-",  # `show` has it all
    ]


def few(names: Sequence[str]) -> str:
    """All of them up to four, else the first three and how many more."""
    return ", ".join(names if len(names) <= 4 else [*names[:3], f"{len(names) - 3} more"])


def source(entry: WeightsEntry) -> str:
    """Where a model's file comes from: the package, a repository of the hub, or beside a manifest of one's own."""
    if entry.hub is not None:
        return entry.hub.repo
    return "package" if entry.folder is None else "own file"


def where(entry: WeightsEntry) -> tuple[str, Path | None]:
    """Where a model is, in a word, and the file if it is on this machine."""
    if entry.hub is not None:
        from d2ls_infer.hub import cached  # takes a second: only where the manifest names files on the hub

        path = cached(entry.hub)
        return ("cached" if path else "remote"), path
    if entry.path is None:
        return "unpublished", None
    kind = "bundled" if entry.folder is None else "local"
    return (kind, entry.path) if entry.path.is_file() else ("missing", None)


def described(entry: WeightsEntry) -> dict[str, Any]:
    """An entry's JSON, with where it is."""
    kind, path = where(entry)
    return entry.to_dict() | {"where": kind, "path": str(path) if path else None}


@models.command()
@click.argument("name")
@options.manifest
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def show(name: str, manifest: Path | None, as_json: bool) -> None:
    """Tell all that is known of a model.

    Of NAME, in the manifest or a weights file: classes, bands, scores and how they were measured, licence, where its
    file is.
    """
    from d2ls_infer.weights import kind_of

    entry = entry_of_file(Path(name)) if kind_of(Path(name)) == "file" else load_manifest(manifest).find(name)
    click.echo(json.dumps(described(entry), indent=2) if as_json else sheet(entry))


def entry_of_file(path: Path) -> WeightsEntry:
    """A weights file, or an exported model, as an entry that no manifest has."""
    from d2ls_infer.weights import find_weights

    weights = find_weights(path)
    return WeightsEntry(
        name=weights.name,
        aliases=(),
        summary="",
        file=path.name,
        hub=None,
        sha256=weights.sha256,
        size=path.stat().st_size,
        num_params=None,
        unpublished=None,
        description=weights.description,
        folder=path.resolve().parent,
    )


def sheet(entry: WeightsEntry) -> str:
    """An entry as text."""
    kind, path = where(entry)
    facts = [("model", entry.name), ("also", ", ".join(entry.aliases)), ("for", entry.summary)]
    facts += [("where", f"{kind} {path or ''}".strip()), ("instead", entry.unpublished or "")]
    facts += [("on the hub", str(entry.hub or "")), ("sha256", entry.sha256 or "")]
    if (about := entry.description) is None:
        return table(["", ""], [fact for fact in facts if fact[1]]).strip("\n")
    low, high = about.value_range
    facts += [
        ("size", f"{entry.size} bytes" + (f", {entry.num_params} parameters" if entry.num_params else "")),
        ("network", ", ".join(f"{key} {value}" for key, value in about.config.items())),
        ("bands", ", ".join(about.bands)),
        ("values", f"{low:g} to {high:g}" + (f", gamma {about.gamma:g}" if about.gamma != 1 else "")),
        ("GSD", f"{about.gsd_m:g} m" if about.gsd_m else "any"),
        ("licence", about.license + (" (not for every use)" if is_restricted(about.license) else "")),
        ("trained on", about.training_data),
        ("source", about.source),
        ("note", about.note),
    ]
    classes = [[str(i), item["name"], item["color"]] for i, item in enumerate(about.labels.to_list())]
    scores = [[metric.name, f"{metric.value:.2f}", metric.split, metric.protocol] for metric in about.metrics]
    parts = [table(["", ""], [fact for fact in facts if fact[1]]).strip("\n"), table(["", "class", "colour"], classes)]
    parts += [table(["measured", "%", "on", "how"], scores, right=[1])] if scores else ["not measured"]
    return "\n\n".join(parts)


@models.command()
@click.argument("name", required=False)
@every
@click.option("--force", is_flag=True, help="Fetch again what is in the cache already.")
@options.manifest
def download(name: str | None, every: bool, force: bool, manifest: Path | None) -> None:
    """Fetch a model from the hub into the cache.

    NAME is in the manifest, or owner/repo[@revision][:file]. The file is checked, and its place printed; after that
    --offline finds it.
    """
    from d2ls_infer.weights import find_weights

    if (name is None) != every:
        raise UsageError("give the name of a model, or --all")
    published = (entry.name for entry in load_manifest(manifest).entries if not entry.unpublished)
    for chosen in [name] if name else published:
        click.echo(find_weights(chosen, manifest=manifest, force=force).path)


@models.command()
@click.argument("name")
@options.manifest
def path(name: str, manifest: Path | None) -> None:
    """Print where the file of a model is.

    It must be on this machine: nothing is downloaded.
    """
    from d2ls_infer.weights import find_weights

    click.echo(find_weights(name, manifest=manifest, offline=True).path)


@models.command()
@click.argument("name", required=False)
@every
@options.manifest
def verify(name: str | None, every: bool, manifest: Path | None) -> None:
    """Check the files that are on this machine.

    Those of all models, or of NAME, against the manifest: size, sha256, and what the file says of itself. Nothing is
    downloaded and nothing deleted.
    """
    if name and every:
        raise UsageError("give the name of a model, or --all, and not both")
    chosen = load_manifest(manifest)
    report(Manifest((chosen.find(name),)) if name else chosen)


@models.command()
@click.argument("file", type=click.Path(path_type=Path))
def validate(file: Path) -> None:
    """Check a manifest and the files it names.

    FILE against the schema (weights_manifest.schema.json in the package), and against those files that are on this
    machine, down to the number of parameters.
    """
    if not file.is_file():
        raise MissingFileError(f"no such manifest: {file}")
    report(manifest_of(file), strictly=True)


def report(manifest: Manifest, *, strictly: bool = False) -> None:
    """Check every model, a line for each. Raises WeightsError where one is not as it should be, after all are done."""
    from d2ls_infer.weights import check_entry

    bad = []
    for entry in manifest.entries:
        kind, path = where(entry)
        try:
            if kind == "missing":
                raise WeightsError(f"no such file: {entry.path}")
            licence = entry.description.license if entry.description else ""
            if strictly and (known := spdx_of(licence)) and known != licence:
                raise WeightsError(f"the licence {licence!r} is {known} as SPDX spells it")
            if path is not None:
                check_entry(entry, path, whole=strictly)
            click.echo(f"{entry.name}: " + (f"whole, {kind}, {path}" if path else f"not here ({kind})"))
        except D2LSError as error:
            bad.append(entry.name)
            click.echo(f"{entry.name}: {error}", err=True)
    if bad:
        raise WeightsError(f"{len(bad)} of {len(manifest.entries)} are not as the manifest says: {', '.join(bad)}")
