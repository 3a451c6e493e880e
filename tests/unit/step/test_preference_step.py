"""One micro-batch by hand: a UNet that multiplies its input, so that every error can be worked out on paper.

The policy multiplies by 1, the reference by 1/2. Each image is one number in all its elements:

            signal noise | latent noise noisy | policy error  reference error  difference
chosen   0    0.6   0.8  |    1     1    1.4  |     0.16           0.09            0.07
rejected 0    0.6   0.8  |   -1     1    0.2  |     0.64           0.81           -0.17
chosen   1    0.8   0.6  |    1     2    2.0  |     0.00           1.00           -1.00
rejected 1    0.8   0.6  |   -1     2    0.4  |     2.56           3.24           -0.68
"""

from dataclasses import replace
from math import exp, log

import pytest
import torch
from torch import Tensor, nn

from ds_dpo.batch import Conditioning, PreferenceBatch
from ds_dpo.diffusion.noise_schedule import NoiseSchedule
from ds_dpo.errors import PreflightError
from ds_dpo.models.denoiser.predict import predict_by_unet
from ds_dpo.objectives.losses import OBJECTIVES, Objective
from ds_dpo.run_folder.metrics import METRICS
from ds_dpo.step.preference_step import PreferenceStep, squared_errors_of_pairs
from ds_dpo.step.preflight import require_near_start

SCHEDULE = NoiseSchedule(alphas_cumprod=torch.tensor([0.36, 0.64]), prediction_type="epsilon")
GAPS = (0.24, -0.32)  # chosen less rejected difference


class ScalingUNet(nn.Module):
    """Multiplies the noisy latents by its weight, and remembers what it was called with."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))
        self.calls: list[dict[str, Tensor]] = []

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        *,
        encoder_hidden_states: Tensor,
        added_cond_kwargs: dict[str, Tensor],
        return_dict: bool,
    ) -> tuple[Tensor]:
        assert not return_dict
        self.calls.append({"noisy": sample, "timesteps": timestep, "text": encoder_hidden_states, **added_cond_kwargs})
        return (self.weight * sample,)


class FrozenScaling:
    """A reference that remembers its UNet, too."""

    def __init__(self, weight: float) -> None:
        self.module = ScalingUNet(weight)

    @torch.no_grad()
    def predict(self, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        return predict_by_unet(self.module, noisy_latents, timesteps, conditioning)


def numbers(*values: float) -> Tensor:
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 4, 2, 2)


def two_pairs() -> PreferenceBatch:
    return PreferenceBatch(
        latents=numbers(1, 1, -1, -1),
        noise=numbers(1, 2),
        timesteps=torch.tensor([0, 1]),
        text_states=torch.tensor([5.0, 6.0]).view(2, 1, 1),
        pooled=torch.tensor([[7.0], [8.0]]),
        extras={"time_ids": torch.tensor([[1.0], [2.0], [3.0], [4.0]])},
        pair_ids=torch.tensor([11, 12]),
        target_probabilities=torch.ones(2),
        weights=torch.ones(2),
    )


def dpo_step(
    *,
    policy: ScalingUNet | None = None,
    reference: FrozenScaling | None = None,
    schedule: NoiseSchedule = SCHEDULE,
    beta: float = 10,
) -> PreferenceStep:
    return PreferenceStep(
        policy=policy or ScalingUNet(1.0),
        predict=predict_by_unet,
        reference=reference or FrozenScaling(0.5),
        schedule=schedule,
        objective=OBJECTIVES["dpo"],
        options={"beta": beta},
    )


def test_loss_and_quantities_are_those_worked_out_by_hand() -> None:
    output = dpo_step()(two_pairs())
    losses = [log(1 + exp(5 * gap)) for gap in GAPS]
    assert output.loss.item() == pytest.approx(sum(losses) / 2, abs=1e-5)
    expected = {
        "loss": losses,
        "policy_chosen_error": [0.16, 0.0],
        "policy_rejected_error": [0.64, 2.56],
        "reference_chosen_error": [0.09, 1.0],
        "reference_rejected_error": [0.81, 3.24],
        "chosen_difference": [0.07, -1.0],
        "rejected_difference": [-0.17, -0.68],
        "implicit_margin": [-0.24, 0.32],
        "absolute_margin": [0.24, 0.32],
        "gradient_factor": [1 / (1 + exp(-5 * gap)) for gap in GAPS],
        "implicit_accuracy": [0.0, 1.0],
    }
    assert output.pair_quantities.keys() == expected.keys()
    for name, values in expected.items():
        found = output.pair_quantities[name]
        assert not found.requires_grad
        assert found.dtype == torch.float32
        assert found.tolist() == pytest.approx(values, abs=1e-5), name


def test_a_pair_counts_by_its_target_and_weight() -> None:
    batch = replace(two_pairs(), target_probabilities=torch.tensor([1.0, 0.5]), weights=torch.tensor([3.0, 2.0]))
    output = dpo_step()(batch)
    won, tie_won, tie_lost = (log(1 + exp(5 * gap)) for gap in (GAPS[0], GAPS[1], -GAPS[1]))
    losses = [3 * won, 2 * (tie_won + tie_lost) / 2]
    assert output.pair_quantities["loss"].tolist() == pytest.approx(losses, abs=1e-5)
    assert output.loss.item() == pytest.approx(sum(losses) / 2, abs=1e-5)
    assert output.pair_quantities["implicit_accuracy"].tolist() == [0, 0.5], "a tie has no side"


def test_the_gradient_is_the_policys_alone() -> None:
    policy, reference = ScalingUNet(1.0), FrozenScaling(0.5)
    dpo_step(policy=policy, reference=reference)(two_pairs()).loss.backward()
    # d error / d weight = 2 (weight x - target) x; of the gaps: 1.12 + 0.32 and 0 + 1.28
    slopes = [5 / (1 + exp(-5 * gap)) for gap in GAPS]
    assert policy.weight.grad is not None
    assert policy.weight.grad.item() == pytest.approx((slopes[0] * 1.44 + slopes[1] * 1.28) / 2, rel=1e-5)
    assert reference.module.weight.grad is None


def test_a_pair_shares_noise_timestep_and_prompt_and_both_models_see_the_same() -> None:
    policy, reference = ScalingUNet(1.0), FrozenScaling(0.5)
    dpo_step(policy=policy, reference=reference)(two_pairs())
    (seen,) = policy.calls
    assert seen["noisy"][:, 0, 0, 0].tolist() == pytest.approx([1.4, 2.0, 0.2, 0.4])
    assert seen["timesteps"].tolist() == [0, 1, 0, 1]
    assert seen["text"].flatten().tolist() == [5, 6, 5, 6]
    assert seen["text_embeds"].flatten().tolist() == [7, 8, 7, 8]
    assert seen["time_ids"].flatten().tolist() == [1, 2, 3, 4]
    (seen_by_reference,) = reference.module.calls
    assert all(torch.equal(seen[name], seen_by_reference[name]) for name in seen)


def test_equal_models_begin_at_ln_2_with_every_pair_half_right() -> None:
    output = dpo_step(reference=FrozenScaling(1.0), beta=5000)(two_pairs())
    assert output.loss.item() == pytest.approx(log(2), abs=1e-7)
    assert output.pair_quantities["implicit_margin"].tolist() == [0, 0]
    assert output.pair_quantities["implicit_accuracy"].tolist() == [0.5, 0.5]


def test_sft_runs_neither_rejected_images_nor_a_reference() -> None:
    policy = ScalingUNet(1.0)
    step = PreferenceStep(
        policy=policy,
        predict=predict_by_unet,
        reference=None,
        schedule=SCHEDULE,
        objective=OBJECTIVES["sft"],
        options={},
    )
    output = step(two_pairs())
    assert output.loss.item() == pytest.approx(0.08)  # (0.16 + 0) / 2
    assert output.pair_quantities.keys() == {"loss", "policy_chosen_error"}
    (seen,) = policy.calls
    assert seen["noisy"][:, 0, 0, 0].tolist() == pytest.approx([1.4, 2.0])
    assert seen["time_ids"].flatten().tolist() == [1, 2]
    assert not step.compares_with_reference


def test_an_objective_may_use_pairs_without_a_reference() -> None:
    objective = Objective(
        loss=lambda errors: errors.policy_chosen_error - errors.policy_rejected_error,
        uses_rejected=True,
        reference="none",
    )
    step = PreferenceStep(
        policy=ScalingUNet(1.0),
        predict=predict_by_unet,
        reference=None,
        schedule=SCHEDULE,
        objective=objective,
        options={},
    )
    output = step(two_pairs())
    assert output.loss.item() == pytest.approx((0.16 - 0.64 + 0 - 2.56) / 2, abs=1e-5)
    assert output.pair_quantities.keys() == {"loss", "policy_chosen_error", "policy_rejected_error"}


def test_the_largest_difference_is_0_only_where_both_predict_alike() -> None:
    assert dpo_step(reference=FrozenScaling(1.0)).largest_difference(two_pairs()) == 0
    assert dpo_step().largest_difference(two_pairs()) == pytest.approx(1.0, abs=1e-6)
    broken = dpo_step(policy=ScalingUNet(float("nan"))).largest_difference(two_pairs())
    assert broken != 0, "not a number is no equality"


def test_the_unet_is_shown_the_input_noise_and_judged_by_the_target_s() -> None:
    policy, reference = ScalingUNet(1.0), FrozenScaling(0.5)
    batch = replace(two_pairs(), input_noise=numbers(2, 1))
    errors = dpo_step(policy=policy, reference=reference).errors(batch)
    # 0.6 x 1 + 0.8 x 2, 0.8 x 1 + 0.6 x 1, and their rejected images
    noisy = [2.2, 1.4, 1.0, -0.2]
    assert policy.calls[0]["noisy"][:, 0, 0, 0].tolist() == pytest.approx(noisy)
    assert reference.module.calls[0]["noisy"][:, 0, 0, 0].tolist() == pytest.approx(noisy)
    assert errors.policy_chosen_error.tolist() == pytest.approx([(2.2 - 1) ** 2, (1.4 - 2) ** 2])
    assert errors.policy_rejected_error.tolist() == pytest.approx([0, 2.2**2], abs=1e-6)


def test_errors_and_differences_weigh_by_their_timestep() -> None:
    # alpha_bar 0.36 and 0.64: SNR 9/16 and 16/9, so min(1, 1/SNR) is 1 and 9/16
    weighted = replace(SCHEDULE, error_weighting="min_snr", snr_gamma=1.0)
    plain, other = (dpo_step(schedule=schedule).errors(two_pairs()) for schedule in (SCHEDULE, weighted))
    weights = torch.tensor([1, 9 / 16])
    assert torch.equal(other.target_probability, plain.target_probability)
    torch.testing.assert_close(other.policy_chosen_error, plain.policy_chosen_error * weights)
    assert plain.asked_for.keys() == {"policy_rejected_error", "chosen_difference", "rejected_difference"}
    for name, value in plain.asked_for.items():
        torch.testing.assert_close(other.asked_for[name], value * weights)
    assert other.difference_gap.tolist() == pytest.approx([GAPS[0], GAPS[1] * 9 / 16])
    assert dpo_step(reference=FrozenScaling(1.0), schedule=weighted).largest_difference(two_pairs()) == 0


def step_without_reference(policy: ScalingUNet, schedule: NoiseSchedule = SCHEDULE) -> PreferenceStep:
    return PreferenceStep(
        policy=policy,
        predict=predict_by_unet,
        reference=None,
        schedule=schedule,
        objective=OBJECTIVES["dpo"],
        options={"beta": 10},
    )


def with_kept_errors(chosen: list[float], rejected: list[float]) -> PreferenceBatch:
    return replace(
        two_pairs(), reference_chosen_error=torch.tensor(chosen), reference_rejected_error=torch.tensor(rejected)
    )


def test_kept_errors_stand_for_a_reference_and_weigh_as_its_own_do() -> None:
    weighing = replace(SCHEDULE, error_weighting="min_snr", snr_gamma=1.0)
    for schedule in (SCHEDULE, weighing):
        kept = step_without_reference(ScalingUNet(1.0), schedule)(with_kept_errors([0.09, 1.0], [0.81, 3.24]))
        held = dpo_step(schedule=schedule)(two_pairs())
        assert kept.pair_quantities.keys() == held.pair_quantities.keys()
        for name, values in held.pair_quantities.items():
            assert kept.pair_quantities[name].tolist() == pytest.approx(values.tolist(), abs=1e-5), name


def test_what_is_kept_of_a_reference_are_its_plain_errors() -> None:
    weighing = replace(SCHEDULE, error_weighting="min_snr", snr_gamma=1.0)
    chosen, rejected = squared_errors_of_pairs(ScalingUNet(0.5), two_pairs(), weighing, predict=predict_by_unet)
    assert chosen.tolist() == pytest.approx([0.09, 1.0], abs=1e-6)
    assert rejected.tolist() == pytest.approx([0.81, 3.24], abs=1e-6)
    assert not chosen.requires_grad


def test_a_fresh_policy_must_be_near_the_kept_errors_of_its_start() -> None:
    step = step_without_reference(ScalingUNet(0.5))
    assert step.reads_reference_errors
    assert require_near_start(step, with_kept_errors([0.09, 1.0], [0.81, 3.24]), precision="fp32") < 1e-5
    off = with_kept_errors([0.09, 1.0], [0.81, 3.0])  # the last error, 3.24, is 0.08 of 3.0 away
    with pytest.raises(PreflightError, match=r"by a share of up to 0\.08"):
        require_near_start(step, off, precision="fp32")
    assert require_near_start(step, off, precision="bf16") == pytest.approx(0.08, abs=1e-5)
    with pytest.raises(PreflightError, match="by a share of up to inf"):
        require_near_start(step_without_reference(ScalingUNet(float("nan"))), off, precision="bf16")


def test_every_quantity_is_a_metric() -> None:
    assert dpo_step()(two_pairs()).pair_quantities.keys() <= METRICS.keys()
