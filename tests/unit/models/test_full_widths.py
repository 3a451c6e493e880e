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


# A processor without instructions for 16 bits takes long, so those cases have two levels and smaller latents: the first
# 1 x 1 convolution is in the second level.
@pytest.mark.parametrize(
    ("family", "dtype", "levels", "size"),
    [
        pytest.param("sdxl", FP32, 3, 8, id="sdxl-fp32", marks=pytest.mark.slow),
        pytest.param("sdxl", BF16, 2, 8, id="sdxl-bf16", marks=pytest.mark.slow),
        pytest.param("sdxl", FP16, 2, 8, id="sdxl-fp16", marks=pytest.mark.slow),
        pytest.param("sd15", FP32, 2, 8, id="sd15-fp32", marks=pytest.mark.slow),
        pytest.param("sd15", FP16, 2, 4, id="sd15-fp16", marks=pytest.mark.slow),
        pytest.param("sd21", FP32, 2, 8, id="sd21-fp32", marks=pytest.mark.slow),
        pytest.param("sd21", BF16, 2, 4, id="sd21-bf16", marks=pytest.mark.slow),
    ],
)
def test_policy_and_reference_differ_by_nothing(
    family: str, dtype: torch.dtype, levels: int, size: int, tmp_path: Path
) -> None:
    policy = load_wide(family, tmp_path / family, levels=levels, dtype=dtype)
    pair = wide_pair(wide_config(family, levels=levels), size=size, layout=torch.channels_last)
    found = {"full": differences(policy, FrozenCopy(policy, predict=predict_by_unet, dtype=dtype, device="cpu"), pair)}
    add_adapter(policy, AdapterConfig(type="lora", rank=2, targets=TARGETS), seed=0)
    found["LoRA"] = differences(policy, PolicyWithoutAdapter(policy, predict=predict_by_unet), pair)
    assert found == {"full": [0.0, 0.0, 0.0], "LoRA": [0.0, 0.0, 0.0]}


class Once:
    """A reference that predicts once, since its passes are all alike, and remembers."""

    def __init__(self, reference: Reference) -> None:
        self._predict = reference.predict
        self._prediction: Tensor | None = None

    def predict(self, *inputs: Any) -> Tensor:
        if self._prediction is None:
            self._prediction = self._predict(*inputs)
        return self._prediction


def differences(policy: ModelMixin, reference: Reference, pair: PreferenceBatch) -> list[float]:
    """Return the largest difference with checkpointing, without it, and without gradients."""
    step = step_of(policy, Once(reference))

    def largest() -> float:
        errors = step.errors(pair)
        assert errors.policy_chosen_error.requires_grad == torch.is_grad_enabled()
        return float(torch.cat([errors.chosen_difference, errors.rejected_difference]).detach().abs().max())

    policy.enable_gradient_checkpointing()
    found = [largest()]
    policy.disable_gradient_checkpointing()
    return [*found, largest(), step.largest_difference(pair)]
