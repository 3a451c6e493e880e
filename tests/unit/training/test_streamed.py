"""The policy of a run under ZeRO-3, from files to one rank's part: right values, and one tensor at a time."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.utils import groups
from safetensors.torch import load_file, save_file
from tiny_sd3 import save_tiny_sd3
from torch import distributed
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing._internal.distributed.fake_pg import FakeStore

from ds_dpo.config.load import load_config
from ds_dpo.distributed import together
from ds_dpo.engine.settings import resolve_deepspeed
from ds_dpo.errors import ModelError
from ds_dpo.models.denoiser.adapters import add_adapter, base_fingerprint
from ds_dpo.models.loading import load_denoiser
from ds_dpo.models.weights import parts
from ds_dpo.reference.cache.fingerprint import weights_sha256
from ds_dpo.training.streamed import Begun, can_stream, stream_models

CPU = torch.device("cpu")
WORLD_SIZE = 2
CASES: dict[str, dict[str, str]] = {
    "full_fp32": {"deepspeed_config": "zero3_fp32_cpu"},
    "full_bf16": {"deepspeed_config": "zero3_bf16", "model.freeze": "*norm*"},
    "lora_bf16": {"deepspeed_config": "zero3_bf16", "adapter.type": "lora", "adapter.rank": "3"},
    "lora_unet": {  # convolutions too
        "deepspeed_config": "zero3_bf16",
        "adapter.type": "lora",
        "adapter.targets": "all",
        "model.pretrained": "ds_dpo://assets/miniature/model",
        "model.family": "sdxl",
    },
}
Stream = Callable[..., tuple[Any, Begun]]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion 3 whose transformer is in several files, with weights that bf16 rounds."""
    folder = save_tiny_sd3(tmp_path_factory.mktemp("sd3"))
    transformer = load_denoiser(_config(folder, "full_fp32").model, dtype=torch.float32)
    shutil.rmtree(folder / "transformer")
    transformer.save_pretrained(folder / "transformer", max_shard_size="50KB")
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 2
    return folder


def _config(pipeline: Path, case: str) -> Any:
    options = {"model.pretrained": str(pipeline), "model.family": "sd3", **CASES[case]}
    return load_config(["--config=miniature", *(f"--{name}={value}" for name, value in options.items())]).config


@pytest.fixture
def stream(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> Stream:
    """Stream as one of two ranks, the other of which is not there: nothing waits for it."""
    monkeypatch.setattr(together, "gather_objects", lambda value: [value])
    monkeypatch.setitem(deepspeed.ops.__compatible_ops__, "deepspeed_shm_comm", False)  # it would be compiled

    def as_rank(case: str, *, rank: int = 0, folder: Path = pipeline, **options: bool) -> tuple[Any, Begun]:
        for module, name in ((deepspeed.comm.comm, "cdb"), (groups, "_WORLD_GROUP")):
            monkeypatch.setattr(module, name, None)
        for name, value in (("RANK", rank), ("LOCAL_RANK", 0), ("WORLD_SIZE", WORLD_SIZE)):
            monkeypatch.setenv(name, str(value))
        distributed.init_process_group("fake", rank=rank, world_size=WORLD_SIZE, store=FakeStore())
        deepspeed.init_distributed(verbose=False)
        try:
            config = _config(folder, case)
            resolved = resolve_deepspeed(config, world_size=WORLD_SIZE)
            asked = {"with_reference": False, "with_start": False, **options}
            return config, stream_models(config, resolved, device=CPU, earlier=None, **asked)
        finally:
            distributed.destroy_process_group()

    return as_rank


@pytest.mark.parametrize("case", list(CASES))
def test_the_parts_of_all_ranks_are_the_files_weights(stream: Stream, case: str) -> None:
    found = [stream(case, rank=rank, with_reference=True, with_start=rank == 0) for rank in range(WORLD_SIZE)]
    (config, first), (_, second) = found
    whole = load_denoiser(config.model, dtype=first.policy.dtype)
    assert first.start is not None
    assert first.start.weights == weights_sha256(whole)
    names = list(whole.state_dict())
    expected = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    if case.startswith("lora"):
        add_adapter(whole, config.adapter, seed=config.seed)
        assert first.base == second.base == base_fingerprint(whole)
        for name, parameter in whole.named_parameters():
            assert ("lora" in name) == parameter.requires_grad == first.policy.get_parameter(name).requires_grad
            if parameter.requires_grad:
                assert torch.equal(first.policy.get_parameter(name), parameter), name
    else:
        assert first.base is None
        frozen = [name for name, each in first.policy.named_parameters() if not each.requires_grad]
        assert frozen == [name for name in names if "norm" in name and "bf16" in case]
    for one, other in ((first.policy, second.policy), (first.reference, second.reference)):
        parts = [
            {name.replace(".base_layer", ""): each for name, each in module.named_parameters()}
            for module in (one, other)
        ]
        for name in names:
            if name not in parts[0]:
                assert torch.equal(one.get_buffer(name), expected[name]), name
                continue
            halves = [part[name].ds_tensor for part in parts]
            assert [len(half) for half in halves] == [-(-expected[name].numel() // WORLD_SIZE)] * WORLD_SIZE, name
            assert halves[0].dtype == expected[name].dtype
            assert torch.equal(torch.cat(halves)[: expected[name].numel()], expected[name].flatten()), name


def test_one_tensor_is_whole_at_a_time(stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted: the bytes of all tensors read so far whose memory is still there, at each read, and at the end."""
    read, sizes, peaks = parts._own, [], []
    alive: list[tuple[StorageWeakRef, int]] = []

    def counted(*arguments: Any, **options: Any) -> torch.Tensor:
        tensor: torch.Tensor = read(*arguments, **options)
        alive.append((StorageWeakRef(tensor.untyped_storage()), tensor.nbytes))
        peaks.append(sum(size for storage, size in alive if not storage.expired()))
        sizes.append(tensor.nbytes)
        return tensor

    monkeypatch.setattr(parts, "_own", counted)
    _, begun = stream("full_bf16", with_reference=True)
    assert max(peaks) == max(sizes) < sum(sizes) / 10
    assert all(storage.expired() for storage, _ in alive)
    for module in (begun.policy, begun.reference):
        assert module is not None
        assert sum(parameter.numel() for parameter in module.parameters()) == 0, "what a rank holds besides its part"


def test_a_damaged_tensor_is_named(stream: Stream, pipeline: Path, tmp_path: Path) -> None:
    shutil.copytree(pipeline, tmp_path / "sd3")
    path = max((tmp_path / "sd3/transformer").glob("*.safetensors"))
    weights = load_file(path)
    weights["proj_out.weight"][3, 5] = torch.nan
    save_file(weights, path)
    with pytest.raises(ModelError, match=r"sd3: tensor proj_out\.weight has 1 NaN of "):
        stream("full_bf16", folder=tmp_path / "sd3")


def test_what_is_streamed(pipeline: Path) -> None:
    def streams(case: str, **changes: str) -> bool:
        options = {**CASES[case], **changes}
        config = load_config(["--config=miniature", *(f"--{name}={value}" for name, value in options.items())]).config
        return can_stream(config, resolve_deepspeed(config, world_size=1))

    assert [streams(case) for case in CASES] == [True] * 4
    assert not streams("full_fp32", deepspeed_config="zero2_fp32_cpu")
    assert not streams("lora_bf16", **{"adapter.type": "dora"})
