"""A checkpoint of two ranks read into the engines of others; small stand-ins have DeepSpeed's attributes."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from ds_dpo.engine.elastic import read_into
from ds_dpo.engine.layout import Part, engine_layout, layout_digest
from ds_dpo.engine.moving_average import MovingAverage
from ds_dpo.errors import CheckpointError

SHAPES = {"weight": (2, 3), "bias": (3,)}
MASTER = torch.arange(9.0) + 1
RATES = {"lr": 0.25, "initial_lr": 0.5}
SCALER = {"dynamic": True, "cur_scale": 8.0, "cur_iter": 7, "last_overflow_iter": 5, "cur_hysteresis": 1}


class DynamicLossScaler:
    """Pickled under DeepSpeed's name."""

    __module__ = "deepspeed.runtime.fp16.loss_scaler"

    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)


class Keeping(torch.optim.Optimizer):
    """Keeps whatever states a checkpoint gives it; bitsandbytes' Lion names its own state1 and counts in an int."""

    def __init__(self, parameters: list[Tensor]) -> None:
        super().__init__(parameters, {"lr": 1.0, "initial_lr": 2.0, "beta": 0.9})


class Model(nn.Module):
    config: ClassVar[dict[str, Any]] = {}

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(3))
        self.frozen = nn.Parameter(torch.zeros(2), requires_grad=False)


class Engine:
    """What read_into touches of a DeepSpeedEngine of ZeRO 2; as rank `global_rank` of `dp_world_size`."""

    global_steps = skipped_steps = global_samples = 0

    def __init__(self, *, rank: int = 0, world_size: int = 1, paddings: tuple[int, int] = (0, 0)) -> None:
        self.global_rank, self.dp_world_size, self.module = rank, world_size, Model()
        size = -(-(9 + sum(paddings)) // (2 * world_size)) * 2  # filled up to a multiple of 2 on each rank
        master = torch.zeros(size, requires_grad=True)
        self.optimizer: Any = SimpleNamespace(
            single_partition_of_fp32_groups=[master],
            round_robin_bit16_padding=[list(paddings)],
            optimizer=Keeping([master]),
            loss_scaler=DynamicLossScaler(dynamic=True, cur_scale=1.0, scale_window=11),
            _link_all_hp_params=lambda: None,
            update_lp_params=lambda: self.followed.append(master.detach().clone()),
        )
        self.followed: list[Tensor] = []
        self.schedule: dict[str, Any] = {}
        self.lr_scheduler = SimpleNamespace(load_state_dict=self.schedule.update)

    @property
    def master(self) -> Tensor:
        master: Tensor = self.optimizer.single_partition_of_fp32_groups[0]
        return master

    def state(self) -> dict[str, Any]:
        return dict(self.optimizer.optimizer.state[self.master])

    def zero_optimization_partition_weights(self) -> bool:
        return False

    def zero_optimization_stage(self) -> int:
        return 2

    def fp16_enabled(self) -> bool:
        return True

    def _get_zero_param_shapes(self) -> list[dict[str, torch.Size]]:
        return [{name: torch.Size(shape) for name, shape in SHAPES.items()}]


def save(folder: Path, *states: dict[str, Any], ema: bool = True, **model: Any) -> Path:
    """Save as two ranks of ZeRO 2 do, of 5 and 4 elements; states: of each rank's optimizer."""
    folder.mkdir(parents=True)
    content = {
        "module": {"weight": torch.zeros(2, 3), "bias": torch.zeros(3), "frozen": torch.tensor([5.0, 6.0])},
        "buffer_names": [],
        "param_shapes": [{name: torch.Size(shape) for name, shape in SHAPES.items()}],
        "dp_world_size": 2,
        "ds_config": {},
        "global_steps": 7,
        "skipped_steps": 2,
        "global_samples": 70,
        "lr_scheduler": {"base_lrs": [0.5], "last_epoch": 5},
        "theirs": {"step": 7},
    }
    torch.save({**content, **model}, folder / "mp_rank_00_model_states.pt")
    for rank, (part, state) in enumerate(zip(MASTER.split([5, 4]), states, strict=True)):
        inner = {
            "zero_stage": 2,
            "partition_count": [2],
            "loss_scaler": DynamicLossScaler(**SCALER, scale_window=1000),
            "single_partition_of_fp32_groups": [part.clone()],
            "base_optimizer_state": {"state": {0: state} if state else {}, "param_groups": [{**RATES, "beta": 0.1}]},
        }
        torch.save({"optimizer_state_dict": inner}, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        if ema:
            average = {"format": 1, "updates": 5, "flat_groups": [-part]}
            torch.save(average, folder / f"ema_rank_{rank:05d}.pt")
    return folder


@pytest.fixture(autouse=True)
def deepspeeds_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let pickle find the stand-in where DeepSpeed has its own."""
    from deepspeed.runtime.fp16 import loss_scaler

    monkeypatch.setattr(loss_scaler, "DynamicLossScaler", DynamicLossScaler)


def read(engine: Engine, folder: Path, **options: Any) -> Any:
    return read_into(engine, folder, **{"averages": (), "has_frozen_weights": True, **options})


def adamw(start: float, numel: int) -> dict[str, Any]:
    values = torch.arange(start, start + numel, dtype=torch.float32)
    return {"step": torch.tensor(5.0), "exp_avg": values, "exp_avg_sq": 10 * values}


def test_all_that_a_run_goes_on_from_is_set(tmp_path: Path) -> None:
    folder = save(tmp_path / "tag", adamw(1, 5), adamw(6, 5))  # states alone keep the padding at the end
    engine = Engine(paddings=(1, 0))  # w w w w w w _ b b b
    average = MovingAverage([torch.zeros(10)], decay=0.9)
    assert read(engine, folder, averages=[average])["theirs"] == {"step": 7}
    expected = [1, 2, 3, 4, 5, 6, 0, 7, 8, 9]
    assert engine.master.tolist() == expected
    assert engine.state()["exp_avg"].tolist() == expected
    assert engine.state()["exp_avg_sq"].tolist() == [10 * value for value in expected]
    assert engine.state()["step"].item() == 5
    assert average.groups[0].tolist() == [-value for value in expected]
    average.update([torch.ones(10)])
    assert average._updates == 6
    assert engine.module.frozen.tolist() == [5, 6]
    assert (engine.global_steps, engine.skipped_steps, engine.global_samples) == (7, 2, 70)
    assert engine.schedule == {"base_lrs": [0.5], "last_epoch": 5}
    (group,) = engine.optimizer.optimizer.param_groups
    assert {name: group[name] for name in ("lr", "initial_lr", "beta")} == {**RATES, "beta": 0.9}
    assert vars(engine.optimizer.loss_scaler) == {**SCALER, "scale_window": 11}, "what moves, and no setting"
    (followed,) = engine.followed
    assert followed.tolist() == expected, "the working weights follow when all masters are set"


def test_each_of_more_ranks_reads_its_own_part(tmp_path: Path) -> None:
    folder = save(tmp_path / "tag", adamw(1, 5), adamw(6, 4))
    engines = [Engine(rank=rank, world_size=3) for rank in range(3)]
    for engine in engines:
        read(engine, folder)
    assert [engine.master.tolist() for engine in engines] == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 0, 0, 0]]
    assert engines[1].state()["exp_avg"].tolist() == [5, 6, 7, 8]
    assert engine_layout(engines[1]).parts == [
        Part(name="weight", start=4, numel=2, group=0, offset=0),
        Part(name="bias", start=0, numel=2, group=0, offset=2),
    ]


def test_other_optimizers_states_come_by_their_own_names(tmp_path: Path) -> None:
    folder = save(tmp_path / "tag", {"step": 4, "state1": torch.ones(5)}, {"step": 4, "state1": 2 * torch.ones(4)})
    engine = Engine()
    read(engine, folder)
    assert engine.state()["step"] == 4
    assert engine.state()["state1"].tolist() == [1, 1, 1, 1, 1, 2, 2, 2, 2, 0]
    assert engine.state().keys() == {"step", "state1"}


def test_a_live_engines_states_are_replaced(tmp_path: Path) -> None:
    engine = Engine()
    read(engine, save(tmp_path / "late", adamw(1, 5), adamw(6, 4)))
    read(engine, save(tmp_path / "before_any_update", {}, {}))
    assert engine.state() == {}


@pytest.mark.parametrize(
    ("states", "said"),
    [
        (
            [{"step": 4, "state1": torch.zeros(5, dtype=torch.uint8), "absmax1": torch.zeros(1)}] * 2,
            r"optimizer keeps state1 \(uint8 of shape \(5,\) .*absmax1 \(float32 of shape \(1,\).*2 ranks at stage 2",
        ),
        ([adamw(1, 5), {}], r"step \(in some groups of weights only\)"),
        ([{"step": 4}, {"step": 5}], r"step \(not the same in all groups\)"),
    ],
)
def test_what_fits_no_other_layout_is_refused_by_name(tmp_path: Path, states: list[dict[str, Any]], said: str) -> None:
    folder = save(tmp_path / "tag", *states)
    engine = Engine()
    with pytest.raises(CheckpointError, match=said):
        read(engine, folder)
    assert engine.master.tolist() == [0] * 10, "before anything is changed"
    assert engine.followed == []


def test_a_missing_average_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "tag", {}, {}, ema=False)
    with pytest.raises(CheckpointError, match=r"has no moving average of the weights, which ema.decay"):
        read(Engine(), folder, averages=[MovingAverage([torch.zeros(10)], decay=0.9)])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda engine: engine.module.bias.requires_grad_(False), "bias was trained there, but this run freezes it"),
        (
            lambda engine: engine.module.register_parameter("new", nn.Parameter(torch.ones(1), requires_grad=False)),
            "the frozen weight new is missing",
        ),
        (
            lambda engine: setattr(
                engine, "_get_zero_param_shapes", lambda: [{"weight": torch.Size((3, 2)), "bias": torch.Size((3,))}]
            ),
            r"weight is of shape \(2, 3\) there, but this run trains it with shape \(3, 2\)",
        ),
        (
            lambda engine: setattr(
                engine, "_get_zero_param_shapes", lambda: [{"weight": torch.Size((2, 3)), "gain": torch.Size((3,))}]
            ),
            r"gain is missing there, but this run trains it with shape \(3,\)",
        ),
        (
            lambda engine: setattr(
                engine, "_get_zero_param_shapes", lambda: [{"weight": torch.Size((2, 3)), "frozen": torch.Size((3,))}]
            ),
            r"frozen is frozen there, but this run trains it with shape \(3,\)",
        ),
    ],
)
def test_other_weights_are_refused_by_name(tmp_path: Path, change: Any, said: str) -> None:
    engine = Engine()
    change(engine)
    folder = save(tmp_path / "tag", {}, {})
    with pytest.raises(CheckpointError, match=said):
        read(engine, folder)


def test_what_a_training_needs_and_the_files_lack_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path / "tag", {}, {}, lr_scheduler=None)
    with pytest.raises(CheckpointError, match=re.escape(f"{folder}: lacks a value that a resumed run needs")):
        read(Engine(), folder)


def test_the_digest_tells_layouts_apart() -> None:
    engines = [Engine(), Engine(world_size=2), Engine(paddings=(1, 0)), Engine(rank=1, world_size=2)]
    first, second, third, again = [layout_digest(engine) for engine in engines]
    assert len({first, second, third}) == 3
    assert second == again, "the same on every rank"
    shuffled = Engine()
    shuffled._get_zero_param_shapes = lambda: [  # type: ignore[method-assign]
        {name: torch.Size(SHAPES[name]) for name in ("bias", "weight")}
    ]
    assert layout_digest(shuffled) != first
