from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from ds_dpo.config.asset_paths import resolve_asset
from ds_dpo.config.models import ModelConfig
from ds_dpo.models.families.text import TextEncoder
from ds_dpo.models.loading import load_text

LONG = "a small red circle on a white background " * 5
PROMPTS = ["a red circle", "", LONG, "a blue square"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sdxl_prompts_are_encoded_as_the_pipeline_does(sdxl: ModelConfig, dtype: torch.dtype) -> None:
    pipeline = StableDiffusionXLPipeline.from_pretrained(resolve_asset(sdxl.pretrained), torch_dtype=dtype)
    with torch.no_grad():
        text_states, _, pooled, _ = pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    encoded = load_text(sdxl, dtype=dtype).encode(PROMPTS)
    assert encoded.text_states.dtype == dtype
    assert torch.equal(encoded.text_states, text_states)
    assert encoded.pooled is not None
    assert torch.equal(encoded.pooled, pooled)


def test_sd15_prompts_are_encoded_as_the_pipeline_does(sd15: ModelConfig) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(sd15.pretrained)
    with torch.no_grad():
        text_states, _ = pipeline.encode_prompt(PROMPTS, "cpu", 1, False)
    encoded = load_text(sd15, dtype=torch.float32).encode(PROMPTS)
    assert torch.equal(encoded.text_states, text_states)
    assert encoded.pooled is None


def test_a_dropped_prompt_is_encoded_not_zeroed(sdxl: ModelConfig) -> None:
    encoded = load_text(sdxl, dtype=torch.float32).encode([""])
    assert encoded.pooled is not None
    assert encoded.text_states.abs().amax(dim=(0, 2)).min() > 0  # at each of the 16 tokens
    assert encoded.pooled.abs().max() > 0


def test_each_distinct_prompt_is_encoded_once_and_given_to_all_its_rows(sdxl: ModelConfig) -> None:
    text = load_text(sdxl, dtype=torch.float32)
    batch_sizes: list[int] = []
    text.towers[0].encoder.register_forward_pre_hook(lambda module, arguments: batch_sizes.append(len(arguments[0])))
    distinct = text.encode(["a red circle", ""])
    repeated = text.encode(["a red circle", "", "a red circle", ""])
    assert batch_sizes == [2, 2]
    assert distinct.pooled is not None
    assert repeated.pooled is not None
    assert torch.equal(repeated.text_states, distinct.text_states.repeat(2, 1, 1))
    assert torch.equal(repeated.pooled, distinct.pooled.repeat(2, 1))


def test_encoding_tracks_no_gradient_and_encoders_are_frozen(sdxl: ModelConfig) -> None:
    text = load_text(sdxl, dtype=torch.float32)
    encoded = text.encode(["a red circle"])
    assert not encoded.text_states.requires_grad
    assert not any(parameter.requires_grad for tower in text.towers for parameter in tower.encoder.parameters())
    assert not any(tower.encoder.training for tower in text.towers)


def test_a_tokenizer_without_a_length_is_cut_to_the_encoders(sdxl: ModelConfig) -> None:
    text = load_text(sdxl, dtype=torch.float32)
    expected = text.encode([LONG]).text_states
    for tower in text.towers:
        tower.tokenizer.model_max_length = int(1e30)
    assert torch.equal(text.encode([LONG]).text_states, expected)


def test_to_moves_the_encoders_and_returns_the_text_encoder(sdxl: ModelConfig) -> None:
    text = load_text(sdxl, dtype=torch.float32)
    assert isinstance(text.to("meta"), TextEncoder)
    assert all(parameter.is_meta for tower in text.towers for parameter in tower.encoder.parameters())


def test_prompts_that_are_cut_are_counted_and_said_once(sdxl: ModelConfig) -> None:
    said: list[str] = []
    text = load_text(sdxl, dtype=torch.float32, say=said.append)
    # the miniature reads 16 tokens, and each of these words is one: a start, 14 words and an end
    words = ("a red circle on a white background " * 3).split()
    fits, longer = " ".join(words[:14]), " ".join(words[:15])
    text.encode([fits, ""])
    assert (len(text.cut_prompts), said) == (0, [])
    text.encode([longer, fits, longer])
    text.encode([longer, LONG])
    assert len(text.cut_prompts) == 2
    (line,) = said
    assert line.startswith(
        "a prompt has 17 tokens, and the text encoder reads 16: its end has no effect ('a red circle"
    )
