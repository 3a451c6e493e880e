"""A CLIP model of transformers with its tokenizer and image processor: images and prompts in, unit vectors out."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from ds_dpo.errors import ScorerError, cut
from ds_dpo.evaluation.scorers.batches import is_out_of_memory
from ds_dpo.process.quiet import quiet_libraries

WEIGHTS = "model*.safetensors"
CONFIG = "config.json"
PACKAGES = ("torch", "transformers", "tokenizers", "pillow")
PROCESSOR = ("preprocessor_config.json", "tokenizer*.json", "vocab.json", "merges.txt", "special_tokens_map.json")

CLIP_FILES = (CONFIG, WEIGHTS, *PROCESSOR)


class ClipModel:
    """CLIP on a device, in fp32 and inference mode. Embeddings are (N, D) of length 1."""

    def __init__(self, model: Any, tokenizer: Any, processor: Any, device: str) -> None:
        self.model = model.to(device=device, dtype=torch.float32).eval().requires_grad_(False)
        self._tokenizer = tokenizer
        self._processor = processor
        self._device = device
        # an accelerator would wait for the resizing of images; on a CPU the model needs all cores itself
        self._map: Callable[..., Iterable[Tensor]] = (
            map if torch.device(device).type == "cpu" else ThreadPoolExecutor(_free_cores()).map
        )

    @property
    def width(self) -> int:
        """Length of an embedding."""
        return int(self.model.config.projection_dim)

    @property
    def logit_scale(self) -> float:
        return float(self.model.logit_scale.detach().double().exp())

    @torch.no_grad()
    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        pixels = torch.cat(list(self._map(self._pixels_of, images)))
        return normalize(_tensor_of(self.model.get_image_features(pixel_values=pixels.to(self._device))), dim=-1)

    def _pixels_of(self, image: Image.Image) -> Tensor:
        pixels: Tensor = self._processor(images=[image], return_tensors="pt")["pixel_values"]
        return pixels

    @torch.no_grad()
    def embed_prompts(self, prompts: Sequence[str]) -> Tensor:
        # padded to the same length always, so that a prompt's embedding does not depend on the others of its batch
        tokens = self._tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self._device)
        features = self.model.get_text_features(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        return normalize(_tensor_of(features), dim=-1)

    def try_out(self, place: str) -> None:
        """Embed an image and a prompt: files of different models load, but do not fit each other.

        place: the beginning of an error's message. Raises ScorerError.
        """
        try:
            cosine = float(self.cosines([Image.new("RGB", (64, 48), "grey")], ["a grey image"]))
        except Exception as error:  # torch, transformers and numpy raise each their own
            if is_out_of_memory(error):
                raise
            raise ScorerError(
                f"{place}: model, tokenizer and image processor do not fit each other ({_reason(error)})"
            ) from error
        if not math.isfinite(cosine):
            raise ScorerError(f"{place}: its weights give {cosine} for an image of one colour; download them again")

    def cosines(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """Return the cosine of each image and its prompt, (N,) in fp64 on the host."""
        return (self.embed_images(images).double() * self.embed_prompts(prompts).double()).sum(-1).cpu()


def clip_weights(folder: Path) -> list[Path]:
    """Return the weight files of a CLIP model's folder."""
    return sorted(folder.glob(WEIGHTS))


def load_clip(weights: Path, processor: Path, device: str, *, scorer: str) -> ClipModel:
    """Return the CLIP model of a folder, with tokenizer and image processor of the same or another folder.

    Raises ScorerError if a file is missing, torn, or does not fit the others.
    """
    quiet_libraries()
    if not any(weights.glob(WEIGHTS)) or not (weights / CONFIG).is_file():
        raise ScorerError(
            f"scorer {scorer}: {weights} has no {CONFIG} with {WEIGHTS}; give a folder or hub id of a CLIP model of "
            "transformers with safetensors"
        )
    from transformers import CLIPModel
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        loaded: Any = CLIPModel.from_pretrained(
            weights, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
        model, info = loaded
    except Exception as error:  # safetensors, transformers and torch raise each their own on foreign or torn files
        raise ScorerError(
            f"scorer {scorer}: the CLIP model of {weights} cannot be loaded ({_reason(error)}); download it again"
        ) from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise ScorerError(
            f"scorer {scorer}: {weights} lacks {len(missing)} weights of a CLIP model, such as {missing[0]}; "
            "give a whole CLIP model with text and vision parts"
        )
    clip = ClipModel(model, *load_processor(processor, scorer=scorer), device)
    clip.try_out(f"scorer {scorer}: {weights}")
    return clip


def load_processor(folder: Path, *, scorer: str) -> tuple[Any, Any]:
    """Return the tokenizer and the image processor of a folder. Raises ScorerError if it lacks one."""
    quiet_libraries()
    # transformers would make an empty tokenizer for a folder without its files
    complete = (folder / "tokenizer.json").is_file() or (
        (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    )
    if not complete or not (folder / "preprocessor_config.json").is_file():
        raise ScorerError(
            f"scorer {scorer}: {folder} lacks the tokenizer (tokenizer.json, or vocab.json and merges.txt) or the "
            "image processor (preprocessor_config.json); copy them from the model's page on the hub"
        )
    # by Pillow everywhere, since torchvision resizes differently
    from transformers import CLIPImageProcessorPil, CLIPTokenizer

    try:
        return (
            CLIPTokenizer.from_pretrained(folder, local_files_only=True),
            CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True),
        )
    except Exception as error:
        raise ScorerError(
            f"scorer {scorer}: {folder} has no usable tokenizer and image processor ({_reason(error)}); copy "
            "them again from the model's page on the hub"
        ) from error


def _free_cores() -> int:
    """Return the number of this rank's cores, at most 8."""
    ranks_here = os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or "1"
    return max(1, min(8, len(os.sched_getaffinity(0)) // max(1, int(ranks_here))))


def _tensor_of(features: Any) -> Tensor:
    """Return features as a tensor: transformers 5 gives an object with pooler_output, earlier versions the tensor."""
    return features if isinstance(features, Tensor) else features.pooler_output


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {cut(str(error))}"
