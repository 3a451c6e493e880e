"""Unit tests of what an export reads of a run's own files."""

from pathlib import Path

import pytest
from checkpoint_run import Run

from ds_dpo.errors import CheckpointError, ConfigError
from ds_dpo.export.source import BaseModel, base_of_run, find_source
from ds_dpo.storage.best_mark import BestMark, write_best_mark


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "run" / "checkpoints")


def test_the_base_is_the_run_s(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: {pretrained: owner/name, variant: fp16}\nof_tomorrow: {a: 1}\n")
    assert base_of_run(tmp_path) == BaseModel("owner/name", variant="fp16")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"model:\n  pretrained: a\n  revi", "is not valid YAML"),
        (b"\0\0\0", "is not valid YAML"),
        (b"3\n", "must contain names and values, not 3"),
        (b"- model\n", "must contain names and values, not a list"),
        (b"model: {pretrained: \xe9}\n", "is not UTF-8 text"),
        (b"[" * 600 + b"]" * 600, "is nested too deeply"),
    ],
)
def test_a_damaged_config_is_one_line_that_says_what_to_do(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(ConfigError) as refused:
        base_of_run(tmp_path)
    assert str(refused.value).startswith(f"{tmp_path / 'config.yaml'} {said}")
    assert str(refused.value).endswith("; give the base with --base")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("content", ["model: 3\n", "model: {pretrained: 3}\n", "other: {}\n", "model: {}\n"])
def test_a_config_without_a_base_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.yaml: has no model\.pretrained .*--base"):
        base_of_run(tmp_path)


def test_a_config_of_an_unknown_family_is_refused_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: {pretrained: owner/name, family: of_tomorrow}\n")
    with pytest.raises(CheckpointError, match=r"config\.yaml: model\.family of_tomorrow is none of sdxl, .*--base"):
        base_of_run(tmp_path)


def test_the_best_checkpoint_is_found_by_its_mark(run: Run) -> None:
    run.save(10, 20)
    with pytest.raises(CheckpointError, match=r"marks no best checkpoint"):
        find_source(run.folder, step="best")
    write_best_mark(run.folder, BestMark(metric="held_out.accuracy", step=10, value=0.75))
    said: list[str] = []
    assert find_source(run.folder, step="best", say=said.append).folder.name == "step_00000010"
    assert said == ["the best checkpoint by held_out.accuracy is that of step 10: 0.75"]
    assert find_source(run.folder, step=None).folder.name == "step_00000020"
