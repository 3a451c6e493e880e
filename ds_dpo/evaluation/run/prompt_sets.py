"""Sets of prompts for an evaluation: files in the usual forms, and known sets by name; imports no torch."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_dpo.errors import ConfigError, cut, shown
from ds_dpo.evaluation.drawing.prompt_file import JSON_LINES, full_lines, json_objects, read_text
from ds_dpo.evaluation.run.table_rows import read_csv, read_parquet
from ds_dpo.outside import parse_json
from ds_dpo.process.say import Say

TEXT_FIELDS = ("prompt", "Prompt", "caption", "text")
CATEGORY_FIELDS = ("category", "Category", "tag", "style")
HPSV2_STYLES = ("anime", "concept-art", "paintings", "photo")
NAME = re.compile(r"[\w.+-]{1,80}")
SHOWN_DUPLICATES = 3


@dataclass(frozen=True)
class Prompt:
    """A prompt, and its category if the set has categories."""

    text: str
    category: str | None = None


@dataclass(frozen=True)
class PromptSet:
    """Different prompts under a name."""

    name: str
    prompts: tuple[Prompt, ...]

    @property
    def sha256(self) -> str:
        """Digest of all prompts in their order; images are numbered by it."""
        return hashlib.sha256("\0".join(prompt.text for prompt in self.prompts).encode()).hexdigest()

    @property
    def categories(self) -> tuple[str, ...]:
        """The categories in the order in which they come first."""
        return tuple(dict.fromkeys(prompt.category for prompt in self.prompts if prompt.category is not None))


@dataclass(frozen=True)
class KnownSet:
    """A set with a name of its own. load: gets it from the hub or the package; None needs a file.

    source: where its authors publish it.
    """

    source: str
    load: Callable[[], list[Prompt]] | None = None


def open_prompt_sets(choices: Sequence[str], *, say: Say) -> list[PromptSet]:
    """Return the sets that --prompts names: a name of KNOWN_SETS, a file or folder, or NAME=FILE.

    Raises ConfigError for an unknown name, a file that cannot be read, an empty set, or two sets of one name.
    """
    sets = [open_prompt_set(choice, say=say) for choice in choices]
    twice = [name for name, times in Counter(each.name for each in sets).items() if times > 1]
    if twice:
        raise ConfigError(f"--prompts: two sets have the name {twice[0]}; name one of them, such as mine=FILE")
    return sets


def open_prompt_set(choice: str, *, say: Say) -> PromptSet:
    """Return one set; see open_prompt_sets. Prompts that come again are left out, and counted in a line."""
    name, path = _name_and_path(choice)
    prompts = _load_known(name) if path is None else _read_file(name, path)
    found = [Prompt(prompt.text.strip(), prompt.category) for prompt in prompts if prompt.text.strip()]
    if not found:
        raise ConfigError(f"--prompts {choice}: has no prompt")
    different = {prompt.text: prompt for prompt in reversed(found)}  # the first of equal ones stays
    times = Counter(prompt.text for prompt in found)
    repeated = [shown(text) for text, count in times.items() if count > 1]
    if repeated:
        others = f" and {len(repeated) - SHOWN_DUPLICATES} more" if len(repeated) > SHOWN_DUPLICATES else ""
        say(
            f"{name}: {len(found) - len(different)} of {len(found)} prompts repeat an earlier one and are left out: "
            f"{', '.join(repeated[:SHOWN_DUPLICATES])}{others}"
        )
    return PromptSet(name, tuple(different[text] for text in times))


def _name_and_path(choice: str) -> tuple[str, Path | None]:
    """Return the name of a set, and its file or folder; None for a known set without a file."""
    before, equals, after = choice.partition("=")
    if equals and NAME.fullmatch(before):
        return before, Path(after).expanduser()
    path = Path(choice).expanduser()
    if choice in KNOWN_SETS and not path.is_file():
        return choice, None
    if not path.exists():
        raise ConfigError(
            f"--prompts {choice}: no such file, and no known set; give a file, NAME=FILE, or {', '.join(KNOWN_SETS)}"
        )
    return re.sub(r"[^\w.+-]+", "_", path.stem) or "prompts", path


def _load_known(name: str) -> list[Prompt]:
    known = KNOWN_SETS[name]
    if known.load is None:
        raise ConfigError(f"--prompts {name}: is published as a file ({known.source}); give {name}=FILE")
    try:
        return known.load()
    except ConfigError as error:
        raise ConfigError(f"--prompts {name}: {error}; or give {name}=FILE, from {known.source}") from error


# ---- files ----


def _read_file(name: str, path: Path) -> list[Prompt]:
    if path.is_dir():
        files = sorted(each for each in path.iterdir() if each.suffix in READERS and each.is_file())
        if not files:
            raise ConfigError(f"--prompts {path}: has no file of prompts ({', '.join(READERS)})")
        return [Prompt(prompt.text, each.stem) for each in files for prompt in _read_file(each.stem, each)]
    if path.suffix not in READERS:
        raise ConfigError(f"--prompts {path}: {path.suffix or 'no suffix'}; give one of {', '.join(READERS)}")
    prompts = READERS[path.suffix](path)
    return _with_styles(prompts) if name == "hpsv2" else prompts


def _with_styles(prompts: list[Prompt]) -> list[Prompt]:
    """Return HPSv2's prompts with their styles, of which its list has equal numbers one after the other."""
    each, rest = divmod(len(prompts), len(HPSV2_STYLES))
    if rest or any(prompt.category for prompt in prompts):
        return prompts
    return [Prompt(prompt.text, HPSV2_STYLES[place // each]) for place, prompt in enumerate(prompts)]


def _from_text(path: Path) -> list[Prompt]:
    return [Prompt(line) for _, line in full_lines(path)]


def _from_json_lines(path: Path) -> list[Prompt]:
    prompts = []
    for where, entry in json_objects(path, full_lines(path)):
        if entry.get("seed") is not None:
            raise ConfigError(
                f"{where}: states seed {shown(entry['seed'])}, but an evaluation computes the seed of each image from "
                "--first_seed; leave it out"
            )
        prompts.append(_prompt_of(entry, where))
    return prompts


def _from_json(path: Path) -> list[Prompt]:
    try:
        content = parse_json(read_text(path))
    except ValueError as error:
        raise ConfigError(f"--prompts {path}: not JSON ({cut(str(error))})") from error
    return list(_from_json_value(content, path, category=None))


def _from_json_value(content: Any, path: Path, *, category: str | None) -> Iterator[Prompt]:
    if isinstance(content, dict) and category is None:
        for name, inside in content.items():
            yield from _from_json_value(inside, path, category=name)
        return
    if not isinstance(content, list):
        raise ConfigError(
            f"--prompts {path}: {shown(content)}: must be a list of prompts, or an object with a list for each category"
        )
    for place, entry in enumerate(content):
        where = f"--prompts {path}, entry {place + 1}"
        prompt = Prompt(entry) if isinstance(entry, str) else _prompt_of(entry, where)
        yield Prompt(prompt.text, prompt.category or category)


def _from_table(read: Callable[[Path], Iterator[Mapping[str, Any]]]) -> Callable[[Path], list[Prompt]]:
    def prompts(path: Path) -> list[Prompt]:
        return [_prompt_of(row, f"--prompts {path}, row {number}") for number, row in enumerate(read(path), start=1)]

    return prompts


def _prompt_of(entry: Any, where: str) -> Prompt:
    """Return the prompt of an object or a row. Raises ConfigError if it has no text under one of TEXT_FIELDS."""
    fields = entry if isinstance(entry, dict) else {}
    text = next((fields[name] for name in TEXT_FIELDS if isinstance(fields.get(name), str)), None)
    if text is None:
        raise ConfigError(f"{where}: {shown(entry)}: has no text named {', '.join(TEXT_FIELDS)}")
    category = next((fields[name] for name in CATEGORY_FIELDS if isinstance(fields.get(name), str)), None)
    return Prompt(text, (category or "").strip() or None)


READERS: dict[str, Callable[[Path], list[Prompt]]] = {
    ".txt": _from_text,
    **dict.fromkeys(JSON_LINES, _from_json_lines),
    ".json": _from_json,
    ".tsv": _from_table(lambda path: read_csv(path, read_text(path), delimiter="\t")),
    ".csv": _from_table(lambda path: read_csv(path, read_text(path), delimiter=",")),
    ".parquet": _from_table(lambda path: read_parquet(path, columns=(*TEXT_FIELDS, *CATEGORY_FIELDS))),
}


# ---- known sets ----


def _from_hub(repository: str, files: Sequence[str]) -> Callable[[], list[Prompt]]:
    """Return what loads files of a dataset repository; files that are one of several are a category each."""

    def load() -> list[Prompt]:
        paths = [_download(repository, name) for name in files]
        if len(paths) == 1:
            return READERS[paths[0].suffix](paths[0])
        return [Prompt(prompt.text, path.stem) for path in paths for prompt in READERS[path.suffix](path)]

    return load


def _download(repository: str, name: str) -> Path:
    from huggingface_hub import hf_hub_download

    from ds_dpo.storage.hub_failures import hub_failure

    try:
        return Path(hf_hub_download(repository, name, repo_type="dataset"))
    except Exception as error:  # also errors of the HTTP library under the hub's client
        raise ConfigError(f"the hub does not provide {name} of {repository}: {hub_failure(error)}") from error


def _split_from_hub(repository: str, split: str) -> Callable[[], list[Prompt]]:
    """Return what loads a split of a dataset repository as the library datasets finds it."""

    def load() -> list[Prompt]:
        from datasets import load_dataset

        from ds_dpo.storage.hub_failures import hub_failure

        try:
            rows = load_dataset(repository, split=split)
        except Exception as error:  # datasets raises errors of many libraries
            raise ConfigError(
                f"the hub does not provide split {split} of {repository}: {hub_failure(error)}"
            ) from error
        names = [name for name in (*TEXT_FIELDS, *CATEGORY_FIELDS) if name in rows.column_names]
        return [_prompt_of(row, f"{repository}, row {place}") for place, row in enumerate(rows.select_columns(names))]

    return load


def _miniature() -> list[Prompt]:
    from ds_dpo.miniature.world import TEST_PROMPTS

    return [Prompt(text) for text in TEST_PROMPTS]


def _miniature_train() -> list[Prompt]:
    from ds_dpo.miniature.world import TRAIN_PROMPTS

    return [Prompt(text) for text in TRAIN_PROMPTS]


KNOWN_SETS: dict[str, KnownSet] = {
    "parti": KnownSet(
        "PartiPrompts.tsv of github.com/google-research/parti", _split_from_hub("nateraw/parti-prompts", "train")
    ),
    "hpsv2": KnownSet(
        "benchmark/ of the dataset zhwang/HPDv2",
        _from_hub("zhwang/HPDv2", [f"benchmark/{style}.json" for style in HPSV2_STYLES]),
    ),
    "pickapic_test": KnownSet(
        "split test_unique of yuvalkirstain/pickapic_v2_no_images",
        _split_from_hub("yuvalkirstain/pickapic_v2_no_images", "test_unique"),
    ),
    "geneval": KnownSet("prompts/evaluation_metadata.jsonl of github.com/djghosh13/geneval"),
    "miniature": KnownSet("the package itself", _miniature),
    "miniature_train": KnownSet("the package itself", _miniature_train),
}
