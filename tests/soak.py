"""Long tests: `kill -9` at random moments, full and read-only disks, memory during thousands of steps and images.

    python -m pytest tests/soak.py -s

They take about ten minutes and are not part of the usual tests, which kill a process a few times only. A small disk is
mounted in memory, which needs root.
"""

import csv
import os
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Forked, assert_same_tensors, run, run_with_kills, tensors_under
from hostile import geotiff, noise, save

import sample
import train
from cdiffset import CDiffSET
from experiments.synth import write_dataset

KILLS = 20
STEPS, IMAGES, GROWTH = 3000, 1500, 10  # of the long runs; MB that they may grow after a third


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "sen12"
    write_dataset(folder, pairs=100, size=64)
    return folder


def training(data: Path, base: Path, options: str) -> list[str]:
    """The options of a small training."""
    return f"--data {data} --model {base} --validate-images 2 --validate-steps 2 --device cpu {options}".split()


def contents(folder: Path) -> dict[str, bytes]:
    """{name: bytes} of the files below a folder, except hidden ones."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


# ----------------------------------------------------------------------------------------------------------
# Kills


def test_a_training_and_its_cache_killed_20_times_equal_undisturbed_ones(data, base, tmp_path):
    options = "--size 64 --steps 120 --batch-size 4 --workers 1 --ema 0.9 --save-every 3 --validate-every 25"
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    commands = [training(data, base, f"{options} --cache {out}_cache --out {out}") for out in (whole, killed)]
    run_with_kills(train.main, *commands, KILLS, share=1 / 10)
    assert_same_tensors(killed, whole)
    for path in [*(whole / "samples").iterdir(), tmp_path / "whole_cache" / "latents.bin"]:
        assert path.read_bytes() == Path(str(path).replace(str(whole), str(killed))).read_bytes()
    tables = []
    for out in (whole, killed):
        with (out / "log.csv").open() as file:
            tables.append([row[:4] for row in csv.reader(file)])  # the fifth is the speed
    assert tables[0] == tables[1] and len(tables[0]) == 121
    assert not [path for path in killed.rglob(".*") if path.name != ".lock"]


def test_sampling_killed_20_times_leaves_only_complete_results(trained, tmp_path):
    geotiff(tmp_path / "in" / "scene.tif", side=200)
    for i in range(30):
        save(tmp_path / "in" / f"{i:02}.png", noise(64, 48, seed=i))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options = f"{tmp_path / 'in'} --model {trained} --steps 6 --tile 64 --out"

    def translate(arguments: list[str]) -> int:
        return sample.main([argument for argument in arguments if argument != "--resume"])

    def check() -> None:
        expected = contents(whole)
        assert all(content == expected[name] for name, content in contents(killed).items())

    commands = [[*options.split(), str(out)] for out in (whole, killed)]
    run_with_kills(translate, *commands, KILLS, share=0.9, check=check)
    assert contents(killed) == contents(whole) and len(contents(whole)) == 62


def test_a_model_saved_over_and_killed_20_times_is_always_one_of_the_two(base, tmp_path):
    models = [CDiffSET.from_pretrained(base) for _ in range(2)]
    for p in models[1].unet.parameters():
        p.data += 1
    models[0].save_pretrained(tmp_path / "model")

    def save_for_ever() -> None:
        while True:
            for model in models[::-1]:
                model.save_pretrained(tmp_path / "model")

    seen = set()
    for moment in np.random.default_rng(0).uniform(0, 0.5, KILLS):
        process = Forked(save_for_ever)
        time.sleep(moment)
        process.signal(9)
        assert process.wait()[0] == -9
        loaded = CDiffSET.from_pretrained(tmp_path / "model").unet.state_dict()
        same = [all(torch.equal(loaded[k], v) for k, v in model.unet.state_dict().items()) for model in models]
        assert sum(same) == 1
        seen.add(same.index(True))
    assert seen == {0, 1}


# ----------------------------------------------------------------------------------------------------------
# Disks


@contextmanager
def disk(folder: Path, size: int) -> Iterator[Callable[[str], None]]:
    """Mounts a disk of `size` bytes in memory; yields a function that mounts it again with other options."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    try:
        yield lambda options: subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_training_continues_after_its_disk_was_full_and_read_only(data, base, tmp_path):
    options = "--size 16 --steps 12 --batch-size 2 --workers 1 --save-every 2 --validate-every 4"
    options, whole = training(data, base, options), tmp_path / "whole"
    assert run(train.main, [*options, "--out", str(whole)])[0] == 0
    room = max(path.stat().st_size for path in (whole / "checkpoint").iterdir()) * 5 // 2
    room += sum(len(content) for name, content in contents(whole).items() if not name.startswith("checkpoint"))
    with disk(tmp_path / "disk", room) as remount:
        out = tmp_path / "disk" / "run"
        code, line = run(train.main, [*options, "--out", str(out)])
        assert code == 2 and "No space left on device" in line and "--resume" in line, line
        assert not [path for path in out.rglob(".*") if path.name != ".lock"]
        before = contents(out)
        remount("ro")
        code, line = run(train.main, [*options, "--out", str(out), "--resume"])
        assert code == 2 and "Read-only file system" in line and contents(out) == before, line
        remount(f"rw,size={10 * room}")
        assert run(train.main, [*options, "--out", str(out), "--resume"])[0] == 0
        assert_same_tensors(out, whole)


@pytest.mark.parametrize("kind", ["png", "tif"])
def test_sampling_to_a_full_or_read_only_disk_keeps_the_old_results(trained, tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    save(path, noise(200, 200)) if kind == "png" else geotiff(path, side=200)
    options = [str(path), "--model", str(trained), "--steps", "1", "--tile", "64"]
    with disk(tmp_path / "disk", 2**20) as remount:
        out = tmp_path / "disk" / "out"
        assert run(sample.main, [*options, "--out", str(out)])[0] == 0
        before = contents(out)
        used = sum(map(len, before.values()))
        remount(f"size={used // 4096 * 4096 + 2**16}")
        for problem in ("full", "read-only"):
            code, line = run(sample.main, [*options, "--out", str(out), "--seed", "1"])
            assert code == 2, (problem, line)
            assert contents(out) == before and not list(out.glob(".*"))
            remount("ro")


# ----------------------------------------------------------------------------------------------------------
# Memory


def check_constant(process: Forked, done: Callable[[], int], total: int) -> None:
    """Watches a process from a third of its work to the end: its memory and its open files must not grow."""
    seen, folder = [], Path("/proc") / str(process.process.pid)
    while process.process.is_alive():
        with suppress(OSError, TypeError):  # it has just ended
            memory = int(re.search(r"VmRSS:\s+(\d+)", (folder / "status").read_text())[1]) / 1e3
            seen.append((done() / total, memory, len(list((folder / "fd").iterdir()))))
        time.sleep(0.05)
    code, line = process.wait()
    assert code == 0 and done() == total, line
    early, late = ([s for s in seen if a <= s[0] < b] for a, b in ((0.33, 0.43), (0.9, 1)))
    memory, files = ([statistics.median(s[i] for s in part) for part in (early, late)] for i in (1, 2))
    print(f"\n{total}: {memory[0]:.1f} -> {memory[1]:.1f} MB, {files[0]:.0f} -> {files[1]:.0f} open files", end=" ")
    assert memory[1] - memory[0] < GROWTH and files[1] <= files[0]


def test_thousands_of_steps_take_no_more_memory_and_files_than_the_first_thousand(data, base, tmp_path):
    options = f"--size 16 --steps {STEPS} --batch-size 2 --workers 1 --ema 0.99 --save-every 100 --validate-every 100"
    process = Forked(train.main, [*training(data, base, options), "--out", str(tmp_path / "run")])
    log = tmp_path / "run" / "log.csv"
    check_constant(process, lambda: log.read_text().count("\n") - 1 if log.exists() else 0, STEPS)
    assert all(torch.isfinite(tensor).all() for tensor in tensors_under(tmp_path / "run").values())


def test_thousands_of_images_take_no_more_memory_and_files_than_the_first(trained, tmp_path):
    for i in range(IMAGES):
        save(tmp_path / "in" / f"{i:05}.png", noise(40, 40) if i % 10 else noise(24, 24))
    options = [str(tmp_path / "in"), "--model", str(trained), "--steps", "1", "--tile", "32", "--batch-size", "4"]
    process, out = Forked(sample.main, [*options, "--out", str(tmp_path / "out")]), tmp_path / "out"
    check_constant(process, lambda: len(list(out.glob("[!.]*_confidence.*"))), IMAGES)
