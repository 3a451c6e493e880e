from __future__ import annotations

import pytest
import torch

from ds_dpo.models.checksum import weights_checksum

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8]
SIZES = [1, 5, 1024 * 8, 100_001]  # a part of a word; whole rows of words; rows and a rest


def of(tensor: torch.Tensor) -> str:
    return weights_checksum([("weight", tensor)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_one_flipped_bit_and_two_swapped_elements_are_seen(dtype: torch.dtype, size: int) -> None:
    tensor = torch.randint(0, 200, (size,), generator=torch.Generator().manual_seed(0)).to(dtype)
    before = of(tensor)
    content = tensor.view(torch.uint8)
    for place in {0, content.numel() // 2, content.numel() - 1}:
        for bit in (0, 7):
            content[place] ^= 1 << bit
            assert of(tensor) != before
            content[place] ^= 1 << bit
    assert of(tensor) == before
    for other in {size // 2, size - 1} - {0}:
        swapped = tensor.clone()
        swapped[0], swapped[other] = tensor[other], tensor[0]
        assert (of(swapped) == before) == bool(tensor[0] == tensor[other])


def test_it_is_the_same_for_any_order_place_in_memory_and_layout() -> None:
    one, two = torch.arange(7, dtype=torch.bfloat16), torch.rand(2, 3, 4, 5)
    expected = weights_checksum([("one", one), ("two", two)])
    shifted = torch.cat([torch.zeros(3, dtype=torch.bfloat16), one])[3:]
    layout = two.to(memory_format=torch.channels_last)
    assert weights_checksum([("two", layout), ("one", shifted)]) == expected


def test_names_dtypes_and_shapes_count() -> None:
    zeros = torch.zeros(4)
    others = [zeros.bfloat16(), torch.zeros(5), torch.zeros(2, 2)]
    assert len({of(tensor) for tensor in [zeros, *others]}) == 4
    assert weights_checksum([("bias", zeros)]) != of(zeros)


def test_a_large_tensor_is_summed_in_pieces() -> None:
    tensor = torch.zeros(2**22 + 2**10 + 1, dtype=torch.int64)  # words: a piece, a row, and one more
    sums = {of(tensor)}
    for place in (0, 2**22 - 1, 2**22, 2**22 + 2**10):
        tensor[place] = 1
        sums.add(of(tensor))
        tensor[place] = 0
    assert len(sums) == 5
