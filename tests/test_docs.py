"""What readers rely on: docstrings, --help, and a README whose commands, files, functions and defaults exist."""

import argparse
import ast
import importlib
import re
from pathlib import Path

import pytest

from common import Parser
from train import SD_FOLDER

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted(path.stem for path in ROOT.glob("*.py"))
SCRIPTS = [name for name in MODULES if "run(main)" in (ROOT / f"{name}.py").read_text()]
README = (ROOT / "README.md").read_text()
READMES = [path for path in ROOT.glob("**/README.md") if not {".venv", Path(SD_FOLDER).name} & set(path.parts)]


class Found(Exception):
    """Carries a parser out of the script that made it."""


@pytest.fixture
def parser_of(monkeypatch):
    """A function: script -> its argument parser."""

    def stop(parser, *_):
        raise Found(parser)

    def parser(script: str) -> argparse.ArgumentParser:
        monkeypatch.setattr(Parser, "parse_args", stop)
        with pytest.raises(Found) as found:
            importlib.import_module(script).main([])
        return found.value.args[0]

    return parser


def options(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    return {option: action for action in parser._actions for option in action.option_strings}


def public(body: list[ast.stmt], prefix: str = "") -> list[tuple[str, ast.AST]]:
    """The functions, classes and methods that others may use. A module's `forward` is told by its class."""
    found = []
    for node in body:
        named = isinstance(node, (ast.FunctionDef, ast.ClassDef))
        if named and not node.name.startswith("_") and node.name != "forward":
            found.append((prefix + node.name, node))
            if isinstance(node, ast.ClassDef):
                found += public(node.body, f"{node.name}.")
    return found


@pytest.mark.parametrize("name", MODULES)
def test_every_public_thing_has_a_docstring(name):
    module = ast.parse((ROOT / f"{name}.py").read_text())
    assert ast.get_docstring(module)
    tuples = ("NamedTuple", "Exception")  # whose fields have a comment each
    missing = [
        title
        for title, node in public(module.body)
        if not ast.get_docstring(node)
        and not any(getattr(base, "id", "") in tuples for base in getattr(node, "bases", []))
    ]
    assert not missing


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_option_is_described(script, parser_of):
    parser = parser_of(script)
    assert not [action.dest for action in parser._actions if not action.help]
    assert len(parser.description) > 200 and f"python {script}.py" in parser.description


def test_every_command_in_a_text_has_options_that_exist(parser_of):
    texts = [path.read_text() for path in READMES]
    texts += [ast.get_docstring(ast.parse((ROOT / f"{name}.py").read_text())) for name in MODULES]
    commands = [match for text in texts for match in re.findall(r"(?<![\w/])(\w+)\.py((?: [^\s`#|]+)*)", text)]
    used = [(script, option) for script, rest in commands for option in re.findall(r"(?<!\S)--[a-z-]+", rest)]
    used = [(script, option) for script, option in used if script in SCRIPTS]
    assert len(used) > 30
    known = {script: options(parser_of(script)) for script in {script for script, _ in used}}
    assert not [(script, option) for script, option in used if option not in known[script]]


def test_no_text_gives_an_option_another_default(parser_of):
    known = [options(parser_of(script)) for script in SCRIPTS]
    texts = [README, *((ROOT / f"{name}.py").read_text() for name in MODULES)]
    told = [match for text in texts for match in re.findall(r"`?(--[a-z-]+)`? \(default:? `?([^)`]+)`?\)", text)]
    for option, value in told:
        assert value in {str(script[option].default) for script in known if option in script}, (option, value)


def test_every_readme_links_to_files_that_exist():
    links = [(path, link) for path in READMES for link in re.findall(r"\]\((?!https?:|#)([^)]+)\)", path.read_text())]
    assert len(links) > 20 and not [(path, link) for path, link in links if not (path.parent / link).exists()]


def test_the_readme_names_every_module():
    assert not [name for name in MODULES if f"({name}.py)" not in README]


def test_functions_named_beside_a_file_are_in_it():
    """As in: (`denoise`, `variance` in [`cdiffset.py`](cdiffset.py))."""
    places = re.findall(r"\(((?:`\w+`(?:, | and )?)+) in \[`(\w+)\.py`\]", README)
    assert places
    for names, module in places:
        defined = {
            node.name for node in ast.walk(ast.parse((ROOT / f"{module}.py").read_text())) if hasattr(node, "name")
        }
        assert set(re.findall(r"`(\w+)`", names)) <= defined, (names, module)
