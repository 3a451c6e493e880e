"""DIR/results.json: the results of an evaluation as its page, its votes and later programs read them."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from pydantic import TypeAdapter, ValidationError

from ds_dpo.errors import DataError, cut, shown
from ds_dpo.evaluation.results import ImageRow, Results
from ds_dpo.outside import read_regular
from ds_dpo.storage.replace import replace_file

RESULTS_NAME = "results.json"
MAX_BYTES = 2**30  # 3,200 prompts of four models, four images each, take 30 MB


def save_results(results: Results, folder: Path) -> Path:
    """Write DIR/results.json whole or not at all, and return its path. A number that is not finite becomes null.

    Raises DataError if it cannot be written.
    """
    path = folder / RESULTS_NAME
    try:
        replace_file(path, _adapter().dump_json(results, indent=1, ensure_ascii=True), sync=False)
    except OSError as error:
        raise DataError(f"{path} cannot be written ({error.strerror}); name another folder") from error
    return path


def load_results(folder: Path) -> Results:
    """Return what `save_results` wrote. Raises DataError if the file is missing, damaged, or names what it lacks."""
    path = folder / RESULTS_NAME
    try:
        content = read_regular(path, max_bytes=MAX_BYTES)
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist; a folder that scripts/evaluate.py wrote would fit") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    try:
        results = _adapter().validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise DataError(f"{path} is no results of an evaluation: {cut(place)}: {cut(first['msg'])}") from error
    models = {model.label for model in results.models}
    for number, image in enumerate(results.images):
        _check_image(image, f"{path}, image {number}", models, len(results.prompts))
    return results


def _adapter() -> TypeAdapter[Results]:
    return TypeAdapter(Results)


def _check_image(image: ImageRow, place: str, models: set[str], num_prompts: int) -> None:
    if image.model not in models:
        raise DataError(f"{place} is of model {shown(image.model)}, which the file does not list")
    if not 0 <= image.prompt < num_prompts:
        raise DataError(f"{place} is of prompt {image.prompt}; the file has {num_prompts} prompts")
    path = PurePosixPath(image.path)
    if path.is_absolute() or ".." in path.parts:
        raise DataError(f"{place} has path {shown(image.path)}; a path below the evaluation's folder would fit")
