"""bench.py: that what is measured is the same work, and that figures are combined as they should be."""

import json
from argparse import Namespace

import numpy as np
import pytest
import torch

from cdiffset import CDiffSET, add_variance_channel, widen_input
from experiments import bench
from experiments.pretrain import CONTEXT, TOKENS, small_unet, small_vae
from metrics import psnr
from scheduler import DDPMScheduler


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    torch.manual_seed(0)
    unet = small_unet([8, 16])
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
    figures = bench.measure(bench.CONTENDERS[task][name], args, keep=task == "sample")
    assert len(figures["seconds"]) == 1 and figures["peak"] > 1e7
    assert (figures["flops"] > 1e6) == (task != "load")
    assert (figures["image"] is not None) == (task == "sample")


def test_the_contenders_translate_alike(args):
    """The released algorithm in diffusers, ours in float32 and in bfloat16: within 40 dB."""
    pytest.importorskip("diffusers")
    names = (bench.RELEASED, "float32", "bfloat16")
    made = [bench.measure(bench.CONTENDERS["sample"][name], args, keep=True)["image"] for name in names]
    released, float32, bfloat16 = (torch.from_numpy(x) / 2 + 0.5 for x in made)
    assert float32.std() > 0.01 and (released - float32).abs().max() < 1e-4
    assert psnr(bfloat16, float32).min() > 40


def test_the_convolutions_flops_are_counted(args):
    figures = bench.measure(bench.CEILINGS["convolution float32"], args)
    assert figures["flops"] == 2 * 8 * 64 * 64 * 320 * 320 * 9


def test_rows_give_medians_and_ratios(monkeypatch):
    image = np.zeros((1, 3, 4, 4), np.float32)
    contenders = {
        "diffusers": bench.Contender(bench.translating),
        "float32": bench.Contender(bench.translating),
        "bfloat16 compiled": bench.Contender(bench.translating, "bfloat16", compiled=True),
        "huge": bench.Contender(bench.translating),
    }
    results = {
        "diffusers": {"seconds": [4.0, 9.0, 5.0], "peak": 7e9, "flops": 60, "image": image},
        "float32": {"seconds": [2.0, 2.5, 8.0], "peak": 3e9, "flops": 50, "image": image + 0.2},
        "bfloat16 compiled": {"seconds": [1.0], "peak": 2e9, "flops": None, "image": image},
        "huge": {"error": "out of memory"},
    }
    limits = {"convolution float32": 80, "matrix product float32": 100, "convolution bfloat16": 200}
    rows = bench.compare(contenders, results, limits)
    assert list(rows) == list(contenders) and rows.pop("huge") == {"error": "out of memory"}

    def column(name):
        return [row.get(name) for row in rows.values()]

    assert column("seconds") == [5, 2.5, 1] and column("times as fast") == [1, 2, 5] and column("peak, GB") == [7, 3, 2]
    assert column("of the ceiling") == pytest.approx([0.1, 0.2, 0.25])  # of 50 FLOPs
    assert column("PSNR to float32") == [pytest.approx(20), None, pytest.approx(20)]


def test_a_contender_that_fails_is_told_and_the_others_go_on(args, tmp_path):
    args.model = tmp_path  # which holds no model, but can be read
    contenders = {name: bench.CONTENDERS["load"][name] for name in ("reading the files", "float32")}
    with bench.tqdm(total=2, disable=True) as bar:
        results = bench.take_turns(contenders, args, bar)
    assert len(results["reading the files"]["seconds"]) == 1
    assert results["float32"]["error"].startswith("ValueError: ") and "\n" not in results["float32"]["error"]


def test_a_run_writes_a_table_and_keeps_the_other_tasks_of_its_file(model_path, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "CEILINGS", {})  # they take no part in it
    arguments = ["load", "--model", str(model_path), "--out", str(tmp_path), "--rounds", "1", "--runs", "1"]
    assert bench.main(arguments) == 0
    (path,) = tmp_path.glob("bench-*.json")
    result = json.loads(path.read_text())
    path.write_text(json.dumps({"load": "old", "train": "kept"}))
    assert bench.main(arguments) == 0
    assert "| float32 " in capsys.readouterr().out
    again = json.loads(path.read_text())
    assert set(again) == {"load", "train"} and again["train"] == "kept"
    assert {"command", "machine", "torch", "date", "settings", "ceilings", "rows"} <= again["load"].keys()
    rows = result["load"]["rows"]
    assert list(rows)[0] == "reading the files" and list(rows)[-1] == "float32"
    first = rows["reading the files"]["seconds"]
    assert all(row["times as fast"] == first / row["seconds"] for row in rows.values() if "error" not in row)


def test_what_cannot_be_measured_is_refused(tmp_path, capsys):
    with pytest.raises(ValueError, match="is not there: give a C-DiffSET model folder"):
        bench.main(["load", "--model", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match="2"):
        bench.main(["fly"])
    assert "choose from sample, train, scene, load" in capsys.readouterr().err
    assert bench.parse([]).tasks == [] and bench.parse(["load", "train"]).tasks == ["load", "train"]
