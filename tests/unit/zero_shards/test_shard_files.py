"""A tag folder holds one run's files, all of them."""

import pytest

from ds_dpo.errors import CheckpointError
from ds_dpo.zero_shards.files import check_number_of_ranks, find_files


def make(folder, *names):
    for name in names:
        (folder / name).touch()
    return folder


def optimizer(rank, prefix="", mp=0):
    return f"{prefix}zero_pp_rank_{rank}_mp_rank_{mp:02d}_optim_states.pt"


def test_ranks_come_in_numeric_order(tmp_path):
    make(tmp_path, "mp_rank_00_model_states.pt", *(optimizer(rank, "bf16_") for rank in range(12)), "manifest.json")
    files = find_files(tmp_path)
    assert [path.name for path in files.model] == ["mp_rank_00_model_states.pt"]
    assert [path.name for path in files.optimizer] == [optimizer(rank, "bf16_") for rank in range(12)]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["mp_rank_00_model_states.pt", optimizer(0), optimizer(2)], "zero_pp_rank_1_mp_rank_00_optim.*missing"),
        (["mp_rank_00_model_states.pt", optimizer(0), optimizer(0, "bf16_")], "bf16_ are mixed"),
        (["mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"], "ZeRO 3 and of another"),
        (["mp_rank_00_model_states.pt", optimizer(0, mp=1)], "mp_rank_01.*not supported"),
        (["mp_rank_00_model_states.pt", "layer_00-model_00-model_states.pt"], "layer_00.*not supported"),
        ([optimizer(0)], "no .*model_states"),
    ],
)
def test_other_sets_of_files_are_refused(tmp_path, names, said):
    with pytest.raises(CheckpointError, match=said):
        find_files(make(tmp_path, *names))


def test_number_of_ranks(tmp_path):
    files = [tmp_path / optimizer(rank) for rank in range(3)]
    check_number_of_ranks(files, expected=3)
    with pytest.raises(CheckpointError, match=r"4 ranks.* 3 files"):
        check_number_of_ranks(files, expected=4)
    with pytest.raises(CheckpointError, match=r"rank_2.*left over.* 2"):
        check_number_of_ranks(files, expected=2)
