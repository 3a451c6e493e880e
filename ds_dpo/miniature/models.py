"""The miniature's untrained parts: tokenizers over its own words, two CLIP text encoders, VAE, UNet, scheduler."""

import json
import string
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ds_dpo.miniature.world import IMAGE_SIZE, PROMPTS

TEXT_LENGTH = 16
TEXT_WIDTH = 48
LATENT_CHANNELS = 4
VAE_CHANNELS = (16, 32, 32)
UNET_CHANNELS = (48, 96)
TIME_EMBEDDING = 8


@dataclass(frozen=True)
class TextParts:
    """Both tokenizers and text encoders, as in SDXL: the second one also gives the pooled embedding."""

    tokenizer: CLIPTokenizer
    tokenizer_2: CLIPTokenizer
    encoder: CLIPTextModel
    encoder_2: CLIPTextModelWithProjection

    def trained_modules(self) -> list[torch.nn.Module]:
        """Return the encoders, which the UNet's pre-training trains too."""
        return [self.encoder, self.encoder_2]

    def components(self) -> dict[str, Any]:
        """Return the tokenizers and encoders by their names in the pipeline."""
        tokenizers = {"tokenizer": self.tokenizer, "tokenizer_2": self.tokenizer_2}
        return tokenizers | {"text_encoder": self.encoder, "text_encoder_2": self.encoder_2}

    def encode_for_training(self, prompts: list[str], generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what `encode` returns."""
        return self.encode(prompts)

    def encode(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return text states (N, 16, 96) and pooled embeddings (N, 48), as StableDiffusionXLPipeline.encode_prompt."""
        first = self.encoder(token_ids(self.tokenizer, prompts), output_hidden_states=True)
        second = self.encoder_2(token_ids(self.tokenizer_2, prompts), output_hidden_states=True)
        return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1), second.text_embeds


def token_ids(tokenizer: CLIPTokenizer, prompts: list[str]) -> torch.Tensor:
    """Return token ids (N, the tokenizer's length), padded and cut as the pipeline does."""
    length = tokenizer.model_max_length
    return tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids


def byte_pair_tables(words: list[str]) -> tuple[dict[str, int], list[str]]:
    """Return vocabulary and merges of a byte-pair tokenizer that reads each word as one token."""
    letters = ["!", *string.ascii_lowercase]
    tokens = dict.fromkeys([*letters, *(letter + "</w>" for letter in letters)])
    merges: dict[str, None] = {}
    for word in words:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            merges[f"{parts[0]} {parts[1]}"] = None
            parts = [parts[0] + parts[1], *parts[2:]]
            tokens[parts[0]] = None
    tokens |= dict.fromkeys(("<|startoftext|>", "<|endoftext|>"))
    return {token: index for index, token in enumerate(tokens)}, list(merges)


def make_tokenizer(*, pad_token: str) -> CLIPTokenizer:
    """Return a real CLIP tokenizer for the words of the captions (117 tokens)."""
    vocabulary, merges = byte_pair_tables(sorted({word for prompt in PROMPTS for word in prompt.split()}))
    with tempfile.TemporaryDirectory() as folder:
        vocabulary_file, merges_file = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        vocabulary_file.write_text(json.dumps(vocabulary))
        merges_file.write_text("\n".join(["#version: 0.2", *merges]) + "\n")
        return CLIPTokenizer(
            vocab=str(vocabulary_file), merges=str(merges_file), model_max_length=TEXT_LENGTH, pad_token=pad_token
        )


def make_text_parts() -> TextParts:
    """Return untrained text encoders. Their embeddings are wider than CLIP's 0.02, which so small a vector needs."""
    tokenizer, tokenizer_2 = make_tokenizer(pad_token="<|endoftext|>"), make_tokenizer(pad_token="!")
    encoder = CLIPTextModel(_text_config(tokenizer, hidden_act="quick_gelu"))
    encoder_2 = CLIPTextModelWithProjection(_text_config(tokenizer_2, hidden_act="gelu"))
    for name, parameter in [*encoder.named_parameters(), *encoder_2.named_parameters()]:
        if "token_embedding" in name:
            torch.nn.init.normal_(parameter, std=0.5)
        if "position_embedding" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return TextParts(tokenizer, tokenizer_2, encoder, encoder_2)


def _text_config(tokenizer: CLIPTokenizer, *, hidden_act: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TEXT_LENGTH,
        projection_dim=TEXT_WIDTH,
        hidden_act=hidden_act,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def make_vae() -> AutoencoderKL:
    """Return an untrained VAE: 32 x 32 pixels to 4 x 8 x 8 latents."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * len(VAE_CHANNELS),
        up_block_types=("UpDecoderBlock2D",) * len(VAE_CHANNELS),
        block_out_channels=VAE_CHANNELS,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
        mid_block_add_attention=False,
    )


def make_unet() -> UNet2DConditionModel:
    """Return an untrained UNet with SDXL's `text_time` conditioning, 2.3 M parameters."""
    return UNet2DConditionModel(
        sample_size=IMAGE_SIZE // 4,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=UNET_CHANNELS,
        layers_per_block=1,
        transformer_layers_per_block=(1, 1),
        attention_head_dim=tuple(width // 16 for width in UNET_CHANNELS),
        cross_attention_dim=2 * TEXT_WIDTH,
        use_linear_projection=True,
        norm_num_groups=8,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_EMBEDDING,
        projection_class_embeddings_input_dim=6 * TIME_EMBEDDING + TEXT_WIDTH,
    )


def make_scheduler() -> DDPMScheduler:
    """Return SDXL's noise schedule."""
    return DDPMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        prediction_type="epsilon",
        steps_offset=1,
    )


def time_ids(count: int) -> torch.Tensor:
    """Return SDXL's size conditioning of an uncropped image, (count, 6)."""
    return torch.tensor([[IMAGE_SIZE, IMAGE_SIZE, 0, 0, IMAGE_SIZE, IMAGE_SIZE]], dtype=torch.float32).expand(count, -1)
