"""Memory of a rank and bytes on the network, by hand and against the numbers of real UNets."""

from __future__ import annotations

import pytest

from ds_dpo.config.load import load_config
from ds_dpo.engine.settings import resolve_deepspeed
from ds_dpo.planning.sizes import Parameters, describe_sizes, model_bytes, parameters_of, sent_gradient_bytes

SDXL = 2_567_463_684  # diffusers' own count of stabilityai/stable-diffusion-xl-base-1.0


def parameters(*options: str) -> Parameters:
    found = parameters_of(load_config(list(options)).config)
    assert found is not None
    return found


def test_parameters_are_those_of_the_unet_and_of_what_is_trained() -> None:
    assert parameters("--config", "sdxl_pickapic") == Parameters(total=SDXL, trained=SDXL)
    assert parameters("--config", "sd15_pickapic").total == 859_520_964
    assert parameters("--config", "sdxl_pickapic_lora") == Parameters(total=SDXL, trained=11_612_160)
    # the miniature's own configuration is in its folder
    assert 2_000_000 < parameters("--config", "miniature").total < 3_000_000
    # diffusers' own counts
    sd3 = {"3-medium-diffusers": 2_028_328_000, "3.5-medium": 2_243_171_520, "3.5-large": 8_056_627_520}
    for name, total in sd3.items():
        model = ("--model.pretrained", f"stabilityai/stable-diffusion-{name}", "--model.family", "sd3")
        assert parameters(*model) == Parameters(total=total, trained=total)
    for name, total in {"dev": 11_901_408_320, "schnell": 11_891_178_560}.items():
        model = ("--model.pretrained", f"black-forest-labs/FLUX.1-{name}", "--model.family", "flux1")
        assert parameters(*model) == Parameters(total=total, trained=total)
    base = ("--config", "sdxl_pickapic")
    attention = parameters(*base, "--model.train", "*.attn2.*").trained
    assert 0 < attention < SDXL
    assert parameters(*base, "--model.freeze", "*.attn2.*").trained == SDXL - attention


def test_zero_divides_what_its_stage_names() -> None:
    hundred = Parameters(total=100, trained=100)
    # weights 2, accumulated gradients 4, DeepSpeed's own 16-bit gradients 2 at stage 1, masters and moments 12
    assert model_bytes(hundred, stage=1, ranks=4) == 100 * (2 + 4 + 2 + 12 / 4)
    assert model_bytes(hundred, stage=2, ranks=4) == 100 * (2 + (4 + 12) / 4)
    assert model_bytes(hundred, stage=3, ranks=4) == 100 * (2 + 4 + 12) / 4
    assert model_bytes(Parameters(total=100, trained=10), stage=2, ranks=1) == 100 * 2 + 10 * 16


@pytest.mark.parametrize(
    ("file", "reductions", "passes"),  # passes of the ring: an all-reduce has two
    [("zero1_bf16", 1, 2), ("zero2_bf16", 32, 1), ("zero2_fp16", 32, 1), ("zero3_bf16", 32, 1)],
)
def test_each_stage_sends_its_gradients_as_often_as_it_reduces_them(file: str, reductions: int, passes: int) -> None:
    config = load_config(["--config", "sdxl_pickapic", "--deepspeed_config", file]).config
    resolved = resolve_deepspeed(config, world_size=16)  # 2048 pairs = 16 ranks x 4 x 32
    assert sent_gradient_bytes(SDXL, resolved) == pytest.approx(passes * reductions * SDXL * 4 * 15 / 16)
    assert sent_gradient_bytes(SDXL, resolve_deepspeed(config, world_size=1)) == 0


def test_the_description_has_memory_and_network() -> None:
    config = load_config(["--config", "sdxl_pickapic"]).config
    memory, network = describe_sizes(config, resolve_deepspeed(config, world_size=16))
    # 5.13 + 10.27 + 5.13 + 30.81 / 16 = 22.5, and 5.13 of the reference
    assert memory.startswith(
        "memory of a rank: 27.6 GB for weights, gradients and optimizer, 5.13 GB of it for the ref"
    )
    assert network == "gradients: 19.3 GB a step over the network from each rank (reduced once a step)"
    config = load_config(["--config", "sd35l_pickapic"]).config
    # 8.06 billion x (2 + 4 + 12) / 16 = 9.06, and 2 / 16 of it for a reference that is divided, too
    memory, _ = describe_sizes(config, resolve_deepspeed(config, world_size=16))
    assert "10.1 GB for weights, gradients and optimizer, 1.01 GB of it for the reference" in memory
    config = load_config(["--config", "sdxl_pickapic"]).config
    (alone,) = describe_sizes(config, resolve_deepspeed(config, world_size=1))
    assert alone.startswith("memory of a rank: 56.5 GB")
