"""Memory, time and choice of a plan, by hand from round numbers; and the program, on the miniature."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ds_dpo.commands import plan as program
from ds_dpo.config.load import load_config
from ds_dpo.config.run import RunConfig
from ds_dpo.engine.settings import resolve_deepspeed
from ds_dpo.errors import ConfigError
from ds_dpo.planning.fit.blocks import Block, BlockTable, Moment, Passes
from ds_dpo.planning.fit.choices import Choice, choices
from ds_dpo.planning.fit.gpus import Gpu
from ds_dpo.planning.fit.model_work import ModelWork
from ds_dpo.planning.fit.plan import SHIPPED, make_plan
from ds_dpo.planning.fit.rank_memory import CONTEXT_BYTES, OFFLOAD_SLOT_BYTES, rank_memory
from ds_dpo.planning.fit.report import plan_text
from ds_dpo.planning.fit.step_time import Assumptions, step_time
from ds_dpo.planning.fit.trace import Traced
from ds_dpo.planning.sizes import parameters_of
from ds_dpo.reference.block_offload import MAX_BLOCK_BYTES, NUM_SLOTS

P = 10**9
# two blocks keep 2 and 3 GB, and compute 2 and 8 TFLOP again
BLOCKS = BlockTable(
    blocks=[
        Block(name="first", kept_bytes=2 * 10**9, flop=2 * 10**12, inputs=frozenset()),
        Block(name="second", kept_bytes=3 * 10**9, flop=8 * 10**12, inputs=frozenset()),
    ],
    moments=[Moment(peak_bytes=6 * 10**9, keeping=frozenset((0, 1)), turn=None, gone=frozenset())],
    input_bytes=[],
    flop=40 * 10**12,
)
WORK = ModelWork(
    parameters=P,
    trained_parameters=P,
    policy={
        "none": Passes(peak_bytes=6 * 10**9, flop=40 * 10**12),
        "all": Passes(peak_bytes=10**9, flop=50 * 10**12),
    },
    blocks=BLOCKS,
    reference=Traced(stored_bytes=0, peak_bytes=10**8, flop=12 * 10**12),
    vae=Traced(stored_bytes=0, peak_bytes=2 * 10**9, flop=4 * 10**12),
    vae_bytes=10**8,
    text_bytes=9 * 10**8,
    pair_encoding_flop=8 * 10**12,
)
ZERO = {"reduce_bucket_size": 2e8, "allgather_bucket_size": 2e8, "overlap_comm": False}


def config(*options: str) -> RunConfig:
    return load_config(["--config", "sdxl_pickapic", *options]).config


def memory(choice: Choice, *options: str, ranks: int = 4) -> dict[str, float]:
    return rank_memory(
        WORK, choice, config(*options), ranks=ranks, precision="bf16", accumulation_precision="fp32", zero=ZERO
    )


def choice(stage: int, residency: Any = "replicated", *, pairs: int = 1, checkpointing: Any = "all") -> Choice:
    return Choice(stage=stage, residency=residency, checkpointing=checkpointing, micro_batch_pairs=pairs)


def test_parts_of_a_rank_by_hand() -> None:
    first = memory(choice(1))
    # weights 2 P; gradients 4 P accumulated and 2 P of a micro-batch; optimizer 12 P / 4; a copy of 2 P
    assert (first["weights"], first["gradients"], first["optimizer"]) == (2 * P, 6 * P, 3 * P)
    assert (first["reference"], first["encoders"], first["context"]) == (2 * P, P, CONTEXT_BYTES)
    # encoding an image takes more than the checkpointed passes of one pair, and less than those of four
    assert first["activations"] == 2 * 10**9
    assert memory(choice(1, pairs=4))["activations"] == 4 * 10**9
    assert memory(choice(1, checkpointing="none"))["activations"] == 6 * 10**9
    # a moving average of the weights takes 4 bytes more, and so does a reference that moves
    averaged = memory(choice(1), "--ema.decay", "0.999", "--reference.ema_decay", "0.99")
    assert averaged["optimizer"] == 5 * P
    third = memory(choice(3, "zero3"))
    assert (third["weights"], third["gradients"], third["reference"]) == (P / 2, P, P / 2)
    assert memory(choice(2))["gradients"] == P
    # 2e8 gradients in fp32 and 2e8 weights in bf16; a single rank sends nothing
    assert first["buffers"] == 4 * 2e8 + 2 * 2e8
    assert memory(choice(1), ranks=1)["buffers"] == 0


def test_caches_and_references_that_are_elsewhere_take_nothing() -> None:
    cached = memory(choice(1, "cached"), "--data.cache", "made", "--cadence.sample_every_steps", "none")
    assert (cached["encoders"], cached["reference"], cached["activations"]) == (0, 0, 10**9)
    assert memory(choice(1, "cpu"))["reference"] == OFFLOAD_SLOT_BYTES == NUM_SLOTS * MAX_BLOCK_BYTES


GPU = Gpu(title="round", memory_bytes=80e9, flop_per_second=100e12, link_bytes_per_second=100e9)
ASSUMED = Assumptions(utilization=0.5, network_bytes_per_second=10e9)


def time(of: Choice, *options: str, ranks: int = 4, precision: Any = "bf16", zero: Any = SHIPPED) -> Any:
    given = {"precision": precision, "sent_precision": "fp32", "zero": zero}
    return step_time(WORK, of, config(*options), GPU, ASSUMED, ranks=ranks, **given)


def test_a_step_s_time_by_hand() -> None:
    found = time(choice(1), "--pairs_per_step", "8")
    # 2 pairs a rank, each 50 + 12 + 8 TFLOP, at 50 TFLOP/s
    assert found.flop == 140e12
    assert found.compute_seconds == pytest.approx(2.8)
    # an all-reduce sends the fp32 gradients twice, and the new weights are gathered once, each to 3 of 4 parts
    assert found.sent_bytes == 0.75 * (2 * 4 * P + 2 * P)
    assert found.seconds == pytest.approx(2.8 + 0.075)
    # stage 3 with a divided reference: two micro-batches, each reduces, gathers the weights twice and the reference
    third = time(choice(3, "zero3"), "--pairs_per_step", "8")
    assert third.sent_bytes == 0.75 * 2 * (4 * P + 2 * 2 * P + 2 * P)
    # stage 2 reduces in each micro-batch, to the rank that keeps a part, or by all-reduces, which send twice as much
    assert time(choice(2), "--pairs_per_step", "8").sent_bytes == 0.75 * (2 * 4 * P + 2 * P)
    assert time(choice(2), "--pairs_per_step", "8", zero={}).sent_bytes == 0.75 * (2 * 2 * 4 * P + 2 * P)
    # between hosts the network counts; a reference in host memory crosses its link in each micro-batch
    assert time(choice(1), "--pairs_per_step", "32", ranks=16).communication_seconds == pytest.approx(
        15 / 16 * 10 * P / 10e9
    )
    assert time(choice(1, "cpu"), "--pairs_per_step", "8").communication_seconds == pytest.approx(0.075 + 2 * 0.1)
    assert time(choice(1), "--pairs_per_step", "8", precision="fp32").compute_seconds == pytest.approx(5.6)


def test_the_fastest_fits_and_the_fewest_gpus_are_found() -> None:
    run = config("--pairs_per_step", "32")
    resolved = resolve_deepspeed(run, world_size=2)
    plan = make_plan(WORK, run, resolved, GPU, ASSUMED)
    assert plan.own.choice == choice(1, pairs=4)
    assert all(row.fits == (row.total_bytes <= 0.94 * 80e9) for row in plan.rows)
    assert plan.fastest is not None
    # in two micro-batches of 8 pairs stage 2 sends what stage 1 sends, and holds less; 16 pairs at once do not fit. A
    # divided reference takes 0.2 % longer and holds less.
    assert plan.fastest.choice == choice(2, "zero3", pairs=8, checkpointing="none")
    assert plan.leanest is not None
    assert plan.leanest.total_bytes == min(row.total_bytes for row in plan.rows)
    assert plan.fewest is not None
    assert plan.fewest.ranks == 1
    assert (plan.checkpoint_bytes, plan.kept_checkpoints) == (14 * P, 3)
    small = Gpu(title="small", memory_bytes=6e9, flop_per_second=1e12, link_bytes_per_second=1e9)
    none = make_plan(WORK, run, resolved, small, ASSUMED)
    assert (none.fastest, none.leanest) == (None, None)


@pytest.mark.parametrize(
    ("free", "activations", "flop"), [(6, 6, 40), (5, 4, 42), (3.5, 3, 48), (2, 1, 50), (0, 1, 50)]
)
def test_auto_computes_as_little_again_as_the_gpu_allows(free: float, activations: int, flop: int) -> None:
    run = config("--pairs_per_step", "4", "--micro_batch_pairs", "1", "--gradient_checkpointing", "auto")
    cached = run.model_copy(update={"data": run.data.model_copy(update={"cache": "made"})})
    resolved = resolve_deepspeed(cached, world_size=4)
    own = make_plan(WORK, cached, resolved, GPU, ASSUMED).own
    others = own.total_bytes - own.parts["activations"]
    small = replace(GPU, memory_bytes=(others + free * 1e9) / 0.94 + 1)
    own = make_plan(WORK, cached, resolved, small, ASSUMED).own
    assert own.choice.checkpointing == "auto"
    assert own.parts["activations"] == activations * 10**9
    assert own.time.flop == (flop + 12) * 10**12  # 12 of the reference


def test_choices_divide_the_pairs_and_keep_what_the_run_fixes() -> None:
    found = list(choices(config("--pairs_per_step", "16"), ranks=8, precision="bf16"))
    assert {each.micro_batch_pairs for each in found} == {1, 2}
    assert {each.residency for each in found} == {"replicated", "zero3", "cpu"}
    assert {each.stage for each in choices(config(), ranks=8, precision="fp16")} == {2, 3}
    lora = load_config(["--config", "sdxl_pickapic_lora"]).config
    assert {each.residency for each in choices(lora, ranks=1, precision="bf16")} == {"adapter"}
    mapo = load_config(["--config", "sdxl_mapo"]).config
    assert {each.residency for each in choices(mapo, ranks=1, precision="bf16")} == {"none"}


def test_the_program_plans_the_miniature(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "plan.svg"
    of_run = ["--config", "miniature", "--gpus", "2", "--gpu", "4090"]
    program.main([*of_run, "--json", "--picture", str(picture)])
    found = json.loads(capsys.readouterr().out)
    counted = parameters_of(load_config(["--config", "miniature"]).config)  # from shapes, without a model
    assert counted is not None
    assert found["parameters"] == found["trained_parameters"] == counted.total
    own = found["as_configured"]
    assert own["fits"]
    assert own["total_bytes"] == pytest.approx(sum(own["bytes"].values()))
    assert own["bytes"]["weights"] == 2 * found["parameters"]
    # the printed options are options of a run, and give that choice
    for name in ("fastest", "least_memory"):
        chosen = load_config(["--config", "miniature", *found[name]["options"].split()]).config
        assert chosen.batch.micro_batch_pairs == found[name]["micro_batch_pairs"]
        assert chosen.model.gradient_checkpointing == found[name]["gradient_checkpointing"]
        assert chosen.reference.residency == found[name]["residency"]
        assert chosen.deepspeed_config == f"zero{found[name]['stage']}_bf16"
    assert picture.read_text().startswith("<svg ")
    program.main(of_run)
    text = capsys.readouterr().out
    assert "fastest: --deepspeed_config zero" in text
    assert "2 x RTX 4090: 24.5 GB each, of which 6% stay free" in text


@pytest.mark.parametrize("text", ["", "{", "[1]", "3", '{"block_out_channels": "wide"}'])
def test_settings_that_build_no_denoiser_are_one_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text(text)
    with pytest.raises(ConfigError, match="its denoiser cannot be built from its settings") as refused:
        program.main(["--config", "miniature", "--gpus", "2", "--model.pretrained", str(tmp_path)])
    assert "\n" not in str(refused.value)


def test_encoders_of_unknown_size_are_said_to_be_left_out() -> None:
    run = config("--pairs_per_step", "32")
    plan = make_plan(WORK, run, resolve_deepspeed(run, world_size=2), GPU, ASSUMED)
    unknown = replace(WORK, vae_bytes=0, text_bytes=0)
    assert "left out" not in plan_text(plan, WORK, run, GPU, ASSUMED)
    assert "left out: VAE and text encoders of stabilityai" in plan_text(plan, unknown, run, GPU, ASSUMED)
    cached = config("--data.cache", "made", "--cadence.sample_every_steps", "none")
    assert "left out" not in plan_text(plan, unknown, cached, GPU, ASSUMED)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--picture", "plan.png"], r"--picture plan\.png: a name that ends in \.svg would fit"),
        (["--gpus", "3"], "nearest"),
        (["--picture", "nowhere/plan.svg"], r"--picture nowhere/plan\.svg cannot be written"),
    ],
)
def test_what_cannot_be_planned_is_one_error(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        program.main(["--config", "miniature", "--gpus", "2", *arguments])
    assert list(tmp_path.iterdir()) == []
