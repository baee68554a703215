"""Kills a training and a cache 20 times each by `kill -9` at random moments: they end as if left alone.

    python -m pytest tests/soak.py -s

Takes minutes, so it is not part of the tests, which kill a few times.
"""

import csv

import pytest
from conftest import assert_same_tensors, run_with_kills

import train
from cache import build_cache
from cdiffset import CDiffSET
from data import PairDataset, find_pairs
from synth import write_dataset

KILLS = 20


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "sen12"
    write_dataset(folder, pairs=100, size=64)
    return PairDataset(find_pairs(folder).pairs, 64)


def test_a_training_killed_20_times_equals_one_left_alone(pairs, base, tmp_path):
    options = "--size 64 --steps 120 --batch-size 4 --workers 1 --ema 0.9 --device cpu --save-every 3 --keep 3"
    options = [*options.split(), "--validate-every", "25", "--validate-images", "2", "--validate-steps", "2"]
    options += ["--data", str(pairs.pairs[0].sar.parents[2]), "--model", str(base), "--cache", str(tmp_path / "cache")]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_with_kills(train.main, [*options, "--out", str(whole)], [*options, "--out", str(killed)], KILLS, share=1 / 6)
    assert_same_tensors(killed, whole)
    for path in (whole / "samples").iterdir():
        assert path.read_bytes() == (killed / "samples" / path.name).read_bytes()
    tables = []
    for out in (whole, killed):
        with (out / "log.csv").open() as file:
            tables.append([row[:4] for row in csv.reader(file)])
    assert tables[0] == tables[1] and len(tables[0]) == 121
    assert not [path for path in killed.rglob(".*") if path.name != ".lock"]


def test_a_cache_killed_20_times_equals_one_left_alone(pairs, base, tmp_path):
    def fill(arguments):
        build_cache(CDiffSET.from_pretrained(base), pairs, tmp_path / arguments[0])

    run_with_kills(fill, ["whole"], ["killed"], KILLS, share=1 / 6)
    assert (tmp_path / "killed" / "latents.bin").read_bytes() == (tmp_path / "whole" / "latents.bin").read_bytes()
