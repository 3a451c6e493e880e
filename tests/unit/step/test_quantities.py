"""What a step gives objectives beside errors, against the same numbers worked out on whole tensors."""

from dataclasses import replace

import pytest
import torch
from small_step import SCHEDULE, ElementwiseUNet, random_pairs, step_of
from torch import Tensor

from ds_dpo.batch import PreferenceBatch
from ds_dpo.config.objectives import OBJECTIVE_SECTIONS
from ds_dpo.objectives.losses import OBJECTIVES, with_terms
from ds_dpo.run_folder.metrics import METRICS

REQUIRED = {"dspo": {"beta": 500.0, "shift": 0.3}}
OPTIONS = {
    name: section(
        type=name, **REQUIRED.get(name, {"beta": 500.0} if "beta" in section.model_fields else {})
    ).loss_options()
    for name, section in OBJECTIVE_SECTIONS.items()
}


def residuals(unet: ElementwiseUNet, batch: PreferenceBatch) -> tuple[Tensor, Tensor]:
    """Prediction minus noise of the chosen and of the rejected images, by the formulas of the forward process."""
    signal = SCHEDULE.alphas_cumprod[batch.timesteps].view(-1, 1, 1, 1)
    chosen, rejected = (
        unet.weight * (signal.sqrt() * latents + (1 - signal).sqrt() * batch.noise) - batch.noise
        for latents in batch.latents.chunk(2)
    )
    return chosen, rejected


def per_pair(values: Tensor) -> Tensor:
    return values.mean(dim=(1, 2, 3))


def test_sdpo_s_lambda_is_each_pair_s_own_and_spares_the_chosen_image() -> None:
    policy, batch, mu = ElementwiseUNet(1), random_pairs(12), 0.5
    output = step_of(OBJECTIVES["sdpo"], {"beta": 500.0, "mu": mu}, policy=policy, reference=ElementwiseUNet(2))(batch)
    predictions = [value.detach().requires_grad_() for value in residuals(policy, batch)]  # the noise is no variable
    of_chosen, of_rejected = (torch.autograd.grad(per_pair(one.square()).sum(), one)[0] for one in predictions)
    opposed = (of_chosen * of_rejected).sum(dim=(1, 2, 3))
    own = of_chosen.square().sum(dim=(1, 2, 3))
    expected = torch.where(opposed > 0, (1 - mu) * own / opposed, 1.0).clamp(0, 1)
    found = output.pair_quantities["rejected_gradient_scale"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert 0 < found.min() < found.max() == 1
    # a step of -of_chosen + lambda of_rejected in the predictions' space leaves mu of the chosen image's descent
    moved = ((-of_chosen + found.view(-1, 1, 1, 1) * of_rejected) * of_chosen).sum(dim=(1, 2, 3))
    assert (moved <= -mu * own * (1 - 1e-4)).all()


def test_sdpo_has_dpo_s_value_and_another_gradient() -> None:
    batch, found = random_pairs(6), {}
    for name, options in (("dpo", {"beta": 500.0}), ("sdpo", {"beta": 500.0, "mu": 0.6})):
        policy = ElementwiseUNet(1)
        loss = step_of(OBJECTIVES[name], options, policy=policy, reference=ElementwiseUNet(2))(batch).loss
        found[name] = loss.item(), torch.autograd.grad(loss, policy.weight)[0]
    assert found["dpo"][0] == found["sdpo"][0]
    assert not torch.allclose(found["dpo"][1], found["sdpo"][1], rtol=1e-2)


@pytest.mark.parametrize("options", [{"beta": 0.5}, {"beta": 200.0, "shift": 0.3}])
def test_dspo_from_scalars_is_the_authors_loss_on_tensors(options: dict[str, float]) -> None:
    policy, reference, batch = ElementwiseUNet(1), ElementwiseUNet(2), random_pairs(5)
    loss = step_of(OBJECTIVES["dspo"], options, policy=policy, reference=reference)(batch).loss
    (own, own_rejected), (other, other_rejected) = (residuals(unet, batch) for unet in (policy, reference))
    gap = per_pair(own.square() - other.square()) - per_pair(own_rejected.square() - other_rejected.square())
    factor = options.get("shift", options["beta"]) * (1 - torch.sigmoid(-0.5 * options["beta"] * gap))
    # both residuals lack the same noise, so their difference is that of the predictions
    direct = per_pair((own - factor.view(-1, 1, 1, 1) * (own - other.detach())).square()).mean()
    assert loss.item() == pytest.approx(direct.item(), rel=1e-5)
    found, expected = (torch.autograd.grad(one, policy.weight)[0] for one in (loss, direct))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


def test_the_anchor_is_the_distance_of_the_predictions() -> None:
    policy, reference, batch = ElementwiseUNet(1), ElementwiseUNet(2), random_pairs(5)
    objective = with_terms(OBJECTIVES["dpo"], sft_weight=0.5, anchor_weight=2.0)
    output = step_of(objective, {"beta": 10.0}, policy=policy, reference=reference)(batch)
    plain = step_of(OBJECTIVES["dpo"], {"beta": 10.0}, policy=policy, reference=reference)(batch)
    (chosen, rejected), (other, other_rejected) = (residuals(unet, batch) for unet in (policy, reference))
    apart = [per_pair((chosen - other).square()), per_pair((rejected - other_rejected).square())]
    torch.testing.assert_close(output.pair_quantities["chosen_distance"], apart[0].detach())
    torch.testing.assert_close(output.pair_quantities["rejected_distance"], apart[1].detach())
    expected = plain.loss + 0.5 * per_pair(chosen.square()).mean() + 2.0 * 0.5 * (apart[0] + apart[1]).mean()
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert "chosen_distance" not in plain.pair_quantities


@pytest.mark.parametrize("name", [name for name, one in OBJECTIVES.items() if one.reference == "errors"])
def test_errors_that_come_with_the_batch_stand_in_for_the_reference(name: str) -> None:
    policy, reference, batch = ElementwiseUNet(1), ElementwiseUNet(2), random_pairs(5)
    live = step_of(OBJECTIVES[name], OPTIONS[name], policy=policy, reference=reference)(batch)
    chosen, rejected = residuals(reference, batch)
    kept = replace(
        batch,
        reference_chosen_error=per_pair(chosen.square()).detach(),
        reference_rejected_error=per_pair(rejected.square()).detach(),
    )
    step = step_of(OBJECTIVES[name], OPTIONS[name], policy=policy, reference=None)
    assert step.compares_with_reference
    stored = step(kept)
    assert stored.pair_quantities.keys() == live.pair_quantities.keys()
    for quantity, values in live.pair_quantities.items():
        torch.testing.assert_close(stored.pair_quantities[quantity], values, rtol=1e-3, atol=1e-6)
    found, expected = (torch.autograd.grad(one.loss, policy.weight)[0] for one in (stored, live))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_half_precision_predictions_give_fp32_losses_near_fp32_s_own(name: str, dtype: torch.dtype) -> None:
    batch, losses = random_pairs(8), {}
    for precision in (dtype, torch.float32):
        policy, reference = (ElementwiseUNet(seed, dtype=precision) for seed in (1, 2))
        output = step_of(
            OBJECTIVES[name],
            {**OPTIONS[name], **({"beta": 10.0} if "beta" in OPTIONS[name] else {})},
            policy=policy,
            reference=reference if OBJECTIVES[name].uses_reference else None,
        )(batch)
        assert output.loss.dtype == torch.float32
        assert all(values.dtype == torch.float32 for values in output.pair_quantities.values())
        assert all(values.isfinite().all() for values in output.pair_quantities.values())
        assert output.pair_quantities.keys() <= METRICS.keys()
        (gradient,) = torch.autograd.grad(output.loss, policy.weight)
        assert gradient.isfinite().all()
        losses[precision] = output.loss.item()
    assert losses[dtype] == pytest.approx(losses[torch.float32], rel=0.05)


def test_lambda_of_half_precision_predictions_is_computed_in_fp32() -> None:
    policy, batch = ElementwiseUNet(1, dtype=torch.bfloat16), random_pairs(8)
    step = step_of(OBJECTIVES["sdpo"], {"beta": 10.0, "mu": 0.8}, policy=policy, reference=ElementwiseUNet(2))
    signal = SCHEDULE.alphas_cumprod[batch.timesteps].view(-1, 1, 1, 1)
    chosen, rejected = (
        (policy.weight * (signal.sqrt() * clean + (1 - signal).sqrt() * batch.noise)).bfloat16().double() - batch.noise
        for clean in batch.latents.chunk(2)
    )
    expected = (0.2 * per_pair(chosen.square()) / per_pair(chosen * rejected)).clamp(0, 1)
    found = step(batch).pair_quantities["rejected_gradient_scale"]
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", [name for name, one in OBJECTIVES.items() if one.uses_reference])
def test_equal_models_have_no_difference_in_any_precision(name: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        policy, reference = (ElementwiseUNet(1, dtype=dtype) for _ in range(2))
        step = step_of(OBJECTIVES[name], OPTIONS[name], policy=policy, reference=reference)
        assert step.largest_difference(random_pairs(4)) == 0
