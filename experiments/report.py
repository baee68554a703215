"""What the scripts that measure write: who computed it and where, small tables, and small clear pictures.

Colours are Okabe and Ito's, which the colour-blind can tell apart. The plots need matplotlib.
"""

import argparse
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from common import atomic

BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#7F7F7F"


def pyplot() -> Any:
    """matplotlib.pyplot, set up for plots that are shown 700 pixels wide. Raises ValueError if it is not there."""
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("the plots need matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")  # files only: no display is needed
    from matplotlib import pyplot

    size = {f"{part}.labelsize": 9 for part in ("axes", "xtick", "ytick")} | {"legend.fontsize": 8.5, "font.size": 9}
    lines = {"axes.spines.top": False, "axes.spines.right": False, "lines.linewidth": 1.6, "lines.markersize": 5}
    rest = {"axes.titlesize": 9.5, "axes.edgecolor": "#444444", "legend.frameon": False, "savefig.dpi": 200}
    pyplot.rcParams.update(size | lines | rest | {"figure.constrained_layout.use": True})
    return pyplot


class Series(NamedTuple):
    """A line of a plot: at each x one value, or one for each seed."""

    x: Sequence[float]
    values: Sequence[Sequence[float] | float]
    colour: str
    style: str = "-"


@contextmanager
def plot(path: Path, panels: int, height: float = 2.7) -> Iterator[Sequence[Any]]:
    """Gives matplotlib's axes, side by side, to draw into; then writes a PNG of 1400 pixels' width.

    height: in inches, of 200 pixels.
    """
    plt = pyplot()
    figure, axes = plt.subplots(1, panels, figsize=(7, height), squeeze=False)
    yield axes[0]
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as temporary:
        figure.savefig(temporary)
    plt.close(figure)


def lines(axes: Any, title: str, x: str, y: str, series: dict[str, Series], log: str = "", columns: int = 1) -> None:
    """Means over the seeds, with the standard deviation as bars. log: which axes are logarithmic, e.g. "xy"; columns:
    of the legend, below.
    """
    axes.set(title=title, xlabel=x, ylabel=y, **{f"{axis}scale": "log" for axis in log})
    for name, line in series.items():
        values = np.array(line.values, dtype=np.float64).reshape(len(line.x), -1)
        spread = values.std(axis=1, ddof=1) if values.shape[1] > 1 else None
        marker = "o" * (line.style == "-" and len(line.x) <= 12)
        look = {"fmt": line.style + marker, "color": line.colour, "capsize": 2, "elinewidth": 1}
        axes.errorbar(line.x, values.mean(axis=1), spread, label=name, **look)
    ticks = max((line.x for line in series.values()), key=len)
    if "x" in log and len(ticks) <= 12:
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
    if sum(not name.startswith("_") for name in series) > 1:
        axes.legend(loc="upper center", bbox_to_anchor=(0.45, -0.24), ncols=columns, columnspacing=1, handlelength=1.5)


def origin(script: str, arguments: list[str] | None, args: argparse.Namespace) -> dict[str, Any]:
    """What a result needs to be made again, or doubted: command, commit, machine, date, version of torch, settings.

    arguments: of the command line, None for those of this process; args: what they became.
    """
    command = shlex.join(["python", script, *(sys.argv[1:] if arguments is None else arguments)])
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    about = {"command": command, "commit": commit(), "machine": machine(args.device), "date": str(date.today())}
    return about | {"torch": torch.__version__, "settings": settings}


def commit() -> str | None:
    """The git commit of this checkout, with "-dirty" if files differ from it; None where there is no git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


def markdown(corner: str, rows: dict[str, dict[str, str | float | None]], columns: Iterable[str] = ()) -> str:
    """A Markdown table of {row: {column: text or number}} whose columns line up on a terminal too; what a row lacks
    stays empty. columns: their order, where it is not that in which the rows name them.
    """
    columns = list(columns) or list(dict.fromkeys(name for row in rows.values() for name in row))
    table = [[corner, *columns]]
    for name, row in rows.items():
        values = [row.get(column) for column in columns]
        table.append([name, *(f"{x:.3f}" if isinstance(x, float) else x or "" for x in values)])
    first, *others = (max(3, *map(len, column)) for column in zip(*table))
    lines = [" | ".join([row[0].ljust(first), *map(str.rjust, row[1:], others)]) for row in table]
    rule = "|".join(["-" * (first + 2), *("-" * (width + 1) + ":" for width in others)])
    return "\n".join([f"| {lines[0]} |", f"|{rule}|", *(f"| {line} |" for line in lines[1:])]) + "\n"


def machine(device: str) -> str:
    """The name of the GPU, or of the processor and its number of threads."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return f"{found[1] if found else platform.processor()}, {torch.get_num_threads()} threads"
