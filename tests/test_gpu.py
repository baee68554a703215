"""experiments/gpu.py: a failing part costs its own lines alone; limits; the table. The parts themselves need a GPU."""

import json
import math
import sys

import pytest
import torch

from experiments import gpu
from experiments.gpu import main, relative_error, row, table

WRITES = "import pathlib, sys; open(sys.argv[1], 'w').write(sys.argv[2] + '\\n'); "
AFTERWARDS = {  # what the process of a part does after its first line
    "parity": "",
    "precision": "raise RuntimeError('CUDA error: an illegal memory access\\nCompile with TORCH_USE_CUDA_DSA')",
    "training": "import time; time.sleep(600)",
    "scripts": "import os; os.abort()",
}


@pytest.fixture()
def fake_parts(monkeypatch):
    """Parts that write one line, and then end as AFTERWARDS says."""

    def command(name, args, limit):
        line = json.dumps(row(f"a line of {name}", {"PSNR": 40.0}, {"PSNR": 30}))
        return [sys.executable, "-c", WRITES + AFTERWARDS[name], str(args.out / f"{name}.jsonl"), line]

    monkeypatch.setattr(gpu, "part_command", command)
    monkeypatch.setattr(gpu, "PARTS", {name: (None, 0.5 if name == "training" else 60) for name in AFTERWARDS})


def test_a_part_that_fails_or_takes_too_long_costs_only_its_own_lines(fake_parts, tmp_path, capsys):
    assert main(["--out", str(tmp_path), "--device", "cpu", "--small"]) == 1
    result = json.loads((tmp_path / "gpu.json").read_text())
    for name in AFTERWARDS:
        first, *rest = result["parts"][name]
        assert first["what"] == f"a line of {name}" and first["ok"] is True
        assert len(rest) == (name != "parity") and all(line["ok"] is False for line in rest)
    notes = {name: rows[-1]["note"] for name, rows in result["parts"].items()}
    assert notes["precision"] == "exit code 1: RuntimeError: CUDA error: an illegal memory access"
    assert notes["training"] == "stopped after 2 s" and notes["scripts"].startswith("exit code -6")
    printed = capsys.readouterr().out
    assert printed.count("PSNR 40") == 4 and printed.count("FAILED") == 3
    assert (tmp_path / "gpu.md").read_text() in printed
    assert {"command", "commit", "machine", "torch", "seconds"} <= result.keys()


def test_parts_for_which_no_time_is_left_are_said_to_be_missing(fake_parts, tmp_path):
    options = ["--out", str(tmp_path), "--device", "cpu", "--small", "--parts", "parity", "--minutes", "0.1"]
    assert main(options) == 0
    (line,) = json.loads((tmp_path / "gpu.json").read_text())["parts"]["parity"]
    assert line["what"] == "not run" and line["note"] == "no time left" and line["ok"] is None


def test_a_part_runs_to_its_end_on_the_cpu(tmp_path):
    assert main(["--out", str(tmp_path), "--device", "cpu", "--small", "--parts", "precision"]) == 0
    lines = json.loads((tmp_path / "gpu.json").read_text())["parts"]["precision"]
    assert [line["ok"] for line in lines[:6]] == [True] * 6
    assert not (tmp_path / "precision.jsonl").exists() and (tmp_path / "precision.log").exists()


@pytest.mark.parametrize(
    "figures, ok",
    [({"a": 1, "b": 5}, True), ({"a": 0.9, "b": 5}, False), ({"a": 1, "b": 6}, False), ({"a": 1}, False)]
    + [({"a": math.nan, "b": 5}, False), ({"a": math.inf, "b": 5}, True)],
)
def test_a_line_is_ok_if_all_its_limits_are_met(figures, ok):
    line = row("what", figures, at_least={"a": 1}, at_most={"b": 5})
    assert line["ok"] is ok
    assert json.loads(json.dumps(line, allow_nan=False)) == line
    assert row("what", figures)["ok"] is None


def test_the_table_shows_figures_limits_and_notes():
    lines = [row("images", {"PSNR": 41.234567, "images": 5}, {"PSNR": 60}), row("SD", {}, note="not tried")]
    first, second = table({"precision": lines}).splitlines()[2:]
    assert [cell.strip() for cell in first.split("|")[1:-1]] == [
        "precision: images", "PSNR 41.23; images 5", "PSNR ≥ 60", "FAILED",
    ]  # fmt: skip
    assert [cell.strip() for cell in second.split("|")[1:-1]] == ["precision: SD", "not tried", "", ""]


def test_the_relative_error_counts_all_tensors_together():
    expected = [torch.tensor([3.0]), torch.tensor([4.0, 0.0])]
    assert relative_error(expected, expected) == 0
    assert relative_error([torch.tensor([3.0]), torch.tensor([4.0, 0.5])], expected) == pytest.approx(0.1)


def test_full_size_on_a_cpu_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--out", str(tmp_path), "--device", "cpu"])
    assert "add --small" in capsys.readouterr().err
