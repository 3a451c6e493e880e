"""Blocks that are chosen for a limit: by hand, and against traces of the very same denoisers that recompute them."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import tiny_flux1
import tiny_flux2
import tiny_sd3
from tiny_families import SMALL_UNETS, shipped

from ds_dpo.config.load import load_config
from ds_dpo.models.denoiser.recomputation import recompute_all, recompute_blocks
from ds_dpo.planning.fit.blocks import Block, BlockTable, Moment, Passes
from ds_dpo.planning.fit.model_work import policy_blocks, policy_call
from ds_dpo.planning.fit.trace import Traced, trace

SETTINGS = 50
SEED = 20


def unet(family: str) -> dict[str, Any]:
    fewer = {"layers_per_block": 1, "_class_name": "UNet2DConditionModel"}
    return {**shipped(family, "unet"), **SMALL_UNETS[family], **fewer}


def settings_of(transformer: Any) -> dict[str, Any]:
    return {**transformer.config, "_class_name": type(transformer).__name__}


DENOISERS: dict[str, Callable[[], dict[str, Any]]] = {
    "sdxl": lambda: unet("sdxl"),
    "sd15": lambda: unet("sd15"),
    "sd3": lambda: settings_of(tiny_sd3.tiny_transformer(pos_embed_max_size=16)),
    "flux1": lambda: settings_of(tiny_flux1.tiny_transformer()),
    "flux2_klein": lambda: settings_of(tiny_flux2.tiny_transformer()),
}


def nothing() -> frozenset[int]:
    return frozenset()


# Three blocks keep 30, 20 and 10 and compute 30, 40 and 5 again. Both passes take 100 at their fullest moment, and 75
# while the second one computes again; then its input, of 4, would otherwise exist no more.
BY_HAND = BlockTable(
    blocks=[
        Block(name="a", kept_bytes=30, flop=30, inputs=nothing()),
        Block(name="b", kept_bytes=20, flop=40, inputs=frozenset((0,))),
        Block(name="c", kept_bytes=10, flop=5, inputs=nothing()),
    ],
    moments=[
        Moment(peak_bytes=100, keeping=frozenset((0, 1, 2)), turn=None, gone=nothing()),
        Moment(peak_bytes=90, keeping=frozenset((0, 1)), turn=2, gone=frozenset((0,))),
        Moment(peak_bytes=75, keeping=frozenset((0,)), turn=1, gone=frozenset((0,)), again=True),
        Moment(peak_bytes=60, keeping=frozenset((0,)), turn=1, gone=frozenset((0,))),
    ],
    input_bytes=[4],
    flop=1000,
)


@pytest.mark.parametrize(
    ("chosen", "peak", "flop"),
    [
        ((), 100, 1000),
        ((0,), 70, 1030),  # 100 - 30
        ((2,), 90, 1005),  # the second moment, in which c no longer keeps anything
        ((1,), 80, 1040),  # 100 - 20; 90 - 20 + 4; 75 + 4, as b computes again
        ((0, 1), 50, 1070),  # 100 - 50; 75 - 30 + 4
        ((0, 1, 2), 49, 1075),  # 75 - 30 + 4
    ],
)
def test_bytes_and_flop_of_a_choice_by_hand(chosen: tuple[int, ...], peak: int, flop: int) -> None:
    assert BY_HAND.passes(chosen) == Passes(peak_bytes=peak, flop=flop)


@pytest.mark.parametrize(
    ("limit", "names"),
    [
        (100, []),
        (90, ["c"]),  # half a FLOP a byte
        (89, ["a"]),  # c would not do at the second moment, and is not needed beside a
        (60, ["a", "c"]),
        (50, ["a", "b"]),  # then c is needless
        (49, ["a", "b", "c"]),
        (10, ["a", "b", "c"]),  # not possible
    ],
)
def test_the_cheapest_blocks_are_taken_until_the_limit_is_kept(limit: int, names: list[str]) -> None:
    assert BY_HAND.names(BY_HAND.fewest(limit)) == names


def test_a_number_takes_those_that_save_most_for_their_work() -> None:
    assert [BY_HAND.names(BY_HAND.best(count)) for count in range(4)] == [[], ["c"], ["a", "c"], ["a", "b", "c"]]
    assert BY_HAND.saved_bytes == [30, 16, 10]  # b keeps its input instead


def traced(family: str, options: list[str], names: list[str] | None) -> Traced:
    """Trace a policy that recomputes blocks, all of them for None."""
    run = load_config(["--config", "miniature", "--model.family", family, *options]).config
    denoiser, call, inputs = policy_call(DENOISERS[family](), run, precision="bf16")
    if names is None:
        recompute_all(denoiser)
    elif names:
        recompute_blocks(denoiser, names)
    return trace(denoiser, call, inputs=inputs, backward=True)


@pytest.mark.slow
def test_auto_never_exceeds_its_limit_in_random_settings() -> None:
    draw = random.Random(SEED)
    kept = 0
    for _ in range(SETTINGS):
        family = draw.choice(list(DENOISERS))
        adapter = draw.choice(
            [[], [], ["--adapter.type", "lora", "--reference.residency", "adapter", "--adapter.rank", "4"]]
        )
        pairs = str(draw.choice((1, 2, 3)))
        options = [*adapter, "--resolution", draw.choice(("64", "128")), "--micro_batch_pairs", pairs]
        options += ["--pairs_per_step", pairs]
        run = load_config(["--config", "miniature", "--model.family", family, *options]).config
        table = policy_blocks(DENOISERS[family](), run, precision="bf16")
        most, least = table.peak_bytes(()), table.peak_bytes(table.all)
        limit = least + draw.uniform(0.02, 1.05) * (most - least)
        chosen = table.fewest(limit)
        found = traced(family, options, table.names(chosen))
        case = (family, options, limit, table.names(chosen))
        assert found.peak_bytes <= limit, case
        assert found.flop == table.passes(chosen).flop, case
        assert found.peak_bytes == pytest.approx(table.peak_bytes(chosen), rel=0.05), case
        kept += bool(chosen) and len(chosen) < len(table.blocks)
    assert kept > SETTINGS // 2, "most settings choose some of the blocks"


@pytest.mark.parametrize("family", DENOISERS)
def test_none_and_all_are_what_their_own_traces_take(family: str) -> None:
    options = ["--resolution", "128", "--micro_batch_pairs", "2", "--pairs_per_step", "2"]
    run = load_config(["--config", "miniature", "--model.family", family, *options]).config
    table = policy_blocks(DENOISERS[family](), run, precision="bf16")
    none, everything = traced(family, options, []), traced(family, options, None)
    assert table.passes([]) == Passes(peak_bytes=none.peak_bytes, flop=none.flop)
    assert table.passes(table.all).flop == everything.flop
    assert everything.peak_bytes <= table.peak_bytes(table.all) <= 1.05 * everything.peak_bytes
