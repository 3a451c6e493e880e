"""The frozen reference: what it answers, and how a run shows that nothing touched it."""

from __future__ import annotations

import copy
import hashlib
from typing import Protocol

import torch
from torch import Tensor, nn

from ds_dpo.batch import Conditioning
from ds_dpo.models.denoiser import predict


class Reference(Protocol):
    """What the policy is compared with; wherever its weights live, it only predicts."""

    def predict(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the reference's prediction, (N, C, H, W) in the model's dtype, without a gradient."""
        ...


class FrozenCopy:
    """A copy of the policy in its own storage: evaluation mode, no gradients, a plain module under every ZeRO stage."""

    def __init__(self, policy: nn.Module, *, dtype: torch.dtype, device: torch.device | str) -> None:
        """Copy a policy that no engine has taken yet, tensor by tensor and straight to the device."""
        self.module = _copy_module(policy, dtype=dtype, device=device).requires_grad_(False).eval()
        assert_own_storage(policy, self.module)

    @torch.no_grad()
    def predict(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the copy's prediction, (N, C, H, W) in its dtype, without a gradient."""
        return predict(self.module, noisy_latents, timesteps, conditioning)


def _copy_module(module: nn.Module, *, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
    """Deep-copy a module with its attention processors and memory layout, but its tensors in dtype on the device.

    deepcopy takes what its memo already holds for a copy made, so that no second host copy of the weights arises.
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


def assert_own_storage(policy: nn.Module, reference: nn.Module) -> None:
    """Assert that no tensor of the reference lies in memory of the policy, where an update would change both."""
    policy_storages = _storages(policy)
    shared = [name for pointer, name in _storages(reference).items() if pointer in policy_storages]
    assert not shared, f"the reference shares storage with the policy: {', '.join(shared[:3])}"


def _storages(module: nn.Module) -> dict[int, str]:
    """Return addresses of a module's storages and the name of a tensor in each; empty ones (ZeRO-3) left out."""
    storages = {}
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        for held in (tensor, getattr(tensor, "ds_tensor", None)):
            if held is not None and held.untyped_storage().nbytes():
                storages[held.untyped_storage().data_ptr()] = name
    return storages


def weights_hash(module: nn.Module) -> str:
    """Return the SHA-256 over names, dtypes, shapes and bytes of a module's tensors, as 64 hex digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()
