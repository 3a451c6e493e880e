"""HPSv2.1 on random weights in open_clip's names, against open_clip's own computation written out here."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_clip import PROMPTS, random_images
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, softmax
from transformers import CLIPImageProcessorPil

from ds_dpo.errors import ScorerError
from ds_dpo.evaluation.scorers.choice import ScorerChoice
from ds_dpo.evaluation.scorers.hpsv21 import whole_in_square
from ds_dpo.evaluation.scorers.open_clip_weights import clip_from_open_clip
from ds_dpo.evaluation.scorers.opening import open_scorer
from ds_dpo.miniature.models import TEXT_LENGTH, make_tokenizer, token_ids

SIDE, PATCH, VISION, TEXT, PROJECTION = 28, 14, 160, 128, 24
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def shapes_of(
    *,
    patches: int,
    patch: int,
    vision: int,
    text: int,
    projection: int,
    length: int,
    vocabulary: int,
    vision_layers: int,
    text_layers: int,
    mlp: int,
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of open_clip's tensors. mlp: width of a hidden layer over that of its block."""

    def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (width,), f"{name}.bias": (width,)}

    def block(name: str, width: int) -> dict[str, tuple[int, ...]]:
        return {
            **norm(f"{name}.ln_1", width),
            **norm(f"{name}.ln_2", width),
            f"{name}.attn.in_proj_weight": (3 * width, width),
            f"{name}.attn.in_proj_bias": (3 * width,),
            f"{name}.attn.out_proj.weight": (width, width),
            f"{name}.attn.out_proj.bias": (width,),
            f"{name}.mlp.c_fc.weight": (mlp * width, width),
            f"{name}.mlp.c_fc.bias": (mlp * width,),
            f"{name}.mlp.c_proj.weight": (width, mlp * width),
            f"{name}.mlp.c_proj.bias": (width,),
        }

    shapes = {
        "logit_scale": (),
        "positional_embedding": (length, text),
        "text_projection": (text, projection),
        "token_embedding.weight": (vocabulary, text),
        **norm("ln_final", text),
        "visual.class_embedding": (vision,),
        "visual.positional_embedding": (patches + 1, vision),
        "visual.proj": (vision, projection),
        "visual.conv1.weight": (vision, 3, patch, patch),
        **norm("visual.ln_pre", vision),
        **norm("visual.ln_post", vision),
    }
    for number in range(text_layers):
        shapes |= block(f"transformer.resblocks.{number}", text)
    for number in range(vision_layers):
        shapes |= block(f"visual.transformer.resblocks.{number}", vision)
    return shapes


TINY = {
    "patches": (SIDE // PATCH) ** 2, "patch": PATCH, "vision": VISION, "text": TEXT, "projection": PROJECTION,
    "length": TEXT_LENGTH, "vision_layers": 2, "text_layers": 2, "mlp": 2,
}  # fmt: skip
# of https://github.com/mlfoundations/open_clip, ViT-H-14.json
VIT_H_14 = {
    "patches": 16 * 16, "patch": 14, "vision": 1280, "text": 1024, "projection": 1024, "length": 77,
    "vision_layers": 32, "text_layers": 24, "mlp": 4,
}  # fmt: skip


def random_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    vocabulary = len(make_tokenizer(pad_token="<|endoftext|>"))
    stds = {"token_embedding.weight": 1.0, "visual.conv1.weight": 0.05}
    tensors = {
        name: torch.randn(shape, generator=generator) * stds.get(name, 0.15)
        for name, shape in shapes_of(vocabulary=vocabulary, **TINY).items()
    }
    return {
        name: 1 + tensor if ".ln_" in f".{name}" and name.endswith("weight") else tensor
        for name, tensor in tensors.items()
    }


def through_block(states: Tensor, tensors: dict[str, Tensor], name: str, head_width: int, *, causal: bool) -> Tensor:
    """(N, L, W) through a ResidualAttentionBlock."""

    def norm(which: str, value: Tensor) -> Tensor:
        weight, bias = (tensors[f"{name}.{which}.{part}"] for part in ("weight", "bias"))
        return layer_norm(value, (value.shape[-1],), weight, bias)

    count, length, width = states.shape
    fused = norm("ln_1", states) @ tensors[f"{name}.attn.in_proj_weight"].T + tensors[f"{name}.attn.in_proj_bias"]
    q, k, v = (
        part.reshape(count, length, width // head_width, head_width).transpose(1, 2) for part in fused.split(width, -1)
    )
    logits = q @ k.transpose(-1, -2) / math.sqrt(head_width)
    if causal:
        logits = logits + torch.full((length, length), -torch.inf).triu(1)
    mixed = (softmax(logits, -1) @ v).transpose(1, 2).reshape(count, length, width)
    states = states + mixed @ tensors[f"{name}.attn.out_proj.weight"].T + tensors[f"{name}.attn.out_proj.bias"]
    inner = gelu(norm("ln_2", states) @ tensors[f"{name}.mlp.c_fc.weight"].T + tensors[f"{name}.mlp.c_fc.bias"])
    return states + inner @ tensors[f"{name}.mlp.c_proj.weight"].T + tensors[f"{name}.mlp.c_proj.bias"]


def cosines_by_hand(tensors: dict[str, Tensor], pixels: Tensor, ids: Tensor) -> np.ndarray:
    tensors = {name: tensor.double() for name, tensor in tensors.items()}
    patches = torch.nn.functional.conv2d(pixels.double(), tensors["visual.conv1.weight"], stride=PATCH)
    states = patches.flatten(2).transpose(1, 2)
    first = tensors["visual.class_embedding"].expand(len(states), 1, -1)
    states = torch.cat([first, states], 1) + tensors["visual.positional_embedding"]
    states = layer_norm(states, (VISION,), tensors["visual.ln_pre.weight"], tensors["visual.ln_pre.bias"])
    for number in range(2):
        states = through_block(states, tensors, f"visual.transformer.resblocks.{number}", 80, causal=False)
    pooled = layer_norm(states[:, 0], (VISION,), tensors["visual.ln_post.weight"], tensors["visual.ln_post.bias"])
    vision = pooled @ tensors["visual.proj"]

    words = tensors["token_embedding.weight"][ids] + tensors["positional_embedding"]
    for number in range(2):
        words = through_block(words, tensors, f"transformer.resblocks.{number}", 64, causal=True)
    words = layer_norm(words, (TEXT,), tensors["ln_final.weight"], tensors["ln_final.bias"])
    # open_clip takes the state at the largest token, which is the end of the text
    text = words[torch.arange(len(ids)), ids.argmax(-1)] @ tensors["text_projection"]
    return torch.cosine_similarity(vision, text).numpy()


def save_hps(folder: Path, tensors: dict[str, Tensor]) -> Path:
    folder.mkdir()
    make_tokenizer(pad_token="<|endoftext|>").save_pretrained(folder)
    side = {"height": SIDE, "width": SIDE}
    CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=side).save_pretrained(folder)
    torch.save({"state_dict": tensors, "epoch": 3}, folder / "HPS_v2.1_compressed.pt")
    return folder


def opened(source: Path, **settings: object):
    return open_scorer(ScorerChoice(name="hps", kind="hpsv21", source=str(source), settings=settings), "cpu")


def test_scores_are_open_clip_s(tmp_path: Path) -> None:
    tensors = random_tensors()
    folder = save_hps(tmp_path / "hps", {**tensors, "attn_mask": torch.zeros(TEXT_LENGTH, TEXT_LENGTH)})
    images, prompts = random_images(6, size=(40, 40)), [PROMPTS[place % 3] for place in range(6)]
    small = [image.resize((SIDE, SIDE), Image.Resampling.BICUBIC) for image in images]
    arrays = [(np.float32(image) / 255 - np.float32(MEAN)) / np.float32(STD) for image in small]
    pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
    ids = token_ids(make_tokenizer(pad_token="!"), prompts)
    expected = cosines_by_hand(tensors, pixels, ids)
    assert expected.std() > 0.05
    scorer = opened(folder)
    np.testing.assert_allclose(scorer.score(images, prompts) / 100, expected, atol=1e-6)
    assert set(scorer.record["sha256"]) == {"HPS_v2.1_compressed.pt"}
    save_file(tensors, tmp_path / "weights.safetensors")
    again = opened(tmp_path / "weights.safetensors", processor=str(folder))
    assert np.array_equal(again.score(images, prompts), scorer.score(images, prompts))


def test_sizes_follow_from_the_shapes_of_the_real_model() -> None:
    shapes = shapes_of(vocabulary=49408, **VIT_H_14)
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    model = clip_from_open_clip(tensors, make_tokenizer(pad_token="<|endoftext|>"), place="x")
    vision, text = model.config.vision_config, model.config.text_config
    assert (vision.image_size, vision.num_attention_heads, vision.num_hidden_layers) == (224, 16, 32)
    assert (text.max_position_embeddings, text.num_attention_heads, text.num_hidden_layers) == (77, 16, 24)
    # as open_clip's page on models states
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(986.11e6, rel=1e-4)


def test_an_image_that_is_not_square_is_whole_in_the_middle() -> None:
    square = np.asarray(whole_in_square(Image.new("RGB", (200, 100), (9, 90, 200)), 28))
    assert square.shape == (28, 28, 3)
    assert (square[7:21] == (9, 90, 200)).all()
    assert (square[:7] == 0).all()
    assert (square[21:] == 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"visual.proj": None}, "visual_projection.weight"),
        ({"visual.conv1.weight": None}, "has no tensor visual.conv1.weight"),
        ({"score_head.weight": torch.ones(3)}, "it has a tensor score_head.weight"),
        ({"positional_embedding": torch.ones(())}, "is no ViT of open_clip"),
        ({"transformer.resblocks.1.mlp.c_fc.bias": torch.ones(2)}, "is no ViT of open_clip"),
        ({"ln_final.weight": [1, 2]}, "something else than tensors"),
    ],
)
def test_weights_of_another_model_are_refused(change: dict, message: str, tmp_path: Path) -> None:
    tensors = {name: value for name, value in {**random_tensors(), **change}.items() if value is not None}
    with pytest.raises(ScorerError, match=message) as caught:
        opened(save_hps(tmp_path / "hps", tensors))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_torn_or_runs_code_is_refused(tmp_path: Path) -> None:
    folder = save_hps(tmp_path / "hps", random_tensors())
    file = folder / "HPS_v2.1_compressed.pt"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ScorerError, match="cannot be read as weights alone"):
        opened(folder)
    torch.save({"state_dict": {"x": Path("/tmp")}}, file)
    with pytest.raises(ScorerError, match="cannot be read as weights alone"):
        opened(folder)
    file.unlink()
    with pytest.raises(ScorerError, match="has none of the files HPS_v2"):
        opened(folder)
