"""The `d2ls` command. One file per subcommand; torch and GDAL are loaded only when one runs."""

from __future__ import annotations

import logging
from typing import Any

import click

from d2ls_infer import __version__
from d2ls_infer.cli.convert import convert
from d2ls_infer.cli.evaluate import evaluate
from d2ls_infer.cli.export import export
from d2ls_infer.cli.models import models
from d2ls_infer.cli.predict import predict
from d2ls_infer.cli.publish import publish
from d2ls_infer.cli.results import one_line
from d2ls_infer.cli.seams import seams
from d2ls_infer.cli.train import train
from d2ls_infer.errors import D2LSError

INTERRUPTED = 130
"""What shells take for a command that was stopped by Ctrl+C."""


class D2LSGroup(click.Group):
    """Turns a `D2LSError` into one line and its exit code. Anything else is a bug and keeps its traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except D2LSError as error:
            click.echo(f"Error: {one_line(error)}", err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("Error: stopped", err=True)
            ctx.exit(INTERRUPTED)


@click.group(
    cls=D2LSGroup,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda token: token.replace("_", "-"),
    },
)
@click.version_option(__version__, prog_name="d2ls")
def main() -> None:
    """Class maps from satellite and aerial scenes, by Dynamic Dictionary Learning (D2LS)."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)


main.add_command(predict)
main.add_command(evaluate)
main.add_command(seams)
main.add_command(train)
main.add_command(models)
main.add_command(convert)
main.add_command(export)
main.add_command(publish)
