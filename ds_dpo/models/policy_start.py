"""The weights that the policy alone starts from: model.policy_init, compared with the policy before it gets them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from ds_dpo.config.models import ModelConfig
from ds_dpo.errors import ModelError
from ds_dpo.models.denoiser.adapters import is_of_adapter, require_same_adapter
from ds_dpo.models.pipelines.pretrained import open_denoiser_init
from ds_dpo.models.start import checkpoint_start
from ds_dpo.models.weights.soundness import require_finite, wrapper_hint

FIELD = "policy_init"


@dataclass(frozen=True, kw_only=True)
class PolicyStart(Mapping[str, Tensor]):
    """The other weights by parameter name, in the dtype of the file; each is read on request, and must be finite.

    source: their origin, for messages.
    """

    weights: Mapping[str, Tensor]
    source: str

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.weights[name]
        require_finite(tensor, name, source=self.source)
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self.weights

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


def open_policy_start(model: ModelConfig, policy: nn.Module, *, has_adapter: bool) -> PolicyStart | None:
    """Return the weights of model.policy_init, or None if it is unset.

    policy: with its adapter, plain or partitioned by ZeRO 3. Only headers and a LoRA are read. Raises CheckpointError
    for an incomplete checkpoint, ModelError for weights that are not those of this policy, by the first difference.
    """
    if model.policy_init is None:
        return None
    source = f"model.{FIELD} {model.policy_init}"
    checkpoint = checkpoint_start(model, field=FIELD)
    if has_adapter:
        if checkpoint is None or not any(map(is_of_adapter, checkpoint)):
            raise ModelError(
                f"{source}: not a checkpoint with a LoRA, but this run trains one (adapter.type); give a run that "
                "trained one like it, or set model.denoiser_init, from which policy and reference start"
            )
        require_same_adapter(policy, checkpoint.checkpoint.folder, source=source)
        own = {name: shape for name, shape in _shapes(policy).items() if is_of_adapter(name)}
        placed = checkpoint.checkpoint.parameters
        _require_same(own, {name: tuple(placed[name].shape) for name in placed if is_of_adapter(name)}, source)
        return PolicyStart(weights={name: checkpoint[name] for name in own}, source=source)
    if checkpoint is not None:
        placed = checkpoint.checkpoint.parameters
        if any(map(is_of_adapter, placed)):
            raise ModelError(
                f"{source}: a run that trained a LoRA has no whole denoiser; write one with scripts/consolidate.py and "
                "give that, or train a LoRA here too"
            )
        _require_same(_shapes(policy), {name: tuple(place.shape) for name, place in placed.items()}, source)
        return PolicyStart(weights=checkpoint, source=source)
    weights = open_denoiser_init(model, field=FIELD).weights()
    tables = dict(policy.named_buffers())  # a file has them beside the parameters, and no training changes them
    found = {name: tuple(weights[name].shape) for name in weights if name not in tables}
    _require_same(_shapes(policy), found, source)
    return PolicyStart(weights=weights, source=source)


def _shapes(policy: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(getattr(each, "ds_shape", each.shape)) for name, each in policy.named_parameters()}


def _require_same(own: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], source: str) -> None:
    missing, unknown = sorted(own.keys() - found.keys()), sorted(found.keys() - own.keys())
    if missing:
        raise ModelError(
            f"{source} lacks {len(missing)} tensors of this policy, such as {missing[0]}{wrapper_hint(unknown)}"
        )
    if unknown:
        raise ModelError(
            f"{source} has {len(unknown)} tensors that do not belong to this policy, such as {unknown[0]}"
            f"{wrapper_hint(unknown)}"
        )
    for name, shape in own.items():
        if found[name] != shape:
            raise ModelError(f"{source} has {name} of shape {found[name]}, but this policy has {shape}")
