"""The pages: their commands run, their links lead somewhere, and what they say about the code holds."""

import argparse
import ast
import importlib
import re
import shlex
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from common import Parser

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted(ROOT.glob("docs/*.md"))]
TEXTS = [*PAGES, ROOT / "models/tiny/README.md", ROOT / "examples/README.md"]
SOURCES = {path.stem: ast.parse(path.read_text()) for path in sorted(ROOT.glob("*.py"))}
EXPERIMENTS = {path.stem: ast.parse(path.read_text()) for path in sorted(ROOT.glob("experiments/*.py"))}
COMMAND = re.compile(r"(?:python|torchrun(?: --\S+)*) (?:(\w+)\.py|-m (experiments\.[a-z_]+))((?: (?!#)\S+)*)")


class Parsed(Exception):
    """Ends a script after its options were parsed."""


def commands() -> list[tuple[str, str, str]]:
    """(where, module, arguments) of each command in pages and docstrings; two spaces end a command in a docstring."""
    texts = {str(path.relative_to(ROOT)): path.read_text() for path in TEXTS}
    texts |= {f"{name}.py": ast.get_docstring(tree) or "" for name, tree in (SOURCES | EXPERIMENTS).items()}
    joined = {where: re.sub(r"\\\n\s*", "", text) for where, text in texts.items()}
    lines = [(where, line) for where, text in joined.items() for line in re.split(r"\n|`", text)]
    found = [(where, *match.groups()) for where, line in lines for match in COMMAND.finditer(line)]
    return [(where, script or module, arguments) for where, script, module, arguments in found]


@pytest.mark.parametrize(("where", "module", "arguments"), commands())
def test_every_command_has_a_script_that_takes_its_options(where, module, arguments, monkeypatch):
    def parse(parser, given, *_):
        argparse.ArgumentParser.parse_args(parser, given)
        raise Parsed

    monkeypatch.setattr(Parser, "parse_args", parse)
    if "--help" not in arguments:
        with pytest.raises(Parsed):
            importlib.import_module(module).main(shlex.split(arguments))


def test_every_link_leads_to_a_file_and_a_heading():
    links = [(path, link) for path in TEXTS for link in re.findall(r"\]\((?!https?:)([^)]+)\)", path.read_text())]
    assert len(links) > 50
    for path, link in links:
        file, _, heading = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), (path, link)
        titles = [re.sub(r"[^\w -]", "", title).lower() for title in re.findall(r"^#+ (.+)", _text(target), re.M)]
        assert not heading or heading in [title.replace(" ", "-") for title in titles], (path, link)


def _text(path: Path) -> str:
    return path.read_text() if path.suffix == ".md" else ""


def test_every_picture_is_shown_or_read_on_a_page():
    named = re.compile(r"\]\(([^)#]+)\)|\"(docs/[^\"]+)\"")
    found = [(path, match) for path in TEXTS for match in named.finditer(_text(path))]
    used = {(path.parent / match[1]).resolve() if match[1] else ROOT / match[2] for path, match in found}
    pictures = {path for path in ROOT.glob("docs/**/*") if path.suffix in (".png", ".jpg", ".svg")}
    assert pictures and pictures <= used


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_a_page_is_short_and_all_but_the_tour_start_with_a_command(page):
    text = page.read_text()
    assert text.count("\n") < {"README.md": 200, "tour.md": 300}.get(page.name, 150)
    assert page.name in ("README.md", "tour.md") or re.match(r"# .+\n\n```bash\n", text)


def test_the_readme_links_the_tour_in_its_first_screen_and_every_module_in_the_reading_order():
    text = README.read_text()
    assert "(docs/tour.md)" in "\n".join(text.splitlines()[:25])
    assert sorted(re.findall(r"^\| \[`(\w+)\.py`\]", text, re.M)) == sorted(SOURCES)


def test_functions_named_beside_a_file_are_in_it():
    """As in: (`denoise`, `variance` in [`cdiffset.py`](../cdiffset.py))."""
    for names, module in re.findall(r"((?:`\w+`(?:, | and )?)+)\sin\s+\[`(\w+)\.py`\]", "\n".join(map(_text, PAGES))):
        defined = {getattr(node, "name", getattr(node, "id", "")) for node in ast.walk(SOURCES[module])}
        assert set(re.findall(r"\w+", names.replace(" and ", " "))) <= defined, (names, module)


def test_imports_form_no_circle_and_no_module_imports_an_experiment():
    imports = {
        name: {node.module.partition(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        for name, tree in SOURCES.items()
    }
    list(TopologicalSorter({name: found & SOURCES.keys() for name, found in imports.items()}).static_order())
    assert not [name for name, found in imports.items() if "experiments" in found]
