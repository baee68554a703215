"""docs/tour.md: its code is ours, its numbers are those that experiments/tour.py printed, its blocks run."""

import re
from pathlib import Path

import pytest

from experiments.tour import fill

ROOT = Path(__file__).parents[1]
PAGE, PICTURES = ROOT / "docs/tour.md", ROOT / "docs/tour"
TEXT, ANSWERS = PAGE.read_text(), (PICTURES / "answers.md").read_text()
PRINTED = (PICTURES / "printed.txt").read_text()
CODE = re.findall(r"```python\n(.*?)```", TEXT, flags=re.S)
QUOTED = [block for block in CODE if re.match(r"# \w+\.py\n", block)]
PASTED = [block for block in CODE if block not in QUOTED]


def stripped(text: str) -> str:
    """Lines without what surrounds them, so that a method may be quoted without its indentation."""
    return "\n".join(line.strip() for line in text.splitlines() if line.strip())


@pytest.mark.parametrize("block", QUOTED, ids=lambda block: "-".join(re.findall(r"\w+", block)[:4]))
def test_quoted_code_is_in_the_file_that_it_names(block):
    name, code = block.removeprefix("# ").split("\n", 1)
    source = stripped((ROOT / name).read_text())
    for part in stripped(code).split("\n...\n"):
        assert part in source, f"{name} has no such lines (docs/tour.md quotes them):\n{part}"


def test_pasted_code_runs(monkeypatch):
    monkeypatch.chdir(ROOT)
    names = {}
    for block in PASTED:
        exec(compile(block, str(PAGE), "exec"), names)
    assert names["loss"].isfinite() and 10 < float(names["score"]) < 40  # dB


def test_numbers_are_those_that_were_printed():
    blocks = PRINTED.strip().split("\n\n")
    assert fill(TEXT, blocks) == TEXT and fill(ANSWERS, blocks[-1:]) == ANSWERS, "run python -m experiments.tour"
    prose = re.sub(r"```.*?```|    .*?\n|`.*?`|Diffusion 2.1", "", TEXT + ANSWERS, flags=re.DOTALL)
    decimals = set(re.findall(r"\b\d+\.\d+\b", prose))
    assert decimals <= set(re.findall(r"\b\d+\.\d+\b", PRINTED)), "the prose quotes other numbers"


def test_pictures_are_all_shown_and_small():
    shown = set(re.findall(r"!\[[^]]+\]\(tour/(\S+)\)", TEXT))
    drawn = {path.name for path in PICTURES.iterdir() if path.name[0].isdigit()}
    assert shown == drawn
    assert sum(path.stat().st_size for path in PICTURES.iterdir()) < 1e6


def test_page_is_short():
    assert len(TEXT.splitlines()) < 300
