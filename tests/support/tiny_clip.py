"""A random CLIP model of a few thousand weights with the miniature's tokenizer, saved as one on the hub is."""

from pathlib import Path

import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from ds_dpo.miniature.models import TEXT_LENGTH, make_tokenizer

IMAGE_SIDE = 28
PROMPTS = ["a red circle on a black background", "a blue cross on a white background", "a green square"]


def save_tiny_clip(folder: Path, *, width: int = 32, projection: int = 24, seed: int = 4) -> CLIPModel:
    """Save the model, its tokenizer and its image processor into a folder, and return the model in eval mode."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(pad_token="<|endoftext|>")
    shared = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = CLIPModel(
        CLIPConfig(
            text_config={
                **shared,
                "vocab_size": len(tokenizer),
                "max_position_embeddings": TEXT_LENGTH,
                "bos_token_id": tokenizer.bos_token_id,
                "eos_token_id": tokenizer.eos_token_id,
                "pad_token_id": tokenizer.pad_token_id,
            },
            vision_config={**shared, "image_size": IMAGE_SIDE, "patch_size": 14},
            projection_dim=projection,
        )
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # the library's small weights would make all embeddings alike
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    side = {"height": IMAGE_SIDE, "width": IMAGE_SIDE}
    CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIDE}, crop_size=side).save_pretrained(folder)
    return model


def random_images(count: int, *, size: tuple[int, int] = (40, 32), seed: int = 0) -> list[Image.Image]:
    """Return images of random blocks of colour. size: width and height in pixels."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 256, (count, 4, 4, 3), generator=generator, dtype=torch.uint8).numpy()
    return [Image.fromarray(one).resize(size, Image.Resampling.BICUBIC) for one in coarse]


NUMBERS_OF_LAYERS = (0, 2, 4, 6, 7)  # of the linear layers of LAION's head; dropout layers have the other numbers


def random_head(width: int = 24) -> dict[str, torch.Tensor]:
    """Return the tensors of an aesthetic head for embeddings of a width."""
    torch.manual_seed(3)
    widths = (width, 16, 8, 4, 2, 1)
    head = {}
    for number, before, after in zip(NUMBERS_OF_LAYERS, widths, widths[1:], strict=False):
        head |= {f"layers.{number}.weight": torch.randn(after, before), f"layers.{number}.bias": torch.randn(after)}
    return head
