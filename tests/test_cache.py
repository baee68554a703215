"""cache.py: a cached sample is the sample, encoded; an interrupted cache goes on; a wrong one is refused."""

import os
import resource
import shutil
from collections import namedtuple

import pytest
import torch
from conftest import run, run_with_kills, write_base

import cache
from cache import CachedLatents, build_cache
from cdiffset import CDiffSET
from data import PairDataset, find_pairs


@pytest.fixture(scope="module")
def pairs(dataset):
    return PairDataset(find_pairs(dataset).pairs, size=64, seed=3)


@pytest.fixture(scope="module")
def model(base):
    return CDiffSET.from_pretrained(base)


@pytest.fixture(scope="module")
def folder(model, pairs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    build_cache(model, pairs, folder)
    return folder


@torch.no_grad()
def test_a_cached_sample_is_the_sample_encoded_in_every_orientation(model, pairs, folder):
    latents, orientations = CachedLatents(folder, pairs), set()
    for position in range(60):
        encoded = model.encode(torch.stack(pairs[position]))
        cached = torch.stack(latents[position])
        assert cached.dtype == torch.float32 and cached.shape == (2, 4, 16, 16)
        torch.testing.assert_close(cached, encoded, rtol=2**-10, atol=1e-5)
        orientations.add(pairs.augmentation(position, 64, 64)[2])
    assert orientations == set(range(8))


@torch.no_grad()
def test_without_flips_the_cache_holds_one_orientation(model, pairs, tmp_path):
    upright = PairDataset(pairs.pairs, 64, flips=False)
    build_cache(model, upright, tmp_path)
    assert (tmp_path / "latents.bin").stat().st_size == len(pairs) * 2 * 4 * 16 * 16 * 2
    latents = CachedLatents(tmp_path, upright)
    for position in range(10):
        encoded = model.encode(torch.stack(upright[position]))
        torch.testing.assert_close(torch.stack(latents[position]), encoded, rtol=2**-10, atol=1e-5)


@torch.no_grad()
def test_encoding_an_oriented_image_is_not_orienting_the_latent(model, pairs):
    """So the cache must hold all eight: this is what the test above would not see with a symmetric encoder."""
    sar = pairs[0][0][None]
    difference = model.encode(sar.flip(-1)) - model.encode(sar).flip(-1)
    assert float(difference.abs().max()) > 0.01


def test_the_cache_takes_the_room_that_the_docstring_says(pairs, folder):
    assert (folder / "latents.bin").stat().st_size == len(pairs) * 8 * 2 * 4 * 16 * 16 * 2


def test_a_cache_killed_at_random_moments_goes_on_to_the_same_bytes(base, pairs, folder, tmp_path):
    def main(arguments):
        build_cache(CDiffSET.from_pretrained(base), pairs, tmp_path / arguments[0])

    run_with_kills(main, ["undisturbed"], ["cache"], kills=4, share=0.4)
    for name in ("latents.bin", "cache.json"):
        assert (tmp_path / "cache" / name).read_bytes() == (folder / name).read_bytes()


def test_only_what_is_missing_is_encoded_again(model, pairs, folder, tmp_path, monkeypatch):
    copy = shutil.copytree(folder, tmp_path / "cache")
    whole = (copy / "latents.bin").read_bytes()
    record = len(whole) // len(pairs)
    (copy / "latents.bin").write_bytes(whole[: 17 * record + 100])  # the 18th was being written
    seen, encode = [], model.encode
    monkeypatch.setattr(model, "encode", lambda image: seen.append(len(image)) or encode(image))
    build_cache(model, pairs, copy)
    assert seen == [16] * 3 and (copy / "latents.bin").read_bytes() == whole
    build_cache(model, pairs, copy)
    assert len(seen) == 3


def test_the_cache_of_another_vae_dataset_or_size_is_refused_and_left_alone(model, pairs, folder, dataset, tmp_path):
    other_vae = CDiffSET.from_pretrained(write_base(tmp_path / "other", seed=1))
    scaled = CDiffSET.from_pretrained(tmp_path / "other")
    scaled.vae.load_state_dict(model.vae.state_dict())
    scaled.vae.scaling_factor = scaled.vae.config["scaling_factor"] = 0.5
    touched = shutil.copytree(dataset, tmp_path / "touched")
    os.utime(next(touched.rglob("*_s1_*.png")), (0, 0))
    before = (folder / "latents.bin").read_bytes()
    for changed, samples in (
        (other_vae, pairs),
        (scaled, pairs),
        (model, PairDataset(pairs.pairs[1:], 64)),
        (model, PairDataset(pairs.pairs, 32)),
        (model, PairDataset(find_pairs(touched).pairs, 64)),
        (model, PairDataset(pairs.pairs, 64, flips=False)),
    ):
        with pytest.raises(
            ValueError, match="another model, dataset .or copied files., split .--seed., --size or --no-flips: delete"
        ):
            build_cache(changed, samples, folder)
    assert (folder / "latents.bin").read_bytes() == before
    build_cache(model, PairDataset(pairs.pairs, 64, seed=4), folder)  # another order of the same pairs is fine


def test_images_larger_than_the_crop_cannot_be_cached(model, pairs, tmp_path):
    with pytest.raises(ValueError, match=r"64x64 pixels, not --size 32; random crops cannot be cached: train without"):
        build_cache(model, PairDataset(pairs.pairs, 32), tmp_path)
    build_cache(model, PairDataset(pairs.pairs[:2], 64), tmp_path)  # nothing was held yet, so the folder can be used


def test_too_little_disk_is_said_before_anything_is_encoded(model, pairs, tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: usage(free=1000))
    with pytest.raises(ValueError, match=r"too little disk, it takes 0.0 GB for the cache, and 0.0 GB are free"):
        build_cache(model, pairs, tmp_path)
    assert not (tmp_path / "latents.bin").exists()


def test_a_disk_that_fills_up_is_one_line_and_the_cache_goes_on(base, pairs, folder, tmp_path):
    def main():
        build_cache(CDiffSET.from_pretrained(base), pairs, tmp_path / "cache")

    code, line = run(main, before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)))
    assert code == 2 and line.startswith("error: ") and "latents.bin" in line and "File too large" in line
    assert run(main)[0] == 0
    assert (tmp_path / "cache" / "latents.bin").read_bytes() == (folder / "latents.bin").read_bytes()
