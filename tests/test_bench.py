"""experiments/bench.py: both sides of the comparison do the same work, and the table holds what was measured."""

import json
import sys
from pathlib import Path

import pytest
import torch

from experiments import bench
from sample import load_model

TINY = Path(__file__).parents[1] / "models" / "tiny"


@pytest.fixture
def model():
    return load_model(TINY, "cpu")


@pytest.mark.parametrize("package", ["diffusers", "none"])
def test_the_released_sampler_and_ours_make_the_same_image(model, package, monkeypatch):
    if package == "none":
        monkeypatch.setitem(sys.modules, "diffusers", None)
    else:
        pytest.importorskip("diffusers")
    sar = bench.random_images(2, 32, "cpu")
    ours = bench.sampler(model, sar, steps=2)()
    torch.testing.assert_close(bench.released_sampler(model, sar, steps=2)(), ours, rtol=0, atol=1e-3)
    assert ours.std() > 0.01


@pytest.mark.parametrize("package", ["diffusers", "none"])
def test_training_steps_change_the_weights(model, package, monkeypatch):
    if package == "none":
        monkeypatch.setitem(sys.modules, "diffusers", None)
    networks = bench.released_networks(model)
    monkeypatch.setattr(bench, "released_networks", lambda _: networks)
    images = bench.random_images(2, 32, "cpu")
    with torch.no_grad():
        latents = list(model.encode(images).repeat(2, 1, 1, 1).chunk(2))
    released = bench.released_train_step(model, images, images), networks[1]
    for step, unet in (released, (bench.train_step(model, latents, "float32"), model.unet)):
        before = unet.conv_in.weight.detach().clone()
        step()
        change = (unet.conv_in.weight - before).abs().max()
        assert 0 < change < 1e-4 and unet.conv_in.weight.grad is None


def test_median_seconds_ignores_the_first_call(monkeypatch):
    calls, clock = [], iter([0, 1, 10, 15, 20, 22])
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clock))
    assert bench.median_seconds(lambda: calls.append(1), 3, "cpu") == 2
    assert len(calls) == 4


def test_the_ceiling_is_a_rate_of_floating_point_operations(monkeypatch):
    monkeypatch.setattr(bench, "seconds", lambda function, device: 2.0)
    assert bench.matmul_ceiling("cpu", "float32") == 2048**3


def test_the_command_writes_the_table_that_it_prints(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "matmul_ceiling", lambda device, dtype: 1e12)
    options = "--size 32 --steps 1 --rounds 2 --runs 1 --device cpu"
    assert bench.main(["--model", str(trained), "--out", str(tmp_path), *options.split()]) == 0
    printed = capsys.readouterr().out
    (path,) = tmp_path.glob("bench-*.json")
    result = json.loads(path.read_text())
    for task in ("sample", "train"):
        rows = result[task]
        assert list(rows) == ["released algorithm", "float32", "bfloat16"]
        for name, row in rows.items():
            assert name in printed and f"{row['times as fast']:.3f}" in printed and 0 < row["of the ceiling"] < 1
            first = rows["released algorithm"]["seconds"]
            assert row["times as fast"] == pytest.approx(first / row["seconds"])
    assert result["sample"]["bfloat16"]["PSNR to float32"] > 30
