"""Weights visit the device block by block: what computes is what rested on the host, and never more than two blocks."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ds_dpo.batch import Conditioning
from ds_dpo.config.models import ModelConfig
from ds_dpo.models.checksum import weights_checksum
from ds_dpo.models.denoiser.predict import predict_by_unet
from ds_dpo.models.loading import load_denoiser
from ds_dpo.models.reference import FrozenCopy
from ds_dpo.reference.block_offload import NUM_SLOTS, BlockOffload

CPU = torch.device("cpu")


class Chain(nn.Module):
    """Four layers of 12 bytes of weight, called in an order that may change, and 8 bytes of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(1, 1) for _ in range(4))
        self.own = nn.Parameter(torch.ones(2))
        self.order = [0, 1, 2, 3]
        self.register_buffer("one", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        for number in self.order:
            x = self.layers[number](x)
        return x * self.own[0] * self.one


def chain() -> tuple[Chain, BlockOffload]:
    module = Chain().requires_grad_(False)
    for number, layer in enumerate(module.layers):
        layer.weight.fill_(number + 1)
        layer.bias.fill_(0)
    return module, BlockOffload(module, device=CPU, max_block_bytes=8)


def test_blocks_are_the_largest_modules_within_the_limit_and_never_a_list() -> None:
    module, offload = chain()
    assert [block.module for block in offload.blocks] == list(module.layers)
    whole = nn.Sequential(nn.Linear(1, 1), nn.ModuleList([nn.Linear(1, 1)])).requires_grad_(False)
    assert [block.module for block in BlockOffload(whole, device=CPU, max_block_bytes=16).blocks] == [whole]
    split = nn.Sequential(nn.Linear(1, 1), nn.ModuleList([nn.Linear(1, 1)])).requires_grad_(False)
    parts = [block.module for block in BlockOffload(split, device=CPU, max_block_bytes=15).blocks]
    assert parts == [split[0], split[1][0]]


def test_a_forked_process_has_no_copy_of_the_weights_on_the_host() -> None:
    """With pinned memory the kernel would copy them for each process of the loader."""
    module, offload = chain()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        mapped = [number for number, block in enumerate(offload.blocks) if _is_mapped(block.host.data_ptr())]
        os.write(writer, f"{mapped}".encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 100) == b"[]"
    assert all(_is_mapped(block.host.data_ptr()) for block in offload.blocks)
    assert [float(layer.weight) for layer in module.layers] == [1, 2, 3, 4], "the parent has them still"


def _is_mapped(address: int) -> bool:
    ranges = (line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines())
    return any(int(start, 16) <= address < int(end, 16) for start, end in ranges)


def test_each_block_is_copied_once_a_pass_and_computes_from_a_slot() -> None:
    module, offload = chain()
    assert len(offload.slots) == NUM_SLOTS == 2
    addresses = {slot.memory.data_ptr() for slot in offload.slots}
    seen = []
    for layer in module.layers:
        layer.register_forward_pre_hook(lambda layer, _: seen.append(layer.weight.untyped_storage().data_ptr()))
    for passes in (1, 2, 3):
        assert module(torch.ones(1)) == 24
        # after the first pass the next one's first block is brought along at the end
        assert offload.num_copies in (4 * passes, 4 * passes + 1)
    assert set(seen) == addresses
    resting = {layer.weight.untyped_storage().data_ptr() for layer in module.layers}
    assert resting == {block.host.data_ptr() for block in offload.blocks}
    assert not resting & addresses


def test_a_pass_that_takes_another_way_computes_with_the_right_weights() -> None:
    module, _ = chain()
    for order, product in (([0, 1, 2, 3], 24), ([3, 1, 1, 0], 16), ([2], 3), ([0, 1, 2, 3], 24), ([3, 2, 3], 48)):
        module.order = order
        assert module(torch.ones(1)) == product


def test_a_pass_that_fails_leaves_the_weights_on_the_host() -> None:
    module, offload = chain()
    with pytest.raises(RuntimeError):
        module(torch.ones(2, 3))
    resting = {layer.weight.untyped_storage().data_ptr() for layer in module.layers}
    assert resting == {block.host.data_ptr() for block in offload.blocks}
    assert module(torch.ones(1)) == 24


def test_weights_that_train_and_weights_of_two_blocks_are_refused() -> None:
    with pytest.raises(AssertionError, match="frozen"):
        BlockOffload(nn.Linear(1, 1), device=CPU)
    tied = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)).requires_grad_(False)
    tied[1].weight = tied[0].weight
    with pytest.raises(AssertionError, match="share"):
        BlockOffload(tied, device=CPU, max_block_bytes=8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_block_bytes", [0, 20_000, 2**30])
def test_a_unet_predicts_to_the_bit_as_without_and_keeps_its_weights(
    sdxl: ModelConfig, dtype: torch.dtype, max_block_bytes: int
) -> None:
    policy = load_denoiser(sdxl, dtype=dtype)
    plain, offloaded = (FrozenCopy(policy, predict=predict_by_unet, dtype=dtype, device=CPU) for _ in range(2))
    offload = BlockOffload(offloaded.module, device=CPU, max_block_bytes=max_block_bytes)
    # nothing computes from where the weights rest: every module with weights of its own sees them in a slot
    slots = {slot.memory.data_ptr() for slot in offload.slots}
    strays: list[str] = []
    for name, module in offloaded.module.named_modules():
        own = list(module.parameters(recurse=False))

        def look(*_: object, own: list[nn.Parameter] = own, name: str = name) -> None:
            strays.extend(name for parameter in own if parameter.untyped_storage().data_ptr() not in slots)

        module.register_forward_pre_hook(look)
    generator = torch.Generator().manual_seed(3)
    conditioning = Conditioning(
        text_states=torch.randn(2, 16, 96, generator=generator),
        pooled=torch.randn(2, 48, generator=generator),
        extras={"time_ids": torch.full((2, 6), 32.0)},
    )
    for _ in range(2):
        inputs = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([5, 700]), conditioning
        assert torch.equal(offloaded.predict(*inputs), plain.predict(*inputs))
    assert strays == []
    assert weights_checksum(offloaded.weights()) == weights_checksum(plain.weights())
