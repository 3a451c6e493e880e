"""Which device a rank takes: a GPU that works, or the CPU where it is asked for."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch

from ds_dpo.distributed.device import PickedDevice, gpu_index, pick_device
from ds_dpo.errors import ConfigError


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A machine with H200s. count: those that torch sees. capability: theirs. broken: indices that refuse to work."""
    machine = SimpleNamespace(count=8, capability=(9, 0), broken=())

    def ones(size: int, *, device: torch.device) -> torch.Tensor:
        if device.index in machine.broken:
            raise RuntimeError("CUDA error: uncorrectable ECC error encountered\nCompile with TORCH_USE_CUDA_DSA")
        return torch.zeros(size) + 1

    def facts(device: torch.device) -> SimpleNamespace:
        major, minor = machine.capability
        return SimpleNamespace(
            name="NVIDIA H200", major=major, minor=minor, total_memory=140 * 2**30, uuid=f"GPU-{device.index}"
        )

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: machine.count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: machine.count)
    monkeypatch.setattr(torch.cuda, "get_device_properties", facts)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 28, 9))
    monkeypatch.setattr("ds_dpo.distributed.device.torch.ones", ones)
    return machine


def test_a_rank_takes_the_gpu_of_its_number_and_says_what_it_is(gpus: SimpleNamespace) -> None:
    picked = pick_device(3, {})
    assert picked.device == torch.device("cuda", 3)
    assert (picked.num_gpus, picked.gpu_id, picked.capability) == (8, "GPU-3", (9, 0))
    assert picked.words == (
        "cuda:3 of 8, NVIDIA H200, compute capability 9.0, 140.0 GiB, torch for CUDA 13.0, NCCL 2.28.9"
    )
    assert picked.alike() == {"accelerator": "cuda", "nccl": "2.28.9"}


def test_the_cpu_is_taken_only_where_it_is_asked_for(gpus: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = pick_device(0, {"DS_ACCELERATOR": "cpu"})
    assert (asked.device.type, asked.num_gpus, asked.words) == ("cpu", 0, "cpu (DS_ACCELERATOR=cpu)")
    assert asked.alike() == {"accelerator": "cpu", "nccl": "none"}
    gpus.count = 0
    for environ in ({}, {"DS_ACCELERATOR": ""}, {"DS_ACCELERATOR": "cuda"}):
        with pytest.raises(ConfigError, match=r"no GPU works here .*nvidia-smi.*set DS_ACCELERATOR=cpu$") as caught:
            pick_device(0, environ)
        assert not caught.value.same_on_all_ranks, "the other ranks may have GPUs"
    # a program that needs none goes on, and says so
    assert pick_device(0, {}, needs_gpu=False).words == "cpu (torch.cuda.is_available() is False)"
    monkeypatch.setattr(torch.version, "cuda", None)
    assert pick_device(0, {}, needs_gpu=False).words == f"cpu (torch {torch.__version__} is built for CPUs)"


def test_the_reason_that_torch_gives_for_no_gpu_is_in_the_message(
    gpus: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_available() -> bool:
        warnings.warn(
            "CUDA initialization: The NVIDIA driver on your system is too old (found version 11040)", stacklevel=1
        )
        return False

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    with pytest.raises(ConfigError, match=r"The NVIDIA driver on your system is too old \(found version 11040\)"):
        pick_device(0, {})


def test_a_gpu_that_is_counted_but_does_not_work_is_named(gpus: SimpleNamespace) -> None:
    gpus.broken = (5,)
    with pytest.raises(ConfigError, match=r"GPU 5 of 8 does not work \(CUDA error: uncorrectable ECC error enc"):
        pick_device(5, {})
    assert pick_device(4, {}).device.index == 4


@pytest.mark.parametrize(
    ("local_rank", "num_gpus", "index"),
    [(0, 1, 0), (3, 8, 3), (7, 8, 7), (3, 1, 0)],  # the last one: srun --gpus-per-task shows each rank its own
)
def test_the_only_visible_gpu_is_that_of_the_rank(local_rank: int, num_gpus: int, index: int) -> None:
    assert gpu_index(local_rank, num_gpus, {}) == index


def test_a_rank_without_a_gpu_of_its_own_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"rank 3 of this host .* sees 2 \(CUDA_VISIBLE_DEVICES 4,5\)"):
        gpu_index(3, 2, {"CUDA_VISIBLE_DEVICES": "4,5"})


def test_bf16_is_warned_of_on_gpus_that_emulate_it(gpus: SimpleNamespace) -> None:
    for capability, precision, warns in [
        ((7, 0), "bf16", True),
        ((7, 5), "bf16", True),
        ((7, 0), "fp16", False),
        ((8, 0), "bf16", False),
        ((9, 0), "bf16", False),
    ]:
        gpus.capability = capability
        remarks = pick_device(0, {}).remarks(precision=precision)
        assert bool(remarks) == warns, (capability, precision)
    cpu = PickedDevice(device=torch.device("cpu"), num_gpus=0, words="cpu")
    assert cpu.remarks(precision="bf16", cost_on_cpu=lambda precision: 1.2) == []
    assert cpu.remarks(precision="fp32", cost_on_cpu=lambda precision: 10.0) == []
    (remark,) = cpu.remarks(precision="bf16", cost_on_cpu=lambda precision: 7.4)
    assert remark.startswith("warning: this CPU takes 7 times as long in bf16 as in fp32; zero1_fp32_cpu, ")


@pytest.mark.parametrize("asked", ["CPU", "gpu", "none", "cpu ", "meta", "xpu", "x" * 1000])
def test_another_word_for_the_accelerator_is_named_with_what_would_fit(asked: str) -> None:
    with pytest.raises(ConfigError, match=r"DS_ACCELERATOR='.* cpu or cuda would fit") as refused:
        pick_device(0, {"DS_ACCELERATOR": asked})
    assert len(str(refused.value)) < 500
    assert not refused.value.same_on_all_ranks
