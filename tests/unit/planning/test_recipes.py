"""What of a run is far from all that was trained with: told for what is, silent for what is not."""

import pytest

from ds_dpo.config.load import load_config, preset_names
from ds_dpo.config.objectives import OBJECTIVE_SECTIONS
from ds_dpo.planning.objective_words import FORMULAS, describe_objective
from ds_dpo.planning.recipes import RECIPES, far_from_recipes


def warnings(*options: str) -> list[str]:
    return far_from_recipes(load_config(options).config)


@pytest.mark.parametrize("preset", ["miniature", "sd15_pickapic", "sdxl_pickapic", "sdxl_pickascore"])
def test_plain_presets_are_near_a_recipe(preset: str) -> None:
    assert preset in preset_names()
    assert warnings("--config", preset) == []


def test_each_setting_is_compared_by_itself() -> None:
    (rate,) = warnings("--learning_rate", "1e-8")  # the authors' number without their scale_lr
    assert rate == (
        "warning: optimizer.learning_rate 1e-08 is more than 10x from every known recipe of this kind; the nearest is "
        "2.048e-06 (AIDC-AI/Diffusion-SDPO sdxl_dmpo.sh, 8 GPUs)"
    )
    beta, pairs = warnings("--beta", "100", "--pairs_per_step", "2", "--micro_batch_pairs", "1")
    assert beta.startswith("warning: objective.beta 100 is more than 10x from every known recipe")
    assert "batch.pairs_per_step 2 is" in pairs
    assert "nearest is 32 (okotaku/diffengine" in pairs


def test_the_edge_of_10_times_is_near() -> None:
    # the betas of the family are 2000, 5000 and 6000
    assert warnings("--beta", "60000") == []
    assert warnings("--beta", "200") == []
    assert len(warnings("--beta", "60001")) == len(warnings("--beta", "199")) == 1


def test_a_run_is_compared_with_its_own_kind() -> None:
    # the miniature's rate would be far for SDXL, and SDXL's for the miniature
    assert len(warnings("--learning_rate", "3e-4")) == 1
    assert len(warnings("--config", "miniature", "--learning_rate", "1e-5")) == 1
    # LoRA recipes have few pairs a step
    lora = ("--adapter.type", "lora", "--micro_batch_pairs", "1")
    assert warnings(*lora, "--pairs_per_step", "16") == []
    assert "batch.pairs_per_step 2048" in warnings(*lora)[0]
    # beta 2000 here is the 1000 of diffusion-kto, whose code has no 1/2
    assert warnings("--objective.type", "kto", "--beta", "2000", "--lr", "1e-7", "--pairs_per_step", "16") == []
    assert warnings("--objective.type", "orpo", "--learning_rate", "1") == [], "no full fine-tuning with it is known"


def test_recipes_are_of_objectives_that_there_are() -> None:
    assert {recipe.objective for recipe in RECIPES} <= OBJECTIVE_SECTIONS.keys()
    for recipe in RECIPES:
        has_beta = "beta" in OBJECTIVE_SECTIONS[recipe.objective].model_fields
        assert (recipe.beta is not None) == has_beta, recipe


# ---- words ----


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("dpo --beta 5000", "loss = -log sigmoid(-2500 x difference), where difference = (policy - reference) error"),
        ("dpo --beta 5000 --objective.label_smoothing 0.1", "x difference), 0.1 of labels taken to be wrong, where"),
        ("ipo --beta 1000", "loss = (-500 x difference - 1/2)^2, least at a difference of -0.001, where"),
        ("hinge --beta 1000", "loss = max(0, 1 + 500 x difference), 0 from a difference of -0.002 on, where"),
        ("dmpo --beta 3000", "KL(Bernoulli(sigmoid(-1500 x difference)) || Bernoulli(0.99))"),
        ("sdpo --beta 5000 --objective.mu 0.7", "until at least 0.7 of the chosen image's own descent is left"),
        ("kto --beta 2000", "h is the utility sigmoid of 1000 x (reference - policy error - the mean of that"),
        ("mapo", "chosen error - 0.1 x log sigmoid(1000 x (f(chosen error) - f(rejected error)))"),
        ("orpo --objective.ratio_weight 0.2", "chosen error - 0.2 x log sigmoid(rejected error - chosen error)"),
        ("dspo --beta 0.001", "c = 0.001 x sigmoid(0.0005 x difference)"),
        ("dspo --beta 5000 --objective.shift 0.1", "c = 0.1 x sigmoid(2500 x difference)"),
        ("sft", "objective: sft: loss = chosen error; an error is a mean of squares"),
        ("dpo --beta 5000 --objective.target_gradient_factor 0.2", "from 5000 on it follows the mean |difference|"),
        ("dpo --beta 5000 --objective.target_gradient_factor 0.2 --objective.beta_max 6e3", "within 500 and 6000"),
        ("dpo --beta 5000 --terms.sft_weight 0.5", "terms: the loss has further + 0.5 x chosen error"),
        ("dpo --beta 5000 --terms.anchor_weight 0.5", "+ 0.25 x (mean squared distance between policy and reference"),
    ],
)
def test_a_loss_is_told_with_the_numbers_that_it_amounts_to(options: str, words: str) -> None:
    config = load_config(["--objective.type", *options.split()]).config
    assert words in "\n".join(describe_objective(config))


def test_every_objective_has_words() -> None:
    assert FORMULAS.keys() == OBJECTIVE_SECTIONS.keys()
