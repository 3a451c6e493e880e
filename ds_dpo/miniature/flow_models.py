"""The flow miniature's untrained parts: Stable Diffusion 3's transformer, and T5 beside the first miniature's CLIPs."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from ds_dpo.config.asset_paths import PACKAGE
from ds_dpo.miniature.models import LATENT_CHANNELS, TEXT_WIDTH, token_ids
from ds_dpo.miniature.world import IMAGE_SIZE, PROMPTS

FIRST_MINIATURE = PACKAGE / "assets" / "miniature" / "model"
TEXT_LENGTH = 10  # of each tokenizer; a caption has 9 tokens of CLIP or 8 of T5, and a transformer pays for padding
T5_WIDTH = 2 * TEXT_WIDTH
# a pipeline of diffusers reads 256 tokens unless it is asked for fewer, so the transformer sees such texts too
LONGER_TEXTS = {64: 0.04, 256: 0.005}  # number of T5's tokens: share of the steps
TRANSFORMER_HEADS, HEAD_WIDTH, BLOCKS = 6, 16, 4


@dataclass(frozen=True)
class FlowText:
    """Three tokenizers and text encoders, as in Stable Diffusion 3. All are frozen, so each prompt is encoded once."""

    tokenizers: tuple[CLIPTokenizer, CLIPTokenizer, T5Tokenizer]
    encoders: tuple[CLIPTextModelWithProjection, CLIPTextModelWithProjection, T5EncoderModel]

    def trained_modules(self) -> list[nn.Module]:
        return []

    def components(self) -> dict[str, Any]:
        """Return the tokenizers and encoders by their names in the pipeline."""
        ends = ("", "_2", "_3")
        tokenizers = {f"tokenizer{end}": each for end, each in zip(ends, self.tokenizers, strict=True)}
        return tokenizers | {f"text_encoder{end}": each for end, each in zip(ends, self.encoders, strict=True)}

    def encode(self, prompts: list[str], *, t5_length: int = TEXT_LENGTH) -> tuple[Tensor, Tensor]:
        """Return text states (N, 10 + t5_length, 96) and pooled texts (N, 96), as the pipeline's encode_prompt does."""
        rows = torch.tensor([self._rows[prompt] for prompt in prompts])
        clip_states, pooled = self._clip_table
        if t5_length not in self._t5_tables:
            with torch.no_grad():
                states = t5_states(self.tokenizers[2], self.encoders[2], list(self._rows), t5_length)
            self._t5_tables[t5_length] = states
        clip_states = pad(clip_states, (0, T5_WIDTH - clip_states.shape[-1]))
        return torch.cat([clip_states[rows], self._t5_tables[t5_length][rows]], 1), pooled[rows]

    def encode_for_training(self, prompts: list[str], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return what `encode` returns; in some steps T5 reads more padding."""
        chance = torch.rand((), generator=generator).item()
        for length, share in LONGER_TEXTS.items():
            if chance < share:
                return self.encode(prompts, t5_length=length)
            chance -= share
        return self.encode(prompts)

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {prompt: row for row, prompt in enumerate(("", *PROMPTS))}

    @cached_property
    def _t5_tables(self) -> dict[int, Tensor]:
        return {}

    @cached_property
    @torch.no_grad()
    def _clip_table(self) -> tuple[Tensor, Tensor]:
        outputs = [
            encoder(token_ids(tokenizer, list(self._rows)), output_hidden_states=True)
            for tokenizer, encoder in zip(self.tokenizers[:2], self.encoders[:2], strict=True)
        ]
        states = torch.cat([output.hidden_states[-2] for output in outputs], -1)
        return states, torch.cat([output.text_embeds for output in outputs], -1)


def t5_states(tokenizer: T5Tokenizer, encoder: T5EncoderModel, prompts: list[str], length: int) -> Tensor:
    """Return T5's last states (N, length, width); it reads its padding too, as in the pipeline."""
    tokens = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    states: Tensor = encoder(tokens.input_ids).last_hidden_state
    return states


def make_t5_tokenizer(*, length: int = TEXT_LENGTH) -> T5Tokenizer:
    """Return a real T5 tokenizer: a token for each word of the captions, and letters for other words.

    length: number of tokens that it states as its limit.
    """
    words = sorted({word for prompt in PROMPTS for word in prompt.split()})
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocabulary += [(f"▁{word}", -1.0) for word in words] + [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=length)


def make_t5(tokenizer: T5Tokenizer) -> T5EncoderModel:
    """Return an untrained T5 encoder of two layers."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=T5_WIDTH,
            d_kv=12,
            d_ff=T5_WIDTH,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
    )


def load_clip_tokenizers() -> tuple[CLIPTokenizer, CLIPTokenizer]:
    """Return the first miniature's tokenizers, with the length of this one."""
    first, second = (
        CLIPTokenizer.from_pretrained(FIRST_MINIATURE / folder, model_max_length=TEXT_LENGTH)
        for folder in ("tokenizer", "tokenizer_2")
    )
    return first, second


def load_clips() -> tuple[CLIPTextModelWithProjection, CLIPTextModelWithProjection]:
    """Return the first miniature's CLIPs. The first one gets a projection, which SDXL leaves out: the identity."""
    encoders = [
        CLIPTextModelWithProjection.from_pretrained(FIRST_MINIATURE / folder, dtype=torch.float32).eval()
        for folder in ("text_encoder", "text_encoder_2")
    ]
    torch.nn.init.eye_(encoders[0].text_projection.weight)
    return encoders[0], encoders[1]


def load_vae() -> AutoencoderKL:
    """Return the first miniature's trained VAE. Stable Diffusion 3 subtracts a shift from latents; here it is 0."""
    vae = AutoencoderKL.from_pretrained(FIRST_MINIATURE, subfolder="vae", dtype=torch.float32).eval()
    vae.register_to_config(shift_factor=0.0)
    return vae


def make_transformer() -> SD3Transformer2DModel:
    """Return an untrained transformer shaped like that of Stable Diffusion 3.5 Large, 1.3 M parameters.

    What modulates a block or leaves the last one begins at zero (arXiv:2212.09748, section 3.2).
    """
    width = TRANSFORMER_HEADS * HEAD_WIDTH
    transformer = SD3Transformer2DModel(
        sample_size=IMAGE_SIZE // 4,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=BLOCKS,
        attention_head_dim=HEAD_WIDTH,
        num_attention_heads=TRANSFORMER_HEADS,
        caption_projection_dim=width,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )
    for name, parameter in transformer.named_parameters():
        if ("norm1" in name and ".linear." in name) or name.startswith(("norm_out.linear", "proj_out")):
            torch.nn.init.zeros_(parameter)
    return transformer


def make_flow_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Return the sampler of a rectified flow. Its times are not shifted: 16 tokens are few."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0)
