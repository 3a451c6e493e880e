"""What scripts/evaluate.py does without drawing: its options."""

import shlex

from repository import ROOT

from ds_dpo.commands import evaluate


def test_models_come_in_the_order_of_the_command_line_with_their_loras() -> None:
    line = "--base a/b --model c/d --lora e:0.5 --model f/g --prompts p.txt q.txt --prompts parti --scorer clip --out o"
    given = evaluate.parse_arguments(line.split())
    assert given.models == [("a/b", []), ("c/d", ["e:0.5"]), ("f/g", [])]
    assert given.labels == ["base", None, None]
    assert (given.prompts, given.scorers) == (["p.txt", "q.txt", "parti"], ["clip"])
    roles = evaluate.parse_arguments(["--tuned", "t", "--sft", "s", "--base", "b", "--out", "o"])
    assert roles.models == [("b", []), ("s", []), ("t", [])]
    assert roles.labels == ["base", "sft", "tuned"]
    assert (roles.prompts, roles.scorers) == (["miniature"], ["reward"])
    twice = "--model a --model b --labels x y --prompts p --scorer s --out o"
    named = evaluate.parse_arguments(twice.split())
    assert named.labels == ["x", "y"]


def test_the_examples_of_the_pages_are_commands() -> None:
    text = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8") + (evaluate.__doc__ or "")
    commands = [line for line in text.replace("\\\n", " ").splitlines() if "scripts/evaluate.py --" in line]
    assert len(commands) > 7
    for command in commands:
        words = shlex.split(command.partition("scripts/evaluate.py")[2])
        assert evaluate.parse_arguments(words).out


def test_a_refiner_belongs_to_the_model_before_it() -> None:
    line = "--model a --lora l --refiner r --model b --prompts p --scorer s --out o"
    assert evaluate.parse_arguments(line.split()).models == [("a", ["l"], "r"), ("b", [])]
