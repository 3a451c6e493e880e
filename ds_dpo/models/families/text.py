"""Encode prompts for a denoiser, as the pipelines of diffusers do.

Legend: B prompts; L text tokens; D text width; P pooled width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ds_dpo.models.families.cut_prompts import CutPrompts
from ds_dpo.process.say import Say

QWEN3_LAYERS = (9, 18, 27)


@dataclass(frozen=True, kw_only=True)
class EncodedPrompts:
    """text_states: (B, L, D). pooled: (B, P), None for SD1.5. Both in the dtype of the text encoders."""

    text_states: Tensor
    pooled: Tensor | None


@dataclass(frozen=True)
class Frame:
    """What a chat model reads before and after a prompt. Such a model does not attend to its padding."""

    before: str
    after: str

    def around(self, prompt: str) -> str:
        return f"{self.before}{prompt}{self.after}"


@dataclass(frozen=True, kw_only=True)
class TextTower:
    """A tokenizer and its text encoder, both of transformers.

    num_tokens: number of tokens of a prompt that are read, if the tokenizer does not state fewer; None for as many as
    the encoder has positions. frame: what is read around a prompt, and counts among its tokens.
    """

    tokenizer: Any
    encoder: nn.Module
    num_tokens: int | None = None
    frame: Frame | None = None

    @property
    def max_tokens(self) -> int:
        """Number of tokens of a prompt that are read, with the start and end tokens."""
        if self.num_tokens is not None:
            return int(min(self.tokenizer.model_max_length, self.num_tokens))
        config: Any = self.encoder.config
        # a tokenizer saved without its length has 1e30
        return int(min(self.tokenizer.model_max_length, config.max_position_embeddings))

    @property
    def prompt_tokens(self) -> int:
        """Number of tokens that are left for a prompt beside its frame; all of them without one."""
        framing = 0 if self.frame is None else len(self.tokenizer(self.frame.around("")).input_ids)
        return self.max_tokens - framing

    def __call__(self, prompts: Sequence[str]) -> Any:
        """Return the encoder's output for prompts padded and cut to its length."""
        config: Any = self.encoder.config
        tokens = self.tokenizer(
            list(prompts) if self.frame is None else [self.frame.around(prompt) for prompt in prompts],
            padding="max_length",
            max_length=self.max_tokens,
            truncation=True,
            return_tensors="pt",
        )
        device = next(self.encoder.parameters()).device
        is_masked = self.frame is not None or getattr(config, "use_attention_mask", False)
        mask = _sent(tokens.attention_mask, device) if is_masked else None
        return self.encoder(_sent(tokens.input_ids, device), attention_mask=mask, output_hidden_states=True)


@dataclass(frozen=True, kw_only=True)
class AbsentTower:
    """The place of a text encoder that a pipeline leaves out: its states are zeros, (B, num_tokens, width)."""

    num_tokens: int
    width: int


Tower = TextTower | AbsentTower


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the host on the device, without waiting for the device: a GPU copies pinned memory so."""
    pinned = tensor.pin_memory() if device.type == "cuda" else tensor
    return pinned.to(device, non_blocking=True)


def encode_sdxl(towers: Sequence[Tower], prompts: Sequence[str]) -> EncodedPrompts:
    """Return both encoders' second to last states side by side, and the second encoder's pooled text.

    Source: arXiv:2307.01952, section 2.1; StableDiffusionXLPipeline.encode_prompt.
    """
    outputs = [tower(prompts) for tower in present(towers)]
    return EncodedPrompts(
        text_states=torch.cat([output.hidden_states[-2] for output in outputs], dim=-1),
        pooled=outputs[-1].text_embeds,
    )


def encode_sd15(towers: Sequence[Tower], prompts: Sequence[str]) -> EncodedPrompts:
    """Return the encoder's last states after its final layer norm. Source: StableDiffusionPipeline.encode_prompt."""
    (tower,) = present(towers)
    return EncodedPrompts(text_states=tower(prompts).last_hidden_state, pooled=None)


def encode_sd3(towers: Sequence[Tower], prompts: Sequence[str]) -> EncodedPrompts:
    """Return both CLIPs' second to last states side by side, T5's last states behind them, and both pooled texts.

    The CLIPs' states are filled up with zeros to the width of T5's. T5 reads its padding tokens too, without a mask.
    Source: arXiv:2403.03206, section 4; StableDiffusion3Pipeline.encode_prompt.
    """
    *clips, last = towers
    outputs = [tower(prompts) for tower in present(clips)]
    clip_states = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    if isinstance(last, AbsentTower):
        last_states = clip_states.new_zeros(len(prompts), last.num_tokens, last.width)
    else:
        last_states = last(prompts).last_hidden_state
    clip_states = pad(clip_states, (0, last_states.shape[-1] - clip_states.shape[-1]))
    return EncodedPrompts(
        text_states=torch.cat([clip_states, last_states], dim=-2),
        pooled=torch.cat([output.text_embeds for output in outputs], dim=-1),
    )


def encode_flux1(towers: Sequence[Tower], prompts: Sequence[str]) -> EncodedPrompts:
    """Return T5's last states, and CLIP's pooled text. T5 reads its padding tokens too, without a mask.

    Source: black-forest-labs/flux, src/flux/sampling.py, prepare; FluxPipeline.encode_prompt.
    """
    clip, t5 = present(towers)
    return EncodedPrompts(text_states=t5(prompts).last_hidden_state, pooled=clip(prompts).pooler_output)


def encode_flux2_klein(towers: Sequence[Tower], prompts: Sequence[str]) -> EncodedPrompts:
    """Return the states of three layers of Qwen3 side by side. Source: Flux2KleinPipeline.encode_prompt."""
    (tower,) = present(towers)
    states = tower(prompts).hidden_states
    return EncodedPrompts(text_states=torch.cat([states[layer] for layer in QWEN3_LAYERS], dim=-1), pooled=None)


def present(towers: Sequence[Tower]) -> list[TextTower]:
    """Return the towers that have an encoder."""
    return [tower for tower in towers if isinstance(tower, TextTower)]


def say_nothing(line: str) -> None:
    """Take a line and drop it."""


class TextEncoder:
    """The frozen text encoders of a pipeline, and its family's function that reads them."""

    def __init__(
        self,
        towers: Sequence[Tower],
        *,
        encode: Callable[[Sequence[Tower], Sequence[str]], EncodedPrompts],
        say: Say = say_nothing,
    ) -> None:
        """Join the towers of a family with its `encode`, such as encode_sdxl. say: gets a line on prompts that are cut.

        A prompt is cut if no encoder reads its end, so the first one of those that read the most decides. CLIP's
        tokenizers divide a text alike.
        """
        self._all_towers = tuple(towers)
        self.towers = tuple(present(towers))
        self._encode = encode
        longest = max(self.towers, key=lambda tower: tower.max_tokens)
        self.cut_prompts = CutPrompts(longest.tokenizer, max_tokens=longest.prompt_tokens, say=say)

    def to(self, device: torch.device | str) -> TextEncoder:
        """Move the encoders and return this object, as a module does."""
        for tower in self.towers:
            tower.encoder.to(device)
        return self

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> EncodedPrompts:
        """Encode B prompts, each distinct one once; '' is encoded like any other prompt, as by the authors."""
        distinct = {prompt: position for position, prompt in enumerate(dict.fromkeys(prompts))}
        self.cut_prompts.note(distinct)
        encoded = self._encode(self._all_towers, list(distinct))
        if len(distinct) == len(prompts):
            return encoded
        rows = _sent(torch.tensor([distinct[prompt] for prompt in prompts]), encoded.text_states.device)
        return EncodedPrompts(
            text_states=encoded.text_states[rows], pooled=None if encoded.pooled is None else encoded.pooled[rows]
        )
