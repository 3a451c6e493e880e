"""Optimizers by name do their paper's first update, and schedules have the values that their formula gives."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch

from ds_dpo.config.load import load_config
from ds_dpo.config.optimization import OPTIMIZER_FIELDS, SCHEDULE_FIELDS, OptimizerConfig, ScheduleConfig
from ds_dpo.engine.compiler import require_compiler
from ds_dpo.engine.learning_rate import build_schedule
from ds_dpo.engine.optimizers import LARGEST_INT32, OPTIMIZERS, build_optimizer, require_countable
from ds_dpo.errors import ConfigError


def test_first_update_of_adamw_by_hand():
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.5, adam_beta1=0.8, adam_beta2=0.9, epsilon=1e-2)
    optimizer = build_optimizer([weight], config)
    gradient = [3.0, -0.04]
    weight.grad = torch.tensor(gradient)
    optimizer.step()
    # the first moments, rid of their bias, are the gradient and its square
    expected = [w * (1 - 0.1 * 0.5) - 0.1 * g / (abs(g) + 1e-2) for w, g in zip([1.0, -2.0], gradient, strict=True)]
    assert weight.tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("kind", "class_name", "expected"),
    [
        ("adamw_8bit", "AdamW8bit", {"betas": (0.8, 0.9), "eps": 1e-6}),
        ("lion", "Lion", {"betas": (0.7, 0.6)}),
        ("lion_8bit", "Lion8bit", {"betas": (0.7, 0.6)}),
    ],
)
def test_bitsandbytes_gets_the_options(monkeypatch, kind, class_name, expected):
    made = {}
    classes = SimpleNamespace(**{class_name: lambda parameters, **options: made.update(options) or "made"})
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace(optim=classes))
    own = {"adam_beta1": 0.8, "adam_beta2": 0.9, "epsilon": 1e-6, "lion_beta1": 0.7, "lion_beta2": 0.6}
    options = {name: own[name] for name in OPTIMIZER_FIELDS[kind]}
    config = OptimizerConfig(type=kind, learning_rate=0.1, weight_decay=0.5, **options)
    assert build_optimizer([], config) == "made"
    assert made == {"lr": 0.1, "weight_decay": 0.5, **expected}


def test_missing_bitsandbytes_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=r"type lion_8bit needs bitsandbytes: pip install bitsandbytes"):
        build_optimizer([], OptimizerConfig(type="lion_8bit", learning_rate=0.1))


def test_adamw_is_one_fused_kernel_on_every_device():
    weight = torch.nn.Parameter(torch.ones(2))
    assert build_optimizer([weight], OptimizerConfig(learning_rate=0.1)).defaults["fused"] is True


SDXL = 2_567_463_684


@pytest.mark.parametrize(
    ("kind", "elements", "stage", "options", "ranks", "fits"),
    [
        ("adamw_8bit", SDXL, 1, {}, 1, False),
        ("adamw_8bit", SDXL, 2, {}, 1, False),
        ("lion", SDXL, 1, {}, 1, False),
        ("lion_8bit", SDXL, 2, {}, 1, False),
        ("adamw", SDXL, 1, {}, 1, True),
        ("adamw_8bit", SDXL, 2, {}, 2, True),
        ("adamw_8bit", SDXL, 3, {}, 1, True),
        ("adamw_8bit", SDXL, 3, {"sub_group_size": 10**12}, 1, False),
        ("adamw_8bit", LARGEST_INT32, 1, {}, 1, True),
        ("adamw_8bit", LARGEST_INT32 + 1, 1, {}, 1, False),
        ("adamw_8bit", 2 * LARGEST_INT32 + 1, 1, {}, 2, False),
    ],
)
def test_bitsandbytes_updates_no_more_elements_than_it_can_count(kind, elements, stage, options, ranks, fits):
    config = OptimizerConfig(type=kind, learning_rate=0.1)
    zero = {"stage": stage, **options}
    if fits:
        require_countable(config, num_trained=elements, zero=zero, world_size=ranks)
        return
    with pytest.raises(
        ConfigError, match=rf"optimizer.type {kind} would update \d+ elements .*zero3_bf16, or at least 2|3"
    ):
        require_countable(config, num_trained=elements, zero=zero, world_size=ranks)


def test_an_option_that_compiles_needs_a_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    require_compiler({"stage": 3, "zero_quantized_weights": False})
    with pytest.raises(ConfigError, match=r"zero_quantized_weights compiles an extension .* no nvcc"):
        require_compiler({"stage": 3, "zero_quantized_weights": True})
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch()
    require_compiler({"stage": 3, "zero_quantized_weights": True})


@pytest.mark.parametrize("kind", ["adamw_8bit", "lion", "lion_8bit"])
def test_bitsandbytes_itself_updates_on_this_device(kind):
    pytest.importorskip("bitsandbytes")
    generator = torch.Generator().manual_seed(0)
    start, gradient = (torch.randn(8192, generator=generator) for _ in range(2))
    weight = torch.nn.Parameter(start.clone())
    optimizer = build_optimizer([weight], OptimizerConfig(type=kind, learning_rate=0.1, weight_decay=0.0))
    weight.grad = gradient.clone()
    optimizer.step()
    # the first update of each is the gradient's sign
    torch.testing.assert_close(weight.detach(), start - 0.1 * gradient.sign(), rtol=0, atol=1e-3)


def test_tables_and_choices_name_the_same_optimizers_and_schedules():
    from diffusers.optimization import SchedulerType

    assert OPTIMIZERS.keys() == OPTIMIZER_FIELDS.keys()
    assert SCHEDULE_FIELDS.keys() == {kind.value for kind in SchedulerType}


@pytest.mark.parametrize(
    ("schedule", "expected"),  # rate / peak by step; warm-up to 4, end at 12
    [
        ({"name": "constant"}, {0: 1, 20: 1}),
        ({"name": "constant_with_warmup", "warmup_steps": 4}, {0: 0, 1: 0.25, 4: 1, 20: 1}),
        ({"name": "linear", "warmup_steps": 4}, {2: 0.5, 4: 1, 6: 0.75, 12: 0}),
        ({"name": "linear", "warmup_steps": 4, "decay_steps": 8}, {4: 1, 6: 0.5, 8: 0, 9: 0}),
        (
            {"name": "cosine", "warmup_steps": 4},
            {3: 0.75, 4: 1, 6: (1 + math.cos(math.pi / 4)) / 2, 8: 0.5, 20: 0},
        ),
        ({"name": "cosine", "decay_steps": 8}, {0: 1, 4: 0.5, 8: 0, 9: 0, 12: 0, 16: 0}),
        ({"name": "cosine_with_restarts", "warmup_steps": 4, "num_cycles": 2}, {6: 0.5, 8: 1, 10: 0.5, 12: 0, 14: 0}),
        (
            {"name": "cosine_with_restarts", "num_cycles": 2, "decay_steps": 8},
            {2: 0.5, 4: 1, 6: 0.5, 8: 0, 10: 0},
        ),
        ({"name": "polynomial", "power": 2, "end_rate": 0.001, "decay_steps": 8}, {8: 0.1, 9: 0.1, 20: 0.1}),
        # from 1 to 0.2 of the peak, 0.01
        ({"name": "polynomial", "warmup_steps": 4, "end_rate": 0.002}, {2: 0.5, 4: 1, 8: 0.6, 12: 0.2, 15: 0.2}),
        ({"name": "polynomial", "power": 2, "end_rate": 0, "decay_steps": 8}, {0: 1, 4: 0.25, 6: 1 / 16, 8: 0}),
        ({"name": "piecewise_constant", "step_rules": "1:2,0.5:5,0.1"}, {0: 1, 1: 1, 2: 0.5, 4: 0.5, 5: 0.1, 20: 0.1}),
    ],
)
def test_rates_by_hand(schedule, expected):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.01)
    rates = build_schedule(optimizer, ScheduleConfig(**schedule), max_train_steps=12)
    found = []
    for _ in range(21):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        rates.step()
    assert {step: found[step] for step in expected} == pytest.approx(
        {step: 0.01 * share for step, share in expected.items()}, abs=1e-12
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--optimizer.type", "adafactor"],
            "optimizer.type = adafactor: Adafactor needs the rows and columns.*flat parts",
        ),
        (["--use_adafactor"], "use_adafactor is not accepted: Adafactor needs the rows and columns"),
        (["--use_8bit_adam"], "use_8bit_adam is not accepted: give --optimizer.type adamw_8bit"),
        (
            ["--optimizer.type", "lion", "--adam_epsilon", "1e-6"],
            "ignores epsilon 1e-06; take adamw or adamw_8bit",
        ),
        (
            ["--optimizer.lion_beta1", "0.8"],
            "adamw ignores lion_beta1 0.8; take lion or lion_8bit, or set lion_beta1 to 0.9",
        ),
        (["--schedule.num_cycles", "2"], "linear ignores num_cycles 2; take cosine_with_restarts"),
        (["--schedule.step_rules", "1:10,0.1"], "linear ignores step_rules 1:10,0.1; take piecewise_constant"),
        (
            ["--schedule.name", "polynomial", "--lr", "1e-8"],
            "end_rate 1e-07 must be below optimizer.learning_rate 1e-08",
        ),
        (["--schedule.name", "polynomial", "--schedule.decay_steps", "20"], "warmup_steps 20 must be below"),
        (["--schedule.name", "piecewise_constant", "--warmup_steps", "0"], "needs schedule.step_rules"),
        (["--schedule.step_rules", ""], "schedule.step_rules is empty; give a value, or none to unset it"),
        (["--schedule.decay_steps", "19"], "warmup_steps 20 is more than schedule.decay_steps 19, the step"),
        *(
            (
                ["--schedule.name", "piecewise_constant", "--warmup_steps", "0", f"--schedule.step_rules={rules}"],
                "rising",
            )
            for rules in ("1:10", "1:10,0.5:5,0.1", "1:10,1:10,1", "x:10,1", "1:1.5,1", "-1:10,1", "1:0,1")
        ),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        load_config(["--config", "miniature", *options])
