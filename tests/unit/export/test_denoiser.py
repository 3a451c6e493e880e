"""What an export takes and leaves, counted: memory is bounded by the largest tensor, and every byte is meant."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from zero_checkpoint import save_zero2

import ds_dpo
from ds_dpo.errors import CheckpointError
from ds_dpo.export.denoiser import expected_shapes, fits_dtype, write_denoiser
from ds_dpo.zero_shards.reader import open_checkpoint

CONFIG = json.loads(
    (Path(ds_dpo.__file__).parent / "assets" / "miniature" / "model" / "unet" / "config.json").read_text()
)


class Allocations(TorchDispatchMode):
    """Bytes of the largest storage that an operation made anew."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        result = operation(*arguments, **(options or {}))
        given = {
            t.untyped_storage().data_ptr() for t in tree_leaves((arguments, options)) if isinstance(t, torch.Tensor)
        }
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return result


@pytest.fixture
def checkpoint(tmp_path):
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in expected_shapes(CONFIG).items()}
    return open_checkpoint(save_zero2(tmp_path / "tag", weights, world_size=3, config=CONFIG)), weights


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_nothing_larger_than_the_largest_tensor_is_allocated(checkpoint, tmp_path, dtype):
    opened, weights = checkpoint
    with Allocations() as allocations:
        written = write_denoiser(opened, CONFIG, tmp_path / "unet", dtype=dtype)
    assert 0 < allocations.largest <= max(weight.nbytes for weight in weights.values())
    path = tmp_path / "unet" / written.files[0]
    (header_bytes,) = struct.unpack("<Q", path.read_bytes()[:8])
    num_elements = sum(weight.numel() for weight in weights.values())
    assert path.stat().st_size == 8 + header_bytes + num_elements * dtype.itemsize
    assert written.num_bytes == num_elements * dtype.itemsize
    found = load_file(path)
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weight.to(dtype)) for name, weight in weights.items())


@pytest.mark.parametrize(
    ("value", "said"),
    [(float("nan"), "1 values of .* NaN"), (-1e5, "reaches 100000, but torch.float16 only holds 65504")],
)
def test_a_value_that_is_not_finite_stops_it(tmp_path, value, said):
    weights = {name: torch.zeros(shape) for name, shape in expected_shapes(CONFIG).items()}
    weights["conv_out.weight"].view(-1)[-1] = value
    opened = open_checkpoint(save_zero2(tmp_path / "tag", weights, config=CONFIG))
    with pytest.raises(CheckpointError, match=rf"'conv_out.weight' .*{said}"):
        write_denoiser(opened, CONFIG, tmp_path / "unet", dtype=torch.float16)


LARGEST_FP16 = 65519.996  # the last fp32 value that fp16 rounds down to 65504


@pytest.mark.parametrize(
    ("value", "dtype", "fits"),
    [
        (LARGEST_FP16, torch.float16, True),
        (-LARGEST_FP16, torch.float16, True),
        (65520.0, torch.float16, False),
        (-65520.0, torch.float16, False),
        (65520.0, torch.bfloat16, True),
        (3.3e38, torch.bfloat16, True),
        (3.4e38, torch.bfloat16, False),
        (3.4e38, torch.float32, True),
        (torch.nan, torch.float32, False),
        (-torch.inf, torch.bfloat16, False),
    ],
)
@pytest.mark.parametrize("others", [0.0, 1.0, -300.0])
def test_what_fits_a_dtype(value, dtype, fits, others):
    values = torch.full((1000,), others)
    values[617] = value
    assert fits_dtype(values, dtype) is fits


@pytest.mark.parametrize("saved", [torch.float16, torch.bfloat16])
def test_what_was_saved_in_16_bit_may_not_fit_either(saved):
    values = torch.full((2**18,), 3.0, dtype=saved)
    assert fits_dtype(values, torch.float16)
    values[-1] = torch.inf
    assert not fits_dtype(values, torch.float16)
