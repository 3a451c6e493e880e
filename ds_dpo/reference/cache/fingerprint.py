"""What determines the reference's errors, as named parts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from ds_dpo.config.diffusion import DiffusionConfig
from ds_dpo.config.fields import FIELDS
from ds_dpo.config.identity import FIRST_FIELDS
from ds_dpo.config.run import RunConfig
from ds_dpo.encoding.cache.fingerprint import encoder_parts, pair_fields
from ds_dpo.encoding.feed import PairFeed
from ds_dpo.models.conditioning import guidance_of
from ds_dpo.models.denoiser.attention import AttentionChoice
from ds_dpo.models.training_schedule import training_schedule
from ds_dpo.precision import Precision

# these weigh errors when a step compares them, and do not change the errors themselves
ACT_ON_COMPARING = {"error_weighting", "snr_gamma"}
HASHING_THREADS = 8


@dataclass(frozen=True, kw_only=True)
class StartOfPolicy:
    """The common start of policy and reference. weights, config: SHA-256 hashes. attention: name of the kernels."""

    weights: str
    config: str
    attention: str


def start_of_policy(policy: ModelMixin, attention: AttentionChoice, *, weights: str | None = None) -> StartOfPolicy:
    """Describe a policy as it was loaded, in the run's precision, before anything is added to it or trained.

    weights: the hash of its tensors, if it was taken while they were read; otherwise the policy must be whole.
    """
    # names that begin with _ hold the library's version and the path where the model was saved
    config = {name: value for name, value in dict(policy.config).items() if not name.startswith("_")}
    return StartOfPolicy(weights=weights or weights_sha256(policy), config=_hash(config), attention=attention.name)


def weights_sha256(module: nn.Module) -> str:
    """Return the SHA-256 over names, dtypes, shapes and contents of a module's tensors on the host, as 64 hex digits.

    Each tensor is hashed on its own, several at once: 5 GB in about a second on eight cores.
    """
    tensors = sorted(module.state_dict().items())
    with ThreadPoolExecutor(HASHING_THREADS) as threads:
        return joined_sha256(list(threads.map(lambda named: line_of(*named), tensors)))


def line_of(name: str, tensor: Tensor) -> str:
    """Return a tensor's line of weights_sha256, for tensors that come one after another."""
    return f"{name} {tensor.dtype} {tuple(tensor.shape)} {_content_sha256(tensor)}"


def joined_sha256(lines: Iterable[str]) -> str:
    """Return weights_sha256 of the tensors whose lines are given, sorted by name."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _content_sha256(tensor: Tensor) -> str:
    content: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(memoryview(content)).hexdigest()


def fingerprint_of(config: RunConfig, feed: PairFeed, start: StartOfPolicy, *, precision: Precision) -> dict[str, str]:
    """Return what a cache of reference errors for this run must be made from.

    Objective, weighting, optimizer, batch size and ranks are left out, because they do not change the errors. The
    attention kernels are those in use, not those configured.
    """
    schedule = training_schedule(config.model, config.diffusion)
    buckets = ", ".join(map(str, feed.pairs.bucket_sizes))
    return {
        "seed": str(config.seed),
        **pair_fields(config),
        **{f"pairs.{name}": value for name, value in feed.fingerprint.items()},
        "pairs.number": buckets,
        "encoding": feed.encoding,
        **encoder_parts(config, text_dtype=precision),
        **_noising_fields(config),
        **_guidance(config),
        "noise_schedule": schedule.fingerprint(),
        "prediction_type": schedule.prediction_type,
        "unet.weights": start.weights,
        "unet.config": start.config,
        "precision": precision,
        "attention kernels": start.attention,
    }


def _guidance(config: RunConfig) -> dict[str, str]:
    """Return the scale of guidance of a denoiser that takes one; caches of other models have no such part."""
    guidance = guidance_of(config.model)
    return {} if guidance is None else {"model.guidance": json.dumps(guidance)}


def _noising_fields(config: RunConfig) -> dict[str, str]:
    """Return the fields of the section `diffusion` that change a denoiser's input or target.

    A field that caches of earlier versions lack counts where it differs from its default.
    """
    values, plain = config.model_dump(mode="json"), DiffusionConfig().model_dump(mode="json")
    specs = [spec for spec in FIELDS.values() if spec.section == "diffusion" and spec.is_identity]
    names = {spec.path.removeprefix("diffusion.") for spec in specs} - ACT_ON_COMPARING
    chosen = {name: values["diffusion"][name] for name in sorted(names)}
    return {
        f"diffusion.{name}": json.dumps(value)
        for name, value in chosen.items()
        if f"diffusion.{name}" in FIRST_FIELDS or value != plain[name]
    }


def _hash(values: object) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()
