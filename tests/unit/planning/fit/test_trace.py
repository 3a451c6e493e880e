"""What a traced call takes: by hand for a small network, and against real tensors for a small UNet."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ds_dpo.planning.fit.trace import Traced, trace

N, IN, MID, OUT = 8, 16, 32, 4


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(IN, MID), nn.Linear(MID, OUT)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


def traced_net(*, backward: bool) -> Traced:
    with torch.device("meta"):
        net, x = Net(), torch.empty(N, IN)
    return trace(net, lambda: net(x), inputs=[x], backward=backward)


def test_bytes_and_flop_of_two_layers_by_hand() -> None:
    forward = 2 * N * IN * MID + 2 * N * MID * OUT
    plain = traced_net(backward=False)
    # the most at once: the first layer's result and its relu, or the relu and the result
    assert plain == Traced(stored_bytes=4 * N * OUT, peak_bytes=2 * 4 * N * MID, flop=forward)
    trained = traced_net(backward=True)
    # the relu's result is what its own backward pass and the second layer's need; the input is the caller's
    assert trained.stored_bytes == 4 * N * MID + 4 * N * OUT
    # the second layer's gradients of weight and input, the first layer's of its weight alone
    assert trained.flop == forward + 2 * 2 * N * MID * OUT + 2 * N * IN * MID


def test_attention_is_one_operation_that_keeps_no_matrix_of_scores() -> None:
    heads, length, width = 2, 64, 8
    with torch.device("meta"):
        layer = nn.Linear(width, width, bias=False)
        x = torch.empty(1, heads, length, width)

    def call() -> Tensor:
        query = layer(x)
        return nn.functional.scaled_dot_product_attention(query, query, query)

    product = 4 * heads * length * length * width
    linear = 2 * heads * length * width * width
    found = trace(layer, call, inputs=[x], backward=True)
    assert found.flop == product + product * 5 // 2 + 2 * linear
    # queries, result and a number for each row; 64 x 64 scores a head would take 32,768 bytes
    assert found.stored_bytes == 4 * heads * length * (width + width + 1)


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_a_unet_takes_what_its_real_tensors_take(is_checkpointed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import UNet2DConditionModel

    settings: dict[str, Any] = {
        "sample_size": 16,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 32,
        "attention_head_dim": 8,
        "norm_num_groups": 8,
    }

    def built(device: str) -> tuple[Any, Any, list[Tensor]]:
        with torch.device(device):
            unet = UNet2DConditionModel.from_config(settings).train()
            inputs = [torch.zeros(2, 4, 16, 16), torch.zeros(2, dtype=torch.int64), torch.zeros(2, 77, 32)]
        if is_checkpointed:
            unet.enable_gradient_checkpointing()
        latents, times, text = inputs
        return unet, lambda: unet(latents, times, encoder_hidden_states=text, return_dict=False)[0], inputs

    unet, call, inputs = built("cpu")
    own = {tensor.untyped_storage().data_ptr() for tensor in [*unet.parameters(), *unet.buffers(), *inputs]}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and storage.nbytes():
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    attention = nn.functional.scaled_dot_product_attention
    products: list[int] = []

    def counted_attention(query: Tensor, key: Tensor, value: Tensor, *others: Any, **named: Any) -> Tensor:
        products.append(4 * query.numel() * key.shape[-2])
        return attention(query, key, value, *others, **named)

    with monkeypatch.context() as patched, FlopCounterMode(display=False) as counter:
        patched.setattr(nn.functional, "scaled_dot_product_attention", counted_attention)
        with torch.no_grad():
            call()
    of_attention = sum(products)
    assert of_attention > 0
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call().float().square().mean().backward()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        call().float().square().mean().backward()
    meta, meta_call, meta_inputs = built("meta")
    found = trace(meta, meta_call, inputs=meta_inputs, backward=True)
    # written out, attention's backward pass is four products; fused, it is five
    assert found.flop == counter.get_total_flops() + of_attention // 2
    if not is_checkpointed:  # with checkpoints the hooks also see what the second passes keep
        assert found.stored_bytes == pytest.approx(sum(kept.values()), rel=0.03)
    else:
        plain, plain_call, plain_inputs = built("meta")
        plain.disable_gradient_checkpointing()
        without = trace(plain, plain_call, inputs=plain_inputs, backward=True)
        assert found.stored_bytes < 0.5 * without.stored_bytes
        assert found.flop > without.flop
