"""DIR/page.html: one page of an evaluation that needs no network, with summary, gallery and blind votes.

Its style and program are inside it; images are referred to by paths below DIR. Text from outside is JSON in a data
block, which the program puts into the page as text alone. The page's policy lets no other program run.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from ds_dpo.errors import ConfigError
from ds_dpo.evaluation.results import ImageRow, Results
from ds_dpo.storage.replace import replace_file

PAGE_NAME = "page.html"
FOLDER = Path(__file__).with_name("template")
STYLES = ("page.css", "views.css")
PROGRAMS = (
    "elements.js",
    "pairs.js",
    "plots.js",
    "summary.js",
    "gallery.js",
    "viewer.js",
    "agreement.js",
    "votes.js",
    "blind.js",
    "result.js",
    "main.js",
)


def write_page(results: Results, folder: Path) -> Path:
    """Write DIR/page.html whole or not at all, and return its path. Raises ConfigError if it cannot be written."""
    path = folder / PAGE_NAME
    try:
        replace_file(path, page_html(results), sync=False)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}); name another folder") from error
    return path


def page_html(results: Results) -> str:
    """Return the page as text."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    style = "\n".join((FOLDER / name).read_text(encoding="utf-8") for name in STYLES)
    parts = "\n".join((FOLDER / name).read_text(encoding="utf-8") for name in PROGRAMS)
    program = f'(() => {{\n"use strict";\n{parts}\n}})();'
    template = environment.from_string((FOLDER / "page.html.jinja").read_text(encoding="utf-8"))
    return template.render(
        evaluation=results.evaluation,
        policy=f"default-src 'none'; img-src 'self' file: blob: data:; "
        f"style-src '{_hash_of(style)}'; script-src '{_hash_of(program)}'",
        # all three are ours, or escaped by block_of_json
        style=Markup(style),
        program=Markup(program),
        data=Markup(block_of_json(page_data(results))),
    )


def page_data(results: Results) -> dict[str, Any]:
    """Return what the page's program reads, as JSON values; rows of prompts and images are lists, for their size."""
    models = {model.label: place for place, model in enumerate(results.models)}
    sets = list(dict.fromkeys(prompt.prompt_set for prompt in results.prompts))
    categories = list(dict.fromkeys(p.category for p in results.prompts if p.category is not None))
    scorers = [scorer.name for scorer in results.scorers]
    place_of_set = {name: place for place, name in enumerate(sets)}
    place_of_category: dict[str | None, int] = {None: -1, **{name: place for place, name in enumerate(categories)}}
    return {
        "evaluation": results.evaluation,
        "models": [asdict(model) for model in results.models],
        "scorers": [
            {"name": each.name, "better": 1 if each.higher_is_better else -1, "record": dict(each.record)}
            for each in results.scorers
        ],
        "sets": sets,
        "categories": categories,
        "prompts": [[p.prompt, place_of_set[p.prompt_set], place_of_category[p.category]] for p in results.prompts],
        "images": [_image(image, models, scorers) for image in results.images],
        "comparisons": [asdict(comparison) for comparison in results.comparisons],
        "settings": dict(results.settings),
        "warnings": list(results.warnings),
    }


def _image(image: ImageRow, models: Mapping[str, int], scorers: Sequence[str]) -> list[Any]:
    # a seed may have more digits than a number of JavaScript
    scores = [image.scores.get(name) for name in scorers]
    return [models[image.model], image.prompt, str(image.seed), image.path, image.sha256, scores]


def block_of_json(value: Any) -> str:
    """Return a value as JSON that no HTML parser takes for a tag or a comment; a number that is not finite is null."""
    text = json.dumps(_finite(value), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    # these occur in strings alone
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return value if isinstance(value, str | int | None) else str(value)


def _hash_of(text: str) -> str:
    """Return a text's hash as a content security policy has it."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
