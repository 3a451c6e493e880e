import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel

from ds_dpo.evaluation.drawing.live_pipeline import build_pipeline
from ds_dpo.evaluation.drawing.sampling import ValidationSampler, draw_images
from ds_dpo.miniature.models import make_scheduler
from ds_dpo.miniature.world import PROMPTS
from ds_dpo.models.sampler import ddim_from

SETTINGS = {"num_inference_steps": 3, "guidance_scale": 1.0, "resolution": 32}


def live_parts(pipeline: DiffusionPipeline) -> dict:
    """What training has at hand, by the arguments of ValidationSampler."""
    return {
        "denoiser": pipeline.unet,
        "vae": pipeline.vae,
        "scheduler": pipeline.scheduler,
        "tokenizers": (pipeline.tokenizer, pipeline.tokenizer_2),
        "text_encoders": (pipeline.text_encoder, pipeline.text_encoder_2),
    }


def test_an_image_depends_on_its_prompt_and_seed_alone(pipeline) -> None:
    prompts, seeds = list(PROMPTS[:5]), [7, 8, 9, 7, 11]
    together = draw_images(pipeline, prompts, seeds, **SETTINGS)
    assert together.shape == (5, 3, 32, 32)
    assert together.dtype == torch.float32
    assert 0 <= together.min() < together.max() <= 1
    backwards = draw_images(pipeline, prompts[::-1], seeds[::-1], **SETTINGS, images_at_once=2).flip(0)
    alone = draw_images(pipeline, [prompts[2]], [9], **SETTINGS)
    # other batch sizes add up in another order
    torch.testing.assert_close(backwards, together, atol=1e-5, rtol=0)
    torch.testing.assert_close(alone[0], together[2], atol=1e-5, rtol=0)
    other_seed = draw_images(pipeline, [prompts[2]], [10], **SETTINGS)
    assert (other_seed[0] - together[2]).abs().max() > 0.01


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_draws_what_the_pipeline_called_plainly_draws(pipeline, guidance_scale) -> None:
    prompts, seeds = list(PROMPTS[:3]), [1, 2, 3]
    plain = pipeline(
        prompts,
        height=32,
        width=32,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        num_inference_steps=3,
        guidance_scale=guidance_scale,
        output_type="pt",
    ).images
    found = draw_images(pipeline, prompts, seeds, **{**SETTINGS, "guidance_scale": guidance_scale})
    torch.testing.assert_close(found, plain, atol=1e-6, rtol=0)


def test_validation_draws_each_prompt_with_each_seed_and_leaves_the_modules_alone(pipeline, capfd) -> None:
    pipeline.unet.train()
    weights = {name: value.clone() for name, value in pipeline.unet.state_dict().items()}
    sampler = ValidationSampler(**live_parts(pipeline), prompts=PROMPTS[:2], seeds=[3, 4], **SETTINGS)
    images = sampler()
    capfd.readouterr()
    assert torch.equal(images, sampler())
    assert capfd.readouterr() == ("", "")  # no progress bar
    one_by_one = [draw_images(pipeline, [p], [s], **SETTINGS)[0] for p in PROMPTS[:2] for s in (3, 4)]
    torch.testing.assert_close(images, torch.stack(one_by_one), atol=1e-5, rtol=0)
    assert pipeline.unet.training
    assert all(torch.equal(value, weights[name]) for name, value in pipeline.unet.state_dict().items())
    assert not images.requires_grad


def test_validation_sees_the_weights_of_the_moment(pipeline) -> None:
    sampler = ValidationSampler(**live_parts(pipeline), prompts=PROMPTS[:1], seeds=[3], **SETTINGS)
    before = sampler()
    with torch.no_grad():
        pipeline.unet.conv_out.weight.mul_(2)
    assert not torch.equal(sampler(), before)


def test_a_16_bit_unet_goes_with_an_fp32_vae(pipeline) -> None:
    exact = draw_images(pipeline, PROMPTS[:2], [1, 2], **SETTINGS)
    for module in (pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2):
        module.to(torch.bfloat16)
    rounded = draw_images(pipeline, PROMPTS[:2], [1, 2], **SETTINGS)
    assert rounded.dtype == torch.float32
    assert pipeline.vae.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, atol=0.05, rtol=0)  # the same noise, not the same rounding


def test_one_text_encoder_makes_stable_diffusion_1(pipeline) -> None:
    unet = UNet2DConditionModel(
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        cross_attention_dim=48,
        norm_num_groups=8,
    )
    parts = {"tokenizers": [pipeline.tokenizer], "text_encoders": [pipeline.text_encoder]}
    small = build_pipeline(denoiser=unet.eval(), vae=pipeline.vae, scheduler=pipeline.scheduler, **parts)
    assert isinstance(small, StableDiffusionPipeline)
    assert draw_images(small, PROMPTS[:2], [1, 2], **{**SETTINGS, "guidance_scale": 3.0}).shape == (2, 3, 32, 32)


def test_ddim_keeps_the_noise_schedule_and_starts_at_its_end() -> None:
    trained = make_scheduler()
    scheduler = ddim_from(trained.config)
    scheduler.set_timesteps(20)
    assert isinstance(scheduler, DDIMScheduler)
    assert torch.equal(scheduler.alphas_cumprod, trained.alphas_cumprod)
    assert scheduler.timesteps[0] == 999
    assert scheduler.final_alpha_cumprod == scheduler.alphas_cumprod[0]


def test_refuses_what_cannot_be_drawn(pipeline) -> None:
    for prompts, seeds in (([], []), (["a red circle"], [1, 2])):
        with pytest.raises(ValueError, match="one seed for each"):
            draw_images(pipeline, prompts, seeds, **SETTINGS)
    with pytest.raises(ValueError, match="resolution 30"):
        draw_images(pipeline, ["a red circle"], [1], **{**SETTINGS, "resolution": 30})
    with pytest.raises(ValueError, match="2 text encoders and 1 tokenizers"):
        build_pipeline(**{**live_parts(pipeline), "tokenizers": [pipeline.tokenizer]})
    pipeline.unet.to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"denoiser in torch\.bfloat16"):
        ValidationSampler(**live_parts(pipeline), prompts=["a red circle"], seeds=[1], **SETTINGS)
