"""What of a run is far from all that was trained with: told for what is, silent for what is not."""

import re
from typing import Any

import pytest
from pydantic import ValidationError

from ds_dpo.config.load import load_config, preset_names
from ds_dpo.planning.recipes import RECIPES_FILE, far_from_recipes, known_recipes, read_recipes


def warnings(*options: str) -> list[str]:
    return far_from_recipes(load_config(options).config)


@pytest.mark.parametrize(
    "preset",
    ["miniature", "sd15_pickapic", "sd35l_pickapic", "sd35m_pickapic", "sd35m_pickapic_lora", "flux1_dev_lora"],
)
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
    # poly has dpo's logit and none of its own; linear has a logit of its own beta
    assert "nearest is 6000" in warnings("--objective.type", "poly", "--beta", "1e5")[0]
    assert warnings("--objective.type", "linear", "--beta", "500", "--lr", "1e-5", "--pairs_per_step", "128") == []
    assert "nearest is 500" in warnings("--objective.type", "linear", "--beta", "6000")[0]
    # LoRA recipes have few pairs a step
    lora = ("--adapter.type", "lora", "--micro_batch_pairs", "1")
    assert warnings(*lora, "--pairs_per_step", "16") == []
    assert "batch.pairs_per_step 2048" in warnings(*lora)[0]
    # beta 2000 here is the 1000 of diffusion-kto, whose code has no 1/2
    assert warnings("--objective.type", "kto", "--beta", "2000", "--lr", "1e-7", "--pairs_per_step", "16") == []
    # a flow model's rate is near those of its own kind: 5e-6 for full training, 1e-6 to 3e-4 for LoRA
    sd3 = ("--model.family", "sd3", "--pairs_per_step", "128")
    assert warnings(*sd3, "--beta", "1000", "--lr", "5e-6") == []
    assert "nearest is 1000" in warnings(*sd3, "--beta", "50", "--lr", "5e-6")[0]
    assert warnings(*sd3, "--adapter.type", "lora", "--beta", "50", "--lr", "3e-4") == []
    assert warnings("--objective.type", "orpo", "--learning_rate", "1") == [], "no full fine-tuning with it is known"


def test_the_file_holds_what_the_sources_publish() -> None:
    known = known_recipes()
    assert len(known) == RECIPES_FILE.read_text(encoding="utf-8").count("- objective:") == 31
    assert len({recipe.source for recipe in known if "miniature" not in recipe.model}) == 27, (
        "each row has its own source"
    )
    sdxl = next(recipe for recipe in known if recipe.source.startswith("SalesforceAIResearch/DiffusionDPO sdxl.sh"))
    # the authors' 1e-8 x 2048 pairs of scale_lr
    assert sdxl.learning_rate == pytest.approx(1e-8 * 2048)
    assert (sdxl.beta, sdxl.pairs_per_step, sdxl.optimizer, sdxl.trained) == (5000, 2048, "Adafactor", "full")


PLAIN = {"objective": "dpo", "source": "a paper", "beta": 5000, "learning_rate": 1e-5, "optimizer": "AdamW"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objective": "of_tomorrow"}, "objective of_tomorrow must be one of dpo, ipo"),
        ({"beta": None}, "objective dpo needs one"),
        ({"objective": "mapo"}, "beta 5000.0: objective mapo has none"),
        ({"learning_rate": "fast"}, "0.learning_rate"),
        ({"pairs_per_step": 0}, "0.pairs_per_step"),
        ({"trained": "half"}, "0.trained"),
        ({"rate": 1}, "0.rate"),
    ],
)
def test_a_row_that_cannot_be_is_refused(change: dict[str, Any], message: str) -> None:
    assert read_recipes([PLAIN])[0].beta == 5000
    with pytest.raises(ValidationError, match=re.escape(message)):
        read_recipes([{**PLAIN, **change}])


# ---- words ----


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("dpo --beta 5000", "loss = -log sigmoid(-2500 x difference), where difference = (policy - reference) error"),
        ("dpo --beta 5000 --objective.label_smoothing 0.1", "x difference), with 0.1 of labels assumed wrong, where"),
        ("ipo --beta 1000", "loss = (-500 x difference - 1/2)^2, smallest at a difference of -0.001, where"),
        ("hinge --beta 1000", "loss = max(0, 1 + 500 x difference), 0 below a difference of -0.002, where"),
        ("dmpo --beta 3000", "KL(Bernoulli(sigmoid(-1500 x difference)) || Bernoulli(0.99))"),
        ("poly --beta 5000 --objective.poly_weight 0.5", "(-2500 x difference) + 0.5 x sigmoid(2500 x difference)"),
        ("alpha --beta 4000", "p = sigmoid(-2000 x difference), a = 0.9999 x the mean of p over the previous step"),
        (
            "linear --beta 500",
            "c is the constant 1/2 + 100 x difference, from 0.001 to 0.999, and difference = (policy",
        ),
        ("sdpo --beta 5000 --objective.mu 0.7", "until at least 0.7 of the chosen image's own descent is left"),
        ("kto --beta 2000", "h is the utility sigmoid of 1000 x (reference - policy error - the mean of that"),
        ("mapo", "chosen error - 0.1 x log sigmoid(1000 x (f(chosen error) - f(rejected error)))"),
        ("orpo --objective.ratio_weight 0.2", "chosen error - 0.2 x log sigmoid(rejected error - chosen error)"),
        ("dspo --beta 0.001", "c = 0.001 x sigmoid(0.0005 x difference)"),
        ("dspo --beta 5000 --objective.shift 0.1", "c = 0.1 x sigmoid(2500 x difference)"),
        ("sft", "objective: sft: loss = chosen error; an error is a mean of squares"),
        (
            "dpo --beta 5000 --objective.target_gradient_factor 0.2",
            "it starts at 5000 and follows the mean |difference|",
        ),
        ("dpo --beta 5000 --objective.target_gradient_factor 0.2 --objective.beta_max 6e3", "from 500 to 6000"),
        ("dpo --beta 5000 --terms.sft_weight 0.5", "terms added to the loss: 0.5 x chosen error"),
        (
            "dpo --beta 5000 --terms.anchor_weight 0.5",
            "terms added to the loss: 0.25 x (mean squared distance between policy and reference",
        ),
    ],
)
def test_a_loss_is_told_with_the_numbers_that_it_amounts_to(options: str, words: str) -> None:
    config = load_config(["--objective.type", *options.split()]).config
    assert words in "\n".join([*config.objective.sentences(), *config.terms.sentences()])
