"""What the experiments share: where a result comes from (command, commit, machine, date), tables over seeds, plots."""

import argparse
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import atomic, write_json
from evaluate import markdown

# The palette of Okabe and Ito, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#7F7F7F"


def pyplot() -> Any:
    """matplotlib.pyplot with the style of our plots. Raises ValueError if matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("the plots need matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")  # writes files and needs no display
    from matplotlib import pyplot

    style = {"font.size": 9, "legend.fontsize": 8.5, "legend.frameon": False, "lines.linewidth": 1.6}
    style |= {"axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#444444"}
    pyplot.rcParams.update(style | {"savefig.dpi": 200, "figure.constrained_layout.use": True})
    return pyplot


@contextmanager
def plot(path: Path, x: str, y: str, height: float = 3.2) -> Iterator[Any]:
    """Yields matplotlib's axes with the titles x and y, then writes a PNG 1400 pixels wide. height: inches."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7, height))
    axes.set(xlabel=x, ylabel=y)
    yield axes
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as temporary:
        figure.savefig(temporary)
    plt.close(figure)


def origin(name: str, arguments: list[str] | None, args: argparse.Namespace) -> dict[str, Any]:
    """What is needed to repeat a result: command, commit, machine, date, version of torch, settings.

    name: of the module. arguments: of its command line; None: those of this process. args: the parsed ones.
    """
    command = shlex.join(["python", "-m", name, *(sys.argv[1:] if arguments is None else arguments)])
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    about = {"command": command, "commit": commit(), "machine": machine(args.device), "date": str(date.today())}
    return about | {"torch": torch.__version__, "settings": settings}


def cell(values: list[float]) -> str:
    """The mean of the values of several seeds, and their standard deviation if there are two or more."""
    mean, digits = float(np.mean(values)), 2 if abs(np.mean(values)) >= 10 else 3
    return f"{mean:.{digits}f}" + (f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else "")


def write_results(stem: Path, source: dict[str, Any], results: dict[str, dict[str, list[float]]], note: str) -> None:
    """Writes STEM.json, with every value, and STEM.md, a table of the means; prints the table.

    source: of `origin`. results: {row: {column: the value of each seed}}. note: what the results were measured on.
    """
    write_json(stem.with_suffix(".json"), source | {"results": results})
    rows = {name: {column: cell(values) for column, values in row.items()} for name, row in results.items()}
    table = markdown("", rows)
    about = f"`{source['command']}`, commit {source['commit']}, {source['machine']}, {source['date']}."
    with atomic(stem.with_suffix(".md")) as temporary:
        temporary.write_text(f"{table}\n{note}. {about}\n", encoding="utf-8")
    print(f"{table}wrote {stem}.json and .md")


def commit() -> str | None:
    """The git commit of this checkout, with "-dirty" if files differ from it; None without git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


def machine(device: str) -> str:
    """The name of the GPU, or that of the processor and the number of threads."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return f"{found[1] if found else platform.processor()}, {torch.get_num_threads()} threads"
