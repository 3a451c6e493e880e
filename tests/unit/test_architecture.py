"""What the layers in pyproject.toml (checked by lint-imports) cannot say."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import packages_distributions

from repository import PACKAGE, ROOT

from ds_dpo.config.families import FAMILY_NAMES

PROGRAMS = ("tests", "scripts", "benchmarks")  # folders of Python beside the package


def own_top_level_names() -> set[str]:
    """What stands first on sys.path when the launcher runs ds_dpo/train.py."""
    files = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    return files | {path.parent.name for path in PACKAGE.glob("*/__init__.py")}


def test_package_init_files_hold_one_docstring_and_import_nothing() -> None:
    others = [
        str(path.relative_to(ROOT))
        for path in PACKAGE.rglob("__init__.py")
        if not _is_one_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert others == []


def _is_one_docstring(module: ast.Module) -> bool:
    return len(module.body) == 1 and bool(ast.get_docstring(module))


def test_every_folder_of_modules_is_a_package() -> None:
    """A folder without __init__.py is left out by the layers' check and by the wheel."""
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


def test_no_module_hides_one_of_the_standard_library_or_of_a_dependency() -> None:
    others = set(sys.stdlib_module_names) | (set(packages_distributions()) - {"ds_dpo"})
    assert own_top_level_names() & others == set()


def test_the_evaluation_s_arithmetic_stands_alone() -> None:
    """evaluation is a high layer; its statistics are pure functions that benchmarks and other layers may use."""
    imported = {
        node.module or ""
        for path in (PACKAGE / "evaluation" / "statistics").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom)
    }
    own = {name for name in imported if name.startswith("ds_dpo")}
    assert own
    assert all(name.startswith("ds_dpo.evaluation.statistics.") for name in own)
    assert imported - own <= {"__future__", "collections.abc", "dataclasses", "statistics", "typing", "numpy.typing"}


# A newcomer must be able to take in each of these at one look.
# The seventh module is __main__.py: `python -m ds_dpo` looks for it there.
MOST_MODULES_AT_THE_TOP, MOST_PACKAGES_AT_THE_TOP, MOST_LAYERS, MOST_LINES = 7, 26, 10, 399


def test_the_top_of_the_package_is_small() -> None:
    modules = [path.name for path in PACKAGE.glob("*.py") if path.name != "__init__.py"]
    packages = [path.parent.name for path in PACKAGE.glob("*/__init__.py")]
    assert len(modules) <= MOST_MODULES_AT_THE_TOP, modules
    assert len(packages) <= MOST_PACKAGES_AT_THE_TOP, packages


def test_there_are_few_layers_and_each_package_has_one() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (contract,) = [
        contract
        for contract in settings["tool"]["importlinter"]["contracts"]
        if contract["type"] == "layers" and contract["containers"] == ["ds_dpo"]
    ]
    assert len(contract["layers"]) <= MOST_LAYERS
    assert contract["exhaustive"] is True


def test_no_file_is_long() -> None:
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in PACKAGE.rglob("*.py")}
    long = {str(path.relative_to(ROOT)): number for path, number in lines.items() if number > MOST_LINES}
    assert long == {}


def test_every_import_of_the_package_finds_its_name() -> None:
    """Also in tests, scripts and benchmarks, which mypy does not look at."""
    sources = [*PACKAGE.rglob("*.py"), *(path for folder in PROGRAMS for path in (ROOT / folder).rglob("*.py"))]
    lost = [
        f"{path.relative_to(ROOT)}: {module}.{name}"
        for path in sources
        for module, name in _imports(path.read_text(encoding="utf-8"))
        if name not in _names_of(module)
    ]
    assert lost == []


def _imports(text: str) -> Iterator[tuple[str, str]]:
    """Yield module and name of each import from the package; much faster than parsing."""
    for module, names in re.findall(r"^ *from (ds_dpo[\w.]*) import (\([^)]*\)|.*)", text, flags=re.MULTILINE):
        without_comments = re.sub(r"#.*", "", names).strip("() \n")
        yield from ((module, name.split(" as ")[0].strip()) for name in without_comments.split(",") if name.strip())


def test_imports_are_found_however_they_are_written() -> None:
    text = "from ds_dpo.a import (\n    b,  # why, here\n    c as d,\n)\nif x:\n    from ds_dpo import e, f  # g\n"
    assert [*_imports(text)] == [("ds_dpo.a", "b"), ("ds_dpo.a", "c"), ("ds_dpo", "e"), ("ds_dpo", "f")]


@cache
def _names_of(module: str) -> frozenset[str]:
    """Return what can be imported from a module by its source, without importing it."""
    place = ROOT.joinpath(*module.split("."))
    if place.is_dir():
        return frozenset(path.stem if path.suffix == ".py" else path.name for path in place.iterdir())
    file = place.with_suffix(".py")
    names: set[str] = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body if file.exists() else ():
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)}
    return frozenset(names)


def test_a_family_is_named_in_two_files_alone() -> None:
    """All that sets a family apart is its row, so that a new one is one file and its name among the choices."""
    found: dict[str, set[str]] = {name: set() for name in FAMILY_NAMES}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and node.value in FAMILY_NAMES:
                found[node.value].add(str(path.relative_to(PACKAGE)))
    for name, files in found.items():
        rows = {file for file in files if file.startswith("models/families/")}
        assert files == {"config/families.py", *rows}, name
        assert len(rows) == 1, name
