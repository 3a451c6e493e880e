"""What the lines before the first step say of a run."""

import pytest

from ds_dpo.config.load import load_config
from ds_dpo.engine.settings import resolve_deepspeed
from ds_dpo.planning.description import describe


def test_the_report_says_what_the_numbers_amount_to() -> None:
    config = load_config([]).config
    report = "\n".join(describe(config, resolve_deepspeed(config, world_size=16)))
    assert "pairs per step: 2048 = 16 ranks x 4 at once x 32 accumulated" in report
    assert (
        "learning rate: peak 1e-05, as given (not scaled by batch or ranks); 200 steps of warm-up, then constant"
        in report
    )
    assert "beta 5000: loss = -log sigmoid(-2500 x difference)" in report
    assert "ZeRO stage 1, bf16, gradients accumulated in fp32" in report
    assert "noising:" not in report


def test_the_report_names_what_of_the_noising_was_chosen() -> None:
    options = ["--diffusion.timestep_sampling", "turbo", "--noise_offset", "0.05", "--diffusion.zero_terminal_snr"]
    config = load_config(options).config
    assert "noising: timestep_sampling turbo, zero_terminal_snr true, noise_offset 0.05" in describe(
        config, resolve_deepspeed(config, world_size=16)
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--model.family", "sd3"], "flow: an error is that of the velocity (noise - latents), counted alike at each"),
        (["--model.family=sd3", "--diffusion.error_weighting=epsilon"], "times (1 - s)^2, s being the share of noise"),
        (["--model.family=sd3", "--diffusion.error_weighting=x0"], "times s^2, s being the share of noise"),
        (["--optimizer.type", "lion_8bit"], "optimizer: Lion with its mean in 8 bit, weight decay"),
        (["--schedule.name", "polynomial"], "200 steps of warm-up, then polynomial to 1e-07 at step 2000"),
        (
            ["--held_out.split=none", "--held_out.share=0.05"],
            "held out: a share of 0.05 of the prompts, never trained on, evaluated every 100 steps",
        ),
        (
            ["--held_out.split=none", "--held_out.share=0.05", "--held_out.every_steps=none"],
            "never trained on, evaluated never (held_out.every_steps is unset)",
        ),
        (["--schedule.name=piecewise_constant", "--warmup_steps=0", "--schedule.step_rules=1:9,0.1"], "by 1:9,0.1"),
    ],
)
def test_the_report_names_optimizer_schedule_and_share(options: list[str], expected: str) -> None:
    config = load_config(options).config
    assert expected in "\n".join(describe(config, resolve_deepspeed(config, world_size=16)))


@pytest.mark.parametrize(
    ("name", "is_warned_of"),
    [
        ("stabilityai/stable-diffusion-3.5-large-turbo", True),
        ("black-forest-labs/FLUX.1-schnell", True),
        ("black-forest-labs/FLUX.2-klein-4B", True),
        ("black-forest-labs/FLUX.2-klein-base-4B", False),
        ("stabilityai/stable-diffusion-3.5-large", False),
        ("turbo/stable-diffusion-3.5-large", False),
    ],
)
def test_a_flow_model_of_few_steps_is_warned_of(name: str, is_warned_of: bool) -> None:
    for family, expected in (("sd3", is_warned_of), ("sdxl", False)):
        config = load_config(["--model.family", family, "--model.pretrained", name]).config
        report = "\n".join(describe(config, resolve_deepspeed(config, world_size=1)))
        assert (f"{name} is distilled to few sampling steps" in report) == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            ["--warmup_steps=200", "--max_train_steps=50"],
            ["is more than max_train_steps 50", "at 25 %"],
        ),
        (
            ["--schedule.decay_steps=40", "--max_train_steps=60"],
            ["from step 40 on", "steps 41 to 60 train nothing"],
        ),
        (["--schedule.decay_steps=40", "--schedule.name=cosine", "--max_train_steps=60"], ["steps 41 to 60"]),
        (["--schedule.decay_steps=40", "--schedule.name=polynomial", "--max_train_steps=60"], []),
        (["--schedule.decay_steps=60", "--max_train_steps=60"], []),
        ([], []),
    ],
)
def test_a_rate_that_never_comes_or_is_gone_is_warned_of(options: list[str], expected: list[str]) -> None:
    config = load_config(["--config", "miniature", *options]).config
    lines = describe(config, resolve_deepspeed(config, world_size=2))
    warnings = "\n".join(line for line in lines if line.startswith("warning: ") and "recipe" not in line)
    assert all(part in warnings for part in expected)
    assert bool(warnings) == bool(expected)
