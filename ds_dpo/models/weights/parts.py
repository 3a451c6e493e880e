"""One model of a pipeline - denoiser, VAE, text encoder - with its configuration and weights, from any kind of file.

A part reads its weights only on request, and never more than one tensor beyond what it returns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import init_empty_weights
from diffusers import ModelMixin
from torch import Tensor, nn

from ds_dpo.errors import ModelError, cut, shown
from ds_dpo.models.weights.alignment import align_weights
from ds_dpo.models.weights.files import FileWeights, WeightFiles, check_headers, read_header, read_json
from ds_dpo.models.weights.ldm_parts import Places, Stored
from ds_dpo.models.weights.soundness import require_finite, wrapper_hint
from ds_dpo.process.quiet import quiet_output

ATTENTION_OF_TEXT = "sdpa"


class Part(Protocol):
    """config: the configuration of diffusers or transformers. files: all files of its weights."""

    @property
    def config(self) -> Mapping[str, Any]: ...
    @property
    def files(self) -> WeightFiles: ...

    def load(self, *, dtype: torch.dtype) -> Any:
        """Return the module on the host, aligned, in dtype, cast tensor by tensor.

        Raises ModelError if a weight is missing.
        """
        ...

    def weights(self) -> Mapping[str, Tensor]:
        """Return its weights by parameter name, in the dtype of the file, each read on request."""
        ...

    def num_bytes(self) -> int:
        """Return the size of its weights on the disk."""
        ...

    def num_parameters(self) -> int:
        """Return the number of elements of its weights, from headers alone."""
        ...


@dataclass(frozen=True, kw_only=True)
class FolderPart:
    """A folder of diffusers or transformers. find: finds its weights, which may not exist yet."""

    folder: Path
    model_class: Any
    find: Callable[[Path], WeightFiles]

    @property
    def config(self) -> Mapping[str, Any]:
        return read_json(self.folder / "config.json")

    @property
    def files(self) -> WeightFiles:
        return self.find(self.folder)

    def load(self, *, dtype: torch.dtype) -> Any:
        """Load by from_pretrained, which knows the names of older files. Raises ModelError as Part does."""
        # the two libraries have different names for this argument
        is_diffusers = issubclass(self.model_class, ModelMixin)
        # transformers would fetch the kernels that a configuration names from the hub
        own = {"torch_dtype": dtype} if is_diffusers else {"dtype": dtype, "attn_implementation": ATTENTION_OF_TEXT}
        files = self.files
        check_headers(files)
        require_plain_numbers(self.config, self.folder)
        try:
            with quiet_output():
                loaded, info = self.model_class.from_pretrained(
                    str(self.folder),
                    variant=files.variant,
                    use_safetensors=True,
                    local_files_only=True,
                    output_loading_info=True,
                    **own,
                )
        except Exception as error:  # foreign settings and weights can fail in any line of the two libraries
            raise ModelError(
                f"{self.folder}: cannot be loaded as {self.model_class.__name__}: {cut(str(error), characters=600)}"
            ) from error
        # both libraries only print a warning, and initialize missing weights at random
        missing = sorted(info["missing_keys"])
        if missing:
            raise ModelError(
                f"{self.folder}: its weights lack {len(missing)} tensors of its config, such as {missing[0]}"
                + wrapper_hint(self._names())
            )
        for name, tensor in loaded.state_dict().items():
            require_finite(tensor, name, source=self._file_of(name))
        align_weights(loaded)  # these may be mapped from the file
        return loaded

    def _names(self) -> Iterator[str]:
        for path in self.files.paths:
            yield from read_header(path).shapes

    def _file_of(self, name: str) -> str:
        """Return the file that has a tensor, or the folder if an older file has it under another name."""
        return str(next((path for path in self.files.paths if name in read_header(path).shapes), self.folder))

    def weights(self) -> Mapping[str, Tensor]:
        return FileWeights(self.files)

    def num_bytes(self) -> int:
        return self.files.num_bytes()

    def num_parameters(self) -> int:
        return self.files.num_parameters()


def require_plain_numbers(config: Mapping[str, Any], folder: Path) -> None:
    """Raise ModelError for quantized weights, whose kernels both libraries fetch from the hub to run them."""
    if config.get("quantization_config") is not None:
        raise ModelError(
            f"{folder / 'config.json'}: quantization_config is {shown(config['quantization_config'])}; give weights in "
            "fp32, bf16 or fp16"
        )


@dataclass(frozen=True, kw_only=True)
class FilePart:
    """Tensors of one file. places: the places of the module's parameters in it."""

    path: Path
    title: str
    model_class: Any
    config: Mapping[str, Any]
    places: Places

    @property
    def files(self) -> WeightFiles:
        return WeightFiles(paths=(self.path,), variant=None)

    def load(self, *, dtype: torch.dtype) -> Any:
        module = self._skeleton()
        fill(module, self._placed(module), dtype=dtype, source=self._source)
        return module

    def weights(self) -> Mapping[str, Tensor]:
        """Return the weights, see Part. Raises ModelError that names the first missing tensor."""
        return self._placed(self._empty)

    def num_bytes(self) -> int:
        weights = FileWeights(self.files)  # mapped, not read
        return sum(weights[name].nbytes for name in {place.name for place in self._places(self._empty).values()})

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self._empty.parameters())

    def _skeleton(self) -> nn.Module:
        try:
            return skeleton(self.model_class, self.config)
        except ModelError as error:
            raise ModelError(f"{self._source}: {error}") from error

    @cached_property
    def _empty(self) -> nn.Module:
        return self._skeleton()

    def _places(self, module: nn.Module) -> Mapping[str, Stored]:
        return self.places(module.state_dict())

    def _placed(self, module: nn.Module) -> PlacedWeights:
        return PlacedWeights(FileWeights(self.files), self._places(module), source=self._source)

    @property
    def _source(self) -> str:
        return f"{self.path}: its {self.title}"


class PlacedWeights(Mapping[str, Tensor]):
    """A file's tensors under the parameters' names, each read, and split or transposed, on request."""

    def __init__(self, weights: FileWeights, places: Mapping[str, Stored], *, source: str) -> None:
        """Join weights and places. source: their origin, for errors. Raises ModelError if the file lacks some."""
        missing = sorted({place.name for place in places.values()} - weights.keys())
        if missing:
            raise ModelError(f"{source} lacks {len(missing)} tensors, such as {missing[0]}")
        self._weights, self._places = weights, places

    def name_in_file(self, name: str) -> str:
        """Return the file's name of a parameter."""
        return self._places[name].name

    def __getitem__(self, name: str) -> Tensor:
        place = self._places[name]
        return place.take(self._weights[place.name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def skeleton(model_class: Any, config: Mapping[str, Any]) -> nn.Module:
    """Return a module whose parameters have shapes but no memory; its buffers have their values.

    Raises ModelError if the configuration does not fit the class.
    """
    try:
        with init_empty_weights(include_buffers=False), quiet_output():
            if hasattr(model_class, "from_config"):  # diffusers
                module = model_class.from_config(dict(config))
            else:
                module = model_class(model_class.config_class(**_with_own_attention(config)))
    except Exception as error:  # foreign settings can fail in any line of the two libraries
        raise ModelError(
            f"its configuration does not make a {model_class.__name__}: {cut(str(error), characters=600)}"
        ) from error
    assert isinstance(module, nn.Module)
    return module


def _with_own_attention(config: Mapping[str, Any]) -> dict[str, Any]:
    # transformers also takes the attribute's own names from a configuration, and the last one wins
    others = {name: value for name, value in config.items() if "attn_implementation" not in name}
    return {**others, "attn_implementation": ATTENTION_OF_TEXT}


def fill(module: nn.Module, weights: Mapping[str, Tensor], *, dtype: torch.dtype, source: str) -> None:
    """Give a skeleton its weights one after another, in dtype and in new memory.

    source: origin of the weights, for errors. Raises ModelError that names the first difference of names or shapes.
    """
    shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
    require_names(weights, shapes, source=source)
    module.load_state_dict(dict(stream(weights, shapes, dtype=dtype, source=source)), assign=True)
    align_weights(module)


def require_names(weights: Mapping[str, Tensor], names: Iterable[str], *, source: str) -> None:
    """Raise ModelError if weights lack a name, or have others. No tensor is read."""
    own = set(names)
    missing, unknown = sorted(own - weights.keys()), sorted(weights.keys() - own)
    if missing or unknown:
        kinds = [f"lacks {len(missing)} tensors of this model, such as {missing[0]}"] if missing else []
        kinds += (
            [f"has {len(unknown)} tensors that do not belong to this model, such as {unknown[0]}"] if unknown else []
        )
        raise ModelError(f"{source} {' and '.join(kinds)}{wrapper_hint(unknown)}")


def stream(
    weights: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], *, dtype: torch.dtype, source: str
) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors by name, in dtype and in new memory, in the order of shapes; none is read before it is asked for.

    source: origin of the weights, for errors. Raises ModelError that names a tensor of another shape, or one with a
    value that is not finite.
    """
    for name, shape in shapes.items():
        tensor = _own(weights[name], name, shape, dtype=dtype, source=source)
        stored = weights.name_in_file(name) if isinstance(weights, PlacedWeights) else name
        require_finite(tensor, stored, source=source)
        yield name, tensor
        del tensor  # the next one is read without this one in memory


def _own(tensor: Tensor, name: str, shape: torch.Size, *, dtype: torch.dtype, source: str) -> Tensor:
    if tensor.shape != shape:
        raise ModelError(f"{source} has {name} of shape {tuple(tensor.shape)}, but this model has {tuple(shape)}")
    return tensor.to(dtype, copy=True).contiguous()
