"""The flow miniature is a whole pipeline of Stable Diffusion 3; its own code makes the same texts and images."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from ds_dpo.config.models import ModelConfig
from ds_dpo.evaluation.drawing.sampling import draw_images
from ds_dpo.miniature import pretrain
from ds_dpo.miniature.kinds import FLOW_KIND, Parts, load_parts, sample, save_parts
from ds_dpo.models.loading import load_text

PROMPTS = ["a red circle on a white background", "", "a blue cross on a gray background"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved flow miniature whose transformer is random, since an untrained one predicts zeros."""
    folder = tmp_path_factory.mktemp("flow")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "TEXT_STEPS", 1)
        parts = pretrain.start_with_parts_of_the_first(folder, say=lambda line: None)
    for parameter in parts.denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    save_parts(parts, folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def parts(folder: Path) -> Parts:
    return load_parts(FLOW_KIND, folder)


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> StableDiffusion3Pipeline:
    return StableDiffusion3Pipeline.from_pretrained(folder, torch_dtype=torch.float32)


def test_its_files_do_not_say_where_its_parts_came_from(folder: Path) -> None:
    configs = list(folder.glob("*/config.json"))
    assert len(configs) == 5
    assert not [path for path in configs if "_name_or_path" in path.read_text()]


@torch.no_grad()
def test_texts_are_those_of_the_pipeline_and_of_training(
    folder: Path, parts: Parts, pipeline: StableDiffusion3Pipeline
) -> None:
    states, _, pooled, _ = pipeline.encode_prompt(
        PROMPTS, None, None, device="cpu", do_classifier_free_guidance=False, max_sequence_length=10
    )
    assert states.shape == (3, 10 + 10, 96), "CLIP's and T5's tokens"
    own_states, own_pooled = parts.text.encode(PROMPTS)
    in_training = load_text(ModelConfig(pretrained=str(folder), family="sd3"), dtype=torch.float32).encode(PROMPTS)
    for found_states, found_pooled in ((own_states, own_pooled), (in_training.text_states, in_training.pooled)):
        torch.testing.assert_close(found_states, states, rtol=0, atol=1e-5)
        torch.testing.assert_close(found_pooled, pooled, rtol=0, atol=1e-5)


def test_it_draws_what_the_pipeline_draws(parts: Parts, pipeline: StableDiffusion3Pipeline) -> None:
    drawn = draw_images(pipeline, PROMPTS[:1], [3], num_inference_steps=20, guidance_scale=1.0, resolution=32)
    torch.testing.assert_close(sample(parts, PROMPTS[:1], seed=3), drawn, rtol=0, atol=1e-3)


def test_pretraining_goes_on_where_it_was_interrupted(tmp_path: Path, parts: Parts) -> None:
    kind = replace(FLOW_KIND, steps=4, batch=2)

    def pretrained(folder: Path, *, stop_at: str = "never") -> torch.Tensor:
        def say(line: str) -> None:
            if stop_at in line:
                raise KeyboardInterrupt

        torch.manual_seed(0)
        own = Parts(kind=kind, text=parts.text, vae=parts.vae, denoiser=kind.make_denoiser())
        pretrain.pretrain_denoiser(folder, own, say=say)
        assert not own.denoiser.training
        return torch.cat([parameter.detach().flatten() for parameter in own.denoiser.parameters()])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "DRAWINGS", 8)
        patch.setattr(pretrain, "REPORT_EVERY", 2)
        for name in ("whole", "halves"):
            (tmp_path / name).mkdir()
        whole = pretrained(tmp_path / "whole")
        with pytest.raises(KeyboardInterrupt):
            pretrained(tmp_path / "halves", stop_at="step 4")
        assert torch.equal(pretrained(tmp_path / "halves"), whole)


def test_noise_is_that_of_a_rectified_flow_at_logit_normal_times() -> None:
    latents = torch.full((4001, 1, 1, 1), 3.0)
    noised = FLOW_KIND.noised(latents, torch.Generator().manual_seed(0))
    share = noised.time.view(-1, 1, 1, 1) / 1000
    noise = noised.target + latents
    torch.testing.assert_close(noised.noisy, (1 - share) * 3 + share * noise)
    assert noise.std().item() == pytest.approx(1, abs=0.05)
    # sigmoid of a standard normal: its quartiles are sigmoid(-0.6745), 1/2 and sigmoid(0.6745)
    quartiles = torch.quantile(share.flatten(), torch.tensor([0.25, 0.5, 0.75])).tolist()
    assert quartiles == pytest.approx([0.3375, 0.5, 0.6625], abs=0.02)
