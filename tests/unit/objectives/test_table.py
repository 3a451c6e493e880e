"""An objective is one class in config/objectives.py and one row of OBJECTIVES; these tests find a missing piece."""

import ast
import inspect
import re
from pathlib import Path

import pytest
from repository import PACKAGE, ROOT

from ds_dpo.config.fields import ALIASES, EXPLAINED
from ds_dpo.config.objective_section import ObjectiveSection
from ds_dpo.config.objectives import OBJECTIVE_SECTIONS
from ds_dpo.objectives.losses import OBJECTIVES
from ds_dpo.objectives.statistics import AutomaticBeta, KtoBaseline, MeanProbability

GIVEN_BY_STATISTICS = {AutomaticBeta: {"beta"}, KtoBaseline: {"baseline"}, MeanProbability: {"mean_probability"}}
MOST_FILES_WITH_A_NAME = 3
# files in which a name is another word: the adapter's scale and a palette of words, an activation and a schedule
ANOTHER_WORD = {
    "alpha": {
        "config/given.py",
        "config/identity.py",
        "config/optimization.py",
        "export/clients.py",
        "export/lora/adapter.py",
        "export/lora/file.py",
    },
    "linear": {"config/optimization.py", "models/denoiser/adapters.py"},
}


def options_of(section: type[ObjectiveSection]) -> set[str]:
    return section.model_fields.keys() - {"type", *section.statistic_fields}


def plain(section: type[ObjectiveSection]) -> ObjectiveSection:
    """An objective with nothing given but what it must be given; 0.25 is within every range."""
    required = {name for name, info in section.model_fields.items() if info.is_required()}
    return section(**dict.fromkeys(required, 0.25))


@pytest.mark.parametrize("name", OBJECTIVE_SECTIONS)
def test_a_config_class_says_all_that_is_known_without_torch(name: str) -> None:
    section = OBJECTIVE_SECTIONS[name]
    assert section.title
    assert section.paper is None or section.paper.startswith("https://")
    words = plain(section).formula()
    assert re.match(rf"{name}(, beta 0\.25)?: loss = .*chosen", words)
    assert ("beta" in section.model_fields) == ("beta 0.25" in words)
    assert ("no reference" in words) == (section.reference_need == "none")
    assert section.statistic_fields <= section.model_fields.keys()
    assert set(section.also_named.values()) <= section.model_fields.keys()
    for alias, field in section.also_named.items():
        assert ALIASES[alias] == f"objective.{field}"
    assert EXPLAINED[name] == f"give --objective.type {name}"


def test_titles_are_each_objectives_own() -> None:
    assert len({section.title for section in OBJECTIVE_SECTIONS.values()}) == len(OBJECTIVE_SECTIONS)


def test_a_class_without_a_formula_is_no_objective() -> None:
    class Nameless(ObjectiveSection):
        type: str = "nameless"

    with pytest.raises(TypeError, match="formula"):
        Nameless()


def test_every_config_class_has_its_row() -> None:
    assert list(OBJECTIVE_SECTIONS) == list(OBJECTIVES)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_row_fits_its_config_class(name: str) -> None:
    objective, section = OBJECTIVES[name], OBJECTIVE_SECTIONS[name]
    parameters = inspect.signature(objective.loss).parameters.values()
    arguments = {one.name: one.default for one in parameters if one.kind is one.KEYWORD_ONLY}
    given = set() if objective.statistic is None else GIVEN_BY_STATISTICS[objective.statistic]
    own = options_of(section)
    assert plain(section).loss_options().keys() == own
    assert arguments.keys() == own | given
    assert bool(section.statistic_fields) == (objective.statistic is AutomaticBeta)
    assert section.reference_need == objective.reference
    for field in own:
        info = section.model_fields[field]
        assert info.is_required() or info.default == arguments[field], f"two defaults of {name}'s {field}"
    assert objective.loss.__doc__ is not None
    assert "Source: " in objective.loss.__doc__
    if objective.quantities is not None:
        assert inspect.signature(objective.quantities).parameters.keys() == {"errors", *arguments}


def test_the_page_on_objectives_says_what_the_table_holds() -> None:
    page = (ROOT / "docs" / "objectives.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[`(\w+)`\]\(#\w+\) \| (.*) \| (.*?) \| (\w+) \| (yes|no) \|$", page, flags=re.MULTILINE)
    assert [row[0] for row in rows] == list(OBJECTIVES)
    for name, _, options, reference, soft in rows:
        section = OBJECTIVE_SECTIONS[name]
        assert reference == section.reference_need
        assert soft == ("yes" if section.takes_soft_targets else "no")
        given = dict(re.findall(r"`(\w+)`(?: \(([^)]*)\))?", options))
        own = options_of(section)
        assert given.keys() == own
        assert ("automatic beta" in options) == bool(section.statistic_fields)
        for field in own - {"beta", "shift"}:
            default = section.model_fields[field].default
            assert given[field] == (default if isinstance(default, str) else f"{default:g}")
        assert f"\n## {name}\n" in page


# ---- where a name is ----


def strings_of(path: Path) -> list[str]:
    """Return the strings of a Python file, its docstrings left out; of another file its text."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return [text]
    tree = ast.parse(text)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings
    ]


def files_with(name: str) -> list[str]:
    """Return the files of the package, presets left out, in whose strings a name is a word or the first part of one."""
    word = re.compile(rf"(?<![\w/.-]){name}(?![A-Za-z0-9-])")
    files = [path for path in PACKAGE.rglob("*") if path.suffix in (".py", ".yaml", ".jinja")]
    return [
        str(path.relative_to(PACKAGE))
        for path in sorted(files)
        if path.parent.name != "presets" and any(word.search(one) for one in strings_of(path))
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVE_SECTIONS)
def test_an_objective_is_named_in_few_files(name: str) -> None:
    found = files_with(name)
    assert "config/objectives.py" in found, "the search finds what is there"
    found = [path for path in found if path not in ANOTHER_WORD.get(name, ())]
    assert len(found) <= MOST_FILES_WITH_A_NAME, found
