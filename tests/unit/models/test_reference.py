from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

from ds_dpo.batch import Conditioning
from ds_dpo.config.models import ModelConfig
from ds_dpo.config.optimization import AdapterConfig
from ds_dpo.models.checksum import weights_checksum
from ds_dpo.models.denoiser.adapters import add_adapter
from ds_dpo.models.denoiser.predict import predict_by_unet
from ds_dpo.models.loading import load_denoiser
from ds_dpo.models.reference import FrozenCopy, PolicyWithoutAdapter, assert_own_storage, held_tensors

Inputs = tuple[Tensor, Tensor, Conditioning]


@pytest.fixture
def policy(sdxl: ModelConfig) -> UNet2DConditionModel:
    return load_denoiser(sdxl, dtype=torch.float32)


@pytest.fixture
def inputs() -> Inputs:
    generator = torch.Generator().manual_seed(3)
    conditioning = Conditioning(
        text_states=torch.randn(2, 16, 96, generator=generator),
        pooled=torch.randn(2, 48, generator=generator),
        extras={"time_ids": torch.full((2, 6), 32.0)},
    )
    return torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([5, 700]), conditioning


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_copy_predicts_exactly_as_the_policy_in_its_dtype(
    sdxl: ModelConfig, inputs: Inputs, dtype: torch.dtype
) -> None:
    policy = load_denoiser(sdxl, dtype=dtype)
    policy.enable_gradient_checkpointing()
    reference = FrozenCopy(policy, predict=predict_by_unet, dtype=dtype, device="cpu")
    prediction = reference.predict(*inputs)
    assert prediction.dtype == dtype
    assert torch.equal(prediction, predict_by_unet(policy, *inputs))


def test_a_frozen_copy_has_no_gradient_and_is_in_evaluation_mode(policy: UNet2DConditionModel, inputs: Inputs) -> None:
    reference = FrozenCopy(policy, predict=predict_by_unet, dtype=torch.bfloat16, device="cpu")
    assert not reference.predict(*inputs).requires_grad
    assert not any(parameter.requires_grad for parameter in reference.module.parameters())
    assert not any(module.training for module in reference.module.modules())
    assert {parameter.dtype for parameter in reference.module.parameters()} == {torch.bfloat16}


def test_copying_leaves_the_policy_as_it_was(policy: UNet2DConditionModel) -> None:
    before = weights_checksum(held_tensors(policy))
    FrozenCopy(policy, predict=predict_by_unet, dtype=torch.bfloat16, device="cpu")
    assert weights_checksum(held_tensors(policy)) == before
    assert policy.training
    assert all(parameter.requires_grad for parameter in policy.parameters())


def test_an_update_of_the_policy_does_not_reach_the_reference(policy: UNet2DConditionModel, inputs: Inputs) -> None:
    reference = FrozenCopy(policy, predict=predict_by_unet, dtype=torch.float32, device="cpu")
    hash_before, prediction_before = weights_checksum(reference.weights()), reference.predict(*inputs)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.01)
    assert weights_checksum(reference.weights()) == hash_before
    assert torch.equal(reference.predict(*inputs), prediction_before)
    assert not torch.equal(predict_by_unet(policy, *inputs), prediction_before)


def test_a_frozen_copy_keeps_attention_kernels_and_memory_layout(policy: UNet2DConditionModel) -> None:
    policy.set_attn_processor(AttnProcessor())
    policy.to(memory_format=torch.channels_last)
    module = FrozenCopy(policy, predict=predict_by_unet, dtype=torch.float32, device="cpu").module
    assert isinstance(module, UNet2DConditionModel)
    assert {type(processor) for processor in module.attn_processors.values()} == {AttnProcessor}
    assert module.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_policy_that_is_partitioned_already_is_refused() -> None:
    policy = nn.Linear(2, 2)
    policy.weight.ds_id = 0
    with pytest.raises(AssertionError, match="before DeepSpeed partitions"):
        FrozenCopy(policy, predict=predict_by_unet, dtype=torch.float32, device="cpu")


def held(module: nn.Module) -> FrozenCopy:
    """A reference that holds this very module, as no constructor of it would."""
    reference = FrozenCopy(module, predict=predict_by_unet, dtype=torch.float32, device="cpu")
    reference.module = module
    return reference


def test_shared_storage_is_found_by_name_also_behind_a_view() -> None:
    policy, reference = nn.Linear(3, 2), nn.Linear(3, 2)
    assert_own_storage(policy, held(reference))
    reference.weight = nn.Parameter(policy.weight.detach().view(2, 3))
    with pytest.raises(AssertionError, match="shares storage with the policy: weight"):
        assert_own_storage(policy, held(reference))


def test_shared_storage_is_found_in_a_part_of_zero_3() -> None:
    policy, reference = nn.Linear(3, 2), held(nn.Linear(3, 2))
    policy.weight.ds_tensor = reference.module.weight.detach()
    policy.weight.data = torch.empty(0)
    with pytest.raises(AssertionError, match="shares storage"):
        assert_own_storage(policy, reference)
    # and the other way about
    policy, reference = nn.Linear(3, 2), held(nn.Linear(3, 2))
    reference.module.weight.ds_tensor = policy.weight.detach()
    with pytest.raises(AssertionError, match="shares storage"):
        assert_own_storage(policy, reference)


def test_released_parameters_of_zero_3_share_nothing() -> None:
    policy, reference = nn.Linear(3, 2), held(nn.Linear(3, 2))
    for module in (policy, reference.module):
        module.weight.data = torch.empty(0)
    assert_own_storage(policy, reference)


def test_a_frozen_copy_recomputes_nothing(policy: UNet2DConditionModel) -> None:
    policy.enable_gradient_checkpointing()
    reference = FrozenCopy(policy, predict=predict_by_unet, dtype=torch.float32, device="cpu")
    assert policy.is_gradient_checkpointing
    assert not reference.module.is_gradient_checkpointing


def with_adapter(policy: UNet2DConditionModel) -> UNet2DConditionModel:
    """Give a policy an adapter that dropout makes random and whose effect is not 0."""
    add_adapter(policy, AdapterConfig(type="lora", rank=2, dropout=0.5), seed=0)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if ".lora_B." in name:
                parameter.fill_(0.1)
    return policy


def test_the_policy_without_its_adapter_predicts_as_the_base_to_the_bit(
    policy: UNet2DConditionModel, inputs: Inputs
) -> None:
    base = FrozenCopy(policy, predict=predict_by_unet, dtype=torch.float32, device="cpu")
    reference = PolicyWithoutAdapter(policy, predict=predict_by_unet)
    with_adapter(policy)
    policy.mid_block.resnets[0].dropout.p = 0.5  # only in training
    policy.conv_in.eval()  # which must not come back as training
    prediction = reference.predict(*inputs)
    assert torch.equal(prediction, base.predict(*inputs))
    assert not prediction.requires_grad
    assert not torch.equal(predict_by_unet(policy, *inputs), prediction)
    assert [module for module in policy.modules() if not module.training] == [policy.conv_in]


def test_its_weights_are_those_outside_of_the_adapter(policy: UNet2DConditionModel) -> None:
    held = {name for name, _ in PolicyWithoutAdapter(with_adapter(policy), predict=predict_by_unet).weights()}
    trained = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    assert trained
    assert held == {name for name, _ in policy.named_parameters()} - trained
