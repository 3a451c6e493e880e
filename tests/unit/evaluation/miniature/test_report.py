import pytest
import torch

from ds_dpo.evaluation.miniature.picture import comparison_picture
from ds_dpo.evaluation.miniature.report import Judged, diversity, judge, summarize, table
from ds_dpo.evaluation.pages.picture import MARK_COLOURS
from ds_dpo.miniature.reward import measure
from ds_dpo.miniature.world import TEST_PROMPTS, draw

PROMPTS = [prompt for prompt in TEST_PROMPTS[:6] for _ in range(3)]
TOP_LEVEL = {
    "n",
    "reward_base",
    "reward_tuned",
    "reward_sft",
    "win_rate",
    "win_by_margin",
    "loss_by_margin",
    "valid",
    "background",
}


def drawings(*, right_colour_share: float) -> Judged:
    """The same shapes, places and vividness for every share: only the colour differs."""
    generator = torch.Generator().manual_seed(0)
    return judge(draw(PROMPTS, generator=generator, right_colour_share=right_colour_share), PROMPTS)


def test_the_right_colour_is_worth_one_and_wins_everywhere() -> None:
    summary = summarize({"base": drawings(right_colour_share=0), "tuned": drawings(right_colour_share=1)})
    assert summary.keys() >= TOP_LEVEL
    assert summary["n"] == 18
    assert summary["reward_tuned"] - summary["reward_base"] == pytest.approx(1, abs=0.05)
    # 6 of 6 prompts won
    assert (summary["win_rate"], summary["win_rate_high"]) == (1, 1)
    assert summary["win_rate_low"] == pytest.approx(0.025 ** (1 / 6))
    assert (summary["win_by_margin"], summary["loss_by_margin"]) == (1, 0)
    assert (summary["valid"], summary["background"]) == (1, 1)
    assert summary["reward_sft"] is None
    assert not summary["identical_to_base"]
    base, tuned = summary["models"]["base"], summary["models"]["tuned"]
    assert (base["colour_right"], tuned["colour_right"]) == (0, 1)
    assert tuned["shape"] == 1
    assert tuned["reward_low"] < tuned["reward"] < tuned["reward_high"]
    assert summary["comparisons"].keys() == {"tuned_against_base"}
    assert summary["comparisons"]["tuned_against_base"]["reward_gain"] == pytest.approx(1, abs=0.05)


def test_a_control_is_compared_with_both() -> None:
    base, tuned = drawings(right_colour_share=0), drawings(right_colour_share=1)
    summary = summarize({"base": base, "sft": base, "tuned": tuned})
    assert summary["reward_sft"] == summary["reward_base"]
    assert summary["comparisons"]["sft_against_base"]["win_rate"] == 0.5
    assert summary["comparisons"]["tuned_against_sft"]["win_by_margin"] == 1
    lines = table(summary).splitlines()
    assert lines[0].split() == ["base", "sft", "tuned"]
    assert next(line for line in lines if line.startswith("colour right")).split()[2:] == ["0.0%", "0.0%", "100.0%"]
    assert next(line for line in lines if line.startswith("wins against base")).split()[3] == "-"


def test_a_model_against_itself_is_a_half_and_said_to_be_the_same() -> None:
    base = drawings(right_colour_share=0.5)
    summary = summarize({"base": base, "tuned": base})
    assert (summary["win_rate"], summary["win_by_margin"], summary["loss_by_margin"]) == (0.5, 0, 0)
    assert summary["identical_to_base"]


def test_side_effects_show_where_the_reward_does_not_look() -> None:
    base = drawings(right_colour_share=1)
    # every image with the next prompt's: nothing of it need be as that caption says
    rotated = judge(base.images.roll(3, 0), PROMPTS)
    broken = judge(torch.zeros(18, 3, 32, 32), PROMPTS)
    assert summarize({"base": base, "tuned": rotated})["background"] < 1
    summary = summarize({"base": base, "tuned": broken})
    assert (summary["valid"], summary["reward_tuned"], summary["win_rate"], summary["loss_by_margin"]) == (0, 0, 0, 1)
    assert summary["models"]["tuned"]["diversity"] == 0


def test_rewards_are_those_of_the_pixels_as_saved() -> None:
    judged = drawings(right_colour_share=0.5)
    assert torch.equal((judged.images * 255).round() / 255, judged.images)
    assert torch.equal(judged.found.reward, measure(judged.images, PROMPTS).reward)


def test_diversity_is_the_mean_distance_within_a_prompt() -> None:
    flat = torch.tensor([0.0, 0.5, 1.0, 0.2, 0.4])[:, None, None, None].expand(-1, 3, 4, 4)
    # a: distances 0.5, 1, 0.5; b: 0.2
    assert diversity(flat, ["a", "a", "a", "b", "b"]) == pytest.approx((2 / 3 + 0.2) / 2)
    # c has one image, so nothing to differ from
    assert diversity(flat, ["a", "a", "a", "c", "b"]) == pytest.approx(2 / 3)
    assert diversity(flat[:1], ["a"]) is None


def test_the_picture_frames_what_won() -> None:
    judged = {"base": drawings(right_colour_share=0), "tuned": drawings(right_colour_share=1)}
    picture = comparison_picture(judged, summarize(judged), seeds=3)
    colours = {colour for _, colour in picture.getcolors(maxcolors=1 << 24)}
    win, loss = (tuple(bytes.fromhex(MARK_COLOURS[mark][1:])) for mark in ("win", "loss"))
    assert win in colours
    assert loss not in colours
