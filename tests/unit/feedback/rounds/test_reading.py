"""The configuration file of rounds: what is refused, by the name of its field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from small_rounds import DOCUMENT, rounds_config

from ds_dpo.errors import ConfigError
from ds_dpo.feedback.rounds.program import plan_lines, prepare
from ds_dpo.feedback.rounds.reading import EXAMPLES, field_lines, find_config, read_rounds


def written(folder: Path, **changes: Any) -> Path:
    path = folder / "rounds.yaml"
    document: dict[str, Any] = {"output_dir": str(folder / "out"), **DOCUMENT}
    for name, value in changes.items():
        inside = dict(document[name]) if isinstance(value, dict) and name in document else {}
        document[name] = {**inside, **value} if isinstance(value, dict) else value
    path.write_text(yaml.safe_dump(document))
    return path


OTHER_CLIP = "scorer: clip\nname: mine\n"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scorers": ["clipp"]}, "--scorer clipp: there is no scorer of this name; .*did you mean clip"),
        ({"scorers": []}, "scorers = .*at least 1 item"),
        (
            {"evaluation": {"held_out": "clip"}},
            "evaluation.held_out clip: clip labels the pairs .*, so it is trained on",
        ),
        ({"evaluation": {"held_out": "mine.yaml"}}, "evaluation.held_out .*mine.yaml: clip labels the pairs"),
        ({"prompts": []}, "prompts = .*at least 1 item"),
        ({"image_per_prompt": 3}, "there is no field image_per_prompt; did you mean images_per_prompt"),
        ({"evaluation": {"heldout": "ocr"}}, "there is no field evaluation.heldout; did you mean held_out"),
        ({"scorers": ["human", "clip"]}, "scorers human, clip: people replace all scorers; give human alone"),
        ({"scorers": ["human"], "evaluation": {"held_out": None}}, "scorers human: the evaluation has no scorer"),
        ({"evaluation": {"scorers": ["human"]}}, "evaluation: human is no scorer there"),
        ({"votes": {4: "votes.jsonl"}}, "votes 4: there is no such round; a number from 1 to 3 would fit"),
        ({"rounds": 0}, "rounds = 0: .*greater than or equal to 1"),
        (
            {"run": {"options": {"output_dir": "x"}}},
            "run.options.output_dir = 'x': each round has its own; leave it out",
        ),
        ({"run": {"options": {"dataset": "x"}}}, "run.options.dataset = 'x': a run trains on the pairs of its round"),
        ({"run": {"options": {"resume": 5}}}, "run.options.resume: is no option of a run's configuration"),
        ({"run": {"options": {"max_train_step": 5}}}, "run: .*max_train_step"),
        ({"run": {"config": "minature"}}, "run: --config minature is neither a preset"),
        (
            {"reference": "following", "run": {"options": {"adapter.type": "lora", "reference.residency": "adapter"}}},
            "reference following: a run with adapter.type lora has no whole denoiser",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_its_field(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(OTHER_CLIP)
    with pytest.raises(ConfigError, match=message) as refused:
        read_rounds(written(tmp_path, **changes))
    assert "\n" not in str(refused.value)


def test_a_file_that_lacks_fields_names_them(tmp_path: Path) -> None:
    (tmp_path / "rounds.yaml").write_text("rounds: 2\n")
    with pytest.raises(ConfigError, match="output_dir is missing; prompts is missing; scorers is missing; evaluation"):
        read_rounds(tmp_path / "rounds.yaml")
    with pytest.raises(ConfigError, match=r"absent.yaml"):
        read_rounds(tmp_path / "absent.yaml")


def test_prompts_are_read_before_anything_runs(tmp_path: Path) -> None:
    config = rounds_config(tmp_path)
    (tmp_path / "drawn.txt").write_text("\n \n")
    with pytest.raises(ConfigError, match=r"drawn.txt: has no prompt"):
        prepare(config, say=print)
    (tmp_path / "drawn.txt").write_text("a red cross\n")
    assert "warning: 1 prompts of evaluation.prompts are trained on" in prepare(config, say=print).lines
    (tmp_path / "judged.txt").write_text("a red cross\n")
    with pytest.raises(ConfigError, match=r"evaluation.prompts: 1 prompt gives no interval"):
        prepare(config, say=print)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_of_the_package_has_a_plan(name: str, tmp_path: Path) -> None:
    config = read_rounds(find_config(name), output_dir=tmp_path / "out")
    lines = plan_lines(prepare(config, say=print))
    assert lines[0].startswith("3 rounds from ds_dpo://assets/miniature/model; the reference is that model in all")
    assert sum(" train " in line for line in lines) == 3
    assert not (tmp_path / "out").exists()


def test_ranks_go_through_the_launcher(tmp_path: Path) -> None:
    launch = {"ranks": 2, "arguments": ["--master_port", "29777"]}
    lines = plan_lines(prepare(rounds_config(tmp_path, launch=launch), say=print))
    stages = [line.split() for line in lines if "--module ds_dpo" in line]
    assert [words[words.index("ds_dpo") + 1] for words in stages] == ["make-pairs", "train", "evaluate"] * 3
    assert all(words[1:5] == ["--num_accelerators", "2", "--master_port", "29777"] for words in stages)


def test_every_field_has_its_help() -> None:
    lines = list(field_lines())
    assert len(lines) > 25
    assert all(line.rstrip().endswith(".") for line in lines), [line for line in lines if not line.endswith(".")]
