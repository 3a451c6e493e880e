"""The options of DeepSpeed that compile an extension when they are first used, which needs CUDA's compiler."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ds_dpo.errors import ConfigError

COMPILED_OPTIONS = ("zero_quantized_weights", "zero_quantized_gradients")  # by DeepSpeed's QuantizerBuilder


def require_compiler(zero: Mapping[str, Any]) -> None:
    """Raise ConfigError if an option of the block zero_optimization needs nvcc and this host has none."""
    chosen = [name for name in COMPILED_OPTIONS if zero.get(name)]
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    if chosen and shutil.which("nvcc") is None and not (Path(home) / "bin" / "nvcc").is_file():
        raise ConfigError(
            f"zero_optimization.{' and '.join(chosen)} compiles an extension at its first use, and this host has no "
            f"nvcc (looked on PATH and in {home}/bin); install CUDA's toolkit, or leave the option out"
        )
