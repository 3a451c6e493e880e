"""Policy and reference of Stable Diffusion 3.5 Medium's width predict exactly alike: full, and with low-rank layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from full_widths import seeded_weights

from ds_dpo.batch import PreferenceBatch
from ds_dpo.config.optimization import AdapterConfig
from ds_dpo.diffusion.flow import Flow
from ds_dpo.models.denoiser.adapters import add_adapter
from ds_dpo.models.denoiser.predict import predict_by_sd3_transformer
from ds_dpo.models.layout import read_row_major
from ds_dpo.models.reference import FrozenCopy, PolicyWithoutAdapter, Reference
from ds_dpo.models.weights.parts import fill, skeleton
from ds_dpo.objectives.losses import OBJECTIVES
from ds_dpo.step.preference_step import PreferenceStep

# that of SD3.5 Medium, but for the number of blocks: one attends twice, and the last has no output for the text
MEDIUM: dict[str, Any] = {
    "sample_size": 128,
    "num_layers": 2,
    "dual_attention_layers": [0],
    "num_attention_heads": 24,
    "attention_head_dim": 64,
    "caption_projection_dim": 1536,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384,
    "qk_norm": "rms_norm",
}


def load_wide(dtype: torch.dtype) -> Any:
    transformer = skeleton(SD3Transformer2DModel, MEDIUM)
    shapes = {name: tensor.shape for name, tensor in transformer.state_dict().items()}
    fill(transformer, seeded_weights(shapes, dtype=dtype), dtype=dtype, source="a test")
    read_row_major(transformer)
    return transformer.train()


def wide_pair() -> PreferenceBatch:
    generator = torch.Generator().manual_seed(1)
    return PreferenceBatch(
        latents=torch.randn(2, 16, 8, 8, generator=generator).contiguous(memory_format=torch.channels_last),
        noise=torch.randn(1, 16, 8, 8, generator=generator),
        timesteps=torch.tensor([400]),
        text_states=torch.randn(1, 24, 4096, generator=generator),
        pooled=torch.randn(1, 2048, generator=generator),
        pair_ids=torch.tensor([7]),
        target_probabilities=torch.ones(1),
        weights=torch.ones(1),
    )


def difference(policy: Any, reference: Reference) -> float:
    """Return the largest difference as training has it, with checkpointing."""
    step = PreferenceStep(
        policy=policy,
        predict=predict_by_sd3_transformer,
        reference=reference,
        schedule=Flow(num_train_timesteps=1000),
        objective=OBJECTIVES["dpo"],
        options={"beta": 2000.0},
    )
    policy.enable_gradient_checkpointing()
    errors = step.errors(wide_pair())
    assert errors.policy_chosen_error.requires_grad
    return float(torch.cat([errors.chosen_difference, errors.rejected_difference]).detach().abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_policy_and_reference_differ_by_nothing(dtype: torch.dtype) -> None:
    policy = load_wide(dtype)
    predict = predict_by_sd3_transformer
    assert difference(policy, FrozenCopy(policy, predict=predict, dtype=dtype, device="cpu")) == 0
    add_adapter(policy, AdapterConfig(type="lora", rank=2, targets=["attention+mlp"]), seed=0)
    assert difference(policy, PolicyWithoutAdapter(policy, predict=predict)) == 0
