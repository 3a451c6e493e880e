"""A folder made in units: begun, killed, continued, extended, left alone, refused."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from ds_dpo.distributed.environment import RankEnvironment, read_environment
from ds_dpo.errors import ConfigError, DataError
from ds_dpo.making.folder import locked, work_of
from ds_dpo.making.make import Finished, Units, make, share_of

PLACE = read_environment({})
PER_UNIT = 2


class KilledError(Exception):
    """Stands for a kill: nothing after it happens."""


@dataclass(frozen=True, kw_only=True)
class Squares:
    """The squares of 0, 1, ..., total - 1, two in a unit, joined into squares.json."""

    out: Path
    total: int
    say: Callable[[str], None]
    made: list[int]
    power: int = 2
    killed_before: int | None = None
    kind = "cache"
    verb = "squared"
    things = "numbers"
    subfolders: Sequence[str] = ("parts",)

    @property
    def units(self) -> Units:
        return Units(self.total, PER_UNIT)

    def plan(self) -> Mapping[str, Any]:
        return {"power": self.power, "sizes": (PER_UNIT, 1)}

    def finished(self) -> Finished[list[int]] | None:
        squares = self._squares()
        if squares is None:
            return None
        plan = {"power": 2, "sizes": [PER_UNIT, 1]}
        return Finished(record=squares, plan=plan, is_enough=len(squares) >= self.total)

    def missing(self) -> list[int]:
        return self.units.missing(lambda unit: [self._file(unit)], first=self._num_whole())

    def make_units(self, missing: Sequence[int]) -> None:
        for unit in share_of(PLACE, missing):
            if unit == self.killed_before:
                (self.out / "parts" / ".torn.json.1.partial").write_text("[")
                raise KilledError
            self.made.append(unit)
            self._file(unit).write_text(json.dumps([number**self.power for number in self.units.span(unit)]))

    def finish(self) -> list[int]:
        kept = (self._squares() or [])[: self._num_whole() * PER_UNIT]
        for unit in range(self._num_whole(), len(self.units)):
            kept += json.loads(self._file(unit).read_text())
        (self.out / "squares.json").write_text(json.dumps(kept))
        return kept

    def _squares(self) -> list[int] | None:
        path = self.out / "squares.json"
        return json.loads(path.read_text()) if path.exists() else None

    def _num_whole(self) -> int:
        """How many units a finished folder has whole."""
        return len(self._squares() or []) // PER_UNIT

    def _file(self, unit: int) -> Path:
        return work_of(self.out) / f"{unit}.json"


@pytest.fixture
def squares(tmp_path: Path) -> Squares:
    return Squares(out=tmp_path / "out", total=5, say=[].append, made=[])


def names_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def saying(squares: Squares, **changes: Any) -> tuple[Squares, list[str]]:
    said: list[str] = []
    return replace(squares, say=said.append, made=[], **changes), said


def test_a_new_folder_is_made_in_units_and_keeps_no_work_folder(squares: Squares) -> None:
    making, said = saying(squares)
    assert make(making) == [0, 1, 4, 9, 16]
    assert making.made == [0, 1, 2]
    assert said == [f"making {making.out}: 5 numbers in 3 units of up to 2; 0 are squared"]
    assert names_in(making.out) == {".lock", "parts", "squares.json"}


def test_a_rerun_after_a_kill_makes_what_is_missing_and_removes_what_is_torn(squares: Squares) -> None:
    with pytest.raises(KilledError):
        make(replace(squares, killed_before=1))
    assert {"work/plan.json", "work/0.json", "parts/.torn.json.1.partial"} <= names_in(squares.out)
    assert json.loads((work_of(squares.out) / "plan.json").read_text()) == {"power": 2, "sizes": [2, 1]}
    making, said = saying(squares)
    assert make(making) == [0, 1, 4, 9, 16]
    assert making.made == [1, 2]
    assert said == [f"continuing {making.out}: 5 numbers in 3 units of up to 2; 1 are squared"]
    assert names_in(making.out) == {".lock", "parts", "squares.json"}


def test_a_finished_folder_is_left_alone(squares: Squares) -> None:
    make(squares)
    work_of(squares.out).mkdir()  # as a kill leaves it that comes just before its removal
    making, said = saying(squares, total=4)
    assert make(making) == [0, 1, 4, 9, 16]
    assert making.made == []
    assert said == [f"{making.out} is finished already; nothing is squared"]
    assert not work_of(making.out).exists()


def test_a_finished_folder_is_extended_even_after_a_kill(squares: Squares) -> None:
    make(squares)
    with pytest.raises(KilledError):
        make(replace(squares, total=8, killed_before=3))
    assert json.loads((squares.out / "squares.json").read_text()) == [0, 1, 4, 9, 16]
    making, said = saying(squares, total=8)
    assert make(making) == [0, 1, 4, 9, 16, 25, 36, 49]
    assert making.made == [3], "unit 2 was not whole, and the killed maker made it again"
    assert said == [f"extending {making.out}: 8 numbers in 4 units of up to 2; 3 are squared"]


@pytest.mark.parametrize("state", ["begun", "finished"])
def test_another_plan_is_refused_and_names_what_differs(squares: Squares, state: str) -> None:
    if state == "finished":
        make(squares)
    else:
        with pytest.raises(KilledError):
            make(replace(squares, killed_before=1))
    before = names_in(squares.out)
    with pytest.raises(ConfigError) as caught:
        make(replace(squares, power=3))
    assert str(caught.value) == (
        f"--out {squares.out} holds a cache that was begun with other settings:\n"
        "  power: the cache has 2, this command 3\n"
        "restore these settings to continue it, or name another folder"
    )
    assert names_in(squares.out) == before


def test_a_plan_that_is_not_readable_is_an_error_that_names_it(squares: Squares) -> None:
    with pytest.raises(KilledError):
        make(replace(squares, killed_before=1))
    (work_of(squares.out) / "plan.json").write_text("{")
    with pytest.raises(DataError, match=r"plan\.json: not readable as JSON .* remove the folder and start again"):
        make(squares)


def test_a_folder_with_anything_else_is_refused_and_left_alone(squares: Squares) -> None:
    squares.out.mkdir()
    (squares.out / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds thesis\.txt and is not an unfinished cache; name another folder"):
        make(squares)
    assert names_in(squares.out) == {".lock", "thesis.txt"}


def test_a_folder_that_cannot_be_written_is_refused(squares: Squares) -> None:
    squares.out.write_text("a file")
    with pytest.raises(ConfigError, match=rf"--out {squares.out} cannot be written: File exists"):
        make(squares)


def hold(out: Path, is_held: Any) -> None:
    with locked(out):
        is_held.send(True)
        is_held.recv()


def test_two_makers_of_one_folder_are_refused_until_the_first_is_gone(squares: Squares) -> None:
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe()
    holder = fork.Process(target=hold, args=(squares.out, there), daemon=True)
    holder.start()
    try:
        assert here.recv()
        with pytest.raises(ConfigError, match=r"another process is writing to it"):
            make(squares)
    finally:
        holder.kill()
        holder.join()
    assert make(squares) == [0, 1, 4, 9, 16]


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("num_units", [0, 1, 5, 12])
def test_ranks_share_all_units_evenly_and_in_order(world_size: int, num_units: int) -> None:
    units = [10 + unit for unit in range(num_units)]
    ranks = [
        RankEnvironment(
            rank=rank, world_size=world_size, local_rank=0, local_world_size=1, master_addr="", master_port=0
        )
        for rank in range(world_size)
    ]
    shares = [list(share_of(place, units)) for place in ranks]
    assert [unit for share in shares for unit in share] == units
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_units_cover_all_things_and_the_last_has_what_is_left() -> None:
    assert [list(Units(5, 2).span(unit)) for unit in range(len(Units(5, 2)))] == [[0, 1], [2, 3], [4]]
    assert len(Units(4, 2)) == 2
    assert len(Units(0, 2)) == 0


def test_a_unit_is_missing_as_long_as_one_of_its_files_is(tmp_path: Path) -> None:
    for name in ("0a", "0b", "1b", "3a"):
        (tmp_path / name).touch()
    units = Units(4, 1)
    assert units.missing(lambda unit: [tmp_path / f"{unit}a", tmp_path / f"{unit}b"]) == [1, 2, 3]
    assert units.missing(lambda unit: [tmp_path / f"{unit}a", tmp_path / f"{unit}b"], first=2) == [2, 3]
