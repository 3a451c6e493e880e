"""Policy and reference predict exactly alike at the widths of published models, in each way that a run calls them.

The miniature is too narrow for that: kernels are chosen by size and layout too. Latents come as a VAE with attention
gives them on a CPU, in NHWC.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ModelMixin
from full_widths import load_wide, wide_config, wide_pair
from torch import Tensor

from ds_dpo.batch import PreferenceBatch
from ds_dpo.config.optimization import AdapterConfig
from ds_dpo.diffusion.noise_schedule import NoiseSchedule
from ds_dpo.models.denoiser.adapters import add_adapter
from ds_dpo.models.denoiser.predict import predict_by_unet
from ds_dpo.models.reference import FrozenCopy, PolicyWithoutAdapter, Reference
from ds_dpo.objectives.losses import OBJECTIVES
from ds_dpo.step.preference_step import PreferenceStep

SCHEDULE = NoiseSchedule(alphas_cumprod=torch.linspace(0.999, 0.005, 1000), prediction_type="epsilon")
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
TARGETS = ["to_q", "to_out.0", "proj_in", "conv1", "conv_shortcut"]


def step_of(policy: ModelMixin, reference: Reference) -> PreferenceStep:
    dpo = OBJECTIVES["dpo"]
    return PreferenceStep(
        policy=policy,
        predict=predict_by_unet,
        reference=reference,
        schedule=SCHEDULE,
        objective=dpo,
        options={"beta": 5000.0},
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("family", ["sdxl", "sd15", "sd21"])
def test_policy_and_reference_differ_by_nothing(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    policy = load_wide(family, tmp_path / family, dtype=dtype)
    # a processor without instructions for 16 bits takes long, so latents are as small as three levels allow
    pair = wide_pair(wide_config(family), size=4, layout=torch.channels_last)
    found = {"full": differences(policy, FrozenCopy(policy, predict=predict_by_unet, dtype=dtype, device="cpu"), pair)}
    add_adapter(policy, AdapterConfig(type="lora", rank=2, targets=TARGETS), seed=0)
    found["LoRA"] = differences(policy, PolicyWithoutAdapter(policy, predict=predict_by_unet), pair)
    assert found == {"full": [0.0, 0.0], "LoRA": [0.0]}


def test_each_width_and_each_kind_of_block_is_there() -> None:
    kinds = {"sdxl": ("Down", "Attn", "Attn"), "sd15": ("Attn", "Attn", "Down"), "sd21": ("Attn", "Attn", "Down")}
    for family, of_levels in kinds.items():
        config = wide_config(family)
        assert config["block_out_channels"] == [320, 640, 1280]
        downs = ["CrossAttnDownBlock2D" if kind == "Attn" else "DownBlock2D" for kind in of_levels]
        assert config["down_block_types"] == downs
        ups = ["CrossAttnUpBlock2D" if kind == "Attn" else "UpBlock2D" for kind in reversed(of_levels)]
        assert config["up_block_types"] == ups


class Once:
    """A reference that predicts once, since its passes are all alike, and remembers."""

    def __init__(self, reference: Reference) -> None:
        self.module, self._predict = reference.module, reference.predict
        self._prediction: Tensor | None = None

    def predict(self, *inputs: Any) -> Tensor:
        if self._prediction is None:
            self._prediction = self._predict(*inputs)
        return self._prediction


def differences(policy: ModelMixin, reference: Reference, pair: PreferenceBatch) -> list[float]:
    """Return the largest difference as training has it, with checkpointing, and as the preflight does."""
    step = step_of(policy, Once(reference))
    policy.enable_gradient_checkpointing()
    errors = step.errors(pair)
    assert errors.policy_chosen_error.requires_grad
    trained = torch.cat([errors.chosen_difference, errors.rejected_difference]).detach().abs().max()
    if isinstance(reference, PolicyWithoutAdapter):
        # without gradients the preflight computes what the reference does, whose frozen weights are the policy's own
        return [float(trained)]
    return [float(trained), step.largest_difference(pair)]
