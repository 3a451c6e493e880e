"""A DPO step of a flow, in fp64, against a plain reading of the formula that every published code of flow DPO has.

T is 1024, so that s and the weights of errors are exact in fp32 as well.
"""

import math

import pytest
import torch
from torch import Tensor, nn

from ds_dpo.batch import Conditioning, PreferenceBatch
from ds_dpo.diffusion.flow import Flow
from ds_dpo.objectives.losses import OBJECTIVES
from ds_dpo.step.preference_step import PreferenceStep

T = 1024
BETA = 3.0
SHAPE = (3, 4, 5)
WEIGHTS = {"none": lambda s: 1, "epsilon": lambda s: (1 - s) ** 2, "x0": lambda s: s**2}


class Bent(nn.Module):
    """A denoiser that depends on its input, its time and its prompt; it remembers the time."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, noisy: Tensor, time: Tensor, text: Tensor) -> Tensor:
        self.time = time
        return torch.tanh(self.weight * noisy) + (time / 1024 + text.flatten()).view(-1, 1, 1, 1)


def predict(module: nn.Module, noisy: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
    prediction = module(noisy, time, conditioning.text_states)
    assert isinstance(prediction, Tensor)
    return prediction


class Frozen:
    def __init__(self, module: nn.Module) -> None:
        self.module = module

    @torch.no_grad()
    def predict(self, noisy: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        return predict(self.module, noisy, time, conditioning)


def random_of(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def five_pairs() -> PreferenceBatch:
    return PreferenceBatch(
        latents=random_of(10, *SHAPE, seed=1),
        noise=random_of(5, *SHAPE, seed=2),
        timesteps=torch.tensor([0, 1, 511, 767, 1023]),
        text_states=random_of(5, 1, 1, seed=3),
        pooled=None,
        pair_ids=torch.arange(5),
        target_probabilities=torch.ones(5, dtype=torch.float64),
        weights=torch.ones(5, dtype=torch.float64),
    )


def flow_step(policy: nn.Module, reference: nn.Module, weighting: str) -> PreferenceStep:
    return PreferenceStep(
        policy=policy,
        predict=predict,
        reference=Frozen(reference),
        schedule=Flow(num_train_timesteps=T, error_weighting=weighting),
        objective=OBJECTIVES["dpo"],
        options={"beta": BETA},
    )


def read_plainly(batch: PreferenceBatch, policy: Tensor, reference: Tensor, weighting: str) -> Tensor:
    """mean of -log sigmoid(u), u = -(beta / 2) w [(m_w - r_w) - (m_l - r_l)], one pair and image after the other."""
    losses = []
    for pair, timestep in enumerate(batch.timesteps.tolist()):
        s = (timestep + 1) / T
        noise, text = batch.noise[pair], batch.text_states[pair].squeeze()

        def error(image: Tensor, weight: Tensor, s: float = s, noise: Tensor = noise, text: Tensor = text) -> Tensor:
            noisy = (1 - s) * image + s * noise
            velocity = torch.tanh(weight * noisy) + s + text
            return ((velocity - (noise - image)) ** 2).mean()

        chosen, rejected = batch.latents[pair], batch.latents[5 + pair]
        gap = error(chosen, policy) - error(chosen, reference) - error(rejected, policy) + error(rejected, reference)
        losses.append(torch.log(1 + torch.exp(BETA / 2 * WEIGHTS[weighting](s) * gap)))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("weighting", WEIGHTS)
def test_loss_and_gradient_are_those_of_the_formula(weighting: str) -> None:
    batch, policy, reference = five_pairs(), Bent(random_of(*SHAPE, seed=4)), Bent(random_of(*SHAPE, seed=5))
    output = flow_step(policy, reference, weighting)(batch)
    output.loss.backward()
    by_hand = policy.weight.detach().clone().requires_grad_()
    expected = read_plainly(batch, by_hand, reference.weight.detach(), weighting)
    (gradient,) = torch.autograd.grad(expected, by_hand)
    assert output.loss.item() == pytest.approx(expected.item(), abs=1e-10)
    assert policy.weight.grad is not None
    assert (policy.weight.grad - gradient).abs().max() <= 1e-10 < gradient.abs().max()


def test_both_denoisers_get_the_time_that_the_model_was_trained_with() -> None:
    policy, reference = Bent(random_of(*SHAPE, seed=4)), Bent(random_of(*SHAPE, seed=5))
    flow_step(policy, reference, "none")(five_pairs())
    for denoiser in (policy, reference):
        assert denoiser.time.dtype == torch.float32
        assert denoiser.time.tolist() == 2 * [1, 2, 512, 768, 1024]


@pytest.mark.parametrize("weighting", WEIGHTS)
def test_the_first_loss_is_ln_2_and_the_difference_exactly_0(weighting: str) -> None:
    policy, reference = Bent(random_of(*SHAPE, seed=4)), Bent(random_of(*SHAPE, seed=4))
    step = flow_step(policy, reference, weighting)
    assert step(five_pairs()).loss.item() == pytest.approx(math.log(2), abs=1e-7)
    assert step.largest_difference(five_pairs()) == 0
