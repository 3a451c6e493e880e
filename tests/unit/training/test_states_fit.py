"""A line says which share of a device's memory the states of a run take; it warns of states that do not fit."""

import pytest
import torch

from ds_dpo.config.load import load_config
from ds_dpo.distributed.environment import read_environment
from ds_dpo.engine.settings import resolve_deepspeed
from ds_dpo.planning.sizes import StateBytes, parameters_of, state_bytes
from ds_dpo.training import states_fit
from ds_dpo.training.states_fit import describe_fit, share_of_memory

# SDXL's UNet, which trains whole: 2,567,463,684 parameters
SDXL = 2_567_463_684


def lines_of(*options: str, ranks: int = 1, available: int | None) -> list[str]:
    config = load_config(["--config", "sdxl_pickapic", "--pairs_per_step", "2048", *options]).config
    place = read_environment({"RANK": "0", "WORLD_SIZE": str(ranks), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": str(ranks)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(states_fit, "available_bytes", lambda: available)
        resolved = resolve_deepspeed(config, world_size=ranks)
        return describe_fit(config, resolved, place, device=torch.device("cpu"))


def test_the_states_of_zero1_in_bf16_on_one_rank() -> None:
    config = load_config(["--config", "sdxl_pickapic"]).config
    parameters = parameters_of(config)
    assert parameters is not None
    found = state_bytes(parameters, config, resolve_deepspeed(config, world_size=1))
    # bf16 weights and gradients, fp32 accumulated gradients, fp32 masters and two moments; a bf16 reference
    assert found == StateBytes(policy=(2 + 2 + 4 + 12) * SDXL, reference=2 * SDXL)


def test_a_line_says_the_share() -> None:
    line = share_of_memory(StateBytes(policy=30e9, reference=10e9), 80e9, owner="this GPU")
    assert line == "memory: weights, gradients, optimizer and reference take 40 GB of the 80 GB of this GPU (50%)"


def test_a_warning_says_what_makes_them_smaller() -> None:
    assert lines_of(available=60 * 10**9) == [
        "memory: weights, gradients, optimizer and reference take 56.5 GB of the 60 GB of this host (94%)"
    ]
    (line,) = lines_of(available=56 * 10**9)
    assert line.startswith(
        "warning: weights, gradients, optimizer and reference take 56.5 GB on each rank, and this host has 56 GB: take "
        "more ranks, a higher ZeRO stage"
    )


def test_the_ranks_of_a_host_share_its_memory() -> None:
    # of each parameter 2 + 2 + 4 bytes and the reference's 2 are on both ranks, and 12 are divided: 16 in all
    (line,) = lines_of(ranks=2, available=100 * 10**9)
    assert line.endswith("take 41.1 GB of the 50 GB of each of the 2 ranks of this host (82%)")


def test_what_is_unknown_or_offloaded_is_not_compared() -> None:
    assert lines_of(available=None) == []
    assert lines_of("--deepspeed_config", "zero3_offload", available=1) == []
    assert lines_of("--model.pretrained", "./of_unknown_size.safetensors", available=1) == []
