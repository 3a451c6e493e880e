"""What real DeepSpeed engines saved on two ranks comes back bit for bit, in every layout."""

import os
import shutil
from pathlib import Path

import forked
import pytest
import torch
from zero_layouts_worker import CASES, QUANTITIES, UNIVERSAL, averaged

from ds_dpo.errors import CheckpointError
from ds_dpo.zero_shards.reader import open_checkpoint

pytestmark = pytest.mark.launch
STAGE_OF = {case: description["stage"] for case, description in CASES.items()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """One launch for all cases."""
    out = tmp_path_factory.mktemp("zero_layouts")
    worker = Path(__file__).parent / "zero_layouts_worker.py"
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    done = forked.run([str(worker), str(out)], env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return out


@pytest.mark.parametrize("case", CASES)
def test_every_layout_comes_back(saved, case):
    expected = torch.load(saved / f"{case}.pt", weights_only=False)
    checkpoint = open_checkpoint(saved / case / "global_step2")
    assert (checkpoint.stage, checkpoint.world_size, checkpoint.global_steps) == (STAGE_OF[case], 2, 2)
    assert checkpoint.parameters.keys() == expected["module"].keys() | expected["shared"].keys()
    compared = compare(checkpoint, expected)
    # round robin gathers nothing to compare with: DeepSpeed's accessor is wrong there, the module is not
    assert bool(compared) == (case != "zero2_bf16_round_robin")
    assert bool(expected["shared"]) == (CASES[case].get("model") == "tied")
    if CASES[case]["precision"] != "fp32" and compared:
        masters = (checkpoint.read(name) for name in expected["fp32"])
        assert any((master.bfloat16() != master).any() for master in masters), "no master is finer than bf16"
    # averages lie beside the shards of ZeRO
    assert checkpoint.has_ema == (STAGE_OF[case] > 0)
    if checkpoint.has_ema:
        for name, tensor in expected["fp32"].items():
            assert torch.equal(checkpoint.read(name, "ema"), averaged(tensor)), name
        for name in expected["module"].keys() - expected["fp32"].keys():
            assert compared == 0 or torch.equal(checkpoint.read(name, "ema"), checkpoint.read(name))


def compare(checkpoint, expected):
    """Compare all that was gathered, and return how many masters and moments that was."""
    compared = 0
    for quantity in QUANTITIES:
        for name, tensor in expected[quantity].items():
            assert torch.equal(checkpoint.read(name, quantity), tensor), (quantity, name)
            compared += 1
    for name, weight in expected["module"].items():
        assert torch.equal(checkpoint.read(name).to(weight.dtype), weight), name
    for other, name in expected["shared"].items():
        assert torch.equal(checkpoint.read(other), checkpoint.read(name)), other
    return compared


@pytest.mark.parametrize("case", UNIVERSAL)
def test_universal_checkpoints_come_back(saved, case):
    expected = torch.load(saved / f"{case}.pt", weights_only=False)
    checkpoint = open_checkpoint(saved / case / "global_step2_universal")
    assert (checkpoint.stage, checkpoint.world_size, checkpoint.global_steps) == (STAGE_OF[case], 2, 2)
    assert checkpoint.parameters.keys() == expected["module"].keys()
    assert compare(checkpoint, expected)
    assert not checkpoint.has_ema


def copy(saved, case, tmp_path, folder="global_step2"):
    return Path(shutil.copytree(saved / case / folder, tmp_path / folder))


def shard_of(folder, rank, kind="optim"):
    (path,) = folder.glob(f"*zero_pp_rank_{rank}_*{kind}_states.pt")
    return path


def swap_ranks(folder):
    first, second = shard_of(folder, 0), shard_of(folder, 1)
    first.rename(folder / "x")
    second.rename(first)
    (folder / "x").rename(second)


def lose_a_rank(folder):
    shard_of(folder, 1).unlink()


def tear(folder):
    shard = shard_of(folder, 1)
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])


def tear_model_states(folder):
    shard = shard_of(folder, 1, kind="model")
    shard.write_bytes(shard.read_bytes()[:-1000])


def save_a_third_rank(folder):
    content = torch.load(shard_of(folder, 1), weights_only=False)
    torch.save(content, folder / shard_of(folder, 1).name.replace("rank_1", "rank_2"))


def take_another_rank(folder):
    shutil.copy(shard_of(folder, 0), shard_of(folder, 1))


def mix_precisions(folder):
    for shard in list(folder.glob("*optim_states.pt")):
        plain = shard.name.removeprefix("bf16_")
        shutil.copy(shard, folder / (plain if plain != shard.name else f"bf16_{plain}"))


def lose_an_average(folder):
    (folder / "ema_rank_00001.pt").unlink()


def lose_the_first_average(folder):
    (folder / "ema_rank_00000.pt").unlink()


def save_a_third_average(folder):
    torch.save(torch.load(folder / "ema_rank_00001.pt"), folder / "ema_rank_00002.pt")


def shorten_an_average(folder):
    content = torch.load(folder / "ema_rank_00001.pt")
    content["flat_groups"][0] = content["flat_groups"][0][:-1].clone()
    torch.save(content, folder / "ema_rank_00001.pt")


@pytest.mark.parametrize("case", ["zero1_bf16", "zero2_fp32_two_groups", "zero3_fp32"])
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (swap_ranks, "rank_0_.* was saved as .*rank_1_.* swapped"),
        (take_another_rank, "rank_1_.* was saved as .*rank_0_.* swapped"),
        (lose_a_rank, "rank_1_.*missing"),
        (tear, "rank_1_.*torn"),
        (save_a_third_rank, "rank_2_.*left over"),
        (mix_precisions, "mixed"),
        (lose_an_average, "ema_rank_00001.pt: missing"),
        (lose_the_first_average, "ema_rank_00000.pt: missing"),
        (save_a_third_average, "ema_rank_00002.pt: left over"),
        (shorten_an_average, "ema_rank_00001.pt: holds averages of shapes"),
    ],
)
def test_damaged_folders_are_refused(saved, tmp_path, case, damage, said):
    folder = copy(saved, case, tmp_path)
    damage(folder)
    with pytest.raises(CheckpointError, match=said):
        open_checkpoint(folder)


def test_torn_model_states_of_another_rank_are_named(saved, tmp_path):
    folder = copy(saved, "zero3_lora", tmp_path)
    tear_model_states(folder)
    with pytest.raises(CheckpointError, match=r"rank_1_mp_rank_00_model_states.pt: torn"):
        open_checkpoint(folder)


def test_ranks_saved_through_a_stream_are_told_apart_by_their_slices(saved, tmp_path):
    folder = copy(saved, "zero1_bf16", tmp_path)
    contents = [torch.load(shard_of(folder, rank), weights_only=False) for rank in (1, 0)]
    for rank, content in enumerate(contents):
        with shard_of(folder, rank).open("wb") as file:
            torch.save(content, file)
    with pytest.raises(CheckpointError, match=r"rank_0_.*holds .* another rank or run"):
        open_checkpoint(folder)


def test_shards_of_another_run_do_not_add_up(saved, tmp_path):
    folder = copy(saved, "zero3_fp32", tmp_path)
    other = saved / "zero3_fp32_two_groups" / "global_step2"
    for shard in other.glob("*optim_states.pt"):
        shutil.copy(shard, folder / shard.name)
    with pytest.raises(CheckpointError, match=r"rank_0_.*groups of weights|elements where"):
        open_checkpoint(folder)


def flip_a_bit(path, tensor):
    """Flip one bit in the middle of a tensor's bytes."""
    content, needle = bytearray(path.read_bytes()), tensor.detach().reshape(-1).numpy().tobytes()
    assert content.count(needle) == 1
    content[content.index(needle) + len(needle) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("case", "key"),
    [("zero2_fp16", "single_partition_of_fp32_groups"), ("zero3_fp32", "fp32_flat_groups")],
)
def test_a_flipped_bit_is_found_when_it_is_read(saved, tmp_path, case, key):
    folder = copy(saved, case, tmp_path)
    shard = shard_of(folder, 1)
    flip_a_bit(shard, torch.load(shard, weights_only=False)["optimizer_state_dict"][key][0])
    checkpoint = open_checkpoint(folder)
    with pytest.raises(CheckpointError, match=rf"{shard.name}: record 'data/\d+' differs from its checksum"):
        [checkpoint.read(name) for name in checkpoint.parameters]
    trusting = open_checkpoint(folder, verify=False)
    [trusting.read(name) for name in trusting.parameters]


def test_a_universal_checkpoint_lacks_no_file(saved, tmp_path):
    folder = copy(saved, "zero3_fp32_two_groups", tmp_path, "global_step2_universal")
    (folder / "zero" / "last.weight" / "exp_avg.pt").unlink()
    with pytest.raises(CheckpointError, match=r"last.weight/exp_avg.pt: missing"):
        open_checkpoint(folder)
