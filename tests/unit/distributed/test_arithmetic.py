"""How a process computes is set by the configuration, whatever PyTorch's defaults are, and said in one line."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from ds_dpo.distributed.arithmetic import set_arithmetic


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    set_arithmetic(allow_tf32=False, deterministic=False, environ={})


def settings() -> dict[str, object]:
    return {
        "products": torch.backends.cuda.matmul.allow_tf32,
        "convolutions": torch.backends.cudnn.allow_tf32,
        "measures kernels": torch.backends.cudnn.benchmark,
        "deterministic convolutions": torch.backends.cudnn.deterministic,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "only warns": torch.is_deterministic_algorithms_warn_only_enabled(),
        "fills memory": torch.utils.deterministic.fill_uninitialized_memory,
    }


NEVER = {"measures kernels": False, "only warns": False, "fills memory": False}
PLAIN = {"deterministic convolutions": False, "deterministic": False, **NEVER}


def test_fp32_is_fp32_unless_tf32_is_asked_for() -> None:
    torch.backends.cudnn.allow_tf32 = True  # PyTorch's default
    line = set_arithmetic(allow_tf32=False, deterministic=False, environ={})
    assert settings() == {"products": False, "convolutions": False, **PLAIN}
    assert line == (
        "arithmetic: fp32 on a GPU without TF32; GPU kernels may add in another order each time "
        "(--deterministic forbids it)"
    )
    line = set_arithmetic(allow_tf32=True, deterministic=False, environ={})
    assert settings() == {"products": True, "convolutions": True, **PLAIN}
    assert line.startswith("arithmetic: fp32 on a GPU is TF32 (allow_tf32); ")


@pytest.mark.parametrize(("before", "after"), [(None, ":4096:8"), (":16:8", ":16:8"), (":0:0", ":4096:8")])
def test_deterministic_kernels_are_required_and_not_only_preferred(before: str | None, after: str) -> None:
    """With a mere warning PyTorch's attention would go on adding in any order in its backward pass."""
    environ = {} if before is None else {"CUBLAS_WORKSPACE_CONFIG": before}
    line = set_arithmetic(allow_tf32=False, deterministic=True, environ=environ)
    expected = {"deterministic convolutions": True, "deterministic": True, **NEVER}
    assert settings() == {"products": False, "convolutions": False, **expected}
    assert environ == {"CUBLAS_WORKSPACE_CONFIG": after}
    assert line.endswith(f"; deterministic kernels only, CUBLAS_WORKSPACE_CONFIG={after}")
    set_arithmetic(allow_tf32=False, deterministic=False, environ=environ)
    assert settings() == {"products": False, "convolutions": False, **PLAIN}
