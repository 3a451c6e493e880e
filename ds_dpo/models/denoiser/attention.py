"""The one place that chooses attention kernels: it tries them on the real device and states its choice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from diffusers import ModelMixin
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor2_0,
    JointAttnProcessor2_0,
    XFormersAttnProcessor,
)
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from diffusers.models.transformers.transformer_flux2 import Flux2AttnProcessor
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ds_dpo.errors import ModelError

JOINT_PROCESSORS = (JointAttnProcessor2_0, FluxAttnProcessor, Flux2AttnProcessor)
_PROBE_TOKENS = (64, 77)  # numbers of image and prompt tokens
_PROBE_TOLERANCE = 0.05  # as a share of the largest value; SDPA itself has up to 0.011 of bf16 rounding


@dataclass(frozen=True, kw_only=True)
class AttentionChoice:
    """The chosen attention kernels, and a sentence for the log."""

    name: Literal["xformers", "sdpa"]
    sentence: str


def choose_attention(
    denoiser: ModelMixin,
    asked: Literal["auto", "xformers", "sdpa"],
    *,
    device: torch.device | str,
    dtype: torch.dtype,
) -> AttentionChoice:
    """Return the kernels for both policy and reference. auto is SDPA, and xformers only where it is asked for.

    xformers 0.0.35 calls the same flash and cutlass kernels as SDPA, after four more copies in each layer of diffusers.
    So all ranks choose alike, without a measurement. denoiser: its head widths are tried.

    Raises ModelError if xformers is requested but does not work.
    """
    if asked != "xformers":
        why = "as configured" if asked == "sdpa" else "auto; xformers would call the same kernels"
        return AttentionChoice(name="sdpa", sentence=f"attention: sdpa ({why})")
    if _has_joint_attention(denoiser):
        raise ModelError(
            f"model.attention xformers: a {type(denoiser).__name__} has joint attention, which uses PyTorch's SDPA; "
            "set it to auto or sdpa"
        )
    problem = _problem_of_xformers(_head_widths(denoiser), torch.device(device), dtype)
    if problem is None:
        return AttentionChoice(name="xformers", sentence=f"attention: xformers (tried on {device} in {dtype})")
    raise ModelError(
        f"model.attention xformers does not work on {device} in {dtype}: {problem}; set it to auto or sdpa, or "
        "install the xformers that was built for this torch"
    )


def set_attention(denoiser: ModelMixin, choice: AttentionChoice) -> None:
    """Give every attention layer of a denoiser the chosen kernels; joint attention has those of SDPA from the start."""
    if _has_joint_attention(denoiser):
        return
    denoiser.set_attn_processor(XFormersAttnProcessor() if choice.name == "xformers" else AttnProcessor2_0())


def _has_joint_attention(denoiser: ModelMixin) -> bool:
    """Return whether image and text attend together, as in the transformers of SD3 and FLUX."""
    return any(isinstance(processor, JOINT_PROCESSORS) for processor in denoiser.attn_processors.values())


def _head_widths(denoiser: ModelMixin) -> list[int]:
    return sorted({layer.inner_dim // layer.heads for layer in denoiser.modules() if isinstance(layer, Attention)})


def _problem_of_xformers(head_widths: list[int], device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why xformers cannot train heads of these widths here, in one line; None if it can.

    It may import without an operator for this device, dtype or width: only a call shows that.
    """
    try:
        for head_width in head_widths:
            error = _largest_error_of_xformers(head_width, device, dtype)
            if not error <= _PROBE_TOLERANCE:  # written so that NaN fails as well
                return f"it differs from sdpa by {error:.2g} of the largest value at head width {head_width}"
    except ModuleNotFoundError as error:
        return "it is not installed" if error.name == "xformers" else str(error)
    except Exception as error:  # a wheel for another torch or driver may raise anything, at import or in a kernel
        lines = str(error).strip().splitlines()
        return f"{type(error).__name__}: {lines[0].rstrip(' :')}" if lines else type(error).__name__
    return None


def _largest_error_of_xformers(head_width: int, device: torch.device, dtype: torch.dtype) -> float:
    """Return the largest difference of outputs and gradients from SDPA's, relative to the largest value."""
    import xformers.ops

    image_tokens, text_tokens = _PROBE_TOKENS
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, tokens, head_width, generator=generator).to(device, dtype)
        for tokens in (image_tokens, text_tokens, text_tokens)
    )
    found, expected = (
        _outputs_and_gradients(attend, query, key, value)
        for attend in (xformers.ops.memory_efficient_attention, scaled_dot_product_attention)
    )
    # reading the number waits for the device, so that a kernel that fails there fails here
    return max(float((one - other).abs().max() / other.abs().max()) for one, other in zip(found, expected, strict=True))


def _outputs_and_gradients(attend: object, *inputs: Tensor) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    assert callable(attend)
    output = attend(*leaves)
    output.float().square().sum().backward()
    return [output.detach().float(), *(leaf.grad.float() for leaf in leaves if leaf.grad is not None)]
