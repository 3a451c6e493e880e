"""An evaluation that is killed and continued, or spread over ranks, leaves what one leaves that runs through."""

import multiprocessing
import random
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from forked import forks_of_one
from small_evaluation import evaluate_and_die, evaluate_as_rank, images_in, lines_in, write_prompts

pytestmark = pytest.mark.slow
KILLS = 5
BATCH = 2
# An evaluation records 21 pieces of lines: 12 images one by one, 6 batches of scores, 3 of the judge. A start that is
# killed at its fifth piece at the latest leaves four more at most, so that five of them never finish.
LATEST = 5


@pytest.fixture(scope="module")
def start() -> Callable[..., multiprocessing.Process]:
    """Start a function in a process of its own; the libraries are imported once for all."""
    context = forks_of_one()

    def start_process(target: Callable[..., None], *arguments: object) -> multiprocessing.Process:
        process = context.Process(target=target, args=arguments)
        process.start()
        return process

    return start_process


@pytest.fixture(scope="module")
def whole(start, models, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """An evaluation that ran through, and its prompts."""
    folder = tmp_path_factory.mktemp("whole")
    prompts = write_prompts(folder)
    process = start(evaluate_and_die, folder / "out", models, prompts, 0, False)
    process.join()
    assert process.exitcode == 0
    return folder / "out", prompts


def results_in(out: Path) -> dict[str, bytes]:
    names = ("summary.json", "summary.csv", "summary.md", "results.json", "evaluation.json", "page.html")
    return {**images_in(out), **{name: (out / name).read_bytes() for name in names}}


def scores_in(out: Path) -> list[tuple]:
    return sorted(
        (folder.name, line["image"], line.get("rival", ""), line["prompt"], line["score"])
        for folder in (out / "scores").iterdir()
        for line in lines_in(folder)
    )


def test_killed_at_five_times_it_ends_as_if_it_was_not(start, models, whole, tmp_path: Path) -> None:
    out, draw = tmp_path / "out", random.Random(0)
    first, prompts = whole
    assert len(lines_in(first / "images")) == 12
    for kill in range(KILLS):
        process = start(evaluate_and_die, out, models, prompts, draw.randint(4, LATEST), kill % 2 == 1)
        process.join()
        assert process.exitcode == -9
    assert (out / "scores").is_dir()
    assert not (out / "summary.json").exists()
    process = start(evaluate_and_die, out, models, prompts, 0, False)
    process.join()
    assert process.exitcode == 0
    assert results_in(out) == results_in(first)
    # only the batch in flight was drawn twice, and nothing was scored twice
    assert len(lines_in(out / "images")) <= 12 + KILLS * (BATCH - 1)
    assert scores_in(out) == scores_in(first)


def test_two_ranks_leave_what_one_leaves(start, models, whole, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first, prompts = whole
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [start(evaluate_as_rank, out, models, prompts, rank, port) for rank in range(2)]
    for process in ranks:
        process.join()
    assert [process.exitcode for process in ranks] == [0, 0]
    assert results_in(out) == results_in(first)
    assert scores_in(out) == scores_in(first)
    shares = [len((out / "images" / f"rank_0000{rank}.jsonl").read_text().splitlines()) for rank in range(2)]
    assert shares == [6, 6]
