"""The tensors of a step: shapes, types, joined from the samples of its pairs, and pinned."""

from dataclasses import dataclass

import torch
from pair_files import ListedPairs, config
from stream_steps import steps_of

from ds_dpo.data.stream.loader import _Loaded
from ds_dpo.data.stream.prepare import OnlinePairs, join_samples
from ds_dpo.diffusion.noising import Noising


def test_shapes_and_types():
    (step,) = steps_of(ListedPairs(11), 1)
    assert step.chosen_pixels.shape == step.rejected_pixels.shape == (8, 3, 16, 16)
    assert step.noise.shape == step.chosen_posterior_noise.shape == step.rejected_posterior_noise.shape == (8, 4, 2, 2)
    assert step.chosen_time_ids.shape == step.rejected_time_ids.shape == (8, 6)
    assert step.pair_ids.dtype == step.timesteps.dtype == torch.int64
    floats = (step.chosen_pixels, step.noise, step.chosen_time_ids, step.rejected_posterior_noise)
    assert {tensor.dtype for tensor in floats} == {torch.float32}
    assert len(step.prompts) == 8


def test_noise_has_the_latent_shape_of_its_bucket():
    source = ListedPairs(8, 8, bucket_shapes=[(16, 24), (24, 16)])
    pairs = OnlinePairs(
        source,
        data=config(),
        seed=0,
        latent_shape=lambda size: (4, size[0] // 8, size[1] // 8),
        noising=Noising.plain(10),
    )
    for index, shape in [(0, (1, 4, 2, 3)), (7, (1, 4, 2, 3)), (8, (1, 4, 3, 2)), (15, (1, 4, 3, 2))]:
        samples = pairs.read(index, visit=0)
        assert samples.noise.shape == samples.chosen_posterior_noise.shape == shape


@dataclass(frozen=True, kw_only=True)
class SomeSamples:
    latents: torch.Tensor
    pooled: torch.Tensor | None
    prompts: list[str]


def test_samples_of_any_kind_are_joined_in_order():
    parts = [SomeSamples(latents=torch.full((1, 2), n), pooled=None, prompts=[str(n)]) for n in range(3)]
    joined = join_samples(parts)
    assert joined.latents.tolist() == [[0, 0], [1, 1], [2, 2]]
    assert (joined.pooled, joined.prompts) == (None, ["0", "1", "2"])


def test_every_tensor_of_any_samples_is_pinned_and_the_rest_is_left(monkeypatch):
    # page-locked memory needs an accelerator: a double stands in for it
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: 2 * tensor)
    for pooled in (None, torch.ones(2)):
        samples = SomeSamples(latents=torch.arange(3), pooled=pooled, prompts=["a"])
        pinned = _Loaded(samples=samples, bad_rows=[]).pin_memory().samples
        assert pinned.latents.tolist() == [0, 2, 4]
        assert pinned.prompts == ["a"]
        assert pinned.pooled is None if pooled is None else pinned.pooled.tolist() == [2, 2]
