"""The training loop and its folder: a step is what the formulas say, and no work is ever lost.

The network is a small perceptron, so that whole trainings take milliseconds.
"""

import argparse
import math
import multiprocessing
import os
import resource
import signal
import socket
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Forked, run, tensors_under
from safetensors.torch import load_file
from torch import nn

import data
import train
from checkpoint import State, append_rows, checkpoints, rewind_table, run_folder
from common import caught_signals, end_processes, start_processes


class Numbers(torch.utils.data.Dataset):
    """Position -> (x, y), drawn from the position alone."""

    def __getitem__(self, position):
        x = torch.randn(8, generator=torch.Generator().manual_seed(position))
        return x, x.flip(0).square()


def make_network(width=32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, width), nn.SiLU(), nn.Linear(width, 8))


def squares(network, batch, positions):
    return (network(batch[0]) - batch[1]).square().mean()


def options(out, **changes):
    defaults = {"steps": 8, "batch_size": 4, "lr": 0.1, "save_every": 3, "validate_every": 2, "workers": 0}
    args = train.parse(["--data", "-", "--out", str(out), "--dtype", "float32"])
    return argparse.Namespace(**vars(args) | defaults | changes)


def fit(out, loss=squares, samples=None, validate=None, network=None, keep_best=lambda: None, identity=None, **changes):
    """Trains in this process; returns the exit code and the network."""
    network, args = network or make_network(), options(out, **changes)
    validate = validate or (lambda step: {"score": -network[0].weight.square().mean().item()})
    with run_folder(args, identity or {}) as settings:
        return train.fit(network, loss, samples or Numbers(), args, settings, validate, keep_best), network


def script(out, **options):
    """Trains in a process of its own, as a script would: for `run` and `Forked`."""
    return fit(Path(out), **options)[0]


def losses(out):
    return [row.split(",")[1] for row in (out / "log.csv").read_text().splitlines()[1:]]


def wait_for_step(out, step):
    end = time.monotonic() + 60
    while not (out / "log.csv").exists() or len(losses(out)) < step:
        assert time.monotonic() < end, "the training does not begin"
        time.sleep(0.002)


def assert_same_end(out, other):
    """The same losses, validations and last checkpoint, to the last bit."""
    assert losses(out) == losses(other)
    assert (out / "validation.csv").read_text() == (other / "validation.csv").read_text()
    ours, theirs = (load_file(checkpoints(folder)[-1]) for folder in (out, other))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def slowly(network, batch, positions):
    """Leaves a second for a signal to arrive in step 5, however busy the machine is."""
    time.sleep(1 if positions[0] // 4 == 4 else 0.005)
    return squares(network, batch, positions)


def until_step(step):
    """A loss that ends the run after so many steps, as a bug would."""

    def loss(network, batch, positions):
        if positions[0] >= 4 * step:
            raise KeyboardInterrupt
        return squares(network, batch, positions)

    return loss


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A training that nothing interrupted, with a moving average."""
    out = tmp_path_factory.mktemp("whole") / "run"
    fit(out, ema=0.9)
    return out


# ----------------------------------------------------------------------------------------------------------
# What a step computes


def test_the_learning_rate_rises_for_100_steps_then_falls_as_a_cosine_to_zero(tmp_path):
    rates = [train.learning_rate(step, options(tmp_path, steps=1100, lr=2.0)) for step in range(1101)]
    assert rates[0] == 0.02 and rates[49] == 1.0 and rates[99] == rates[100] == 2.0
    assert rates[600] == pytest.approx(1.0) and rates[350] == pytest.approx(1 + math.sqrt(0.5))
    assert rates[1100] == pytest.approx(0) and rates[100:] == sorted(rates[100:], reverse=True)


def test_noise_and_timestep_of_a_sample_follow_from_the_seed_and_its_position_alone():
    noise, t = train.sample_noise((4, 3, 3), 0, [5, 6, 7])
    again, t_again = train.sample_noise((4, 3, 3), 0, [7, 5])
    assert torch.equal(noise[[2, 0]], again) and torch.equal(t[[2, 0]], t_again)
    assert not torch.equal(noise[0], train.sample_noise((4, 3, 3), 1, [5])[0][0])
    noise, t = train.sample_noise((4, 8, 8), 0, list(range(2000)))
    assert abs(float(noise.mean())) < 0.01 and abs(float(noise.std()) - 1) < 0.01
    assert t.min() < 10 and t.max() > 989 and abs(float(t.float().mean()) - 499.5) < 20


def test_a_step_is_clipped_adamw_at_the_scheduled_rate_and_the_average_follows(tmp_path):
    _, trained = fit(tmp_path / "run", steps=20, clip=0.5, ema=0.5)

    network = make_network()
    average = [p.detach().clone() for p in network.parameters()]
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.01)
    for step in range(20):
        optimizer.param_groups[0]["lr"] = train.learning_rate(step, options(tmp_path, steps=20))
        x, y = (torch.stack(z) for z in zip(*(Numbers()[4 * step + i] for i in range(4))))
        optimizer.zero_grad()
        (network(x) - y).square().mean().backward()
        nn.utils.clip_grad_norm_(network.parameters(), 0.5)
        optimizer.step()
        decay = min(0.5, (1 + step) / (10 + step))
        average = [decay * a + (1 - decay) * p.detach() for a, p in zip(average, network.parameters())]

    saved = load_file(checkpoints(tmp_path / "run")[-1])
    for (name, p), q, a in zip(network.named_parameters(), trained.parameters(), average):
        torch.testing.assert_close(q, p, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(saved[f"average.{name}"], a, rtol=1e-5, atol=1e-6)


def test_validation_sees_the_average_and_the_network_gets_its_own_weights_back(tmp_path):
    network, seen = make_network(), []

    def validate(step):
        assert not network.training
        seen.append({name: p.detach().clone() for name, p in network.named_parameters()})
        return {"score": 0.0}

    fit(tmp_path / "run", network=network, validate=validate, ema=0.9, validate_every=8)
    saved = load_file(checkpoints(tmp_path / "run")[-1])
    for name, p in network.named_parameters():
        assert torch.equal(seen[-1][name], saved[f"average.{name}"]) and torch.equal(p, saved[f"network.{name}"])
    assert network.training


def test_accumulated_parts_give_the_losses_of_whole_batches(tmp_path):
    _, whole = fit(tmp_path / "1")
    _, parts = fit(tmp_path / "4", accumulate=4)
    for a, b in zip(whole.parameters(), parts.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert [float(x) for x in losses(tmp_path / "1")] == pytest.approx([float(x) for x in losses(tmp_path / "4")], 1e-4)


def test_the_model_with_the_best_score_is_kept_and_nan_is_never_the_best(tmp_path):
    scores, kept, step = iter([1.0, 3.0, 2.0, math.nan]), [], {}
    fit(
        tmp_path / "run",
        validate=lambda now: step.update(now=now) or {"score": next(scores)},
        keep_best=lambda: kept.append(step["now"]),
    )
    assert kept == [2, 4]


def test_only_trainable_weights_are_in_a_checkpoint(tmp_path):
    network = make_network()
    network[0].requires_grad_(False)
    before = network[0].weight.clone()
    fit(tmp_path / "run", network=network)
    assert torch.equal(network[0].weight, before)
    assert not any(".0." in name for name in load_file(checkpoints(tmp_path / "run")[-1]))


# ----------------------------------------------------------------------------------------------------------
# No work is lost


def test_a_run_interrupted_at_every_step_equals_one_that_was_not(tmp_path, whole):
    for stop in range(8):
        with pytest.raises(KeyboardInterrupt):
            fit(tmp_path / "run", until_step(stop), ema=0.9, resume=True, save_every=1)
    assert fit(tmp_path / "run", ema=0.9, resume=True)[0] == 0
    assert len(checkpoints(tmp_path / "run")) == len(checkpoints(whole)) == 2
    assert_same_end(tmp_path / "run", whole)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_the_whole_group_finishes_the_step_saves_and_resumes_to_the_same_end(tmp_path, whole, number, code):
    out = tmp_path / "run"
    process = Forked(lambda: script(out, loss=slowly, ema=0.9, workers=2, save_every=100))
    wait_for_step(out, 3)
    process.signal(number, group=True)
    assert process.wait()[0] == code
    (kept,) = checkpoints(out)
    assert 3 <= int(kept.stem) < 8 and len(losses(out)) == int(kept.stem)
    assert run(lambda: script(out, ema=0.9, resume=True))[0] == 0
    assert_same_end(out, whole)


def test_a_signal_in_the_last_step_leaves_its_validation_to_the_resumed_run(tmp_path, whole):
    def loss(network, batch, positions):
        if positions[0] == 28:
            os.kill(os.getpid(), signal.SIGINT)
        return squares(network, batch, positions)

    out = tmp_path / "run"
    assert fit(out, loss, ema=0.9)[0] == 130 and checkpoints(out)[-1].stem == "00000008"
    assert not (out / "validation.csv").read_text().splitlines()[-1].startswith("8")
    assert fit(out, ema=0.9, resume=True)[0] == 0
    assert_same_end(out, whole)


def test_a_signal_that_arrives_twice_at_once_counts_once_and_a_later_one_ends_the_run():
    with caught_signals() as caught:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert caught == [signal.SIGINT]
        time.sleep(1.1)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_twice_ends_a_long_step_and_the_last_checkpoint_serves(tmp_path, whole):
    def long(network, batch, positions):
        time.sleep(60 if positions[0] // 4 == 4 else 0)
        return squares(network, batch, positions)

    out = tmp_path / "run"
    process = Forked(lambda: script(out, loss=long, ema=0.9, workers=2))
    wait_for_step(out, 4)
    process.signal(signal.SIGINT, group=True)
    time.sleep(1.5)
    assert process.process.is_alive()
    process.signal(signal.SIGINT, group=True)
    assert process.wait()[0] == 130 and [path.stem for path in checkpoints(out)] == ["00000003"]
    assert run(lambda: script(out, ema=0.9, resume=True))[0] == 0
    assert_same_end(out, whole)


def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint_and_nothing_half_written(tmp_path):
    out = tmp_path / "run"
    run(lambda: script(out, loss=until_step(4), save_every=2))
    before = {path.name: path.read_bytes() for path in (out / "checkpoint").iterdir()}
    assert sorted(before) == ["00000002.safetensors", "00000004.safetensors"]

    def little_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))

    code, line = run(lambda: script(out, save_every=2, resume=True), before=little_disk)
    assert code == 2 and line.startswith("error: ") and "00000004.safetensors" in line and "--resume" in line
    assert {path.name: path.read_bytes() for path in (out / "checkpoint").iterdir()} == before
    assert run(lambda: script(out, save_every=2, resume=True))[0] == 0


def test_half_written_files_of_a_killed_run_are_deleted_and_nothing_else(tmp_path):
    out = tmp_path / "run"
    fit(out)
    (out / "model" / "unet").mkdir(parents=True)
    left = [out / "checkpoint" / ".tmpAb3xY9", out / "checkpoint" / ".00000004.17.safetensors", out / ".log.99.csv"]
    left += [out / "model" / "unet" / ".diffusion_pytorch_model.12.safetensors"]
    mine = [out / ".gitignore", out / "checkpoint" / ".nomedia", out / "model" / "notes.txt"]
    mine += [out / "another run" / "checkpoint" / ".00000004.17.safetensors"]
    mine[-1].parent.mkdir(parents=True)
    for path in left + mine:
        path.write_text("")
    fit(out, resume=True)
    assert not any(path.exists() for path in left) and all(path.exists() for path in mine)


def test_a_validation_that_fails_costs_no_step_and_the_resumed_run_repeats_it(tmp_path, whole):
    out, network = tmp_path / "run", make_network()

    def failing(step):
        if step == 6:
            raise ValueError("a validation image cannot be read")
        return {"score": -network[0].weight.square().mean().item()}

    with pytest.raises(ValueError, match="a validation image cannot be read"):
        fit(out, network=network, validate=failing, ema=0.9)
    assert [path.stem for path in checkpoints(out)] == ["00000003", "00000006"]
    assert fit(out, ema=0.9, resume=True)[0] == 0
    assert_same_end(out, whole)


@pytest.mark.parametrize("kept_in_time", [False, True])
def test_the_best_model_never_lags_behind_the_checkpoint(tmp_path, kept_in_time):
    """The run ends while the best model, that of step 6, is saved: the resumed run begins with it."""
    validated, kept = [], []

    def validate(step):
        validated.append(step)
        return {"score": {2: 1.0, 4: 2.0, 6: 4.0, 8: 3.0}[step]}

    def keep_and_die():
        if validated[-1] < 6 or kept_in_time:
            kept.append(validated[-1])
        if validated[-1] == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "run", validate=validate, keep_best=keep_and_die)
    for _ in range(2):  # the second time there is nothing left to do, and step 8 is still not the best
        again = {"validate": validate, "keep_best": lambda: kept.append(validated[-1]), "resume": True}
        assert fit(tmp_path / "run", **again)[0] == 0
    assert validated == [2, 4, 6, 6, 8] and kept == [2, 4, 6] + [6] * kept_in_time


def test_the_best_score_is_remembered_by_a_run_that_validates_at_other_steps(tmp_path):
    kept, scores = [], {4: 2.0, 6: 1.0, 8: 1.5}

    def validate(step):
        kept.append(step)
        return {"score": scores[step]}

    both = {"validate": validate, "keep_best": lambda: kept.append("best")}
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "run", until_step(5), save_every=4, validate_every=4, **both)
    fit(tmp_path / "run", save_every=4, validate_every=3, resume=True, **both)
    assert kept == [4, "best", 6, 8]


def test_a_table_forgets_the_rows_after_the_step_and_half_rows(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("step,loss\n1,0.5\n2,0.25\n3,0.125\n4")
    assert rewind_table(path, 2) == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]
    append_rows(path, [{"step": 3, "loss": 0.75}])
    assert path.read_text().split() == ["step,loss", "1,0.5", "2,0.25", "3,0.75"]
    path.write_text("step,loss\n1,half\n")
    with pytest.raises(ValueError, match="log.csv: not a table that train.py wrote: restore it"):
        rewind_table(path, 2)


# ----------------------------------------------------------------------------------------------------------
# Which runs may write into a folder


def test_a_run_is_neither_overwritten_nor_resumed_with_other_settings(tmp_path):
    out, identity = tmp_path / "run", {"loss": "cdiff", "data": "SEN1-2 of 20 pairs"}
    fit(out, identity=identity)
    with pytest.raises(ValueError, match="holds a run already: continue it with --resume"):
        fit(out, identity=identity)
    for changes, message in (
        ({"lr": 0.02}, r"lr 0.1 is now 0.02"),
        ({"steps": 9, "batch_size": 8}, r"steps 8 is now 9, batch_size 4 is now 8"),
        ({"dtype": "bfloat16"}, "dtype float32 is now bfloat16"),
        ({"identity": identity | {"loss": "mse"}}, "loss cdiff is now mse"),
    ):
        with pytest.raises(ValueError, match=message):
            fit(out, resume=True, **{"identity": identity} | changes)
    assert fit(out, identity=identity, resume=True, workers=1, accumulate=2, save_every=1, validate_every=1)[0] == 0


def test_the_second_run_into_a_folder_is_refused_until_the_first_one_dies(tmp_path):
    out = tmp_path / "run"
    first = Forked(lambda: script(out, loss=slowly, steps=10_000, workers=2, save_every=1, validate_every=10_000))
    wait_for_step(out, 2)
    code, line = run(lambda: script(out, resume=True))
    assert code == 2 and "another run is writing there" in line
    first.signal(signal.SIGKILL)  # its reading processes live on for some seconds, and must not hold the folder
    first.wait()
    code, line = run(lambda: script(out, loss=until_step(0), steps=10_000, resume=True, validate_every=10_000))
    assert code == 130, line


def test_resume_with_nothing_to_resume_starts_from_the_beginning_and_says_so(tmp_path, capsys):
    assert fit(tmp_path / "run", resume=True)[0] == 0
    assert "holds no checkpoint: starting from the beginning" in capsys.readouterr().out


def test_a_damaged_checkpoint_is_named_and_the_one_before_serves(tmp_path):
    out = tmp_path / "run"
    fit(out)
    _, newest = checkpoints(out)
    newest.write_bytes(newest.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{newest.name}: not a readable checkpoint .*delete it to resume"):
        fit(out, resume=True)
    newest.unlink()
    assert fit(out, resume=True)[0] == 0


def test_a_checkpoint_of_another_network_is_refused_by_tensor(tmp_path):
    fit(tmp_path / "run")
    with pytest.raises(ValueError, match=r"network\.0\.weight is \(32, 8\), not \(16, 8\)"):
        fit(tmp_path / "run", network=make_network(width=16), resume=True)
    with pytest.raises(ValueError, match="missing tensors: average"):
        State(make_network(), options(tmp_path / "run", ema=0.5)).load(checkpoints(tmp_path / "run")[-1])


# ----------------------------------------------------------------------------------------------------------
# What goes wrong, in one line


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_loss_or_gradient_that_is_not_finite_stops_the_run_before_it_spoils_the_weights(tmp_path, kind):
    def loss(network, batch, positions):
        value = squares(network, batch, positions)
        if positions[0] == 20:  # step 6
            # the square root of 0 is finite, its slope is not
            return value * math.nan if kind == "loss" else value + (network[0].bias.sum() * 0).sqrt()
        return value

    network = make_network()
    with pytest.raises(ValueError) as error:
        fit(tmp_path / "run", loss, network=network)
    for part in ("step 6: the loss is", "nan", "bad_batch.txt", "00000003.safetensors"):
        assert part in str(error.value)
    assert (tmp_path / "run" / "bad_batch.txt").read_text().split() == ["20", "21", "22", "23"]
    assert all(p.isfinite().all() for p in network.parameters())


class Failing(Numbers):
    """Position 17 cannot be read, in one of several ways."""

    def __init__(self, how):
        self.how = how

    def __getitem__(self, position):
        if position == 17:
            if self.how == "bad":
                raise ValueError("'a\\nb.png' is missing: Error: really")
            if self.how == "gone":
                return np.memmap("gone.bin")
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(position)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sample_that_cannot_be_read_is_the_same_line_whoever_reads_it(tmp_path, workers):
    bad = run(lambda: script(tmp_path / "1", samples=Failing("bad"), workers=workers))
    assert bad == (2, "error: 'a\\nb.png' is missing: Error: really")
    gone = run(lambda: script(tmp_path / "2", samples=Failing("gone"), workers=workers))
    kept = f"the last checkpoint is {tmp_path}/2/checkpoint/00000003.safetensors"
    reason = "[Errno 2] No such file or directory: 'gone.bin'"
    assert gone == (2, f"error: {reason}; {kept}; continue with --resume")


def test_a_reading_process_that_is_killed_is_one_line_and_the_run_can_continue(tmp_path):
    code, line = run(lambda: script(tmp_path / "run", samples=Failing("dies"), workers=2))
    assert code == 2 and line.startswith("error: a process that reads images died") and "--resume" in line
    assert run(lambda: script(tmp_path / "run", workers=2, resume=True))[0] == 0


class Loader:
    """Two workers: one dies while it hands over a batch, the other one while they are shut down."""

    def __init__(self, *_, **__):
        self._workers = [multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,), daemon=True)]
        self._workers[0].start()

    def __iter__(self):
        return self

    def __next__(self):
        raise self.error

    def _shutdown_workers(self):
        raise RuntimeError("DataLoader worker (pid 17) is killed by signal: Killed.")


@pytest.mark.parametrize("error", [ConnectionResetError(104, "Connection reset by peer"), EOFError()])
def test_reading_processes_that_die_while_they_hand_over_or_end_leave_none_to_wait_for(tmp_path, monkeypatch, error):
    loaders = []
    monkeypatch.setattr(Loader, "error", error, raising=False)
    monkeypatch.setattr(data, "DataLoader", lambda *_, **__: loaders.append(Loader()) or loaders[0])
    with pytest.raises(ValueError, match="^a process that reads images died .*--resume"):
        fit(tmp_path / "run", workers=2)
    loaders[0]._workers[0].join(60)
    assert loaders[0]._workers[0].exitcode == -signal.SIGKILL


def test_too_little_memory_is_one_line_with_what_to_try(tmp_path):
    def loss(network, batch, positions):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")

    with pytest.raises(ValueError, match=r"^out of memory: try --accumulate 4, --checkpointing .*2.00 GiB\.\)$"):
        fit(tmp_path / "run", loss, accumulate=2)


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    code, line = run(lambda: script(tmp_path / "file" / "run"))
    assert code == 2 and line.startswith("error: ") and "file" in line


# ----------------------------------------------------------------------------------------------------------
# Several processes


def together(rank, port, out, world=2, **options):
    """One of `world` processes, as torchrun would start it."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in place.items()})
    start_processes("cpu")
    code = script(out, **options)
    end_processes()
    return code


def start_two(outs, **options):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    return [Forked(lambda rank=rank: together(rank, port, outs[rank], **options)) for rank in range(2)]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_give_the_losses_and_weights_of_one(tmp_path, whole, accumulate):
    out = tmp_path / "run"
    assert [rank.wait()[0] for rank in start_two([out, out], ema=0.9, accumulate=accumulate)] == [0, 0]
    assert [float(x) for x in losses(out)] == pytest.approx([float(x) for x in losses(whole)], rel=1e-4)
    ours, theirs = tensors_under(out), tensors_under(whole)
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key], tensor, rtol=1e-3, atol=1e-5)


def test_a_signal_to_one_of_two_processes_stops_both_at_one_step_with_a_checkpoint(tmp_path, whole):
    out = tmp_path / "run"
    ranks = start_two([out, out], ema=0.9, loss=slowly, save_every=100)
    wait_for_step(out, 2)
    ranks[1].signal(signal.SIGTERM)
    assert [rank.wait()[0] for rank in ranks] == [143, 143]
    assert [int(path.stem) for path in checkpoints(out)] == [len(losses(out))]
    assert run(lambda: script(out, ema=0.9, resume=True))[0] == 0  # one process continues what two began
    assert [float(x) for x in losses(out)] == pytest.approx([float(x) for x in losses(whole)], rel=1e-4)


def test_processes_that_find_different_checkpoints_refuse_to_train(tmp_path):
    run(lambda: script(tmp_path / "0"))
    (tmp_path / "1").mkdir()
    for rank in start_two([tmp_path / "0", tmp_path / "1"], resume=True):
        code, line = rank.wait()
        assert code == 2 and "different checkpoints, of steps 0 and 8: --out must be on a disk that they share" in line


def test_an_unreadable_sample_of_one_process_ends_the_others_in_one_line_too(tmp_path):
    ranks = start_two([tmp_path / "run"] * 2, samples=Failing("bad"), workers=1)
    assert ranks[1].wait() == (2, "error: 'a\\nb.png' is missing: Error: really")
    assert ranks[0].wait() == (2, "error: another process of this run exited; its message says why")
