"""Evaluations of the smallest pipeline on a few prompts, by scorers of a few lines. Other processes import it too."""

import json
import os
import signal
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ds_dpo.evaluation.drawing.named_model import ModelChoice
from ds_dpo.evaluation.run import line_log, score
from ds_dpo.evaluation.run.program import evaluate
from ds_dpo.evaluation.run.request import Request
from ds_dpo.evaluation.scorers.choice import ScorerChoice
from ds_dpo.storage.line_file import LineFile

PROMPTS = (
    "a red circle on a white background",
    "a blue square on a black background",
    "a green cross on a gray background",
)


@dataclass
class Brightness:
    """Rates an image by its mean, and remembers how many it rated. nan_for: prompts that get no number."""

    name: str
    higher_is_better: bool = True
    images_at_once: int = 2
    nan_for: tuple[str, ...] = ()
    rated: int = 0
    record: dict = field(default_factory=lambda: {"kind": "brightness"})

    def score(self, images, prompts):
        self.rated += len(images)
        values = [float(np.asarray(image).mean()) for image in images]
        return np.array([np.nan if prompt in self.nan_for else v for v, prompt in zip(values, prompts, strict=True)])


@dataclass
class Judge:
    """Prefers the brighter image by 0.8, and the one that comes first by 0.1 more."""

    name: str
    images_at_once: int = 2
    asked: int = 0
    record: dict = field(default_factory=lambda: {"kind": "judge"})

    def prefer(self, images, rivals, prompts):
        self.asked += len(images)
        pairs = zip(images, rivals, strict=True)
        return np.array([0.1 + np.sign(np.asarray(a).mean() - np.asarray(b).mean()) * 0.3 + 0.5 for a, b in pairs])


def write_prompts(folder: Path, name: str = "few", prompts: tuple[str, ...] = PROMPTS) -> str:
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": p, "tag": p.split()[-2]}) for p in prompts), encoding="utf-8")
    return str(path)


def run(out: Path, models: dict[str, str], prompts: list[str], scorers: list, *, say=None, export=None, **changes):
    """Evaluate in this process; returns the results."""
    by_name = {scorer.name: scorer for scorer in scorers}
    small = {"seeds": 2, "steps": 1, "guidance": 1.0, "batch": 2, "device": "cpu"}
    request = Request(
        models=tuple(ModelChoice(name) for name in models.values()),
        labels=tuple(models),
        prompts=tuple(prompts),
        scorers=tuple(ScorerChoice(name=name, kind="fake") for name in by_name),
        out=out,
        **{**small, **changes},
    )
    return evaluate(request, export=export, say=say or [].append, opener=lambda choice, device: by_name[choice.name])


def lines_in(folder: Path) -> list[dict]:
    return [json.loads(line) for path in sorted(folder.glob("rank_*.jsonl")) for line in path.read_text().splitlines()]


def images_in(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted((out / "images").rglob("*.png"))}


# ---- processes of their own ----


def evaluate_and_die(out: Path, models: dict[str, str], prompts: str, at: int, torn: bool) -> None:
    """Evaluate until the `at`-th piece of lines is about to be recorded; then this process is killed.

    torn: half of that piece is on the disk. at: 0 is never.
    """
    written = 0
    write = LineFile.write

    def counted(self, text: str) -> None:
        nonlocal written
        written += 1
        if written == at:
            if torn:
                write(self, text[: len(text) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, text)

    assert line_log.LineFile is LineFile
    LineFile.write = counted
    run(out, models, [prompts], [Brightness("bright"), Judge("judge")])


def evaluate_as_rank(out: Path, models: dict[str, str], prompts: str, rank: int, port: int) -> None:
    """Evaluate as one of two ranks. Only rank 0 reads what is scored, because another rank could read it later."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    if rank > 0:
        score.read_lines = None
    run(out, models, [prompts], [Brightness("bright"), Judge("judge")])
