"""Show that a change moves nothing: run this checkout and an earlier one, and compare what they compute, byte for byte.

    python benchmarks/same_behaviour.py --before 661ef99
    python benchmarks/same_behaviour.py --before 661ef99 --keep runs/before     # keep the earlier record, use it again

behaviour.py makes the records: 20 steps of the miniature in fp32 on 1 and 2 ranks, its exports, caches, order of pairs
and resolved configurations, and a short run of each objective and of other options. The later checkout also resumes
from the earlier one's run folders, checkpoints and caches. Prints a JSON line for each comparison; the exit status is 1
if something differs. Not compared: times, memory, dates, the text of model cards, and renamed fields and formats
(RENAMED, RENAMED_FORMATS). Takes about 5 minutes per checkout on two cores.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
MEASURED = re.compile(r"(^|_)seconds$|_per_second$|_gib$")
DATE = re.compile(rb'"modelspec\.date":"[^"]*"')
# Fields of the run configuration under their present names: old name -> new name.
RENAMED = {"unet_init": "denoiser_init"}
# Formats in export.json, likewise.
RENAMED_FORMATS = {"unet": "denoiser"}


@dataclass(frozen=True)
class Comparison:
    """A comparison. what: its name. place: a file or folder in both records. read: returns plain data of it."""

    what: str
    place: str
    read: Callable[[Path], Any]


def comparisons(before: Path) -> Iterator[Comparison]:
    """Yield the comparisons of all that the earlier record holds."""
    for path in sorted(before.glob("**/metrics.jsonl")):
        run = str(path.parent.relative_to(before))
        yield Comparison("curve", run, curve)
        yield Comparison("configuration", run, configuration)
        if (path.parent / "evaluation").is_dir():
            yield Comparison("held-out pairs", run, held_out)
        if (path.parent / "samples").is_dir():
            yield Comparison("pictures", f"{run}/samples", files)
    for name in ("export", "export_of_given", "export_of_short_runs", "cache", "reference"):
        yield Comparison("files", name, files)
    yield Comparison("order of pairs", "orders.json", plain_data)
    for name in plain_data(before / "configurations.json"):
        yield Comparison(f"resolved configuration: {name}", "configurations.json", partial(resolved, name=name))


def held_out(run: Path) -> list[Any]:
    """Return the evaluations of held-out pairs."""
    return lines_of(run / "evaluation" / "held_out.jsonl")


def lines_of(path: Path) -> list[dict[str, Any]]:
    """Return lines of JSON, without times and memory."""
    lines = (json.loads(line) for line in path.read_text().splitlines())
    return [{name: value for name, value in line.items() if not MEASURED.search(name)} for line in lines]


def curve(run: Path) -> list[dict[str, Any]]:
    return lines_of(run / "metrics.jsonl")


def configuration(run: Path) -> dict[str, Any]:
    import yaml

    run_section = yaml.safe_load((run / "config.yaml").read_text())
    return {"run": renamed(run_section), "deepspeed": json.loads((run / "deepspeed.json").read_text())}


def plain_data(path: Path) -> Any:
    return json.loads(path.read_text())


def resolved(path: Path, *, name: str) -> Any:
    return renamed(plain_data(path)[name])


def renamed(value: Any) -> Any:
    if isinstance(value, dict):
        return {RENAMED.get(name, name): renamed(inner) for name, inner in value.items()}
    return value


def files(folder: Path) -> dict[str, Any]:
    """Return the content of every file by its path: its SHA-256, or the data of a model card or of export.json."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): content(path) for path in found}


def content(path: Path) -> Any:
    if path.name == "README.md":
        import yaml

        return yaml.safe_load(path.read_text().split("---")[1])
    if path.name == "export.json":
        facts = plain_data(path)
        return {**facts, "format": RENAMED_FORMATS.get(facts["format"], facts["format"])}
    return hashlib.sha256(DATE.sub(b"", path.read_bytes())).hexdigest()


def first_difference(before: Any, after: Any, place: str = "") -> str | None:
    """Return the first place where plain data differ, with both values; None if they are equal."""
    if isinstance(before, dict) and isinstance(after, dict):
        names = [*before, *(name for name in after if name not in before)]
        places = ((f"{place}/{name}", before.get(name, "absent"), after.get(name, "absent")) for name in names)
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        pairs = zip(before, after, strict=True)
        places = ((f"{place}/{number}", one, other) for number, (one, other) in enumerate(pairs))
    else:
        return None if before == after else f"{place or '/'}: {before!r} -> {after!r}"
    return next(filter(None, (first_difference(one, other, where) for where, one, other in places)), None)


def report(before: Path, after: Path) -> bool:
    """Print a line for each comparison. Returns whether all are equal."""
    is_same = True
    for comparison in comparisons(before):
        old = comparison.read(before / comparison.place)
        try:
            difference = first_difference(old, comparison.read(after / comparison.place))
        except (OSError, KeyError) as error:
            difference = f"missing: {error}"
        is_same &= difference is None
        line = {"what": comparison.what, "place": comparison.place, "equal": difference is None, "values": count(old)}
        print(json.dumps(line if difference is None else {**line, "first difference": difference}), flush=True)
    return is_same


def count(value: Any) -> int:
    """Return how many numbers and strings were compared; 0 would be a comparison of nothing."""
    if isinstance(value, dict | list):
        return sum(map(count, value.values() if isinstance(value, dict) else value))
    return 1


def check_out(commit: str, folder: Path) -> Path:
    """Write a commit's files to a folder."""
    archive = subprocess.run(["git", "archive", commit], cwd=HERE, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=BytesIO(archive)) as files_of_commit:
        files_of_commit.extractall(folder, filter="data")
    return folder


def record(checkout: Path, out: Path, given: Path) -> None:
    subprocess.run([sys.executable, HERE / "behaviour.py", checkout, out, "--given", given], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", required=True, metavar="COMMIT", help="Commit, or folder of a checkout.")
    parser.add_argument(
        "--after",
        type=Path,
        default=HERE.parent,
        metavar="FOLDER",
        help="Folder of the later checkout (default: this one).",
    )
    parser.add_argument(
        "--keep", type=Path, metavar="FOLDER", help="Folder to keep the earlier record in, and to use it again."
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="Folder to keep the later record in.")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        before = (arguments.keep or scratch / "before").resolve()
        after = (arguments.out or scratch / "after").resolve()
        is_folder = Path(arguments.before).is_dir()
        old = Path(arguments.before) if is_folder else check_out(arguments.before, scratch / "checkout")
        record(old, before, before)
        record(arguments.after, after, before)
        sys.exit(0 if report(before, after) else 1)


if __name__ == "__main__":
    main()
