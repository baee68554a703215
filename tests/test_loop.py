"""loop.py, checkpoint.py, processes.py: a step is what the formulas say, and no work is ever lost.

The network is a small perceptron, so that whole trainings take milliseconds.
"""

import math
import multiprocessing
import os
import resource
import signal
import socket
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Forked, run, tensors_under
from safetensors.torch import load_file
from torch import nn

import checkpoint
import loop
import processes
from checkpoint import Log, Settings, checkpoints, run_folder
from common import caught_signals, end_processes, start_processes


class Numbers(torch.utils.data.Dataset):
    """Position -> (x, y), drawn from the position alone."""

    def __getitem__(self, position):
        x = torch.randn(8, generator=torch.Generator().manual_seed(position))
        return x, x.flip(0).square()


def make_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.SiLU(), nn.Linear(32, 8))


def squares(network, batch, positions):
    return (network(batch[0]) - batch[1]).square().mean()


def settings_for(out, **changes):
    defaults = {"steps": 8, "batch_size": 4, "lr": 0.01, "warmup": 3, "save_every": 3, "validate_every": 2}
    return Settings(out, **defaults | changes)


def train(out, loss=squares, data=None, validate=None, network=None, keep_best=lambda: None, **changes):
    """Trains in this process: -> exit code, network."""
    network = network or make_network()
    settings = settings_for(out, **changes)
    with run_folder(settings):
        validate = validate or (lambda step: {"score": -network[0].weight.square().mean().item()})
        code = loop.fit(network, loss, data or Numbers(), settings, validate, keep_best)
    return code, network


def script(out, **options):
    """Trains in a process of its own, as a script would: for `run` and `Forked`."""
    return train(Path(out), **options)[0]


def losses(out):
    return [row.split(",")[1] for row in (out / "log.csv").read_text().splitlines()[1:]]


def wait_for_step(out, step):
    """Waits until a process has done so many steps."""
    end = time.monotonic() + 60
    while not (out / "log.csv").exists() or len(losses(out)) < step:
        assert time.monotonic() < end, "the training does not begin"
        time.sleep(0.002)


def assert_same_end(out, other):
    """The same losses and the same last checkpoint, to the last bit."""
    assert losses(out) == losses(other)
    ours, theirs = (load_file(checkpoints(folder)[-1]) for folder in (out, other))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def slowly(network, batch, positions):
    """Leaves a second for a signal to come in step 5, however long the test is kept waiting for its turn."""
    time.sleep(1 if positions[0] // 4 == 4 else 0.005)
    return squares(network, batch, positions)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A training that nothing interrupted, with a moving average."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train(out, ema=0.9)
    return out


# ----------------------------------------------------------------------------------------------------------
# What a step computes


def test_the_learning_rate_rises_for_the_warm_up_then_falls_as_a_cosine_to_zero(tmp_path):
    settings = Settings(tmp_path, steps=1100, batch_size=1, lr=2.0, warmup=100)
    rates = [loop.learning_rate(step, settings) for step in range(1101)]
    assert rates[0] == 0.02 and rates[49] == 1.0 and rates[99] == rates[100] == 2.0
    assert rates[600] == pytest.approx(1.0) and rates[350] == pytest.approx(1 + math.sqrt(0.5))
    assert rates[1100] == pytest.approx(0) and rates[100:] == sorted(rates[100:], reverse=True)


def test_the_noise_of_a_sample_follows_from_the_seed_and_its_position_alone():
    noise, t = loop.sample_noise((4, 3, 3), 0, [5, 6, 7])
    again, t_again = loop.sample_noise((4, 3, 3), 0, [7, 5])
    assert torch.equal(noise[[2, 0]], again) and torch.equal(t[[2, 0]], t_again)
    assert not torch.equal(noise[0], loop.sample_noise((4, 3, 3), 1, [5])[0][0])
    noise, t = loop.sample_noise((4, 8, 8), 0, list(range(2000)))
    assert abs(float(noise.mean())) < 0.01 and abs(float(noise.std()) - 1) < 0.01
    assert t.min() < 10 and t.max() > 989 and abs(float(t.float().mean()) - 499.5) < 20


def test_training_is_clipped_adamw_at_the_scheduled_rate_and_the_average_follows(tmp_path):
    _, trained = train(tmp_path / "run", steps=20, clip=0.5, ema=0.5)

    network = make_network()
    average = [p.detach().clone() for p in network.parameters()]
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.01)
    for step in range(20):
        optimizer.param_groups[0]["lr"] = loop.learning_rate(step, settings_for(tmp_path, steps=20))
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

    train(tmp_path / "run", network=network, validate=validate, ema=0.9, validate_every=8)
    saved = load_file(checkpoints(tmp_path / "run")[-1])
    for name, p in network.named_parameters():
        assert torch.equal(seen[-1][name], saved[f"average.{name}"]) and torch.equal(p, saved[f"network.{name}"])
    assert network.training


def test_the_moving_average_keeps_no_graph_of_past_steps(tmp_path):
    state = checkpoint.State(make_network(), settings_for(tmp_path, ema=0.9))
    for _ in range(2):
        squares(state.network, [x[None] for x in Numbers()[0]], [0]).backward()
        state.update(0.1)
    assert not any(average.requires_grad for average in state.average.values())


def test_accumulated_parts_give_the_losses_of_whole_batches(tmp_path):
    _, whole = train(tmp_path / "1")
    _, parts = train(tmp_path / "4", accumulate=4)
    for a, b in zip(whole.parameters(), parts.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert [float(x) for x in losses(tmp_path / "1")] == pytest.approx([float(x) for x in losses(tmp_path / "4")], 1e-4)


def test_the_best_score_is_what_is_kept(tmp_path):
    scores, kept = iter([1.0, 3.0, 2.0, math.nan]), []
    step = {}
    train(
        tmp_path / "run",
        validate=lambda now: step.update(now=now) or {"score": next(scores)},
        keep_best=lambda: kept.append(step["now"]),
    )
    assert kept == [2, 4]


# ----------------------------------------------------------------------------------------------------------
# Never lose work


def test_a_run_interrupted_at_every_step_equals_one_that_was_not(tmp_path, whole):
    kept = []
    for stop in range(8):

        def until(network, batch, positions, stop=stop):
            if positions[0] == 4 * stop:
                raise KeyboardInterrupt
            return squares(network, batch, positions)

        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "run", until, ema=0.9, resume=True, save_every=1)
        kept += checkpoints(tmp_path / "run")
    code, _ = train(tmp_path / "run", ema=0.9, resume=True)
    assert code == 0 and len({path.name for path in kept}) == 7
    for folder in (whole, tmp_path / "run"):
        assert len(checkpoints(folder)) == 2  # --keep
    assert_same_end(tmp_path / "run", whole)
    assert (whole / "validation.csv").read_text() == (tmp_path / "run" / "validation.csv").read_text()


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
    assert train(out, loss, ema=0.9)[0] == 130 and checkpoints(out)[-1].stem == "00000008"
    assert not (out / "validation.csv").read_text().splitlines()[-1].startswith("8")
    assert train(out, ema=0.9, resume=True)[0] == 0
    assert_same_end(out, whole)
    assert (out / "validation.csv").read_text() == (whole / "validation.csv").read_text()


def test_a_signal_that_comes_twice_at_once_counts_once_and_a_later_one_ends_the_run():
    with caught_signals() as caught:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert caught == [signal.SIGINT]
        time.sleep(1.1)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_twice_ends_a_step_that_takes_long_and_the_last_checkpoint_serves(tmp_path, whole):
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


def until_step(step):
    """A loss that ends the run after so many steps, as a bug would."""

    def loss(network, batch, positions):
        if positions[0] >= 4 * step:
            raise KeyboardInterrupt
        return squares(network, batch, positions)

    return loss


def test_what_a_killed_run_left_half_written_is_cleared_away_and_nothing_else(tmp_path):
    out = tmp_path / "run"
    train(out)
    (out / "model" / "unet").mkdir(parents=True)
    left = [out / "checkpoint" / ".tmpAb3xY9", out / "checkpoint" / ".00000004.17.safetensors", out / ".log.99.csv"]
    left += [out / "model" / "unet" / ".diffusion_pytorch_model.12.safetensors"]
    mine = [out / ".gitignore", out / "checkpoint" / ".nomedia", out / "model" / "notes.txt"]
    mine += [out / "another run" / "checkpoint" / ".00000004.17.safetensors"]
    mine[-1].parent.mkdir(parents=True)
    for path in left + mine:
        path.write_text("")
    train(out, resume=True)
    assert not any(path.exists() for path in left) and all(path.exists() for path in mine)


def test_a_validation_that_fails_costs_no_step_and_the_resumed_run_makes_up_for_it(tmp_path, whole):
    out, network = tmp_path / "run", make_network()

    def failing(step):
        if step == 6:
            raise ValueError("a held-out image cannot be read")
        return {"score": -network[0].weight.square().mean().item()}

    with pytest.raises(ValueError, match="a held-out image cannot be read"):
        train(out, network=network, validate=failing, ema=0.9)
    assert [path.stem for path in checkpoints(out)] == ["00000003", "00000006"]
    assert train(out, ema=0.9, resume=True)[0] == 0
    assert_same_end(out, whole)
    assert (out / "validation.csv").read_text() == (whole / "validation.csv").read_text()


@pytest.mark.parametrize("kept_in_time", [False, True])
def test_the_best_model_never_lags_behind_the_checkpoint(tmp_path, kept_in_time):
    """The run ends as the best model, that of step 6, is kept: the resumed one goes on from step 6, and keeps it."""
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
        train(tmp_path / "run", validate=validate, keep_best=keep_and_die)
    for _ in range(2):  # the second time there is nothing left to do, and step 8 is still not the best
        options = {"validate": validate, "keep_best": lambda: kept.append(validated[-1]), "resume": True}
        assert train(tmp_path / "run", **options)[0] == 0
    assert validated == [2, 4, 6, 6, 8] and kept == [2, 4, 6] + [6] * kept_in_time


def test_the_best_score_is_remembered_by_a_run_that_validates_at_other_steps(tmp_path):
    kept, scores = [], {4: 2.0, 6: 1.0, 8: 1.5}

    def validate(step):
        kept.append(step)
        return {"score": scores[step]}

    options = {"validate": validate, "keep_best": lambda: kept.append("best")}
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", until_step(5), save_every=4, validate_every=4, **options)
    train(tmp_path / "run", save_every=4, validate_every=3, resume=True, **options)
    assert kept == [4, "best", 6, 8]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    code, line = run(lambda: script(tmp_path / "file" / "run"))
    assert code == 2 and line.startswith("error: ") and "file" in line


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


def test_a_run_is_neither_overwritten_nor_resumed_with_other_settings(tmp_path):
    out = tmp_path / "run"
    about = {"loss": "cdiff", "data": "SEN1-2 of 20 pairs"}
    train(out, about=about)
    with pytest.raises(ValueError, match="holds a run already: go on with --resume"):
        train(out, about=about)
    for changes, message in (
        ({"lr": 0.02}, r"lr 0.01 is now 0.02"),
        ({"steps": 9, "batch_size": 8}, r"steps 8 is now 9, batch_size 4 is now 8"),
        ({"dtype": "bfloat16"}, "dtype float32 is now bfloat16"),
        ({"about": about | {"loss": "mse"}}, "loss cdiff is now mse"),
        ({"about": about | {"data": "SEN1-2 of 21 pairs"}}, "data SEN1-2 of 20 pairs is now SEN1-2 of 21 pairs"),
    ):
        with pytest.raises(ValueError, match=message):
            train(out, resume=True, **{"about": about} | changes)
    code, _ = train(out, about=about, resume=True, workers=1, accumulate=2, keep=1, save_every=1, validate_every=1)
    assert code == 0


def test_resume_with_nothing_to_resume_starts_from_the_beginning_and_says_so(tmp_path, capsys):
    assert train(tmp_path / "run", resume=True)[0] == 0
    assert "holds no checkpoint: starting from the beginning" in capsys.readouterr().out


def test_a_damaged_checkpoint_is_named_and_the_one_before_serves(tmp_path):
    out = tmp_path / "run"
    train(out)
    older, newest = checkpoints(out)
    newest.write_bytes(newest.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{newest.name}: not a readable checkpoint .*delete it to resume"):
        train(out, resume=True)
    newest.unlink()
    assert train(out, resume=True)[0] == 0


def test_a_checkpoint_of_another_network_is_refused_by_tensor(tmp_path):
    train(tmp_path / "run")
    with pytest.raises(ValueError, match=r"network\.0\.weight is \(32, 8\), not \(16, 8\)"):
        train(tmp_path / "run", network=nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 8)), resume=True)
    state = checkpoint.State(make_network(), settings_for(tmp_path / "run", ema=0.5))
    with pytest.raises(ValueError, match="missing tensors: average"):
        state.load(checkpoints(tmp_path / "run")[-1])


# ----------------------------------------------------------------------------------------------------------
# What goes wrong


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_what_is_not_finite_stops_the_run_before_it_spoils_the_weights(tmp_path, kind):
    def loss(network, batch, positions):
        value = squares(network, batch, positions)
        if positions[0] == 20:  # step 6
            # the square root of 0 is finite, its slope is not
            return value * math.nan if kind == "loss" else value + (network[0].bias.sum() * 0).sqrt()
        return value

    network = make_network()
    with pytest.raises(ValueError) as error:
        train(tmp_path / "run", loss, network=network)
    message = str(error.value)
    assert "step 6: the loss is" in message and "nan" in message and "batch: 20, 21, 22, 23" in message
    assert "00000003.safetensors" in message
    assert all(p.isfinite().all() for p in network.parameters())


class Failing(Numbers):
    def __getitem__(self, position):
        if position == 17:
            raise ValueError("'a\\nb.png' is missing: Error: really")
        return super().__getitem__(position)


class Dying(Numbers):
    def __getitem__(self, position):
        if position == 17:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(position)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_sample_is_the_same_line_whoever_reads_it(tmp_path, workers):
    code, line = run(lambda: script(tmp_path / "run", data=Failing(), workers=workers))
    assert (code, line) == (2, "error: 'a\\nb.png' is missing: Error: really")


def test_a_reading_process_that_is_killed_is_one_line_and_the_run_can_go_on(tmp_path):
    code, line = run(lambda: script(tmp_path / "run", data=Dying(), workers=2))
    assert code == 2 and line.startswith("error: a process that reads images died") and "--resume" in line
    assert run(lambda: script(tmp_path / "run", workers=2, resume=True))[0] == 0


class Loader:
    """Two workers, of which one dies while it hands over a batch, and the other one while they are told to end."""

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
    monkeypatch.setattr(processes, "DataLoader", lambda *_, **__: loaders.append(Loader()) or loaders[0])
    with pytest.raises(ValueError, match="^a process that reads images died .*--resume"):
        train(tmp_path / "run", workers=2)
    loaders[0]._workers[0].join(60)
    assert loaders[0]._workers[0].exitcode == -signal.SIGKILL


class Vanishing(Numbers):
    def __getitem__(self, position):
        return np.memmap("gone.bin") if position == 17 else super().__getitem__(position)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_vanishes_is_the_same_line_whoever_reads_it(tmp_path, workers):
    code, line = run(lambda: script(tmp_path / "run", data=Vanishing(), workers=workers))
    kept = f"the last checkpoint is {tmp_path}/run/checkpoint/00000003.safetensors"
    what = f"[Errno 2] No such file or directory: 'gone.bin'; {kept}; mend that and go on with --resume"
    assert (code, line) == (2, f"error: {tmp_path}/run: {what}")


def test_too_little_memory_is_one_line_with_what_to_try(tmp_path):
    def loss(network, batch, positions):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")

    with pytest.raises(ValueError, match=r"^out of memory: try --accumulate 4, --checkpointing .*2.00 GiB\.\)$"):
        train(tmp_path / "run", loss, accumulate=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.0}, "--lr 0.0: must be a number above 0"),
        ({"lr": math.nan}, "--lr nan"),
        ({"clip": -1.0}, "--clip -1.0"),
        ({"ema": 1.0}, "--ema 1.0: must be 0 for none, or a number below 1"),
        ({"workers": -1}, "--workers -1: must be 0 or more"),
        ({"accumulate": 3}, r"--batch-size 4: cannot be shared evenly by 1 process\(es\) x 3 accumulation"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        settings_for(tmp_path, **changes)


# ----------------------------------------------------------------------------------------------------------
# Logs


def test_a_log_forgets_the_rows_after_the_step_and_half_rows(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("step,loss\n1,0.5\n2,0.25\n3,0.125\n4")
    Log(path, start=3).write({"step": 3, "loss": 0.75})
    assert path.read_text().split() == ["step,loss", "1,0.5", "2,0.25", "3,0.75"]
    Log(path, start=1).write({"step": 1, "other": 1.0})
    assert path.read_text().split() == ["step,other", "1,1"]


def test_tensorboard_gets_what_the_tables_get_where_it_is_installed(tmp_path, monkeypatch):
    seen = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            self.folder = (Path(folder).relative_to(tmp_path / "run").as_posix(), purge_step)

        def add_scalar(self, name, value, step):
            seen.append((*self.folder, name, step))

        def flush(self):
            pass

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    train(tmp_path / "run", steps=2)
    assert ("tensorboard/log", 1, "loss", 2) in seen and ("tensorboard/validation", 1, "score", 2) in seen
    assert not any(name == "step" for _, _, name, _ in seen)


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


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_give_the_losses_and_weights_of_one(tmp_path, whole, accumulate):
    port, out = free_port(), tmp_path / "run"
    options = {"ema": 0.9, "accumulate": accumulate}
    ranks = [Forked(lambda rank=rank: together(rank, port, out, **options)) for rank in range(2)]
    assert [rank.wait()[0] for rank in ranks] == [0, 0]
    assert [float(x) for x in losses(out)] == pytest.approx([float(x) for x in losses(whole)], rel=1e-4)
    ours, theirs = tensors_under(out), tensors_under(whole)
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key], tensor, rtol=1e-3, atol=1e-5)


def test_a_signal_to_one_of_two_processes_stops_both_at_one_step_with_a_checkpoint(tmp_path, whole):
    port, out = free_port(), tmp_path / "run"
    options = {"ema": 0.9, "loss": slowly, "save_every": 100}
    ranks = [Forked(lambda rank=rank: together(rank, port, out, **options)) for rank in range(2)]
    wait_for_step(out, 2)
    ranks[1].signal(signal.SIGTERM)
    assert [rank.wait()[0] for rank in ranks] == [143, 143]
    assert [int(path.stem) for path in checkpoints(out)] == [len(losses(out))]
    assert run(lambda: script(out, ema=0.9, resume=True))[0] == 0  # one process goes on from two
    assert [float(x) for x in losses(out)] == pytest.approx([float(x) for x in losses(whole)], rel=1e-4)


def test_processes_that_find_different_checkpoints_refuse_to_train(tmp_path):
    run(lambda: script(tmp_path / "0"))
    (tmp_path / "1").mkdir()
    port = free_port()
    ranks = [Forked(lambda rank=rank: together(rank, port, tmp_path / str(rank), resume=True)) for rank in range(2)]
    for rank in ranks:
        code, line = rank.wait()
        assert code == 2 and "different checkpoints, of steps 0 and 8: --out must be on a disk that they share" in line


def test_an_unreadable_sample_of_one_process_ends_the_others_in_one_line_too(tmp_path):
    port, options = free_port(), {"data": Failing(), "workers": 1}
    ranks = [Forked(lambda rank=rank: together(rank, port, tmp_path / "run", **options)) for rank in range(2)]
    assert ranks[1].wait() == (2, "error: 'a\\nb.png' is missing: Error: really")
    assert ranks[0].wait() == (2, "error: another process of this run ended; its message says why")


def test_a_batch_that_the_processes_cannot_share_is_refused(tmp_path):
    port = free_port()
    ranks = [Forked(lambda rank=rank: together(rank, port, tmp_path / "run", batch_size=3)) for rank in range(2)]
    for rank in ranks:
        code, line = rank.wait()
        assert code == 2 and "--batch-size 3: cannot be shared evenly by 2 process(es)" in line


def test_a_gpu_that_is_not_there_is_one_line(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match="--device cuda cannot be used here"):
        start_processes("cuda")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ValueError, match="--device cuda:1 cannot be used here"):
        start_processes("cuda")
    with pytest.raises(ValueError, match="--device cuda:0: torchrun gives each process a GPU of its own"):
        start_processes("cuda:0")
