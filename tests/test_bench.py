"""bench.py: that what is measured is the same work, and that figures are combined as they should be."""

import json
from argparse import Namespace

import numpy as np
import pytest
import torch

import bench
from cdiffset import CDiffSET, add_variance_channel, widen_input
from metrics import psnr
from pretrain import CONTEXT, TOKENS, small_unet, small_vae
from scheduler import DDPMScheduler


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    torch.manual_seed(0)
    unet = small_unet([8, 16], 1)
    widen_input(unet)
    add_variance_channel(unet)
    path = tmp_path_factory.mktemp("model") / "model"
    CDiffSET(small_vae([8, 16, 16, 16]), unet, torch.randn(1, TOKENS, CONTEXT), DDPMScheduler()).save_pretrained(path)
    return path


@pytest.fixture
def args(model_path):
    return Namespace(model=model_path, size=32, steps=2, batch_size=2, runs=1, rounds=1, device="cpu")


CASES = [(task, name) for task, contenders in bench.CONTENDERS.items() for name in contenders if "compiled" not in name]


@pytest.mark.parametrize("task, name", CASES)
def test_every_contender_runs(args, task, name):
    if "diffusers" in name:
        pytest.importorskip("diffusers")
    figures = bench.measure(bench.CONTENDERS[task][name], args, compiled=False)
    assert len(figures["seconds"]) == 1 and figures["peak_bytes"] > 1e7
    assert (figures["flops"] > 1e6) == (task != "load")
    assert (figures["output"] is not None) == (task == "sample" or name.endswith("one image"))


def test_the_contenders_translate_alike(args):
    """The released algorithm in diffusers, ours in float32 and in bfloat16: within 40 dB."""
    pytest.importorskip("diffusers")
    names = (bench.RELEASED, "float32", "bfloat16")
    made = [bench.measure(bench.CONTENDERS["sample"][name], args, compiled=False)["output"] for name in names]
    released, float32, bfloat16 = (torch.from_numpy(x) / 2 + 0.5 for x in made)
    assert float32.std() > 0.01 and (released - float32).abs().max() < 1e-4
    assert psnr(bfloat16, float32).min() > 40


def test_the_convolutions_flops_are_counted(args):
    figures = bench.measure(bench.CEILINGS["convolution float32"], args, compiled=False)
    assert figures["flops"] == 2 * 8 * 64 * 64 * 320 * 320 * 9


def test_rows_give_medians_and_ratios():
    image = np.zeros((1, 3, 4, 4), np.float32)
    results = {
        "diffusers float32": {"seconds": [4.0, 9.0, 5.0], "peak_bytes": 7e9, "flops": 60, "output": image},
        "float32": {"seconds": [2.0, 2.5, 8.0], "peak_bytes": 3e9, "flops": 50, "output": image + 0.2},
        "bfloat16 compiled": {"seconds": [1.0], "peak_bytes": 2e9, "flops": None, "output": image},
        "huge": {"error": "out of memory"},
    }
    limits = {"convolution float32": 80, "matrix product float32": 100, "convolution bfloat16": 200}
    rows = bench.compare("sample", results, limits, 10)
    assert [row.get("seconds") for row in rows] == [5, 2.5, 1, None]
    assert [row.get("speedup") for row in rows] == [1, 2, 5, None]
    assert [row.get("images_per_second") for row in rows] == [2, 4, 10, None]
    assert [row.get("share_of_ceiling") for row in rows] == pytest.approx([0.1, 0.2, 0.25, None])  # of 50 FLOPs
    assert [row.get("psnr_to_float32") for row in rows] == [pytest.approx(20), None, pytest.approx(20), None]
    lines = bench.table(rows).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[2] == ["sample: diffusers float32", "5", "2", "7.00", "10%", "1.00", "20.0"]
    assert cells[5] == ["sample: huge", "out of memory", "", "", "", "", ""]


def test_a_run_writes_a_table_and_a_file(model_path, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "CEILINGS", {})  # they take no part in it
    arguments = ["load", "--model", str(model_path), "--out", str(tmp_path), "--rounds", "1", "--runs", "1"]
    assert bench.main(arguments) == 0
    out = capsys.readouterr().out
    (path,) = tmp_path.glob("bench-*.json")
    result = json.loads(path.read_text())
    assert {"machine", "torch", "date", "settings", "ceilings", "rows"} < result.keys()
    rows = result["rows"]
    assert rows[0]["contender"] == "reading the files" and rows[-1]["contender"] == "float32"
    assert all(row["speedup"] == rows[0]["seconds"] / row["seconds"] for row in rows)
    assert "| load: float32 " in out


def test_what_cannot_be_measured_is_refused(tmp_path, capsys):
    with pytest.raises(ValueError, match="is not there: give a C-DiffSET model folder"):
        bench.main(["load", "--model", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match="2"):
        bench.main(["fly"])
    assert "choose from sample, train, scene, load" in capsys.readouterr().err
