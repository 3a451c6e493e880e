"""What the lines before the first step say of a run."""

import pytest

from ds_dpo.config.load import load_config
from ds_dpo.engine.settings import resolve_deepspeed
from ds_dpo.planning.description import describe


def test_the_report_says_what_the_numbers_amount_to() -> None:
    config = load_config([]).config
    report = "\n".join(describe(config, resolve_deepspeed(config, world_size=16)))
    assert "pairs per step: 2048 = 16 ranks x 1 at once x 128 accumulated" in report
    assert (
        "learning rate: peak 1e-05, as given (not scaled by batch or ranks); 200 steps of warm-up, then constant"
        in report
    )
    assert "beta 5000: loss = -log sigmoid(-2500 x difference)" in report
    assert "ZeRO stage 2, bf16, gradients accumulated in fp32" in report
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
        (["--optimizer.type", "lion_8bit"], "optimizer: Lion with its mean in 8 bit, weight decay"),
        (["--schedule.name", "polynomial"], "200 steps of warm-up, then polynomial to 1e-07 at step 2000"),
        (["--schedule.name=piecewise_constant", "--warmup_steps=0", "--schedule.step_rules=1:9,0.1"], "by 1:9,0.1"),
    ],
)
def test_the_report_names_optimizer_and_schedule(options: list[str], expected: str) -> None:
    config = load_config(options).config
    assert expected in "\n".join(describe(config, resolve_deepspeed(config, world_size=16)))
