# SPDX-License-Identifier: Apache-2.0
"""The documentation names every command, option, error and module; what it quotes is what the code prints."""

import argparse
import ast
import re
import tomllib
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import pytest

from doc.raised import raised
from nvdimm_driver import errors
from nvdimm_driver.cmd.nvdimmctl import Nvdimmctl
from nvdimm_driver.metrics import DriverCollector
from nvdimm_driver.rpc.intercept import PASSED, TABLE
from nvdimm_driver.state.events import KINDS, LOGGED
from nvdimm_driver.state.ledger import Ledger
from nvdimm_driver.state.schema import SCHEMAS
from nvdimm_driver.xml.parse_domain import extract
from nvdimm_driver.xml.rewrite import restore, rewrite
from tests.unit.doubles import MemoryBacking, RecordingMapper, make_driver

PROJECT = Path(__file__).parents[2]
PACKAGE = Path(errors.__file__).parent
"""Of the Debian package where its tests run, and then not in the project."""
DOC = PROJECT / "doc"
MONITORING = (DOC / "monitoring.rst").read_text(encoding="utf-8")
COMMANDS = (DOC / "commands.rst").read_text(encoding="utf-8")
DESIGN = (DOC / "design.rst").read_text(encoding="utf-8")
COLUMNS = 100
"""As .editorconfig has it for pages."""
NOT_LISTED = ("__init__.py", "_xen.py")
"""Modules without code of their own, and those that setup.py makes."""
CLIFF_HAS = {"--help", "--variable", "--quote", "--noindent", "--max-width", "--fit-width", "--print-empty", "--prefix"}
CLIFF_HAS |= {"--sort-column", "--sort-ascending", "--sort-descending"}


def _options(parser: argparse.ArgumentParser) -> list[str]:
    found = {option for action in parser._actions for option in action.option_strings if option.startswith("--")}
    return sorted(found - CLIFF_HAS)


def _blocks(page: str) -> list[str]:
    text = (DOC / page).read_text(encoding="utf-8")
    found = re.findall(r"\.\. code-block:: xml\n\n((?:    .*\n|\n)+)", text)
    return [re.sub(r"^    ", "", block, flags=re.MULTILINE).strip() + "\n" for block in found]


def _section(text: str, title: str) -> str:
    """Return the section with that title, up to the next one of its level."""
    start = text.index(f"\n{title}\n---")
    found: str = re.split(r"^.+\n-{3,}$", text[start + 1 :], flags=re.MULTILINE)[1]
    return found


def _prose(text: str) -> list[str]:
    """Return the lines of a page, without literal blocks, code blocks and tables that are drawn with ``===``."""
    prose = []
    literal: int | None = None  # the indentation of what introduces the block
    table = False
    for line in text.splitlines():
        indentation = len(line) - len(line.lstrip())
        if literal is not None and (not line or indentation > literal):
            continue
        literal = indentation if re.match(r" *\.\. code-block::|(?! *\.\. ).*::$", line) else None
        table = bool(re.match(r" *=+ +=", line)) or (table and bool(line))
        if not table:
            prose.append(line)
    return prose


def _literal_blocks(section: str) -> list[str]:
    return re.findall(r"::\n\n((?:    .*\n|\n)+)", section)


def _defined(node: ast.stmt) -> set[str]:
    """Return the names that a statement defines, those of a class as CLASS.NAME too."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return {node.name}
    if isinstance(node, ast.ClassDef):
        return {node.name, *(f"{node.name}.{name}" for each in node.body for name in _defined(each))}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {target.id for target in targets if isinstance(target, ast.Name)}


def _is_defined(file: str, name: str) -> bool:
    tree = ast.parse((PACKAGE / file).read_text(encoding="utf-8"))
    return any(name in _defined(node) for node in tree.body)


def _pattern(message: str, hints: tuple[str, ...]) -> str:
    """Return a pattern of what is printed for an error; the path in front is that of an error that is passed on."""

    def any_of(text: str) -> str:
        return ".*".join(map(re.escape, text.split("…")))

    printed = "|".join(rf" \({any_of(hint)}\)" if hint else "" for hint in hints)
    return rf"(?:\S+: )?{any_of(message)}(?:{printed})"


@pytest.mark.parametrize("entry", entry_points(group="nvdimm_driver.nvdimmctl"), ids=lambda entry: entry.name)
def test_every_command_has_a_man_page_with_its_options(entry: EntryPoint) -> None:
    name, page_name = entry.name.replace("_", " "), entry.name.replace("_", "-")
    assert re.search(rf"^:doc:`{name} <commands/{page_name}>`\n   .+\.$", COMMANDS, re.MULTILINE), (
        "on one line: conf.py"
    )
    page = (DOC / "commands" / f"{page_name}.rst").read_text(encoding="utf-8")
    assert f"| **nvdimmctl** **{name}** " in page
    parser = entry.load()(Nvdimmctl(), None).get_parser(f"nvdimmctl {name}")
    for option in _options(parser):
        assert re.search(rf"^\.\. option:: .*{option}\b", page + COMMANDS, re.MULTILINE), option


def test_every_global_option_is_in_the_man_page() -> None:
    for option in _options(Nvdimmctl().parser):
        assert re.search(rf"^\.\. option:: .*{option}\b", COMMANDS, re.MULTILINE), option


@pytest.mark.parametrize("kind", errors.NvdimmError.__subclasses__(), ids=lambda kind: kind.__name__)
def test_every_error_is_documented_with_its_status(kind: type[errors.NvdimmError]) -> None:
    page = (DOC / "errors.rst").read_text(encoding="utf-8")
    assert f"\n{kind.__name__} ({kind.exit_code})\n---" in page
    assert f"\n.. raised:: {kind.__name__}\n" in page, "which lists all that the code can raise"
    assert f"\n{kind.exit_code}\n   " in COMMANDS


@pytest.mark.parametrize("kind", errors.NvdimmError.__subclasses__(), ids=lambda kind: kind.__name__)
def test_the_errors_that_are_quoted_are_those_of_the_code(kind: type[errors.NvdimmError]) -> None:
    page = (DOC / "errors.rst").read_text(encoding="utf-8")
    blocks = "\n\n".join(_literal_blocks(_section(page, f"{kind.__name__} ({kind.exit_code})")))
    quoted = [" ".join(each.split()) for each in re.split(r"\n\s*\n", blocks) if each.strip()]
    known = [
        _pattern(message, hints)
        for message, hints in raised(kind.__name__, PACKAGE)
        if len(re.findall(r"\w", message + "".join(hints))) > 8  # with fewer letters of its own it fits anything
    ]
    assert quoted
    assert [each for each in quoted if not any(re.fullmatch(pattern, each) for pattern in known)] == []


def test_design_lists_every_module() -> None:
    listed = {
        folder.removeprefix("nvdimm_driver"): sorted(re.findall(r"^    (\w+\.py) ", block, re.MULTILINE))
        for folder, block in re.findall(
            r"^``([\w/]+)/``.*::\n\n((?:    .*\n)+)", _section(DESIGN, "The modules"), re.MULTILINE
        )
    }
    there: dict[str, list[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name not in NOT_LISTED:
            folder = path.parent.relative_to(PACKAGE).as_posix()
            there.setdefault("" if folder == "." else folder, []).append(path.name)
    assert listed == there


def test_design_shows_the_import_contracts() -> None:
    contracts = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    layers = [
        [sorted(part.strip().removeprefix("nvdimm_driver.") for part in layer.split("|")) for layer in each["layers"]]
        for each in contracts["contracts"]
        if each["type"] == "layers"
    ]
    section = _section(DESIGN, "The modules")
    whole, folders = _literal_blocks(section[section.index("Imports point one way") :])
    shown = [[sorted(line.strip().replace("/", ".").split(", ")) for line in whole.strip().splitlines()]]
    for folder, picture in re.findall(r"^    (\w+): +(.+)$", folders, re.MULTILINE):
        shown.append([sorted(f"{folder}.{each}" for each in layer.split(", ")) for layer in picture.split(" → ")])
    assert shown == layers


@pytest.mark.parametrize(
    "page", sorted({"../NEWS.rst", *(path.relative_to(DOC).as_posix() for path in DOC.rglob("*.rst"))})
)
def test_prose_has_at_most_100_columns(page: str) -> None:
    """A line that cannot be broken, such as a long URL, may be longer."""
    lines = _prose((DOC / page).read_text(encoding="utf-8"))
    assert [line for line in lines if len(line) > COLUMNS and " " in line.strip(" *-")] == []
    assert any(" " in line for line in lines)


@pytest.mark.parametrize(
    ("page", "folder"),
    [
        ("design.rst", PACKAGE),
        ("lab.rst", PROJECT / "tests/lab"),
        ("testing.rst", PROJECT / "tests"),
        ("without_xen.rst", PROJECT / "tests/integration"),
    ],
)
def test_the_files_that_a_page_names_are_there(page: str, folder: Path) -> None:
    text = (DOC / page).read_text(encoding="utf-8")
    named = set(re.findall(r"``([\w/.*-]+\.py)(?::[\w.]+)?``", text))
    assert len(named) > 3
    assert [name for name in sorted(named) if not (any(folder.glob(name)) or any(PROJECT.glob(name)))] == []


def test_design_tells_where_things_are_decided() -> None:
    section = _section(DESIGN, "Where is it decided?")
    assert len(re.findall(r"^   \* - ", section, re.MULTILINE)) > 25
    named = re.findall(r"``([\w/]+\.py):([\w.]+)``", section)
    assert [f"{file}:{name}" for file, name in named if not _is_defined(file, name)] == []
    assert len(named) > 50


def test_every_call_with_domain_xml_has_a_row() -> None:
    page = (DOC / "nvdimmd.rst").read_text(encoding="utf-8")
    for name in (*(procedure.name.lower() for procedure in TABLE), *PASSED):
        assert f"``{name}``" in page


@pytest.mark.parametrize("kind", [*KINDS, *LOGGED])
def test_every_event_is_documented(kind: str) -> None:
    assert f"``{kind}``" in MONITORING


def test_the_steps_that_debugging_shows_are_those_of_the_code() -> None:
    shown = re.findall(r'DEBUG msg="(.*)"$', (DOC / "debugging.rst").read_text(encoding="utf-8"), re.MULTILINE)
    sources = "".join(file.read_text(encoding="utf-8") for file in Path(errors.__file__).parent.rglob("*.py"))
    formats = re.findall(r'\.debug\("(.+?)"', sources)
    step = re.compile("|".join(re.sub(r"%(?:s|d|\\#x|\\\.3f)", ".+", re.escape(each)) for each in formats))
    assert [line for line in shown if not step.fullmatch(line)] == []
    assert len(shown) > 20


def test_every_metric_is_documented(tmp_path: Path) -> None:
    driver = make_driver(tmp_path, MemoryBacking(), RecordingMapper())
    families = [family.name for family in DriverCollector(driver).collect()]
    assert len(families) == 14
    for name in families:
        assert f"``{name}" in MONITORING


def test_the_rewritten_example_is_what_rewriting_its_original_gives() -> None:
    rewritten = next(block for block in _blocks("xml.rst") if "nvdimm:domain" in block)
    original = restore(rewritten)
    assert extract(original) is not None
    assert rewrite(original, "/usr/libexec/xen/bin/nvdimm-device-model") == rewritten


def test_every_column_of_the_ledger_is_documented() -> None:
    page = (DOC / "ledger.rst").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^   \* - ``(\w+)``\n     - ((?:.*\n(?!   \*))*.*)", page, re.MULTILINE))
    ledger = Ledger(":memory:")
    for (table,) in ledger._rows("SELECT name FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite%'"):
        for _, column, *_ in ledger._rows(f"PRAGMA table_info({table})"):
            assert f"``{column}``" in rows[table], f"{table}.{column}"
    assert f"``PRAGMA user_version`` is the version of the schema, {len(SCHEMAS)};" in page
    ledger.close()


@pytest.mark.parametrize("page", ["security.rst", "reliability.rst", "testing.rst"])
def test_the_tests_that_a_page_names_are_there(page: str) -> None:
    text = (DOC / page).read_text(encoding="utf-8")
    named = re.findall(r"``(?:tests/)?((?:unit|integration|lab|nova|fuzz)/\w[\w/]*\.py)``", text)
    assert named
    assert [name for name in named if not (PROJECT / "tests" / name).is_file()] == []


def test_the_installation_with_pip_has_all_that_the_wheel_needs() -> None:
    setup = (PROJECT / "setup.py").read_text(encoding="utf-8")
    needs = ast.literal_eval(re.findall(r"install_requires=(\[.*?\])", setup, re.DOTALL)[0])
    (line,) = re.findall(r"# apt install (python3-venv .*)", (DOC / "install.rst").read_text(encoding="utf-8"))
    assert {f"python3-{name.replace('_', '-')}" for name in needs} <= set(line.split())
