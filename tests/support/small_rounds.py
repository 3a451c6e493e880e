"""Rounds whose stages take no time: each leaves the files by which a finished stage is known."""

import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from ds_dpo.evaluation.results import ImageRow, ModelRow, PromptRow, Results, ScorerRow
from ds_dpo.evaluation.results_file import save_results
from ds_dpo.feedback.rounds.reading import parse_rounds
from ds_dpo.storage.manifest import Manifest, hash_file, write_manifest

COLOURS = ("red", "blue", "green", "gray", "pink")
PROMPTS = {"drawn": ["a red circle", "a blue square"], "judged": [f"a {colour} cross" for colour in COLOURS]}
STEPS = 4
DOCUMENT = {
    "rounds": 3,
    "prompts": ["drawn.txt"],
    "images_per_prompt": 4,
    "scorers": ["clip"],
    "evaluation": {"prompts": ["judged.txt"], "images_per_prompt": 2, "held_out": "brisque"},
    "run": {"config": "miniature", "options": {"max_train_steps": STEPS}},
}


def rounds_config(folder: Path, **changes):
    """Return the configuration of rounds in folder/out; its prompts are written."""
    for name, prompts in PROMPTS.items():
        (folder / f"{name}.txt").write_text("\n".join(prompts))
    document = {**DOCUMENT, "output_dir": str(folder / "out"), "prompts": [str(folder / "drawn.txt")], **changes}
    judged = {**DOCUMENT["evaluation"], "prompts": [str(folder / "judged.txt")], **changes.get("evaluation", {})}
    return parse_rounds({**document, "evaluation": judged}, source="rounds.yaml")


class Stages:
    """Stands in for the programs. calls: what was called, as (program, round).

    brisque: its mean by round, from the base on. fails, dies: places in the order of calls, from 1, of a program that
    fails, or is killed with the rounds.
    """

    def __init__(self, *, brisque: Sequence[float] = (30, 30, 30, 30), fails: int = 0, dies: int = 0) -> None:
        self.brisque, self.fails, self.dies = brisque, fails, dies
        self.calls: list[tuple[str, int]] = []
        self.commands: list[list[str]] = []
        self.stops_at = STEPS

    def __call__(self, command: Sequence[str]) -> int:
        words = list(command)
        words = words[words.index("ds_dpo") + 1 :]
        self.commands.append(words)
        out = Path(words[2] if words[0] == "consolidate" else option(words, "out") or option(words, "output_dir"))
        is_last = words[0] == "evaluate" and out.name != "pairs"
        number = len(labels_of(words)) - 1 if is_last else int(out.parent.name[-2:])
        self.calls.append((words[0] if out.name != "pairs" else "draw", number))
        if len(self.calls) == self.dies:
            raise KeyboardInterrupt
        if len(self.calls) == self.fails:
            return 1
        {"make-pairs": self.draw, "train": self.train, "consolidate": self.export, "evaluate": self.evaluate}[words[0]](
            out, words
        )
        return 0

    def draw(self, out: Path, words: list[str]) -> None:
        out.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"caption": ["x"]}), out / "pairs.parquet")
        record = {"pairs": 5, "prompts": 2, "undecided": 1, "rule": "best_worst", "scorers": {"clip": {}}}
        (out / "pairs.json").write_text(json.dumps(record))

    def train(self, out: Path, words: list[str]) -> None:
        folder = out / "checkpoints" / f"step_{self.stops_at:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "weights").write_text(" ".join(words))
        files = {"weights": hash_file(folder / "weights")}
        write_manifest(
            folder,
            Manifest(step=self.stops_at, world_size=1, stage=2, precision="fp32", fingerprint="", files=files),
        )

    def export(self, out: Path, words: list[str]) -> None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "export.json").write_text("{}")

    def evaluate(self, out: Path, words: list[str]) -> None:
        prompts = PROMPTS["drawn" if out.name == "pairs" else "judged"]
        results = self.results(labels_of(words), prompts, int(option(words, "seeds")), out)
        save_results(results, out)
        models = {
            label: {"scores": {"clip": {"mean": place}, "brisque": {"mean": self.brisque[place]}}, "diversity": 0.5}
            for place, label in enumerate(labels_of(words))
        }
        (out / "summary.json").write_text(json.dumps({"models": models}))

    def results(self, labels: list[str], prompts: list[str], seeds: int, out: Path) -> Results:
        rows = []
        for place, label in enumerate(labels):
            for prompt in range(len(prompts)):
                for seed in range(seeds):
                    path = out / "images" / f"{label}_{prompt}_{seed}.png"
                    content = png(20 * prompt + 5 * seed + place)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(content)
                    # brisque is better if it is lower; its scatter over prompts, of mean 0, is wider than a fall of 0.1
                    scatter = 0.3 * ((prompt + place) % len(prompts) - len(prompts) // 2)
                    scores = {"clip": place + (prompt + seed) % 2, "brisque": self.brisque[place] + scatter}
                    rows.append(
                        ImageRow(
                            model=label,
                            prompt=prompt,
                            seed=seed,
                            path=path.relative_to(out).as_posix(),
                            sha256=hashlib.sha256(content).hexdigest(),
                            scores=scores,
                        )
                    )
        return Results(
            evaluation=f"evaluation of {out.parent.name}",
            models=[ModelRow(label=label, source=label) for label in labels],
            scorers=[
                ScorerRow(name="clip", higher_is_better=True, record={}),
                ScorerRow(name="brisque", higher_is_better=False, record={}),
            ],
            prompts=[PromptRow(prompt=text, prompt_set="set") for text in prompts],
            images=rows,
            comparisons=[],
            settings={"seeds": seeds, "resolution": 32},
        )


def option(words: Sequence[str], name: str) -> str:
    """Return the value of an option, spelled with a space or =; '' without it."""
    for place, word in enumerate(words):
        if word == f"--{name}":
            return words[place + 1]
        if word.startswith(f"--{name}="):
            return word.partition("=")[2]
    return ""


def labels_of(words: Sequence[str]) -> list[str]:
    first = words.index("--labels") + 1
    return list(words[first : next(p for p in range(first, len(words)) if words[p].startswith("--"))])


def png(shade: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((32, 32, 3), shade % 256, dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()
