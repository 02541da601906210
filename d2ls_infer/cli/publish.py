"""`d2ls publish`: a weights file -> a repository on the Hugging Face Hub, and its entry for a manifest."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path

import click

from d2ls_infer.cli import options
from d2ls_infer.errors import MissingFileError, OutputExistsError, UsageError
from d2ls_infer.manifest import NAME, REPO, HubFile, WeightsEntry


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--repo", required=True, metavar="OWNER/NAME", help="Repository; it is made where there is none.")
@click.option("--private", is_flag=True, help="Make the repository a private one.")
@click.option("--name", metavar="NAME", help="Name of the model in a manifest.  [default: the repository's]")
@click.option("--summary", metavar="TEXT", help="What it is for, in a line.  [default: its classes, bands and GSD]")
@click.option("--dry-run", is_flag=True, help="Upload nothing, leave the folder that would be.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="That folder.  [default: the model's name]")
@options.overwrite
def publish(
    file: Path,
    repo: str,
    private: bool,
    name: str | None,
    summary: str | None,
    dry_run: bool,
    output: Path | None,
    overwrite: bool,
) -> None:
    """Publish the weights FILE on the Hugging Face Hub, with a model card, and print its entry for a manifest.

    The token is HF_TOKEN, or that of `hf auth login`. In a manifest of your own (--manifest) the entry makes NAME a
    model that --model takes, pinned and checked.
    """
    name = name or repo.rpartition("/")[2]
    if not re.fullmatch(REPO, repo) or not re.fullmatch(NAME, name):
        raise UsageError(f"--repo is OWNER/NAME, of letters, digits, '.', '_' and '-'; got {repo!r}, {name!r}")
    if output is not None and not dry_run:
        raise UsageError("--output is for --dry-run: without it the folder is uploaded, not left")
    folder = output or Path(name)
    if dry_run and folder.exists() and not (overwrite and folder.is_dir()):
        raise OutputExistsError(f"{folder} exists; give --overwrite to write into it, or another --output")
    if not file.is_file():
        raise MissingFileError(f"no such weights file: {file}")

    from d2ls_infer import hub
    from d2ls_infer.card import write_folder

    entry = checked_entry(file, name, summary, repo)
    if dry_run:
        write_folder(folder, file, entry, repo)
        click.echo(folder)
        return
    with tempfile.TemporaryDirectory() as place:
        write_folder(Path(place), file, entry, repo)
        commit = hub.publish(Path(place), repo, private=private)
    entry_there = entry.to_dict() | {"hub": {"repo": repo, "revision": commit, "filename": HubFile.filename}}
    click.echo(json.dumps(WeightsEntry.from_dict(entry_there).to_dict(), indent=2))


def checked_entry(file: Path, name: str, summary: str | None, repo: str) -> WeightsEntry:
    """The manifest's entry of a weights file that was loaded whole. Raises WeightsError for one that cannot be."""
    from d2ls_infer.nn import count_parameters
    from d2ls_infer.weights import file_sha256, load_network, read_description

    description = read_description(file)
    network = load_network(file, description)
    size_m = f"{description.gsd_m:g} m" if description.gsd_m else "any pixel size"
    classes = f"{len(description.labels)} class" + "es" * (len(description.labels) > 1)
    return WeightsEntry(
        name=name,
        aliases=(),
        summary=summary or f"{classes}, {size_m}, {', '.join(description.bands)}",
        file=None,
        hub=HubFile(repo=repo, revision="main"),
        sha256=file_sha256(file),
        size=file.stat().st_size,
        num_params=count_parameters(network),
        unpublished=None,
        description=description,
    )
