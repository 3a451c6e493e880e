"""Open a file of torch.save without running any code that it may contain."""

from __future__ import annotations

import collections
import dataclasses
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_dpo.errors import CheckpointError, cut, shown
from ds_dpo.zero_shards.archive import PICKLE, Archive
from ds_dpo.zero_shards.pickle_budget import check_budget


@dataclasses.dataclass(frozen=True)
class Shard:
    """A loaded file: the saved dictionary; its tensors stay in the archive."""

    content: dict[str, Any]
    archive: Archive


def load_shard(path: Path) -> Shard:
    """Load a dictionary saved by torch.save; its tensors stay in the file, memory-mapped, until they are read.

    Raises CheckpointError as load_file does, and for a file that holds something else.
    """
    content, archive = load_file(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a dictionary as DeepSpeed saves it")
    return Shard(content, archive)


def load_file(path: Path) -> tuple[Any, Archive]:
    """Load what torch.save wrote.

    Builds only tensors, plain containers and stand-ins for DeepSpeed's classes; DeepSpeed need not be installed.
    Raises CheckpointError for a missing, torn or foreign file, and for one that asks for any other class or function.
    """
    archive = Archive(path)
    try:
        archive.check_byte_order()
        return Unpickler(archive).load(), archive
    except RefusedError as error:
        raise CheckpointError(
            f"{path}: refused, because it asks for {cut(str(error))}, which no checkpoint needs; none of its code was "
            "run"
        ) from error
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle can fail in any line
        raise CheckpointError(f"{path}: damaged, its pickle is not one of torch ({cut(str(error))})") from error


class RefusedError(Exception):
    """The pickle asks for a class or function that is not in the list."""


class Unpickler(pickle.Unpickler):
    """Builds only what is in a fixed list of names, as in "Restricting Globals" of pickle's manual.

    It is Python's C unpickler, because torch's weights-only one takes 0.2 s for the names of SDXL's 1,680 weights, and
    64 ranks write 128 files. The list is made anew for each file, so that data which a pickle sets on its entries is
    gone with the file.
    """

    def __init__(self, archive: Archive) -> None:
        content = archive.content(PICKLE)
        check_budget(content)
        super().__init__(io.BytesIO(content))
        self._archive = archive
        self._storages: dict[str, Tensor] = {}
        self._known = {**PLAIN, **DTYPES, **STORAGES, **_stand_ins(), **_builders()}

    def find_class(self, module: str, name: str) -> Any:
        """Return the list's entry of a name."""
        full_name = f"{module}.{name}"
        if full_name not in self._known:
            raise RefusedError(full_name)
        return self._known[full_name]

    def persistent_load(self, pid: Any) -> Tensor:
        """Return the flat tensor of a storage."""
        kind, (dtype, key) = pid[0], pid[1:3]
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise RefusedError(f"a storage of {dtype!r}")
        if key not in self._storages:
            self._storages[key] = self._map_storage(f"data/{key}", dtype)
        return self._storages[key]

    def _map_storage(self, name: str, dtype: torch.dtype) -> Tensor:
        record = self._archive.records[name]
        if record.size == 0:
            return torch.empty(0, dtype=dtype)
        return self._archive.tensor(record.start, dtype, record.size // dtype.itemsize)


# functions that only make a value from their arguments
PLAIN: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": collections.OrderedDict,
    "torch.Size": torch.Size,
    "torch.device": torch.device,
    "builtins.set": set,
    "__builtin__.set": set,
    # named as the type of a tensor, but never called
    "torch.Tensor": Tensor,
    "torch.nn.parameter.Parameter": Tensor,
    # a ZeRO stage is an enumeration of integers
    "deepspeed.runtime.zero.config.ZeroStageEnum": int,
}
# the members of deepspeed/runtime/zero/config.py, ZeroStageEnum
ZERO_STAGES = {"disabled": 0, "optimizer_states": 1, "gradients": 2, "weights": 3, "max_stage": 3}
STORAGES: dict[str, torch.dtype] = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}
DTYPES: dict[str, torch.dtype] = {str(dtype): dtype for dtype in STORAGES.values()}


def _stand_ins() -> dict[str, type]:
    """Return classes that take the saved attributes and have no behaviour."""
    names = (
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
        "deepspeed.utils.tensor_fragment.fragment_address",
    )
    return {name: type("Attributes", (), {}) for name in names}


def _builders() -> dict[str, Callable[..., Any]]:
    def rebuild_tensor(storage: Tensor, offset: int, size: Any, stride: Any, *unused: Any) -> Tensor:
        # torch refuses a view that reaches beyond the storage, but not one that repeats parts of it without an end
        view = storage.as_strided(size, stride, offset)
        if view.numel() > storage.numel():
            raise ValueError(f"a tensor of {view.numel()} elements over {storage.numel()} stored ones")
        return view

    def rebuild_parameter(data: Tensor, *unused: Any) -> Tensor:
        return data

    def rebuild_typed(function: Any, kind: Any, arguments: Any, attributes: Any) -> Tensor:
        # torch saves tensors with attributes this way; DeepSpeed sets some on its flat groups
        if function not in (rebuild_tensor, rebuild_parameter):
            raise RefusedError(f"a tensor built by {function!r}")
        return function(*arguments)

    def encode(text: str, encoding: str) -> bytes:
        # protocol 2 writes bytes this way
        if encoding != "latin1":
            raise RefusedError(f"text in {encoding!r}")
        return text.encode("latin1")

    def member(kind: Any, name: Any) -> int:
        # Python 3.11.0 to 3.11.3 write a member of an enumeration as getattr(class, name), later ones as class(value)
        if kind is not int or not isinstance(name, str) or name not in ZERO_STAGES:
            raise RefusedError(f"the attribute {shown(name)}")
        return ZERO_STAGES[name]

    return {
        "__builtin__.getattr": member,
        "builtins.getattr": member,
        "torch._utils._rebuild_tensor_v2": rebuild_tensor,
        "torch._utils._rebuild_parameter": rebuild_parameter,
        "torch._tensor._rebuild_from_type_v2": rebuild_typed,
        "_codecs.encode": encode,
    }
