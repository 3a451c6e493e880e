"""Low-rank adapters, by peft: add them before an engine wraps the policy, switch them off, save their settings."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from ds_dpo.config.adapter_targets import NAMED_TARGETS, is_target
from ds_dpo.config.documents import read_json
from ds_dpo.config.optimization import AdapterConfig
from ds_dpo.errors import CheckpointError, ConfigError, ModelError, shown
from ds_dpo.run_part import RunPart
from ds_dpo.storage.state_files import StateFile

CONFIG_FILE = "adapter_config.json"
NAME = "default"  # peft's name for the only adapter of a model
KINDS: dict[str, dict[str, bool]] = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}
# settings of peft without which the same weights are another change, and the fields that set them
_SAME = {
    "r": "adapter.rank",
    "lora_alpha": "adapter.alpha",
    "target_modules": "adapter.targets",
    "use_rslora": "adapter.type",
    "use_dora": "adapter.type",
}
_SAMPLED_ELEMENTS = 1024  # of each weight; another training of the model changes them


def add_adapter(denoiser: ModelMixin, config: AdapterConfig, *, seed: int) -> None:
    """Freeze a denoiser and put a trainable adapter beside its target layers, in its dtype and on its device.

    A denoiser without memory (on the device meta) gets an adapter without memory: see give_memory.
    Its predictions do not change at all: every lora_B is 0, and DoRA's magnitudes are the norms of the rows. lora_A is
    drawn from the seed and the parameter's name, so that it is the same on every rank of any run.
    Raises ConfigError if peft is missing, and for a target that no linear or convolution layer has.
    Sources: arXiv:2106.09685 (LoRA), arXiv:2312.03732 (rsLoRA), arXiv:2402.09353 (DoRA); peft's initial values.
    """
    lora_config = _peft().LoraConfig
    targets = _found_targets(denoiser, config.targets)
    denoiser.requires_grad_(False)
    denoiser.add_adapter(
        lora_config(
            r=config.rank,
            lora_alpha=_plain(config.alpha or config.rank),
            target_modules=targets,
            lora_dropout=config.dropout,
            **KINDS[config.type],
        ),
        adapter_name=NAME,
    )
    for name, parameter in denoiser.named_parameters():
        if ".lora_A." in name and not parameter.is_meta:
            with torch.no_grad():
                parameter.copy_(_initial_down(name, parameter.shape, seed=seed))


def needs_whole_weights(config: AdapterConfig) -> bool:
    """Return whether an adapter starts from the values of the weights that it changes, as DoRA's magnitudes do."""
    return config.type == "dora"


def give_memory(denoiser: nn.Module, *, seed: int, device: torch.device) -> None:
    """Give an adapter that add_adapter put into a denoiser without memory its initial values, on a device."""
    for name, parameter in list(denoiser.named_parameters()):
        if is_of_adapter(name) and parameter.is_meta:
            initial = _initial_down if ".lora_A." in name else _initial_up
            values = initial(name, parameter.shape, seed=seed).to(device, parameter.dtype)
            layer, _, own = name.rpartition(".")
            setattr(denoiser.get_submodule(layer), own, nn.Parameter(values, requires_grad=parameter.requires_grad))


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ConfigError(f"adapter.type other than none needs peft: pip install peft ({error})") from error
    return peft


def _initial_down(name: str, shape: torch.Size, *, seed: int) -> Tensor:
    """Return lora_A's initial value, fp32: uniform within 1 / sqrt(inputs), as nn.Linear and peft draw it."""
    key = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "big") % 2**63)
    bound = 1 / math.sqrt(math.prod(shape[1:]))
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def _initial_up(name: str, shape: torch.Size, *, seed: int) -> Tensor:
    """Return lora_B's initial value, which changes no prediction."""
    return torch.zeros(shape)


def _found_targets(denoiser: nn.Module, targets: list[str]) -> list[str]:
    """Return targets as peft takes them: a kind of layers, such as attention, becomes the names of its layers.

    Raises ConfigError for a target without a layer; peft silently ignores it if another target has one.
    """
    modules = dict(denoiser.named_modules())
    layers = [name for name, module in modules.items() if isinstance(module, nn.Linear | nn.Conv2d)]
    _require_targets(layers, targets)
    # FLUX.2's to_out is a layer in some blocks and a list of layers in others, which peft refuses
    has_others = any(is_target(name, targets) for name in modules.keys() - set(layers))
    if has_others or NAMED_TARGETS.keys() & set(targets):
        return sorted(name for name in layers if is_target(name, targets))
    return sorted(set(targets))


def _require_targets(layers: list[str], targets: list[str]) -> None:
    for target in targets:
        if any(is_target(name, [target]) for name in layers):
            continue
        ends = {".".join(name.split(".")[-parts:]) for name in layers for parts in (1, 2)}
        near = get_close_matches(target, sorted(ends), n=3, cutoff=0.5) or ["to_q", "proj_in", "conv1"]
        raise ConfigError(
            f"adapter.targets {target}: no linear or convolution layer of this model has this name or ends with it; "
            f"there are {', '.join(near)}"
        )


def is_of_adapter(name: str) -> bool:
    """Return whether a parameter belongs to an adapter, by its name: peft's names begin with lora_."""
    return any(part.startswith("lora_") for part in name.split("."))


def name_without_adapter(name: str) -> str:
    """Return the name that a base's weight has without an adapter; peft puts the layer that it wraps into a module."""
    return name.replace(".base_layer.", ".")


@contextmanager
def adapters_disabled(policy: nn.Module) -> Iterator[None]:
    """Let a policy predict without its adapter: a denoiser, or the engine around it, whose weights may be partitioned.

    It only sets a switch in each layer, so that dtypes and requires_grad stay. peft's own enable_adapters would freeze
    the adapter, which breaks an engine's optimizer.
    """
    layers = [module for module in policy.modules() if isinstance(module, _peft().tuners.tuners_utils.BaseTunerLayer)]
    assert layers, "the policy has no adapter"
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, disabled in zip(layers, before, strict=True):
            layer._disable_adapters = disabled


class AdapterPart(RunPart):
    """What a checkpoint of an adapter holds besides its weights: peft's settings, and the identity of its base.

    It does not hold the base's weights: a resumed run takes them from the model's file, which must be the same. Dropout
    depends on the seed, the step and the rank, so that a resumed run drops the same inputs as an uninterrupted one.
    """

    name = "adapter"

    def __init__(self, denoiser: ModelMixin, *, seed: int, rank: int, base: str | None = None) -> None:
        """Take a denoiser after add_adapter and before an engine wraps it.

        base: the fingerprint of its frozen weights, if it was taken while they were read; otherwise they must be whole.
        """
        self._config = denoiser.peft_config[NAME]
        self._base = base or base_fingerprint(denoiser)
        self._seed, self._rank = seed, rank
        self._seed_dropout(after_step=0)

    def after_step(self, step: int, metrics: Mapping[str, float]) -> Mapping[str, float]:
        """Seed the dropout of the next step."""
        self._seed_dropout(after_step=step)
        return {}

    def state(self) -> dict[str, Any]:
        """Return the fingerprint of the base, and the step that seeds dropout."""
        return {"base": self._base, "step": self._step}

    def files(self) -> list[StateFile]:
        """Return adapter_config.json as peft writes it, on rank 0."""
        return [StateFile(name=CONFIG_FILE, state=self._config, write=_write_config)] if self._rank == 0 else []

    def restore(self, state: Mapping[str, Any], folder: Path) -> None:
        """Compare the base. Raises CheckpointError if the model's file now holds other weights."""
        if state["base"] != self._base:
            raise CheckpointError(
                f"{folder}: its adapter was trained on other weights than model.pretrained now holds; give the "
                "original model, or start a new run with another output_dir"
            )
        self._seed_dropout(after_step=int(state["step"]))

    def _seed_dropout(self, *, after_step: int) -> None:
        self._step = after_step
        if self._config.lora_dropout:
            key = hashlib.sha256(f"dropout {self._seed} {after_step} {self._rank}".encode()).digest()
            torch.manual_seed(int.from_bytes(key[:8], "big") % 2**63)


def require_same_adapter(denoiser: nn.Module, folder: Path, *, source: str) -> None:
    """Raise ModelError that names the setting in which a checkpoint's adapter is not like the denoiser's.

    source: what names the folder, for the message. Raises ConfigError if its settings cannot be read.
    """
    saved = read_json(folder / CONFIG_FILE, dict)
    config: Any = denoiser.peft_config
    for name, field in _SAME.items():
        values = saved.get(name), getattr(config[NAME], name)
        one, other = (sorted(map(str, value)) if isinstance(value, list | set) else value for value in values)
        if one != other:
            raise ModelError(
                f"{source}: its adapter has {name} {shown(one)}, but this run's has {other}; set {field} to fit"
            )


def _write_config(config: Any, path: Path) -> None:
    config.save_pretrained(str(path.parent))  # peft chooses the file's name, which is CONFIG_FILE


class BaseFingerprint:
    """The SHA-256 of names, dtypes, shapes and first elements of frozen weights, which come one after another."""

    def __init__(self) -> None:
        self._lines: dict[str, bytes] = {}

    def add(self, name: str, weight: Tensor) -> None:
        """Add a weight by its name in the denoiser with the adapter."""
        first = weight.detach().flatten()[:_SAMPLED_ELEMENTS].float().cpu()
        self._lines[name] = f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode() + first.numpy().tobytes()

    def hexdigest(self) -> str:
        """Return 64 hex digits, the same for any order of the weights."""
        return hashlib.sha256(b"".join(line for _, line in sorted(self._lines.items()))).hexdigest()


def base_fingerprint(denoiser: nn.Module) -> str:
    """Return the fingerprint of a denoiser's frozen weights, which must be whole: see BaseFingerprint."""
    fingerprint = BaseFingerprint()
    for name, parameter in denoiser.named_parameters():
        if not parameter.requires_grad:
            fingerprint.add(name, parameter)
    return fingerprint.hexdigest()


def _plain(value: float) -> float | int:
    return int(value) if value == int(value) else value
