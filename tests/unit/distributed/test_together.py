"""What one of several real ranks fails at is raised by all of them, once each, and said by few."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import forks_of_one
from torch import distributed, multiprocessing

from ds_dpo.distributed.environment import RankEnvironment
from ds_dpo.distributed.together import node_turns, on_main, raised_everywhere, said_once
from ds_dpo.errors import CheckpointError, CollapseError, DataError, DsDpoError

NUM_RANKS = 3


class ForeignError(Exception):
    """Of another library; the other processes cannot make one."""

    def __init__(self, code: int, *, text: str) -> None:
        super().__init__(text)


def test_alone_an_error_is_its_own_and_is_said() -> None:
    with raised_everywhere():
        pass
    error = DataError("x")
    with pytest.raises(DataError) as caught, raised_everywhere():
        raise error
    assert caught.value is error
    assert not error.is_said_elsewhere
    assert on_main(lambda: "of rank 0") == "of rank 0"
    assert not said_once(error).is_said_elsewhere


def test_what_is_no_failure_of_the_body_passes_at_once() -> None:
    """Ctrl-C is every rank's own."""
    with pytest.raises(KeyboardInterrupt), raised_everywhere():
        raise KeyboardInterrupt


@pytest.mark.slow
def test_three_ranks(tmp_path: Path) -> None:
    forks_of_one()
    multiprocessing.start_processes(be_one_of_three, args=(tmp_path,), nprocs=NUM_RANKS, start_method="forkserver")
    assert (tmp_path / "turns").read_text().split() == ["in0", "out0", "in1", "out1", "in2", "out2"]
    assert (tmp_path / "failing_turns").read_text().split() == ["in0", "out0", "in1"], "rank 2 never enters"


def be_one_of_three(rank: int, folder: Path) -> None:
    """What each rank does; an assertion that fails here fails the test with its traceback."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=NUM_RANKS)
    nothing_is_raised_where_none_fails()
    a_failure_of_one_is_raised_by_all(rank)
    each_that_failed_raises_its_own(rank)
    an_error_of_another_library_arrives_as_words(rank)
    rank_0_acts_for_all(rank)
    an_error_that_all_raise_is_said_by_rank_0(rank)
    ranks_of_a_node_take_turns(rank, folder)
    ranks_of_unequal_nodes_take_as_many_turns(rank)
    distributed.destroy_process_group()


def nothing_is_raised_where_none_fails() -> None:
    with raised_everywhere():
        pass


def a_failure_of_one_is_raised_by_all(rank: int) -> None:
    error = raised_on({1: CheckpointError("disk of rank 1 is full")}, rank)
    assert (type(error), str(error)) == (CheckpointError, "disk of rank 1 is full")
    assert says(error) == (rank in (0, 1)), "rank 0 for all, and the one that failed for its own log"


def each_that_failed_raises_its_own(rank: int) -> None:
    error = raised_on({1: DataError("of 1"), 2: CheckpointError("of 2")}, rank)
    assert (type(error), str(error)) == ((CheckpointError, "of 2") if rank == 2 else (DataError, "of 1"))
    assert says(error) == (rank in (0, 1)), "the first that failed is enough"


def an_error_of_another_library_arrives_as_words(rank: int) -> None:
    error = raised_on({0: ForeignError(3, text="broken")}, rank)
    assert type(error) is (ForeignError if rank == 0 else RuntimeError)
    assert str(error) == ("broken" if rank == 0 else "ForeignError: broken")


def rank_0_acts_for_all(rank: int) -> None:
    acted: list[int] = []

    def act() -> dict[str, int]:
        acted.append(rank)
        return {"rank": rank}

    assert on_main(act) == {"rank": 0}
    assert acted == ([0] if rank == 0 else [])

    def fail() -> None:
        raise DataError("no such folder")

    error = raised_by(lambda: on_main(fail))
    assert (type(error), str(error), says(error)) == (DataError, "no such folder", rank == 0)


def an_error_that_all_raise_is_said_by_rank_0(rank: int) -> None:
    error = CollapseError("the policy falls apart")
    assert said_once(error) is error
    assert says(error) == (rank == 0)


def ranks_of_a_node_take_turns(rank: int, folder: Path) -> None:
    place = RankEnvironment(
        rank=rank, world_size=3, local_rank=rank, local_world_size=3, master_addr="127.0.0.1", master_port=1
    )

    def take_turn(name: str, failing: int | None) -> None:
        with node_turns(place), (folder / name).open("a") as file:
            file.write(f"in{rank} ")
            if rank == failing:
                raise DataError("no such dataset")
            file.write(f"out{rank} ")

    assert collectives_of(lambda: take_turn("turns", None)) == 1 + 3, "agree how many turns; each ends in one"
    error = raised_by(lambda: take_turn("failing_turns", 1))
    assert (str(error), says(error)) == ("no such dataset", rank in (0, 1))


def ranks_of_unequal_nodes_take_as_many_turns(rank: int) -> None:
    """Ranks 0 and 1 are a node, rank 2 is another."""
    local_rank, local_world_size = [(0, 2), (1, 2), (0, 1)][rank]
    place = RankEnvironment(
        rank=rank,
        world_size=3,
        local_rank=local_rank,
        local_world_size=local_world_size,
        master_addr="127.0.0.1",
        master_port=1,
    )
    entered: list[int] = []

    def take_turn() -> None:
        with node_turns(place):
            entered.append(rank)

    assert collectives_of(take_turn) == 1 + 2
    assert entered == [rank]


def raised_on(errors: dict[int, Exception], rank: int) -> Exception:
    """Return what a rank raises where some ranks fail, after exactly one collective."""
    found: list[Exception] = []

    def act() -> None:
        with raised_everywhere():
            if rank in errors:
                raise errors[rank]

    assert collectives_of(lambda: found.append(raised_by(act))) == 1
    return found[0]


def says(error: Exception) -> bool:
    """Tell whether run_program prints it."""
    assert isinstance(error, DsDpoError)
    return not error.is_said_elsewhere


def collectives_of(action: Callable[[], None]) -> int:
    """Return how many collectives of objects an action does on this rank."""
    done: list[str] = []

    def count(name: str) -> Any:
        real = getattr(distributed, name)

        def counted(*arguments: Any, **options: Any) -> Any:
            done.append(name)
            return real(*arguments, **options)

        return counted

    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_gather_object", "broadcast_object_list"):
            patch.setattr(distributed, name, count(name))
        action()
    return len(done)


def raised_by(action: Callable[[], object]) -> Exception:
    try:
        action()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")
