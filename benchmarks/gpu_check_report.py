"""What every part of gpu_check.py gets: the sizes and the folder to work in, and a report that survives its end."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = "report.json"


@dataclass(frozen=True, kw_only=True)
class Setup:
    """is_full: the sizes of SDXL, else those of the miniature. folder: empty, and deleted afterwards."""

    is_full: bool
    folder: Path

    @staticmethod
    def of(scale: str, folder: Path) -> Setup:
        return Setup(is_full=scale == "full", folder=folder)

    @property
    def dtype(self) -> Any:
        """The dtype of UNets: bf16, and fp32 for small ones, because CPUs compute bf16 slowly."""
        import torch

        return torch.bfloat16 if self.is_full else torch.float32

    @property
    def has_gpu(self) -> bool:
        """Whether parts compute on a GPU; which one, and whether it works, the product says."""
        return os.environ.get("DS_ACCELERATOR") != "cpu"


class Report:
    """The results and failures of a part. Each is written at once, so that a part that is killed keeps what it has."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self.results: dict[str, Any] = {}
        self._failures: list[str] = []

    def add(self, **results: Any) -> None:
        """Add results by name; numbers are rounded to 6 digits."""
        self.results |= {name: _plain(value) for name, value in results.items()}
        self._write()

    def skip(self, name: str, reason: str) -> None:
        """Say why something was not tried."""
        self.add(**{name: {"skipped": reason}})

    def require(self, what: str, is_so: bool) -> None:
        """Record a failure, in words, unless it is so."""
        if not is_so:
            self._failures.append(what)
            self._write()

    def try_to(self, name: str, work: Callable[[], Any]) -> None:
        """Add what work returns; if it raises, add the error and go on with the rest of the part."""
        try:
            self.add(**{name: work()})
        except Exception as error:
            first_line = str(error).strip().partition("\n")[0]
            self.add(**{name: {"error": f"{type(error).__name__}: {first_line[:300]}"}})
            self.require(f"{name} raised {type(error).__name__}", False)

    def _write(self) -> None:
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps({"results": self.results, "failures": self._failures}), encoding="utf-8")
        partial.replace(self._path)

    @staticmethod
    def read(folder: Path) -> dict[str, Any]:
        """Return the results and failures that a part has written."""
        path = folder / FILE
        found: dict[str, Any] = {"results": {}, "failures": []}
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else found


def _plain(value: Any) -> Any:
    """Return a value as JSON has it; what is not finite becomes a word."""
    if isinstance(value, dict):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    return value


def timed(work: Callable[[], Any]) -> float:
    """Return the seconds that something takes, the GPU's work included."""
    import torch

    is_cuda = torch.cuda.is_initialized()
    if is_cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def peak_gb(work: Callable[[], Any]) -> float | None:
    """Do something, and return the most GB (10^9 bytes) that a GPU then held; None on a CPU."""
    import torch

    if not torch.cuda.is_initialized():
        work()
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 1e9
