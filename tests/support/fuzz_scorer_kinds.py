"""Kinds of files of scorers for tests/fuzz.py: a CLIP model's folder, heads and weights of torch, settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from fuzz_files import Prepare, Prepared

JUDGE = """scorer: http
name: vlm
source: http://127.0.0.1:8000/v1/chat/completions
model: judge
prompt_template: 'Rate the image of "{prompt}".'
parameters: {temperature: 0, max_tokens: 512}
answer_pattern: 'score: ([0-9.]+)'
answers: {"yes": 1, "no": 0.5}
requests_at_once: 16
timeout_seconds: 60
pairwise: false
"""


def _scores(kind: str, source: Path, **settings: object) -> Callable[[], object]:
    from tiny_clip import PROMPTS, random_images

    from ds_dpo.evaluation.scorers.choice import ScorerChoice
    from ds_dpo.evaluation.scorers.opening import open_scorer

    choice = ScorerChoice(name=kind, kind=kind, source=str(source), settings=settings)
    return lambda: open_scorer(choice, "cpu").score(random_images(2), PROMPTS[:2])


def _clip(pattern: str) -> Prepare:
    def prepare(folder: Path) -> Prepared:
        from tiny_clip import save_tiny_clip

        save_tiny_clip(folder / "clip")
        return Prepared(sorted((folder / "clip").glob(pattern)), _scores("clip", folder / "clip"))

    return prepare


def _aesthetic_head(folder: Path) -> Prepared:
    import torch
    from tiny_clip import random_head, save_tiny_clip

    save_tiny_clip(folder / "clip")
    head = folder / "head.pth"
    torch.save(random_head(), head)
    return Prepared([head], _scores("aesthetic", head, clip=str(folder / "clip")))


def _settings(folder: Path) -> Prepared:
    from ds_dpo.evaluation.scorers.choice import read_choices
    from ds_dpo.evaluation.scorers.opening import open_scorer

    path = folder / "judge.yaml"
    path.write_text(JUDGE)

    def read() -> None:
        (choice,) = read_choices([str(path)])
        if choice.kind == "http":  # nothing is sent yet
            open_scorer(choice, "cpu")

    return Prepared([path], read)


SCORER_KINDS: Mapping[str, Prepare] = {
    "weights of a scorer": _clip("*.safetensors"),
    "settings of a scorer": _clip("*.json"),
    "head of a scorer": _aesthetic_head,
    "scorer YAML": _settings,
}
