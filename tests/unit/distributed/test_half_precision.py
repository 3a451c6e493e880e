"""How slow a CPU is in half precision, by a clock that the test sets."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from ds_dpo.distributed import half_precision
from ds_dpo.distributed.half_precision import faster_on_cpu, half_precision_cost


def clock(*seconds: float) -> Callable[[], float]:
    """Return a clock by which the measured parts take these times one after another."""
    times = iter([time for second in seconds for time in (0.0, second)])
    return lambda: next(times)


def test_the_cost_is_the_ratio_of_the_shortest_times() -> None:
    before = torch.get_rng_state()
    assert half_precision_cost("bf16", clock(9, 3, 6, 0.5, 2, 1)) == 6
    assert torch.equal(torch.get_rng_state(), before), "a run's random numbers are its own"


@pytest.mark.parametrize(("cost", "taken"), [(1.9, "bf16"), (2.1, "fp32")])
def test_fp32_is_taken_where_half_precision_is_slow(cost: float, taken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half_precision, "half_precision_cost", lambda precision: cost)
    assert faster_on_cpu("bf16") == taken
    assert faster_on_cpu("fp32") == "fp32"
