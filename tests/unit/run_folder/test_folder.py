"""Whose run a folder holds, and what is saved of a start."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from ds_dpo.config.load import config_from_yaml, load_config
from ds_dpo.config.run import RunConfig
from ds_dpo.errors import ConfigError
from ds_dpo.run_folder.folder import RunFolder, precision_of

SETTINGS = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}}


def config(*argv: str) -> RunConfig:
    return load_config(["--config", "miniature", *argv]).config


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "runs" / "one")


def test_a_new_folder_is_anyones(run: RunFolder) -> None:
    assert run.require_same_run(config(), precision="bf16") == []
    assert not run.path.exists(), "asking leaves nothing"


def test_a_start_is_saved_and_read_back(run: RunFolder) -> None:
    run.write_start(config("--seed", "3"), SETTINGS, world_size=2, data={})
    run.write_start(config("--seed", "3"), SETTINGS, world_size=4, data={"data": {"rows": 9, "pairs": 8}})
    assert config_from_yaml(run.config) == config("--seed", "3")
    assert json.loads(run.deepspeed.read_text()) == SETTINGS
    starts = json.loads(run.environment.read_text())
    assert [start["world_size"] for start in starts] == [2, 4]
    assert [start.get("data") for start in starts] == [None, {"rows": 9, "pairs": 8}]
    assert starts[0]["packages"].keys() >= {"torch", "deepspeed", "diffusers"}
    assert sorted(path.name for path in run.path.iterdir()) == ["config.yaml", "deepspeed.json", "environment.json"]


def test_another_identity_is_refused_with_old_and_new(run: RunFolder) -> None:
    run.write_start(config(), SETTINGS, world_size=2, data={})
    with pytest.raises(ConfigError) as refused:
        run.require_same_run(config("--objective.beta", "2000", "--seed", "1"), precision="fp16")
    said = str(refused.value)
    for part in (str(run.path), "objective.beta: 500.0 -> 2000.0", "seed: 0 -> 1", "precision: bf16 -> fp16"):
        assert part in said
    assert "output_dir" in said, "what to do"


def test_free_changes_are_taken_and_listed(run: RunFolder) -> None:
    run.write_start(config(), SETTINGS, world_size=2, data={})
    assert run.require_same_run(config(), precision="bf16") == []
    said = run.require_same_run(config("--micro_batch_pairs", "4", "--data.workers", "2"), precision="bf16")
    assert said == [
        "changed since the last start: data.workers 0 -> 2",
        "changed since the last start: batch.micro_batch_pairs 8 -> 4",
    ]


def test_a_longer_run_names_the_option_that_keeps_its_schedule(run: RunFolder) -> None:
    run.write_start(config("--max_train_steps", "40"), SETTINGS, world_size=2, data={})
    longer = ("--max_train_steps", "60")
    with pytest.raises(ConfigError) as refused:
        run.require_same_run(config(*longer), precision="bf16")
    assert "schedule.decay_steps: 40 -> 60" in str(refused.value)
    assert str(refused.value).endswith(
        "the end of schedule linear follows max_train_steps 60: to train to that step with the schedule that the run "
        "has, add --schedule.decay_steps 40"
    )
    extended = config(*longer, "--schedule.decay_steps", "40")
    assert run.require_same_run(extended, precision="bf16") == [
        "changed since the last start: max_train_steps 40 -> 60",
        "changed since the last start: schedule.decay_steps None -> 40",
    ]
    run.write_start(extended, SETTINGS, world_size=2, data={})
    assert run.require_same_run(config("--max_train_steps", "40"), precision="bf16") != [], "the first command goes on"
    with pytest.raises(ConfigError) as refused:
        run.require_same_run(config("--max_train_steps", "60", "--schedule.decay_steps", "50"), precision="bf16")
    assert "schedule.decay_steps: 40 -> 50" in str(refused.value)
    assert "add --schedule" not in str(refused.value)


def test_ranks_and_zero_stage_are_free_and_precision_is_not(run: RunFolder) -> None:
    run.write_start(config("--deepspeed_config", "zero2_bf16"), SETTINGS, world_size=2, data={})
    at_stage_3 = config("--deepspeed_config", "zero3_bf16", "--expected_world_size", "4")
    assert run.require_same_run(at_stage_3, precision="bf16") == [
        "changed since the last start: deepspeed_config 'zero2_bf16' -> 'zero3_bf16'",
        "changed since the last start: expected_world_size None -> 4",
    ]
    with pytest.raises(ConfigError, match="precision: bf16 -> fp32"):
        run.require_same_run(config("--deepspeed_config", "zero2_fp32_cpu"), precision="fp32")


def test_no_secret_of_the_environment_is_saved(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "swordfish")
    run.write_start(config(), SETTINGS, world_size=1, data={})
    assert [path for path in run.path.rglob("*") if path.is_file() and "swordfish" in path.read_text()] == []


def kill_at(number: int) -> Callable[[str, str], None]:
    replace, calls = os.replace, iter(range(100))

    def replaced(source: str, target: str) -> None:
        if next(calls) == number:
            raise KeyboardInterrupt
        replace(source, target)

    return replaced


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_start_killed_while_it_is_saved_can_be_repeated(
    run: RunFolder, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", kill_at(number))
        with pytest.raises(KeyboardInterrupt):
            run.write_start(config(), SETTINGS, world_size=1, data={})
    assert run.require_same_run(config("--seed", "5"), precision="bf16") == [], "nobody's yet"
    run.write_start(config("--seed", "5"), SETTINGS, world_size=1, data={})
    assert run.require_same_run(config("--seed", "5"), precision="bf16") == []


FILES = ("config.yaml", "deepspeed.json", "environment.json")
DEEP_YAML = b"[" * 600 + b"]" * 600
DAMAGES: dict[str, tuple[Callable[[bytes, bool], bytes], str]] = {
    "empty": (lambda content, is_json: b"", "is empty"),
    "cut off": (
        lambda content, is_json: content[:-4] if is_json else b"model:\n  pretrained: a\n  revi",
        "is not valid",
    ),
    "zeros, as a power cut leaves them": (lambda content, is_json: bytes(len(content)), "is not valid"),
    "of another type": (lambda content, is_json: b"3\n", "must contain .*, not 3"),
    "not UTF-8": (lambda content, is_json: b"\xff" + content, "is not UTF-8 text: byte 0 is 0xff"),
    "nested too deeply": (lambda content, is_json: b"[" * 90_000 if is_json else DEEP_YAML, "is nested too deeply"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_of_the_folder_is_one_line_that_says_what_to_do(run: RunFolder, name: str, damage: str) -> None:
    run.write_start(config(), SETTINGS, world_size=1, data={})
    change, what = DAMAGES[damage]
    path = run.path / name
    path.write_bytes(change(path.read_bytes(), path.suffix == ".json"))
    damaged = path.read_bytes()
    to_do = "move it away" if name == "environment.json" else "restore the file .* or give another output_dir"
    with pytest.raises(ConfigError, match=rf"^{path} {what}.*; {to_do}") as refused:
        run.require_same_run(config(), precision="bf16")
    assert "\n" not in str(refused.value)
    if name == "environment.json":
        with pytest.raises(ConfigError, match=rf"^{path} {what}"):
            run.write_start(config(), SETTINGS, world_size=1, data={})
        assert path.read_bytes() == damaged, "left for the user to look at"


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("config.yaml", "model: 3\n", "model is a section and must contain names and values, not 3"),
        ("config.yaml", "seed: [1]\n", "seed = [1]: "),
        ("deepspeed.json", '{"bf16": true}', "bf16 must contain names and values, not True"),
        ("deepspeed.json", "[]", "must contain names and values, not a list"),
        ("environment.json", "{}", "must contain a list, not names and values"),
        ("environment.json", "[1]", "a start must contain names and values, not 1"),
        ("environment.json", f'["{"x" * 10**6}"]', "a start must contain names and values, not 'xxx"),
        ("deepspeed.json", f'{{"bf16": "{"x" * 10**6}"}}', "bf16 must contain names and values, not 'xxx"),
        ("config.yaml", f"objective: {{type: dpo, mu: {'x' * 10**5}}}\n", "mu = "),
    ],
)
def test_a_file_of_another_shape_is_named(run: RunFolder, name: str, content: str, what: str) -> None:
    run.write_start(config(), SETTINGS, world_size=1, data={})
    (run.path / name).write_text(content)
    with pytest.raises(ConfigError) as refused:
        run.require_same_run(config(), precision="bf16")
    assert str(refused.value).startswith(str(run.path / name))
    assert what in str(refused.value)
    assert len(str(refused.value)) < 2000


def test_a_missing_deepspeed_json_is_named(run: RunFolder) -> None:
    run.write_start(config(), SETTINGS, world_size=1, data={})
    run.deepspeed.unlink()
    with pytest.raises(ConfigError, match=r"deepspeed\.json cannot be read: No such file or directory; restore"):
        run.require_same_run(config(), precision="bf16")


def test_what_a_killed_start_left_is_removed(run: RunFolder) -> None:
    run.path.mkdir(parents=True)
    (run.path / ".config.yaml.host.1.partial").touch()
    run.write_start(config(), SETTINGS, world_size=1, data={})
    assert sorted(path.name for path in run.path.iterdir()) == sorted(FILES)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"output_dir .*file/run.* cannot be written: Not a directory"):
        RunFolder(tmp_path / "file" / "run").write_start(config(), SETTINGS, world_size=1, data={})


def test_precision_is_read_from_the_settings() -> None:
    assert precision_of(SETTINGS) == "bf16"
    assert precision_of({"fp16": {"enabled": True}, "bf16": {"enabled": False}}) == "fp16"
    assert precision_of({}) == "fp32"
