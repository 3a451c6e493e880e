"""The frozen reference: how it predicts, and how a run checks that nothing changed it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from ds_dpo.batch import Conditioning
from ds_dpo.models.denoiser.adapters import adapters_disabled, is_of_adapter
from ds_dpo.models.denoiser.predict import Predict


class Reference(Protocol):
    """What the policy is compared with. Wherever its weights are, it only predicts.

    module: the network that computes the prediction, plain or in an engine.
    """

    module: nn.Module

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the reference's prediction, (N, C, H, W) in the model's dtype, without a gradient."""
        ...


class HeldReference(Reference, Protocol):
    """A reference whose weights a run can read, to check that they do not change."""

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield its tensors by name, as this rank holds them: with ZeRO-3 its part of each parameter."""
        ...


class FrozenCopy:
    """A copy of the policy with its own storage: evaluation mode, no gradients, no gradient checkpointing.

    module: a plain module under every ZeRO stage; another residency moves it after the copy is made. forget_copies:
    called when the weights were replaced on purpose; a residency sets it that keeps copies of them elsewhere.
    """

    forget_copies: Callable[[], None] = staticmethod(lambda: None)

    def __init__(self, policy: nn.Module, *, predict: Predict, dtype: torch.dtype, device: torch.device | str) -> None:
        """Copy a policy before an engine wraps it, tensor by tensor and directly to the device."""
        self._freeze(_copy_module(policy, dtype=dtype, device=device), predict)
        assert_own_storage(policy, self)

    @classmethod
    def of_own(cls, module: nn.Module, *, predict: Predict) -> FrozenCopy:
        """Return a reference around a module that was loaded for it alone, plain or partitioned by ZeRO 3."""
        reference = cls.__new__(cls)
        reference._freeze(module, predict)
        return reference

    def _freeze(self, module: nn.Module, predict: Predict) -> None:
        self._predict = predict
        self.module = module.requires_grad_(False).eval()
        if isinstance(self.module, ModelMixin):
            self.module.disable_gradient_checkpointing()

    @torch.no_grad()
    def predict(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the copy's prediction, (N, C, H, W) in its dtype, without a gradient."""
        return self._predict(self.module, noisy_latents, timesteps, conditioning)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the copy's tensors by name, as this rank holds them."""
        return held_tensors(self.module)


class PolicyWithoutAdapter:
    """The policy itself with its low-rank layers switched off: its frozen weights are those of its start.

    It uses the policy's own module, which has ZeRO-3's hooks. An engine's forward would prepare for a backward pass
    that never comes.
    """

    def __init__(self, policy: nn.Module, *, predict: Predict) -> None:
        """policy: the module that gets, or has, an adapter, plain or in an engine."""
        self.module, self._predict = policy, predict

    @torch.no_grad()
    def predict(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Return what the policy predicts without its adapter and without dropout."""
        with adapters_disabled(self.module), evaluation_mode(self.module):
            return self._predict(self.module, noisy_latents, timesteps, conditioning)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights without those of the adapter, as this rank holds them."""
        return ((name, tensor) for name, tensor in held_tensors(self.module) if not is_of_adapter(name))


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode, and afterwards restore the mode of each part."""
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


def held_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield a module's parameters and buffers by name, as this rank holds them: with ZeRO-3 its part of each."""
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        yield name, getattr(tensor, "ds_tensor", tensor).detach()


def _copy_module(module: nn.Module, *, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
    """Deep-copy a module with its attention processors and memory layout, and with its tensors in dtype on the device.

    deepcopy uses the tensors in its memo instead of copying, so that there is no second host copy of the weights.
    """
    made: dict[int, object] = {}
    for parameter in module.parameters():
        assert not hasattr(parameter, "ds_id"), "copy the reference before DeepSpeed partitions the policy"
        tensor = parameter.detach().to(device=device, dtype=dtype, copy=True)
        made[id(parameter)] = nn.Parameter(tensor, requires_grad=False)
    for buffer in module.buffers():
        buffer_dtype = dtype if buffer.is_floating_point() else buffer.dtype
        made[id(buffer)] = buffer.detach().to(device=device, dtype=buffer_dtype, copy=True)
    return copy.deepcopy(module, made)


def assert_own_storage(policy: nn.Module, reference: FrozenCopy) -> None:
    """Assert that the reference shares no memory with the policy: an update would change both."""
    owned = {_address(tensor) for tensor in [*policy.parameters(), *policy.buffers()]}
    owned |= {_address(tensor) for _, tensor in held_tensors(policy)}  # parts of ZeRO-3
    shared = [name for name, tensor in reference.weights() if _address(tensor) in owned - {None}]
    assert not shared, f"the reference shares storage with the policy: {', '.join(shared[:3])}"


def _address(tensor: Tensor) -> int | None:
    """Return the address of a tensor's storage, None for an empty one (a parameter that ZeRO-3 has released)."""
    return tensor.untyped_storage().data_ptr() if tensor.untyped_storage().nbytes() else None
