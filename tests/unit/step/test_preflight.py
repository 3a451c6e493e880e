"""What the check before the first update allows, and what it says.

A policy's weights are its reference's times a factor.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from small_step import SCHEDULE, ElementwiseUNet, Frozen, random_pairs

from ds_dpo.batch import PreferenceBatch
from ds_dpo.config.models import Preflight
from ds_dpo.errors import PreflightError
from ds_dpo.models.denoiser.predict import predict_by_unet
from ds_dpo.objectives.losses import OBJECTIVES
from ds_dpo.precision import Precision
from ds_dpo.step import preflight as preflight_module
from ds_dpo.step.preference_step import PreferenceStep
from ds_dpo.step.preflight import look_at_start, require_equal_start

PAIRS = random_pairs(2)


def a_step(*, factor: float) -> PreferenceStep:
    """Return a step whose policy's weights are the reference's times a factor."""
    policy, reference = ElementwiseUNet(0), ElementwiseUNet(0)
    with torch.no_grad():
        policy.weight *= factor
    return PreferenceStep(
        policy=policy,
        predict=predict_by_unet,
        reference=Frozen(reference),
        schedule=SCHEDULE,
        objective=OBJECTIVES["dpo"],
        options={"beta": 10},
    )


def look(step: PreferenceStep, preflight: Preflight, *, precision: Precision = "bf16") -> str:
    return require_equal_start(step, PAIRS, precision=precision, preflight=preflight)


def differences_by_hand(factor: float) -> tuple[float, float]:
    """Return the largest difference of the errors, and as a share of the reference's, with plain means."""
    batch, weight = PAIRS, ElementwiseUNet(0).weight.detach()
    noise, timesteps = batch.image_noise(), batch.image_timesteps()
    signal = SCHEDULE.alphas_cumprod[timesteps].sqrt().view(-1, 1, 1, 1)
    noisy = signal * batch.latents + (1 - signal.square()).sqrt() * noise
    policy, reference = (
        (each * weight * noisy - noise).square().mean((1, 2, 3)) for each in (torch.tensor(factor), torch.tensor(1.0))
    )
    difference = (policy - reference).abs()
    return float(difference.max()), float((difference / reference).max())


@pytest.mark.parametrize("preflight", ["exact", "near"])
def test_equal_models_start_whatever_is_allowed(preflight: Preflight) -> None:
    assert look(a_step(factor=1), preflight) == (
        "preflight: policy and reference predict exactly the same (largest difference 0)"
    )


def test_a_small_difference_is_refused_unless_it_is_allowed() -> None:
    difference, share = differences_by_hand(1.001)
    assert 1e-4 < share < 0.01, "more than rounding in fp32, less than in fp16"
    found = f"their errors differ by up to {difference:.3g}"
    named = "the first module that differs is the whole ElementwiseUNet: it reads the same values"
    weights = "weights: its weight has other values in the policy than in the reference"
    with pytest.raises(PreflightError) as refused:
        look(a_step(factor=1.001), "exact")
    for words in (found[:-1], f"a share of {share:.2g}", named, weights, "near would allow it, up to a share of 0.1"):
        assert words in str(refused.value)
    line = look(a_step(factor=1.001), "near")
    assert line.startswith("warning: preflight: ")
    for words in (
        found[:-1],
        f"a share of {share:.2g}",
        named,
        weights,
        "allows a share of 0.1 in bf16",
    ):
        assert words in line


@pytest.mark.parametrize(("precision", "is_allowed"), [("fp32", False), ("fp16", True), ("bf16", True)])
def test_what_near_allows_is_what_rounding_causes_in_the_precision(precision: Precision, is_allowed: bool) -> None:
    if is_allowed:
        assert look(a_step(factor=1.001), "near", precision=precision).startswith("warning")
        return
    with pytest.raises(PreflightError, match=r"reference\.preflight near allows a share of 0\.0001 in fp32$"):
        look(a_step(factor=1.001), "near", precision=precision)
    with pytest.raises(PreflightError) as refused:
        look(a_step(factor=1.001), "exact", precision=precision)
    assert "near" not in str(refused.value), "it would be refused too"


@pytest.mark.parametrize("preflight", ["exact", "near"])
def test_predictions_that_are_no_numbers_are_refused(preflight: Preflight) -> None:
    with pytest.raises(PreflightError, match=r"differ by up to inf .* the first module that differs is the whole"):
        look(a_step(factor=float("nan")), preflight)


@pytest.mark.parametrize("preflight", ["exact", "near"])
def test_ranks_share_the_largest_difference_and_the_first_message(
    preflight: Preflight, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This rank finds nothing, another one does: this rank makes the same collectives and ends alike."""
    gathered: list[Any] = []
    of_another_rank = [0.25, 0.5, "the first module that differs is X"]

    def gather_objects(own: Any) -> list[Any]:
        gathered.append(own)
        return [own, of_another_rank[len(gathered) - 1]]

    monkeypatch.setattr(preflight_module, "gather_objects", gather_objects)
    with pytest.raises(PreflightError, match=r"differ by up to 0\.25 .*, a share of 0\.5; the first module .* is X"):
        look(a_step(factor=1), preflight)
    assert gathered == [0.0, 0.0, None]


def test_the_batch_that_was_looked_at_is_trained_on() -> None:
    said: list[str] = []

    def batches() -> Iterator[PreferenceBatch]:
        yield from (random_pairs(2), random_pairs(3))

    left = look_at_start(
        a_step(factor=1.001),
        lambda batch: batch,
        batches(),
        is_resumed=False,
        precision="bf16",
        preflight="near",
        say=said.append,
    )
    assert [len(batch.pair_ids) for batch in left] == [2, 3]
    assert [line.split(":")[0] for line in said] == ["warning"]
