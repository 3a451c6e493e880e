"""The table of scorers: one row for each, with its class by name, so that a listing imports no torch; and plugins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points

from ds_dpo.config.fields import did_you_mean
from ds_dpo.errors import ConfigError, cut

PLUGIN_GROUP = "ds_dpo.scorers"
HERE = "ds_dpo.evaluation.scorers"
EVAL_EXTRA = "pip install 'ds_dpo[eval]'"


@dataclass(frozen=True, kw_only=True)
class ScorerKind:
    """A kind of scorer. made_by: MODULE:CLASS, called with a ScorerChoice and the name of a device.

    words: one sentence on what it measures. higher_is_better: None if its settings say which way is better. source:
    where its weights come from by default. takes: what NAME=SOURCE may name (nothing if unset). needs_source: it has
    no default. install: command that installs what it needs beside ds_dpo.
    """

    made_by: str
    words: str
    higher_is_better: bool | None = True
    source: str | None = None
    takes: str | None = None
    needs_source: bool = False
    install: str | None = None


MODEL_FOLDER = "a folder or hub id"

SCORERS: Mapping[str, ScorerKind] = {
    "pickscore": ScorerKind(
        made_by=f"{HERE}.clip:PickScore",
        words="How much people prefer the image for its prompt, learned from Pick-a-Pic; about 15 to 25.",
        source="yuvalkirstain/PickScore_v1",
        takes=MODEL_FOLDER,
    ),
    "clip": ScorerKind(
        made_by=f"{HERE}.clip:ClipScore",
        words="How well the image fits its prompt: 100 times the cosine of CLIP's embeddings, at least 0.",
        source="openai/clip-vit-large-patch14",
        takes=MODEL_FOLDER,
    ),
    "hpsv21": ScorerKind(
        made_by=f"{HERE}.hpsv21:HpsScore",
        words="How much people prefer the image for its prompt, learned from HPDv2: 100 x cosine, about 20 to 35.",
        source="xswu/HPSv2",
        takes="a .pt or .safetensors file, a folder or hub id",
    ),
    "aesthetic": ScorerKind(
        made_by=f"{HERE}.aesthetic:AestheticScore",
        words="How good the image looks, without its prompt: LAION's predictor on CLIP ViT-L/14; about 1 to 10.",
        source="trl-lib/ddpo-aesthetic-predictor",
        takes="the head's .pth or .safetensors file, a folder or hub id",
    ),
    "ocr": ScorerKind(
        made_by=f"{HERE}.ocr:OcrScore",
        words="Which share of the words that the prompt quotes can be read in the image, 0 to 1.",
        install=EVAL_EXTRA,
    ),
    "brisque": ScorerKind(
        made_by=f"{HERE}.brisque_score:BrisqueScore",
        words="How distorted the image looks (blur, noise, blocks), without its prompt; 0 to 100 or so.",
        higher_is_better=False,
        install=EVAL_EXTRA,
    ),
    "reward": ScorerKind(
        made_by=f"{HERE}.miniature_reward:MiniatureReward",
        words="The miniature's true reward: right colour, vivid and centred, 0 to 2; for its 32 px images alone.",
    ),
    "command": ScorerKind(
        made_by=f"{HERE}.command:open_command",
        words="Whatever a program of your own says, which reads and writes JSON lines.",
        higher_is_better=None,
        takes="the command of a program",
        needs_source=True,
    ),
    "http": ScorerKind(
        made_by=f"{HERE}.http_scorer:open_http",
        words="Whatever a server says: an OpenAI-style model that sees images, or one that answers plain JSON.",
        higher_is_better=None,
        takes="a URL",
        needs_source=True,
    ),
}


def plugins() -> Mapping[str, EntryPoint]:
    """Return the scorers of installed packages by name: entry points of the group ds_dpo.scorers, not yet imported."""
    return {point.name: point for point in entry_points(group=PLUGIN_GROUP) if point.name not in SCORERS}


def known_kinds() -> list[str]:
    """Return the names of all scorers that there are, those of the table first."""
    return [*SCORERS, *sorted(plugins())]


def require_known(kind: str) -> None:
    """Raise ConfigError, with the names there are, if neither the table nor a plugin has a kind of scorer."""
    known = known_kinds()
    if kind not in known:
        raise ConfigError(
            f"--scorer {cut(kind)}: there is no scorer of this name; {', '.join(known)} would fit"
            f"{did_you_mean(kind, known)}"
        )
