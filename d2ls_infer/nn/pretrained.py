"""Tensors into a network and out of it, and networks to and from the Hugging Face Hub."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from torch import Tensor, nn

from d2ls_infer.errors import D2LSError, MissingFileError, WeightsError
from d2ls_infer.tensors import read_header, read_tensors, write_tensors

FILE, CONFIG = "model.safetensors", "config.json"
"""What a folder or repository holds: the weights, and what the network is made of."""


class Pretrained(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="d2ls-infer",
    pipeline_tag="image-segmentation",
    tags=["remote-sensing", "semantic-segmentation"],
):
    """`from_pretrained`, `save_pretrained` and `push_to_hub` as `PyTorchModelHubMixin` has them, but strict.

    A folder or repository holds config.json, the network's, and model.safetensors. Keys and shapes must fit, and a
    pickle is never read. It is the bare network: classes and bands are in the files that `load_model` takes.
    """

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, room: int) -> Self:
        """A network with random weights. Raises UsageError for a config there is no network of.

        room: values it may have at most; a config that needs more is refused before its memory is taken.
        """
        raise NotImplementedError

    @classmethod
    def from_file(cls, file: Path, config: Mapping[str, Any]) -> Self:
        """The network of a safetensors file in eval mode, float32. Every key must be there, none may be left over.

        Raises WeightsError, with the path, that names missing, left-over or misshapen tensors.
        """
        shapes = read_header(file).shapes
        try:
            network = cls.from_config(config, room=sum(map(math.prod, shapes.values())))
            state = read_tensors(file)
            # The mixin's own files hold the step counters of batch norms too.
            load_weights(network, {key: value for key, value in state.items() if not is_counter(key)})
        except D2LSError as error:
            raise error if str(file) in str(error) else WeightsError(f"{file}: {error}") from error
        return network.eval()

    @classmethod
    def from_pretrained(cls, *args: Any, **options: Any) -> Self:
        """The network of a folder or of owner/repo, in eval mode, float32; arguments as the mixin has them.

        Raises WeightsError for a config or weights that do not fit, MissingFileError, and the client's own errors.
        """
        try:
            network: Self = super().from_pretrained(*args, **options)
        # What comes of a config.json that is no JSON object.
        except (AttributeError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise WeightsError(f"{args[0] if args else options}: {CONFIG} is not that of a network: {error}") from error
        return network

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        **options: Any,
    ) -> Self:
        """The mixin's hook. The values of config.json come in `options`, as `config` where it is one of a network."""

        def find(name: str) -> Path:
            if Path(model_id).is_dir():
                return Path(model_id) / name
            found = hf_hub_download(
                model_id,
                name,
                revision=revision,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
                token=token,
            )
            return Path(str(found))

        if "config" not in options and not find(CONFIG).is_file():  # the mixin passes over a hub that has none
            raise MissingFileError(f"no such file: {find(CONFIG)}")
        config = options.pop("config", None)
        for name in ("proxies", "resume_download"):  # the mixin hands them on before its version 1
            options.pop(name, None)
        if options or not isinstance(config, Mapping):
            raise WeightsError(f"{model_id}: {CONFIG} is not that of a network ({', '.join(options)})")
        file = find(FILE)
        if not file.is_file():
            raise MissingFileError(f"no such weights file: {file}")
        return cls.from_file(file, config)

    def _save_pretrained(self, save_directory: Path) -> None:
        """The mixin's hook; config.json it writes itself."""
        write_tensors(save_directory / FILE, weights_of(self), {"format": "pt"})


def is_counter(key: str) -> bool:
    """Whether a tensor is the step counter of a batch norm, which inference never reads."""
    return key.endswith("num_batches_tracked")


def count_parameters(network: nn.Module) -> int:
    """Number of learnable values."""
    return sum(parameter.numel() for parameter in network.parameters())


def weights_of(network: nn.Module) -> dict[str, Tensor]:
    """The tensors that a weights file holds: all but the step counters of batch norms, which inference never reads."""
    return {key: value for key, value in network.state_dict().items() if not is_counter(key)}


def few(texts: Sequence[str], between: str = ", ") -> str:
    """The first ten of them, and how many more there are."""
    return between.join([*texts[:10], *([f"and {len(texts) - 10} more"] if len(texts) > 10 else [])])


def load_weights(network: nn.Module, state: Mapping[str, Tensor], *, names: Mapping[str, str] | None = None) -> None:
    """Put tensors into the network, whatever their precision; every key must be there, and none may be left over.

    names: what to call keys in errors. Raises WeightsError that names missing, left-over and misshapen keys, and
    tensors that hold anything but numbers.
    """
    wanted, names = weights_of(network), names or {}
    problems = []
    for what, keys in (("missing", set(wanted) - set(state)), ("left over", set(state) - set(wanted))):
        if keys:
            problems.append(f"{what} {few(sorted(names.get(key, key) for key in keys))}")
    unfit = []
    for key in sorted(set(state) & set(wanted)):
        value, fit = state[key], wanted[key]
        if value.shape != fit.shape:
            unfit.append(f"{names.get(key, key)} has shape {tuple(value.shape)}, not {tuple(fit.shape)}")
        elif not value.is_floating_point():
            unfit.append(f"{names.get(key, key)} holds {value.dtype}, not real numbers")
        elif not value.to(fit.dtype).isfinite().all():
            unfit.append(f"{names.get(key, key)} holds values that are not finite numbers")
    if problems := [*problems, *([few(unfit, "; ")] if unfit else [])]:
        raise WeightsError("the weights do not fit the network: " + "; ".join(problems))
    network.load_state_dict(dict(state), strict=False)  # strict but for the counters: checked above
