"""Which blocks of a denoiser keep their activations, and which compute them again in the backward pass.

diffusers' denoisers call each block that may be checkpointed through a function that a caller can replace. The one here
checkpoints the blocks that are marked and calls the others as they are, so that it works with every class of denoiser.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from diffusers import ModelMixin
from torch import nn
from torch.utils.checkpoint import checkpoint

# on the block itself, so that a copy of the denoiser has it too
MARK = "computes_again"


def recompute_all(denoiser: ModelMixin) -> None:
    """Let every block compute its activations again, by torch's checkpoints that are not re-entrant.

    These recompute less than the re-entrant ones, and work with ZeRO-3.
    """
    denoiser.enable_gradient_checkpointing()


def recompute_blocks(denoiser: ModelMixin, names: Collection[str]) -> None:
    """Let the blocks of these names compute their activations again; the others keep them."""
    for name in names:
        setattr(denoiser.get_submodule(name), MARK, True)
    call_blocks_by(denoiser, _call_block)


def call_blocks_by(denoiser: ModelMixin, call: Callable[..., Any]) -> None:
    """Call each block that may be checkpointed as call(block, *inputs) when gradients are computed."""
    denoiser.enable_gradient_checkpointing(call)


def _call_block(block: nn.Module, *inputs: Any) -> Any:
    if getattr(block, MARK, False):
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)
