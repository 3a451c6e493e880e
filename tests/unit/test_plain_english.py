"""Help texts, messages, docstrings, comments and pages in plain English: the worst habits are refused.

CONTRIBUTING.md states the rule. What is checked here is only what a program can decide without false alarms.
"""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest
from repository import PACKAGE, ROOT

from ds_dpo.config.command_line import SECTION_TITLES
from ds_dpo.config.fields import FIELDS

PLACES = "in|on|at|beside|below|above|behind|there|here"
# What is refused, and what to write in its place.
HABITS = {
    r"\bso many\b": "N, or the name of the number",
    r"\b(is|are|was|were|be|been|being) told\b|\btold (of|by|from|that|what|at)\b": "gets, states, is called with",
    rf"\b(lies?|lay|lain) ({PLACES}|under|outside|inside|within|between|far)\b": "is",
    rf"\bstands? ({PLACES}|alone|first|left|right|over|by)\b": "is",
    r"\b(can|could)( ?not)? be had\b|\bto be had\b": "is available, cannot be read, cannot be used",
    r"\bheed(s|ed|ing)?\b": "uses",
    r"\breckons?\b": "assumes, computes",
    r"\bwhere there (is|are) none\b": "if there is none",
    r"\bsuch as [^.;]{1,60} would fit\b": "give NAME, such as ...",
}
HELP_HABITS = {r"(?<!\. )\bnone: ": "(off if unset), (NAME if unset)", r"\bnone given\b": "(all if empty)"}
# An optional field says what happens without a value, or where alone it applies.
SAYS_WITHOUT_A_VALUE = re.compile(r"\bunset\b|\bonly\b")
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md"), *PACKAGE.glob("presets/*.yaml")]
NOT_CHECKED = ("CONTRIBUTING.md",)  # it shows examples of what to avoid
PROGRAMS = [*ROOT.glob("scripts/**/*.py"), *ROOT.glob("benchmarks/*.py"), *ROOT.glob("tests/cluster/*.py")]


def habits_in(text: str, habits: dict[str, str] = HABITS) -> list[str]:
    """Return each habit of a text, with what to write in its place."""
    plain = " ".join(text.split())
    return [
        f"...{plain[max(0, found.start() - 40) : found.end() + 40]}...: {better}"
        for pattern, better in habits.items()
        for found in re.finditer(pattern, plain)
    ]


def texts_of(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the strings (an f-string with X for its values), docstrings and comments of a module, with their lines."""
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield node.lineno, _text(node)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            yield node.lineno, node.value
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def _text(node: ast.expr) -> str:
    """Return a string, or an f-string with X for each of its values."""
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "X" for part in node.values)
    return str(node.value) if isinstance(node, ast.Constant) else "X"


def help_texts_of(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the help texts of a program's options."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        for keyword in node.keywords if isinstance(node, ast.Call) else []:
            if keyword.arg == "help" and isinstance(keyword.value, ast.Constant | ast.JoinedStr):
                yield node.lineno, _text(keyword.value)


def faults_of_help(text: str) -> list[str]:
    """Return what is wrong with a help text: it is a sentence that is understood alone."""
    faults = habits_in(text, HABITS | HELP_HABITS)
    if not text[:1].isupper():
        faults.append(f"{text!r} does not begin with a capital letter")
    if not text.rstrip(")").endswith("."):
        faults.append(f"{text!r} does not end with a period")
    return faults


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_are_in_plain_english(path: Path) -> None:
    assert [f"line {line}: {habit}" for line, text in texts_of(path) for habit in habits_in(text)] == []


@pytest.mark.parametrize("path", sorted(PROGRAMS), ids=lambda path: str(path.relative_to(ROOT)))
def test_programs_are_in_plain_english(path: Path) -> None:
    assert [f"line {line}: {habit}" for line, text in texts_of(path) for habit in habits_in(text)] == []
    assert [f"line {line}: {fault}" for line, text in help_texts_of(path) for fault in faults_of_help(text)] == []


@pytest.mark.parametrize("path", sorted(PAGES), ids=lambda path: str(path.relative_to(ROOT)))
def test_pages_are_in_plain_english(path: Path) -> None:
    if path.name not in NOT_CHECKED:
        assert habits_in(path.read_text(encoding="utf-8")) == []


def test_help_of_fields_is_in_whole_sentences() -> None:
    assert {path: faults for path, spec in FIELDS.items() if (faults := faults_of_help(spec.description))} == {}
    assert {title: habits for title in SECTION_TITLES.values() if (habits := habits_in(title))} == {}


def test_help_of_optional_fields_says_what_happens_without_a_value() -> None:
    silent = [
        path for path, spec in FIELDS.items() if spec.is_optional and not SAYS_WITHOUT_A_VALUE.search(spec.description)
    ]
    assert silent == []


@pytest.mark.parametrize(
    ("text", "num_faults"),
    [
        ("multiples of it are saved, and stay on disk; none: no step is", 3),
        ("Also save every N steps, and never delete those checkpoints (off if unset).", 0),
        ("A step that takes so many times the median is a hang.", 1),
        ("Read at most N rows, such as a first look needs.", 0),
        ("Low-rank adapter. none: the denoiser itself is trained.", 0),
        ("The rank is told where the file lies in memory.", 2),
        ("Lies between N and M, which stands for the last.", 0),
    ],
)
def test_the_habits_are_found_and_nothing_else(text: str, num_faults: int) -> None:
    assert len(faults_of_help(text)) == num_faults
