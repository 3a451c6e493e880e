"""Weights begin at aligned addresses, wherever they come from; the tests build odd addresses in memory and in files."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_families import tiny_model
from torch import Tensor, nn

from ds_dpo.config.models import ModelConfig
from ds_dpo.models.denoiser.predict import predict_by_unet
from ds_dpo.models.loading import load_denoiser, load_text, load_vae
from ds_dpo.models.reference import FrozenCopy
from ds_dpo.models.weights.alignment import align_weights, is_aligned

LINE = 64  # bytes, of a CPU


def at_odd_address(tensor: Tensor, offset: int) -> Tensor:
    """Return an equal tensor that begins this many bytes past a multiple of 64, inside a larger buffer."""
    memory = torch.empty(tensor.nbytes + 2 * LINE, dtype=torch.uint8)
    start = (offset - memory.data_ptr()) % LINE
    view = memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    view.copy_(tensor)
    assert view.data_ptr() % LINE == offset
    return view


def tensors_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return chain(module.named_parameters(), module.named_buffers())


def assert_aligned(module: nn.Module) -> None:
    odd = {name: tensor.data_ptr() % LINE for name, tensor in tensors_of(module) if tensor.data_ptr() % LINE}
    assert odd == {}


class Oddly(nn.Module):
    """A weight at 24, another at 40, both used twice, a buffer at 8, and a bias where it should be."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 3), nn.Linear(5, 3)
        self.register_buffer("counts", at_odd_address(torch.arange(7), 8), persistent=False)
        self.first.weight.data = at_odd_address(torch.arange(15.0).view(3, 5), 24)
        self.second.weight = self.first.weight
        self.second.bias = nn.Parameter(at_odd_address(torch.tensor([1, 2, 3], dtype=torch.bfloat16), 40), False)


def test_odd_parameters_and_buffers_move_and_keep_their_values() -> None:
    module = Oddly()
    stays = module.first.bias.data_ptr()
    align_weights(module)
    assert_aligned(module)
    assert module.first.weight.tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11, 12, 13, 14]]
    assert module.counts.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert (module.second.bias.tolist(), module.second.bias.dtype) == ([1, 2, 3], torch.bfloat16)
    assert module.second.weight is module.first.weight
    assert (module.first.weight.requires_grad, module.second.bias.requires_grad) == (True, False)
    assert module.first.bias.data_ptr() == stays, "what is aligned is not copied"


def test_a_weight_becomes_row_major() -> None:
    """Kernels are chosen by layout too."""
    module = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Conv2d(4, 6, 1, bias=False))
    module[0].weight.data = at_odd_address(torch.arange(24.0).view(4, 6), 24).T
    # as channels_last leaves a 1 x 1 convolution: torch calls it contiguous in both formats
    module[1].weight.data = torch.arange(24.0).as_strided((6, 4, 1, 1), (4, 1, 4, 4))
    assert module[1].weight.is_contiguous()
    align_weights(module)
    assert_aligned(module)
    assert [layer.weight.stride() for layer in module] == [(4, 1), (4, 1, 1, 1)]
    assert torch.equal(module[0].weight.data, torch.arange(24.0).view(4, 6).T)
    assert module[1].weight.flatten().tolist() == list(range(24))


def test_a_module_without_memory_is_left_as_it_is() -> None:
    module = nn.Linear(2, 2, device="meta")
    align_weights(module)
    assert module.weight.is_meta


def test_a_copy_of_an_odd_policy_is_aligned() -> None:
    reference = FrozenCopy(Oddly(), predict=predict_by_unet, dtype=torch.float32, device="cpu")
    assert_aligned(reference.module)
    assert reference.module.get_buffer("counts").tolist() == [0, 1, 2, 3, 4, 5, 6]


# ---- what is loaded ----


def save_oddly(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file whose tensors begin 24 bytes past a multiple of 64, as the hub's files happen to."""
    save_file(dict(tensors), path, metadata={"format": "pt", "padding": ""})
    # headers are padded to a multiple of 8
    save_file(dict(tensors), path, metadata={"format": "pt", "padding": "x" * ((24 - start_of_tensors(path)) % LINE)})
    assert start_of_tensors(path) % LINE == 24


def start_of_tensors(path: Path) -> int:
    with path.open("rb") as file:
        (header_bytes,) = struct.unpack("<Q", file.read(8))
    return 8 + int(header_bytes)


def make_odd(folder: Path) -> None:
    """Rewrite every weight file below a folder, in fp32: a tensor that is cast is a fresh one."""
    for path in list(folder.rglob("*.safetensors")):
        tensors = {name: tensor.float() for name, tensor in load_file(path).items()}
        save_oddly(path, tensors)
        with safe_open(path, framework="pt") as mapped:
            odd = [name for name in tensors if mapped.get_tensor(name).data_ptr() % LINE]
        assert odd, f"{path}: mapped at aligned addresses, so that this test would show nothing"


@pytest.fixture(params=["folder", "sharded", "single file"])
def model(request: pytest.FixtureRequest, sdxl_copy: ModelConfig, tmp_path: Path) -> ModelConfig:
    if request.param == "single file":
        path = tiny_model("sd15").save_file(tmp_path / "a.safetensors")
        save_oddly(path, load_file(path))
        return ModelConfig(pretrained=str(path), family="sd15")
    folder = Path(sdxl_copy.pretrained)
    if request.param == "sharded":
        unet = load_denoiser(sdxl_copy, dtype=torch.float32)
        (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
        unet.save_pretrained(folder / "unet", max_shard_size="2MB")
        index = json.loads((folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").read_text())
        assert len(set(index["weight_map"].values())) > 1
    make_odd(folder)
    return sdxl_copy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_loaded_is_aligned(model: ModelConfig, dtype: torch.dtype) -> None:
    assert_aligned(load_denoiser(model, dtype=dtype))
    assert_aligned(load_vae(model))
    for tower in load_text(model, dtype=dtype).towers:
        assert_aligned(tower.encoder)


def test_a_start_of_a_checkpoint_is_aligned(sdxl: ModelConfig) -> None:
    start = {
        name: at_odd_address(tensor, 40)
        for name, tensor in load_denoiser(sdxl, dtype=torch.float32).state_dict().items()
    }
    policy = load_denoiser(sdxl, dtype=torch.float32, start=start)
    assert_aligned(policy)
    assert all(torch.equal(tensor, start[name]) for name, tensor in policy.state_dict().items())


def test_alignment_is_that_of_the_device() -> None:
    assert is_aligned(torch.empty(0))
    assert not is_aligned(at_odd_address(torch.zeros(4), 8))
