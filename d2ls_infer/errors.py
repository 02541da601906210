"""The errors of the package: one root, a few kinds, each also a builtin exception.

A command line turns a `D2LSError` into one line and its `exit_code`; everything else is a bug and shows its traceback.
"""


class D2LSError(Exception):
    """Root of every error a user can cause. `exit_code` is what the command line leaves with."""

    exit_code = 1


def shortened(value: object) -> str:
    """A value as an error's line shows it: of one that came from a file, at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


class StoppedError(D2LSError):
    """It was stopped, by Ctrl+C for example."""

    exit_code = 130


class UsageError(D2LSError, ValueError):
    """What was asked for does not make sense: a bad option, an unknown name, too few bands."""

    exit_code = 2


class MissingFileError(UsageError, FileNotFoundError):
    """A file that was named does not exist."""


class OutputExistsError(UsageError, FileExistsError):
    """The output is already there and overwriting was not asked for."""


class OutputBusyError(D2LSError, BlockingIOError):
    """Another run is making the output."""


class RasterError(D2LSError, OSError):
    """A raster could not be read or written."""


class WeightsError(D2LSError, ValueError):
    """A weights file or the manifest is damaged, or does not fit the network."""


class UnavailableModelError(UsageError):
    """The model is known, but its weights are not to be had (yet)."""


class StoreError(D2LSError, OSError):
    """An object store could not be reached, refused, or has no such bucket."""


class HubError(D2LSError, OSError):
    """The Hugging Face Hub could not be reached, refused, or gave something else than was asked for."""
