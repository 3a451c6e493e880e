"""Trackers beside TensorBoard, by fakes of their packages that record calls."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ds_dpo.errors import ConfigError
from ds_dpo.run_folder.metrics import MetricsWriter
from ds_dpo.run_folder.trackers import SERVICES, open_trackers

SETTINGS = {"optimizer.learning_rate": 2e-4, "model.train": []}


class Service(ModuleType):
    """A package of either name. It records what it gets; `fails` names a call that raises."""

    def __init__(self) -> None:
        super().__init__("service")
        self.inits: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.fails, self.num_finished = "", 0

    def init(self, **options: Any) -> Any:
        self._reach("init")
        self.inits.append(options)
        return SimpleNamespace(log=self.log, finish=self.finish)

    def log(self, values: dict[str, Any], *, step: int) -> None:
        self._reach("log")
        self.logged.append((step, values))

    def finish(self) -> None:
        self._reach("finish")
        self.num_finished += 1

    def Image(self, pixels: Any, *, caption: str) -> tuple[Any, str]:
        return tuple(pixels.shape), caption

    def _reach(self, name: str) -> None:
        if self.fails == name:
            raise RuntimeError(f"{name} refused")


@pytest.fixture(params=SERVICES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def service(name: str, monkeypatch: pytest.MonkeyPatch) -> Service:
    service = Service()
    monkeypatch.setitem(sys.modules, name, service)
    for variable in ("WANDB_PROJECT", "WANDB_NAME", "TRACKIO_PROJECT"):
        monkeypatch.delenv(variable, raising=False)
    for variable in ("WANDB_CONSOLE", "WANDB_SILENT"):
        monkeypatch.setenv(variable, "true")
    return service


def writer(folder: Path, name: str, *, last_step: int = 0) -> MetricsWriter:
    trackers = open_trackers(["tensorboard", name], folder, SETTINGS)
    return MetricsWriter(folder, last_step=last_step, trackers=trackers)


def test_it_gets_what_metrics_jsonl_gets_and_the_configuration(tmp_path: Path, name: str, service: Service) -> None:
    metrics = writer(tmp_path / "run", name)
    metrics.write_scalars({"held_out/accuracy": 0.5}, step=0)
    metrics.write({"step": 1, "loss": 0.25})
    metrics.close()
    (begun,) = service.inits
    assert begun["config"] == SETTINGS
    assert (begun["project"], begun["resume"]) == ("ds_dpo", "allow")
    assert service.logged == [(0, {"held_out/accuracy": 0.5}), (1, {"train/loss": 0.25})]
    assert service.num_finished == 1


def test_a_resumed_run_continues_the_same_one_and_no_curve_goes_back(
    tmp_path: Path, name: str, service: Service
) -> None:
    first = writer(tmp_path, name)
    for step in range(1, 6):
        first.write({"step": step, "loss": float(step)})
    first.flush()  # killed after step 5, with a checkpoint of step 3
    second = writer(tmp_path, name, last_step=3)
    for step in range(4, 7):
        second.write({"step": step, "loss": 10.0 * step})
    second.rewind(2)  # the watchdog's
    for step in range(3, 8):
        second.write({"step": step, "loss": 100.0 * step})
    second.close()
    third = writer(tmp_path, name, last_step=2)
    for step in range(3, 9):
        third.write({"step": step, "loss": 1.0})
    third.close()
    assert [step for step, _ in service.logged] == [1, 2, 3, 4, 5, 6, 7, 8]
    run_id = json.loads((tmp_path / "trackers.json").read_text())[name]
    known_as = [begun.get("id") or begun["name"] for begun in service.inits]
    assert len(known_as) == 3
    assert set(known_as) == {run_id if name == "wandb" else f"{tmp_path.name}-{run_id}"}


def test_images_have_captions(tmp_path: Path, name: str, service: Service) -> None:
    metrics = writer(tmp_path, name)
    metrics.write_images("validation", torch.rand(2, 3, 8, 8), captions=["a cat, seed 0", "a cat, seed 1"], step=4)
    metrics.close()
    ((step, values),) = service.logged
    assert step == 4
    images = values["validation"] if name == "wandb" else list(values.values())
    assert images == [((8, 8, 3), "a cat, seed 0"), ((8, 8, 3), "a cat, seed 1")]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (text,) = events.Tensors("validation_captions/text_summary")
    assert text.tensor_proto.string_val[0].decode() == "1. a cat, seed 0\n2. a cat, seed 1"
    assert events.Tags()["images"] == ["validation"]


def test_one_that_is_not_installed_is_refused_with_what_to_install(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=rf"^trackers: {name} cannot be imported .*pip install 'ds_dpo\[{name}\]'"):
        open_trackers([name], tmp_path, SETTINGS)
    assert list(tmp_path.iterdir()) == []
    assert open_trackers(["tensorboard"], tmp_path, SETTINGS) == []


def test_one_that_does_not_start_is_refused(tmp_path: Path, name: str, service: Service) -> None:
    service.fails = "init"
    with pytest.raises(ConfigError, match=rf"trackers: {name} does not start \(RuntimeError: init refused\)"):
        open_trackers([name], tmp_path, SETTINGS)


@pytest.mark.parametrize("content", ["[" * 5000, "{", '["a"]', "null", "x" * 20_000])
def test_a_file_of_ids_that_cannot_be_used_is_named(tmp_path: Path, name: str, service: Service, content: str) -> None:
    (tmp_path / "trackers.json").write_text(content)
    with pytest.raises(
        ConfigError, match=r"trackers.json: cannot be used \(.*\); remove it to begin new runs"
    ) as refused:
        open_trackers([name], tmp_path, SETTINGS)
    assert len(str(refused.value)) < 500
    assert (tmp_path / "trackers.json").read_text() == content


@pytest.mark.parametrize("call", ["log", "finish"])
def test_one_that_fails_later_says_so_once_and_ends_nothing(
    tmp_path: Path, name: str, service: Service, call: str, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = writer(tmp_path, name)
    service.fails = call
    for step in (1, 2, 3):
        metrics.write({"step": step, "loss": 1.0})
    metrics.close()
    said = f"tracker {name} has failed and gets nothing more: RuntimeError: {call} refused\n"
    assert capsys.readouterr().err == said
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_without_tensorboard_there_is_none(tmp_path: Path) -> None:
    metrics = MetricsWriter(tmp_path, last_step=0, has_tensorboard=False)
    metrics.write({"step": 1, "loss": 1.0})
    metrics.flush()
    metrics.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
