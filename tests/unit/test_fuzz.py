"""A few damaged files of each kind end in values or in errors of this project; tests/fuzz.py tries many."""

import importlib.util
import sys

import pytest
from fuzz_kinds import KINDS
from repository import ROOT

from ds_dpo.errors import DataError

FLIPS, CUTS = 4, 2
SEED = 18  # other cases than those of the whole run


@pytest.fixture(scope="module")
def fuzz():
    spec = importlib.util.spec_from_file_location("fuzz", ROOT / "tests" / "fuzz.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["fuzz"] = module  # where its dataclass looks for its types
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_ends_in_words(kind, fuzz):
    result = fuzz.read_kind(kind, flips=FLIPS, cuts=CUTS, seed=SEED, seconds=60)
    assert result.failures == []
    assert result.read + result.refused >= FLIPS + CUTS
    assert result.refused > 0


def raising(error):
    def read():
        raise error

    return read


def test_what_is_not_an_error_of_ours_fails(fuzz, monkeypatch, tmp_path):
    outcomes = {
        "ours": (DataError("x is 1; 2 would fit"), []),
        "theirs": (KeyError("x"), ["KeyError in test_fuzz.py"]),
        "long": (DataError("x " * 1001), ["a message of 2002 characters in 1 lines"]),
        "two lines": (DataError("x\ny"), ["a message of 3 characters in 2 lines"]),
        "a list": (DataError("these are wrong:\n  x\n  y"), []),
        "slow": (fuzz.TooSlow(), ["more than 10 s"]),
    }
    for name, (error, failures) in outcomes.items():
        result = fuzz.Result(name)
        fuzz._read_case(fuzz.Prepared([], raising(error)), name, result)
        assert len(result.failures) == len(failures)
        assert all(words in failure for words, failure in zip(failures, result.failures, strict=True))


def test_the_same_seed_gives_the_same_damage_and_each_differs_from_the_whole(fuzz):
    content = bytes(range(256)) * 40
    first, again = (list(fuzz.damages(content, seed="17 a", flips=20, cuts=5)) for _ in range(2))
    assert first == again != list(fuzz.damages(content, seed="18 a", flips=20, cuts=5))
    assert all(sum(a != b for a, b in zip(changed, content, strict=True)) == 1 for _, changed in first[:20])
    assert all(content.startswith(changed) and len(changed) < len(content) for _, changed in first[20:])
