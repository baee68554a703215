"""train.py as a user runs it: whole trainings at small size, killed, resumed, shared by processes, refused."""

import csv
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import Forked, assert_same_tensors, run, run_with_kills, tensors_under, write_base
from PIL import Image

import data
import train
from cdiffset import CDiffSET, denoise, variance
from common import read_json
from data import PairDataset, find_pairs
from images import Reading
from train import sample_noise

ROOT = Path(train.__file__).parent


@pytest.fixture(scope="module")
def command(dataset, base):
    """The options of a small training."""
    options = "--size 16 --steps 10 --batch-size 4 --lr 1e-3 --workers 0 --device cpu --save-every 3"
    options += " --validate-every 4 --validate-images 2 --validate-steps 2 --dtype float32"
    return ["--data", str(dataset), "--model", str(base), *options.split()]


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    """The folder of a training that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert train.main([*command, "--out", str(out)]) == 0
    return out


def table(path):
    """A log without the one column that is never the same twice."""
    with path.open() as file:
        return [{k: float(v) for k, v in row.items() if k != "images_per_second"} for row in csv.DictReader(file)]


def assert_same_run(out, other):
    """The same losses, scores, checkpoints, best model and previews, to the last bit."""
    assert_same_tensors(out, other)
    for name in ("log.csv", "validation.csv"):
        assert table(out / name) == table(other / name)
    for path in other.glob("samples/*.png"):
        assert (out / "samples" / path.name).read_bytes() == path.read_bytes()


def assert_close_run(out, other):
    """The same losses and weights to rounding."""
    for ours, theirs in zip(table(out / "log.csv"), table(other / "log.csv"), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-3)
    assert table(out / "log.csv")[-1]["loss"] == pytest.approx(table(other / "log.csv")[-1]["loss"], rel=1e-4)


# ----------------------------------------------------------------------------------------------------------
# What is trained


@pytest.mark.parametrize("kind", ["cdiff", "mse"])
def test_the_loss_of_a_batch_is_the_paper_s(base, kind):
    model = CDiffSET.from_pretrained(base, variance_channel=kind == "cdiff").float()
    if kind == "cdiff":
        torch.nn.init.normal_(model.unet.conv_out.weight[4:], std=0.1)
    sar, eo = torch.rand(2, 3, 3, 16, 16) * 2 - 1
    ours = train.objective(model, kind, seed=7, cached=False)(model.unet, [sar, eo], [4, 5, 6])

    z_sar, z_eo = model.encode(sar), model.encode(eo)
    assert torch.equal(ours, train.objective(model, kind, 7, cached=True)(model.unet, [z_sar, z_eo], [4, 5, 6]))
    noise, t = sample_noise((4, 4, 4), 7, [4, 5, 6])
    a = model.scheduler.alphas_cumprod[t].reshape(3, 1, 1, 1)
    z_t = a.sqrt() * z_eo + (1 - a).sqrt() * noise
    prediction, raw = denoise(model.unet, z_sar, z_t, t, model.prompt_embedding)
    expected = F.mse_loss(prediction, noise)
    if kind == "cdiff":
        var = variance(raw)
        nll = ((noise - prediction) ** 2 / var + var.log() + math.log(2 * math.pi)) / 2
        expected = (var ** a.sqrt() * nll).mean()
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_recomputing_activations_changes_no_gradient(base):
    model, gradients = CDiffSET.from_pretrained(base), []
    for model.unet.gradient_checkpointing in (False, True):
        sar, eo = torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 1, 3, 16, 16)
        train.objective(model, "cdiff", 0, cached=False)(model.unet, [sar, eo], [0]).backward()
        gradients.append([p.grad.clone() for p in model.unet.parameters()])
        model.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_the_loss_falls_on_a_few_pairs(dataset, base):
    model, pairs = CDiffSET.from_pretrained(base), PairDataset(find_pairs(dataset).pairs[:2], 16)
    loss, optimizer = train.objective(model, "cdiff", 0, cached=False), torch.optim.AdamW(model.unet.parameters(), 3e-3)
    batch, values = [torch.stack(x) for x in zip(*(pairs[i] for i in range(2)))], []
    for _ in range(60):
        values.append(loss(model.unet, batch, [0, 1]))
        optimizer.zero_grad()
        values[-1].backward()
        optimizer.step()
    assert values[-1] < values[0] - 0.3


def test_stage_two_starts_from_stage_one_in_two_commands(command, tmp_path):
    one, two = tmp_path / "stage1", tmp_path / "stage2"
    assert train.main([*command, "--loss", "mse", "--out", str(one)]) == 0
    stage1 = CDiffSET.from_pretrained(one / "model")
    assert (stage1.unet.config["in_channels"], stage1.unet.config["out_channels"]) == (8, 4)
    assert train.main([*command, "--loss", "cdiff", "--out", str(two), "--model", str(one / "model")]) == 0
    assert CDiffSET.from_pretrained(two / "model").unet.config["out_channels"] == 5
    # the first loss of stage two is half the L2 loss of stage one's network, plus log(2 pi) / 2
    loss = train.objective(stage1, "mse", 0, cached=False)
    pairs = PairDataset(train.split_pairs(find_pairs(command[1]).pairs).train, 16)
    with torch.no_grad():
        l2 = loss(stage1.unet, [torch.stack(x) for x in zip(*(pairs[i] for i in range(4)))], [0, 1, 2, 3])
    first = table(two / "log.csv")[0]["loss"]
    assert first == pytest.approx(float(l2) / 2 + math.log(2 * math.pi) / 2, rel=1e-4)
    with pytest.raises(ValueError, match="has a variance channel, which --loss mse would not train"):
        train.main([*command, "--loss", "mse", "--out", str(tmp_path / "3"), "--model", str(two / "model")])


def test_a_base_model_that_predicts_velocity_goes_on_doing_so(command, tmp_path):
    velocity = write_base(tmp_path / "v", prediction_type="v_prediction")
    assert train.main([*command, "--model", str(velocity), "--out", str(tmp_path / "run")]) == 0
    assert CDiffSET.from_pretrained(tmp_path / "run" / "model").scheduler.prediction_type == "v_prediction"
    model = CDiffSET.from_pretrained(velocity)
    sar, eo = torch.rand(2, 2, 3, 16, 16)
    noise, t = sample_noise((4, 4, 4), 0, [0, 1])
    z_sar, z_eo = model.encode(sar), model.encode(eo)
    a = model.scheduler.alphas_cumprod[t].reshape(2, 1, 1, 1)
    z_t = a.sqrt() * z_eo + (1 - a).sqrt() * noise
    prediction, _ = denoise(model.unet, z_sar, z_t, t, model.prompt_embedding)
    expected = (prediction - (a.sqrt() * noise - (1 - a).sqrt() * z_eo)).square().mean()
    torch.testing.assert_close(train.objective(model, "mse", 0, False)(model.unet, [sar, eo], [0, 1]), expected)


def test_bfloat16_arithmetic_trains_float32_weights(command, whole, tmp_path):
    assert train.main([*command, "--dtype", "bfloat16", "--out", str(tmp_path / "run")]) == 0
    assert {t.dtype for t in tensors_under(tmp_path / "run").values()} == {torch.float32}
    for ours, theirs in zip(table(tmp_path / "run" / "log.csv"), table(whole / "log.csv")):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.02) and ours["loss"] != theirs["loss"]


# ----------------------------------------------------------------------------------------------------------
# What a run leaves


def test_a_run_leaves_what_the_readme_promises(whole):
    names = {path.relative_to(whole).as_posix() for path in whole.rglob("*") if path.is_file()}
    assert {"log.csv", "validation.csv", "split.json", "summary.json", "model/model_index.json"} <= names
    assert {f"checkpoint/{step:08d}.safetensors" for step in (9, 10)} <= names
    assert {f"samples/{step:08d}.png" for step in (4, 8, 10)} <= names
    assert not [name for name in names if Path(name).name.startswith(".") and name != ".lock"]
    assert [row["step"] for row in table(whole / "log.csv")] == list(range(1, 11))
    scores = table(whole / "validation.csv")
    assert list(scores[0]) == ["step", "psnr", "ssim", "mse_t125", "mse_t375", "mse_t625", "mse_t875"]
    summary = read_json(whole / "summary.json")
    assert summary["best"] == max(scores, key=lambda row: row["psnr"]) and summary["settings"]["size"] == 16
    split = read_json(whole / "split.json")["scenes"]
    assert split["train"] and split["test"] and not set(split["train"]) & set(split["test"])
    assert Image.open(whole / "samples" / "00000010.png").width > 4 * 16  # SAR, EO, generated, confidence


def test_the_best_model_is_the_one_that_scored_best(whole, tmp_path):
    scores = table(whole / "validation.csv")
    best = max(scores, key=lambda row: row["psnr"])
    model = CDiffSET.from_pretrained(whole / "model")
    pairs = train.split_pairs(find_pairs(read_json(whole / "split.json")["data"]).pairs).val
    args = train.parse(["--data", "-", "--out", str(tmp_path), "--size", "16", "--validate-steps", "2"])
    args.dtype = "float32"
    again = train.validate(model, data.evenly(pairs, 2), Reading(), args, step=0)
    assert again == pytest.approx({key: value for key, value in best.items() if key != "step"}, rel=1e-4)


def test_the_summary_says_how_to_continue(command, tmp_path, capsys):
    train.main([*command, "--steps", "2", "--out", str(tmp_path / "run")])
    said = capsys.readouterr().out
    assert "SEN1-2: 20 pairs in 10 scenes" in said and "16 pairs to train on, 4 to validate on" in said
    assert "done: 2 of 2 steps" in said and f"python sample.py SAR --model {tmp_path / 'run' / 'model'}" in said


# ----------------------------------------------------------------------------------------------------------
# The same whatever happens


def test_a_run_killed_at_random_moments_equals_one_that_was_not(command, whole, tmp_path):
    out = tmp_path / "run"
    undisturbed = [*command, "--out", str(tmp_path / "undisturbed")]
    run_with_kills(train.main, undisturbed, [*command, "--out", str(out)], kills=5, share=0.4)
    assert_same_run(out, whole)
    assert not [path for path in out.rglob(".*") if path.name != ".lock"]


def test_a_run_with_cache_and_average_and_workers_killed_while_saving_equals_one_that_was_not(command, tmp_path):
    arguments = [*command, "--size", "64", "--steps", "8", "--ema", "0.9", "--workers", "1"]
    arguments += ["--save-every", "1", "--validate-every", "3", "--cache", str(tmp_path / "cache")]
    assert run(train.main, [*arguments, "--out", str(tmp_path / "whole")])[0] == 0
    out, moments = tmp_path / "run", random.Random(0)
    for step in (1, 3):
        process, end = Forked(train.main, [*arguments, "--out", str(out), "--resume"]), time.monotonic() + 200
        while not (out / "checkpoint" / f"{step:08d}.safetensors").exists() and time.monotonic() < end:
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.05))
        process.signal(signal.SIGKILL)
        assert process.wait()[0] == -signal.SIGKILL
    assert run(train.main, [*arguments, "--out", str(out), "--resume"])[0] == 0
    assert_same_run(out, tmp_path / "whole")


def test_workers_accumulation_and_the_cache_do_not_change_the_samples(command, whole, tmp_path):
    assert run(train.main, [*command, "--workers", "2", "--out", str(tmp_path / "workers")])[0] == 0
    assert_same_run(tmp_path / "workers", whole)
    assert run(train.main, [*command, "--accumulate", "4", "--out", str(tmp_path / "parts")])[0] == 0
    assert_close_run(tmp_path / "parts", whole)
    large = [*command, "--size", "64", "--steps", "3"]
    assert run(train.main, [*large, "--out", str(tmp_path / "images")])[0] == 0
    cached = ["--cache", str(tmp_path / "cache"), "--workers", "1"]
    assert run(train.main, [*large, *cached, "--out", str(tmp_path / "cached")])[0] == 0
    assert_close_run(tmp_path / "cached", tmp_path / "images")


def torchrun(arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py"]
    return subprocess.Popen(
        [*start, *arguments], cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def test_torchrun_with_two_processes_stopped_by_sigterm_and_resumed_gives_the_losses_of_one(command, whole, tmp_path):
    out = tmp_path / "run"
    arguments = [*command, "--accumulate", "2", "--save-every", "100", "--out", str(out)]
    first, end = torchrun(arguments), time.monotonic() + 200
    while not (out / "log.csv").exists() or len((out / "log.csv").read_text().splitlines()) < 3:
        assert time.monotonic() < end and first.poll() is None
        time.sleep(0.01)
    first.send_signal(signal.SIGTERM)  # torchrun passes it on
    first.communicate(timeout=200)
    assert [int(path.stem) for path in (out / "checkpoint").glob("*")] == [len(table(out / "log.csv"))]
    second = torchrun([*arguments, "--resume"])
    said, _ = second.communicate(timeout=200)
    assert second.returncode == 0, said
    assert_close_run(out, whole)


# ----------------------------------------------------------------------------------------------------------
# What is refused, in one line


def test_a_run_is_not_resumed_with_other_data_model_loss_or_size(command, whole, dataset, base, tmp_path):
    out = shutil.copytree(whole, tmp_path / "run")
    arguments = [*command, "--out", str(out), "--resume"]
    fewer = shutil.copytree(dataset, tmp_path / "fewer")
    next(fewer.rglob("*_s1_*.png")).unlink()
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for changes, message in (
        (["--data", str(fewer)], r"data SEN1-2 of 20 pairs .* is now SEN1-2 of 19 pairs"),
        (["--model", str(write_base(tmp_path / "other", seed=1))], r"model \w+ is now \w+"),
        (["--loss", "mse"], "loss cdiff is now mse"),
        (["--size", "32"], "size 16 is now 32"),
        (["--seed", "1"], "seed 0 is now 1"),
        (["--prediction-type", "v_prediction"], "model"),
        (["--validate-steps", "3"], "validate_steps 2 is now 3"),
    ):
        with pytest.raises(ValueError, match=f"was made with other settings .*{message}"):
            train.main([*arguments, *changes])
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    # moved folders are the same data and the same model
    moved = [shutil.copytree(folder, tmp_path / f"moved{i}") for i, folder in enumerate((dataset, base))]
    assert train.main([*arguments, "--data", str(moved[0]), "--model", str(moved[1])]) == 0


def test_a_second_run_into_a_folder_changes_nothing_there(command, whole):
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="holds a run already: continue it with --resume, or choose another --out"):
        train.main([*command, "--out", str(whole), "--seed", "5"])
    assert {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()} == before


def spoil(dataset, kind):
    """Makes a copy's images unusable, each at one stroke, since they are being read."""
    for path in dataset.rglob("*_s2_*.png" if kind == "sizes" else "*_s1_*.png"):
        if kind == "missing":
            path.unlink()
        elif kind == "damaged":
            path.with_suffix(".new").write_bytes(path.read_bytes()[:200])
            path.with_suffix(".new").replace(path)
        else:
            Image.new("RGB", (32, 40)).save(path.with_suffix(".new"), "PNG")
            path.with_suffix(".new").replace(path)


@pytest.mark.parametrize("kind", ["missing", "damaged", "sizes"])
@pytest.mark.parametrize("workers", ["0", "1"])
def test_an_image_that_fails_in_the_middle_of_an_epoch_is_named_in_one_line(command, dataset, tmp_path, kind, workers):
    data, out = shutil.copytree(dataset, tmp_path / "data"), tmp_path / "run"
    arguments = [*command, "--data", str(data), "--out", str(out), "--steps", "1000", "--workers", workers]
    process, end = Forked(train.main, arguments), time.monotonic() + 200
    while not (out / "checkpoint").exists() or not any((out / "checkpoint").glob("0*")):
        assert time.monotonic() < end
        time.sleep(0.01)
    spoil(data, kind)
    code, line = process.wait()
    said = {"missing": "is missing", "damaged": "cannot be read", "sizes": "must have equal sizes"}[kind]
    assert code == 2 and line.startswith("error: '") and said in line and str(data) in line and "_s1_" in line
    assert not [path for path in out.rglob(".*") if path.name != ".lock"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--data {tmp}/none", "is not a folder"),
        ("--data {tmp}", "is empty"),
        ("--model {tmp}/none", "does not exist: give a diffusers folder"),
        ("--model {tmp}", "holds no model"),
        ("--size 96", "an image of 64x64 pixels is smaller than the crop of 96x96"),
        ("--size 15", "--size 15: must be a multiple of 8 for this model"),
        ("--device cuda", "--device cuda cannot be used here"),
        ("--device nonsense", "--device nonsense cannot be used here"),
        ("--batch-size 5 --accumulate 2", "--batch-size 5: cannot be shared evenly"),
        ("--cache {tmp}/../run", "--cache and --out must be two folders"),
        ("--ema 1", "--ema 1.0: must be 0 for none"),
        ("--validate-steps 2000", "--validate-steps 2000: more than this model's timesteps"),
    ],
)
def test_every_wrong_input_is_one_line_and_leaves_nothing(command, tmp_path, options, message):
    if "cuda" in options and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    out, empty = tmp_path / "run", tmp_path / "empty"
    empty.mkdir()
    code, line = run(train.main, [*command, "--out", str(out), *options.format(tmp=empty).split()])
    assert code == 2 and line.startswith("error: ") and message in line
    assert not [p for p in out.rglob("*") if p.is_file() and p.suffix in (".safetensors", ".png") or p.suffix == ".tmp"]


def test_without_stable_diffusion_the_download_command_is_said(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="hf download .*or start from the small model with --model models/tiny"):
        train.main(["--data", command[1]])


def test_unknown_options_are_one_line_and_the_help_teaches(capsys):
    with pytest.raises(SystemExit) as error:
        train.main(["--data", "x", "--batchsize", "3"])
    assert error.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    with pytest.raises(SystemExit):
        train.main(["--help"])
    said = capsys.readouterr().out
    for lesson in ("torchrun --nproc_per_node=4", "--loss mse --out runs/stage1", "--resume continues"):
        assert lesson in said
