"""How this process computes on a GPU: fp32 as it is or as TF32, and kernels that repeat a result to the bit."""

from __future__ import annotations

from collections.abc import MutableMapping

import torch

WORKSPACE_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
FIXED_WORKSPACES = (":4096:8", ":16:8")  # with which cuBLAS repeats its sums; the first is the faster one


def set_arithmetic(*, allow_tf32: bool, deterministic: bool, environ: MutableMapping[str, str]) -> str:
    """Set what PyTorch leaves open, before anything is computed; returns a line for the log.

    allow_tf32: of both matrix products and convolutions. By itself PyTorch would allow it for convolutions alone.
    deterministic: take only kernels that repeat a result. An operation without one raises RuntimeError, with its name.
    It must not only warn: attention would then keep the kernels that add in any order (attention_backward.cu in
    PyTorch). environ: gets cuBLAS's variable.
    """
    torch.backends.cuda.matmul.allow_tf32 = allow_tf32
    torch.backends.cudnn.allow_tf32 = allow_tf32
    # otherwise each start measures, and may choose other kernels than the last one
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = deterministic
    if deterministic != torch.are_deterministic_algorithms_enabled():  # the call imports a compiler, for seconds
        torch.use_deterministic_algorithms(deterministic)
    # it helps to find mistakes, by writing to all new memory
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    tf32 = "fp32 on a GPU is TF32 (allow_tf32)" if allow_tf32 else "fp32 on a GPU without TF32"
    if not deterministic:
        return f"arithmetic: {tf32}; GPU kernels may add in another order each time (--deterministic forbids it)"
    if environ.get(WORKSPACE_VARIABLE) not in FIXED_WORKSPACES:
        environ[WORKSPACE_VARIABLE] = FIXED_WORKSPACES[0]
    return f"arithmetic: {tf32}; deterministic kernels only, {WORKSPACE_VARIABLE}={environ[WORKSPACE_VARIABLE]}"
