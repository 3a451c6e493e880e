"""Each preset amounts to what its source says, with the ranks that its comments name."""

import pytest

from ds_dpo.config.load import load_config, preset_names
from ds_dpo.engine.settings import resolve_deepspeed

# pairs of a step, micro-batch x ranks x accumulation, peak rate, warm-up, steps, resolution, fields of the objective
PRESETS = {
    "flux1_dev_lora": (16, 1, 1, 16, 1e-5, 0, 1500, 1024, {"type": "dpo", "beta": 2000}),
    "flux2_klein_full_zero3": (8 * 16, 2, 8, 8, 5e-6, 100, 1000, 1024, {"type": "dpo", "beta": 1000}),
    "miniature": (16, 8, 2, 1, 2e-4, 20, 300, 32, {"type": "dpo", "beta": 500}),
    "miniature_flow": (16, 8, 2, 1, 2e-4, 20, 300, 32, {"type": "dpo", "beta": 50}),
    "sd15_kto": (4, 1, 4, 1, 1e-7, 200, 20000, 512, {"type": "kto", "beta": 2 * 1000, "utility": "sigmoid"}),
    "sd15_pickapic": (2048, 8, 16, 16, 1e-5, 500, 2000, 512, {"type": "dpo", "beta": 5000}),
    "sd35l_pickapic": (8 * 16, 1, 8, 16, 5e-6, 100, 1000, 1024, {"type": "dpo", "beta": 1000}),
    "sd35m_pickapic_lora": (16, 2, 1, 8, 2e-4, 0, 1000, 1024, {"type": "dpo", "beta": 100}),
    "sd35m_pickapic": (8 * 16, 2, 8, 8, 5e-6, 100, 1000, 1024, {"type": "dpo", "beta": 1000}),
    "sdxl_mapo": (8 * 8 * 2, 8, 8, 2, 1e-5, 0, 2000, 1024, {"type": "mapo", "ratio_weight": 0.1, "snr_value": 0.5}),
    "sdxl_pickapic": (2048, 4, 16, 32, 1e-5, 200, 2000, 1024, {"type": "dpo", "beta": 5000}),
    "sdxl_pickapic_lora": (8 * 2, 2, 1, 8, 1e-5, 0, 2000, 1024, {"type": "dpo", "beta": 5000}),
    "sdxl_pickascore": (64, 1, 8, 8, 1e-5, 20, 200, 1024, {"type": "dpo", "beta": 5000}),
    "sdxl_sdpo": (8 * 8 * 32, 4, 8, 64, 1e-9 * 2048, 500, 2000, 1024, {"type": "sdpo", "beta": 5000, "mu": 0.6}),
    "sdxl_turbo_pickapic": (2048, 4, 16, 32, 1e-5, 200, 2000, 512, {"type": "dpo", "beta": 5000}),
}
# the family of presets of flow models that are not of sd3
FLOWS = {"flux1_dev_lora": "flux1", "flux2_klein_full_zero3": "flux2_klein"}
DIVIDED = ("sd35l_pickapic", "flux2_klein_full_zero3")  # under ZeRO-3


def test_every_preset_is_checked_here():
    assert preset_names() == sorted(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_amounts_to_its_source(name):
    pairs, micro, ranks, accumulated, rate, warmup, steps, resolution, objective = PRESETS[name]
    config = load_config(["--config", name]).config
    resolved = resolve_deepspeed(config, world_size=ranks)
    assert (config.batch.pairs_per_step, config.batch.micro_batch_pairs) == (pairs, micro)
    assert resolved.accumulation_steps == accumulated
    assert config.optimizer.learning_rate == pytest.approx(rate, rel=1e-12)
    assert (config.schedule.warmup_steps, config.max_train_steps) == (warmup, steps)
    assert config.data.resolution == resolution
    found = config.objective.model_dump()
    assert {field: found[field] for field in objective} == objective


@pytest.mark.parametrize("name", sorted(set(PRESETS) - {"miniature", "miniature_flow", *DIVIDED}))
def test_gradients_are_reduced_once_a_step(name):
    assert load_config(["--config", name]).config.deepspeed_config == "zero1_bf16"


def test_turbo_trains_on_its_own_four_steps_and_is_drawn_in_them():
    config = load_config(["--config", "sdxl_turbo_pickapic"]).config
    assert (config.diffusion.timestep_sampling, config.diffusion.zero_terminal_snr) == ("turbo", False)
    assert (config.validation.num_inference_steps, config.validation.guidance_scale) == (4, 1.0)
    assert config.data.prompt_dropout == 0


def test_the_lora_needs_no_second_unet():
    config = load_config(["--config", "sdxl_pickapic_lora"]).config
    assert (config.adapter.type, config.adapter.rank, config.adapter.alpha) == ("lora", 8, 8)
    assert config.reference.residency == "adapter"


@pytest.mark.parametrize("name", DIVIDED)
def test_what_does_not_fit_one_gpu_is_divided(name):
    config = load_config(["--config", name]).config
    assert (config.deepspeed_config, config.reference.residency) == ("zero3_bf16", "zero3")


@pytest.mark.parametrize("name", ["sd35m_pickapic", "sd35m_pickapic_lora", *DIVIDED, "flux1_dev_lora"])
def test_flow_models_keep_their_own_times_and_the_weight_of_published_code(name):
    config = load_config(["--config", name]).config
    diffusion = config.diffusion
    assert (diffusion.timestep_sampling, diffusion.timestep_shift, diffusion.error_weighting) == (
        *("uniform", "model", "none"),
    )
    assert (config.model.family, config.model.vae, config.model.vae_dtype) == (FLOWS.get(name, "sd3"), None, "fp32")


def test_flux_is_trained_without_guidance_and_drawn_with_it():
    config = load_config(["--config", "flux1_dev_lora"]).config
    assert (config.model.guidance, config.validation.guidance_scale) == (1, 3.5)
    assert (config.adapter.rank, config.adapter.alpha, config.reference.residency) == (64, 128, "adapter")
