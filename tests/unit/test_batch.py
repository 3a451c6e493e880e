"""The layout of a pair: all chosen images, then all rejected ones, sharing noise, timestep and prompt."""

import torch

from ds_dpo.batch import Conditioning, PreferenceBatch, repeat_for_pair, split_pair, stack_pair

CHOSEN, REJECTED = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])


def images(values: torch.Tensor) -> torch.Tensor:
    return values.view(-1, 1, 1, 1).expand(-1, 4, 2, 2)


def batch_of_two(**changed: object) -> PreferenceBatch:
    fields = {
        "latents": stack_pair(images(CHOSEN), images(REJECTED)),
        "noise": images(torch.tensor([5.0, 6.0])),
        "timesteps": torch.tensor([7, 8]),
        "text_states": torch.tensor([9.0, 10.0]).view(2, 1, 1),
        "pooled": torch.tensor([[11.0], [12.0]]),
        "extras": {"time_ids": torch.tensor([[13.0], [14.0], [15.0], [16.0]])},
        "pair_ids": torch.tensor([17, 18]),
        "target_probabilities": torch.tensor([1.0, 0.5]),
        "weights": torch.tensor([1.0, 2.0]),
    }
    return PreferenceBatch(**{**fields, **changed})  # type: ignore[arg-type]


def test_chosen_come_first_and_come_back_as_chosen() -> None:
    assert stack_pair(CHOSEN, REJECTED).tolist() == [1, 2, 3, 4]
    chosen, rejected = split_pair(stack_pair(CHOSEN, REJECTED))
    assert (chosen.tolist(), rejected.tolist()) == ([1, 2], [3, 4])


def test_what_a_pair_shares_stands_beside_both_of_its_images() -> None:
    chosen, rejected = split_pair(repeat_for_pair(torch.tensor([5, 6])))
    assert chosen.tolist() == rejected.tolist() == [5, 6]
    batch = batch_of_two()
    assert batch.num_pairs == 2
    assert batch.image_timesteps().tolist() == [7, 8, 7, 8]
    assert batch.image_noise()[:, 0, 0, 0].tolist() == [5, 6, 5, 6]
    assert torch.equal(batch.image_input_noise(), batch.image_noise())
    perturbed = batch_of_two(input_noise=images(torch.tensor([5.5, 6.5])))
    assert perturbed.image_input_noise()[:, 0, 0, 0].tolist() == [5.5, 6.5, 5.5, 6.5]
    assert perturbed.image_noise()[:, 0, 0, 0].tolist() == [5, 6, 5, 6]
    assert perturbed.chosen_only().image_input_noise()[:, 0, 0, 0].tolist() == [5.5, 6.5]
    conditioning = batch.conditioning()
    assert conditioning.text_states.flatten().tolist() == [9, 10, 9, 10]
    assert conditioning.pooled is not None
    assert conditioning.pooled.flatten().tolist() == [11, 12, 11, 12]
    assert conditioning.extras["time_ids"].flatten().tolist() == [13, 14, 15, 16], "sizes are each image's own"


def test_chosen_only_leaves_out_everything_of_rejected_images() -> None:
    batch = batch_of_two().chosen_only()
    assert batch.num_pairs == 2
    assert batch.latents[:, 0, 0, 0].tolist() == [1, 2]
    assert batch.image_timesteps().tolist() == [7, 8]
    assert batch.image_noise()[:, 0, 0, 0].tolist() == [5, 6]
    assert batch.conditioning().text_states.flatten().tolist() == [9, 10]
    assert batch.extras["time_ids"].flatten().tolist() == [13, 14]


def test_a_model_without_pooled_text_and_sizes_gets_none() -> None:
    assert batch_of_two(pooled=None, extras={}).conditioning().pooled is None
    assert batch_of_two(pooled=None, extras={}).chosen_only().conditioning().extras == {}


def test_to_moves_every_tensor_and_keeps_what_is_none() -> None:
    moved = batch_of_two(pooled=None).to("meta")
    tensors = [value for name, value in vars(moved).items() if value is not None and name != "extras"]
    assert {tensor.device.type for tensor in [*tensors, *moved.extras.values()]} == {"meta"}
    assert moved.extras.keys() == {"time_ids"}
    assert moved.pooled is None
    assert Conditioning(text_states=torch.zeros(1, 1, 1)).to("meta").text_states.device.type == "meta"
