"""data.py: layouts, one reading for a dataset, augmentation, the order of the samples, the cache of their latents."""

import os
import resource
import shutil
from collections import namedtuple

import numpy as np
import pytest
import torch
from conftest import run, run_with_kills, write_base
from image_files import RNG, geotiff, noise, picture
from PIL import Image
from torch.utils.data import DataLoader

import data
import images
from cdiffset import CDiffSET
from data import CachedLatents, PairDataset, build_cache, find_pairs
from images import Reading


def sen12(root, scenes=5, patches=4):
    for season in ("ROIs1158_spring", "ROIs1868_summer"):
        for scene in range(scenes):
            for patch in range(patches):
                for kind in ("s1", "s2"):
                    picture(root / season / f"{kind}_{scene}" / f"{season}_{kind}_{scene}_p{patch}.png")
    return root


# ----------------------------------------------------------------------------------------------------------
# Layouts

SN6 = "SN6_Train_AOI_11_Rotterdam_{}_20190804111224_20190804111453_tile_1.tif"
LAYOUTS = {  # some SAR images, their EO images, the scenes
    "SEN1-2": (
        ["ROIs1158_spring/s1_0/ROIs1158_spring_s1_0_p30.png", "ROIs1158_spring/s1_7/ROIs1158_spring_s1_7_p3.png"],
        ["ROIs1158_spring/s2_0/ROIs1158_spring_s2_0_p30.png", "ROIs1158_spring/s2_7/ROIs1158_spring_s2_7_p3.png"],
        ["ROIs1158_spring_0", "ROIs1158_spring_7"],
    ),
    "SEN1-2 by terrain": (
        ["v_2/agri/s1/ROIs1868_summer_s1_59_p2.png", "v_2/urban/s1/ROIs1868_summer_s1_59_p9.png"],
        ["v_2/agri/s2/ROIs1868_summer_s2_59_p2.png", "v_2/urban/s2/ROIs1868_summer_s2_59_p9.png"],
        ["ROIs1868_summer_59", "ROIs1868_summer_59"],
    ),
    "QXS-SAROPT": (
        ["sar_256_oc_0.2/1.png", "sar_256_oc_0.2/20.png"],
        ["opt_256_oc_0.2/1.png", "opt_256_oc_0.2/20.png"],
        ["1", "20"],
    ),
    "SAR2Opt": (["testA/3 b.png", "trainA/x.png"], ["testB/3 b.png", "trainB/x.png"], ["test_3 b", "train_x"]),
    "sar/ and eo/": (["sar/more/b.JPG", "sar/ü.png"], ["eo/more/b.JPG", "eo/ü.png"], ["more", "ü"]),
    "SEN12MS": (
        ["ROIs1158_spring/s1_1/ROIs1158_spring_s1_1_p30.tif"],
        ["ROIs1158_spring/s2_1/ROIs1158_spring_s2_1_p30.tif"],
        ["ROIs1158_spring_1"],
    ),
    "SpaceNet6": (
        [f"SAR-Intensity/{SN6.format('SAR-Intensity')}"],
        [f"PS-RGB/{SN6.format('PS-RGB')}"],
        ["20190804111224_20190804111453"],
    ),
}


@pytest.mark.parametrize("below", ["", "unpacked/here/", "Valid/"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_and_split_is_recognised_from_the_folders_alone(tmp_path, layout, below):
    sars, eos, scenes = LAYOUTS[layout]
    for name in sars + eos:
        (tmp_path / below / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / below / name).touch()
    (tmp_path / "README.txt").touch()
    found = find_pairs(tmp_path)
    assert found.layout == layout and not found.unpaired
    assert [p.sar.relative_to(tmp_path / below).as_posix() for p in found.pairs] == sars
    assert [p.eo.relative_to(tmp_path / below).as_posix() for p in found.pairs] == eos
    assert [p.scene for p in found.pairs] == scenes
    by_folders = ["test", "train"] if layout == "SAR2Opt" else [("val" if below == "Valid/" else None)] * len(sars)
    assert [p.split for p in found.pairs] == by_folders


def test_in_folders_sar_and_eo_pair_whatever_their_endings_and_two_of_one_name_are_refused(tmp_path):
    picture(tmp_path / "sar" / "rome" / "1.tif")
    picture(tmp_path / "eo" / "rome" / "1.png")
    (pair,) = find_pairs(tmp_path).pairs
    assert (pair.sar.name, pair.eo.name, pair.scene) == ("1.tif", "1.png", "rome")
    picture(tmp_path / "eo" / "rome" / "1.jpg")
    with pytest.raises(ValueError, match=r"1\.\w+' and '.*1\.\w+' differ only in their endings"):
        find_pairs(tmp_path)


@pytest.mark.parametrize("total, number", [(199, 100), (63, 32), (10, 3), (5, 9)])
def test_a_choice_of_pairs_is_spread_over_all_of_them(total, number):
    chosen = data.evenly(list(range(total)), number)
    assert len(chosen) == len(set(chosen)) == min(total, number)
    gaps = np.diff([*chosen, total])
    assert chosen[0] == 0 and gaps.max() - gaps.min() <= 1


def test_what_has_no_partner_is_counted_and_named(tmp_path):
    sen12(tmp_path)
    lost = tmp_path / "ROIs1158_spring/s2_0/ROIs1158_spring_s2_0_p1.png"
    lost.unlink()
    found = find_pairs(tmp_path)
    assert len(found.pairs) == 39
    assert [path.name for path in found.unpaired] == ["ROIs1158_spring_s1_0_p1.png"]
    text = "\n".join(data.describe(found))
    assert "SEN1-2: 39 pairs in 10 scenes" in text and "16x16, 3 band(s) of uint8" in text
    assert "1 image(s) without a partner" in text and "s1_0_p1.png" in text


def test_two_polarisations_in_two_files_are_named_with_the_command_that_makes_them_one(tmp_path):
    for name in ("sar/S1_VV.tif", "sar/S1_VH.tif", "eo/S1.png"):
        picture(tmp_path / name)
    with pytest.raises(ValueError, match=r"none has a partner.*rio stack S1_VV.tif S1_VH.tif -o"):
        find_pairs(tmp_path)
    for name in ("sar/other.png", "eo/other.png"):
        picture(tmp_path / name)
    assert "rio stack" in "".join(data.describe(find_pairs(tmp_path)))


def test_hidden_files_and_loops_of_links_do_no_harm(tmp_path):
    for kind in ("sar", "eo"):
        picture(tmp_path / kind / "a.png")
        picture(tmp_path / kind / "._a.png")
    (tmp_path / "sar" / "loop").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "sar" / "dead.png").symlink_to(tmp_path / "nowhere")
    found = find_pairs(tmp_path)
    assert [p.sar.name for p in found.pairs] == ["a.png"]
    assert [path.name for path in found.unpaired] == ["dead.png"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "is empty or holds no PNG, JPEG or TIFF"),
        (["notes.txt"], "is empty or holds no PNG, JPEG or TIFF"),
        (["photo.png", "notes.txt"], "none of the known datasets.*SpaceNet6"),
        (["sar/a.png", "eo/b.png"], "none has a partner.*eo/b.png"),
        (["sar/a.png"], "1 SAR and 0 EO"),
        (["sar/a.png", "eo/a.png", "trainA/b.png", "trainB/b.png"], "pairs of SAR2Opt and sar/ and eo/"),
    ],
)
def test_a_folder_that_is_no_dataset_is_refused(tmp_path, files, message):
    for name in files:
        picture(tmp_path / name) if name.endswith("png") else (tmp_path / name).touch()
    with pytest.raises(ValueError, match=message) as caught:
        find_pairs(tmp_path)
    assert tmp_path.name in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_or_nothing_is_no_folder(tmp_path):
    for path in (picture(tmp_path / "a.png"), tmp_path / "nowhere"):
        with pytest.raises(ValueError, match="is not a folder"):
            find_pairs(path)


# ----------------------------------------------------------------------------------------------------------
# One reading for a dataset

LINEAR = RNG.gamma(4, 0.02, (2, 32, 32)).astype("float32")
RGB = noise(3, 32, 32)
SARS = {
    "db": 10 * np.log10(LINEAR),
    "linear": LINEAR,
    "amplitude": (600 * np.sqrt(LINEAR)).astype("uint16"),
    "full": noise(1, 32, 32),
    "nothing": np.zeros((2, 32, 32), "float32"),
}
EOS = {"full": RGB, "reflectance": noise(3, 32, 32, dtype="uint16", high=4000), "dark": RGB.astype("uint16")}


def pairs_of(root, kinds, colours):
    """Pairs in the plain layout, of these kinds of numbers."""
    for i, (kind, colour) in enumerate(zip(kinds, colours)):
        geotiff(root / f"sar/{i}.tif", SARS[kind], names=("VV", "VH")[: len(SARS[kind])], east=1e4 * i)
        geotiff(root / f"eo/{i}.tif", EOS[colour], east=1e4 * i)
    return find_pairs(root).pairs


@pytest.mark.parametrize("colour", ["full", "reflectance"])
@pytest.mark.parametrize("kind", ["db", "linear", "amplitude", "full"])
def test_what_most_images_are_is_decided_once_and_said_in_a_line_each(tmp_path, kind, colour):
    pairs = pairs_of(tmp_path, [kind] * 3, [colour] * 3)
    reading, lines = data.decide_reading(pairs)
    assert reading == Reading(kind, None, colour) and len(lines) == 2
    assert "--scale or --stretch" in lines[0] and "--eo-scale" in lines[1]
    for a, b in zip(PairDataset(pairs, 32, reading=reading)[0], PairDataset(pairs, 32)[0]):
        assert torch.equal(a, b)


def test_an_image_that_looks_otherwise_is_named_and_read_like_the_others(tmp_path):
    pairs = pairs_of(tmp_path, ["db", "linear", "db", "nothing"], ["reflectance"] * 3 + ["dark"])
    reading, lines = data.decide_reading(pairs)
    assert reading == Reading("db", None, "reflectance")
    assert "1.tif" in lines[1] and "3.tif" in lines[1] and "3.tif" in lines[3] and "2 of 4" in lines[1]
    sar, eo = data.read_pair(pairs[3], reading)
    assert sar.eq(-1).all() and eo.max() < -0.8
    sar, _ = data.read_pair(pairs[1], reading)
    assert sar.eq(1).float().mean() > 0.9  # intensities as dB


@pytest.mark.parametrize(("majority", "odd"), [("db", "full"), ("full", "db"), ("db", "amplitude"), ("linear", "full")])
def test_an_image_whose_numbers_cannot_be_what_the_others_are_is_refused(tmp_path, majority, odd):
    pairs = pairs_of(tmp_path, [majority, odd, majority], ["full"] * 3)
    with pytest.raises(ValueError, match=rf"1\.tif.*which cannot be {majority}"):
        data.decide_reading(pairs)
    reading, _ = data.decide_reading(pairs[::2])
    with pytest.raises(ValueError, match=r"1\.tif"):
        data.read_pair(pairs[1], reading)


def test_what_is_wanted_is_not_looked_for(tmp_path):
    pairs = pairs_of(tmp_path, ["db"] * 2, ["reflectance"] * 2)
    assert data.decide_reading(pairs, Reading("linear", None, "full"))[0] == Reading("linear", None, "full")
    reading, lines = data.decide_reading(pairs, Reading(stretch=[10, 90]))
    assert reading == Reading("linear", (10, 90), "reflectance") and "(10 and 90)" in lines[0]
    with pytest.raises(ValueError, match=r"\.tif.*cannot be full"):
        data.decide_reading(pairs, Reading("full"))


def test_bands_that_are_left_out_are_said_once(tmp_path):
    for i in range(3):
        geotiff(tmp_path / f"sar/{i}.tif", np.stack([*SARS["db"], SARS["db"][0]]), names=("VV", "VH", "angle"))
        geotiff(tmp_path / f"eo/{i}.tif", RGB)
    lines = data.decide_reading(find_pairs(tmp_path).pairs)[1]
    assert [line.count("'angle'") for line in lines] == [1, 0]


# ----------------------------------------------------------------------------------------------------------
# Samples


def generator(seed):
    return torch.Generator().manual_seed(seed)


def augmented(image, size, seed):
    top, left, orientation = data.draw_augmentation(*image.shape[-2:], size, generator(seed))
    return data.orient(image[..., top : top + size, left : left + size], orientation)


def one_picture_twice(folder, height, width):
    """A pair whose two images are the same noise."""
    for kind in ("sar", "eo"):
        (folder / kind).mkdir()
        pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / kind / "a.png")
    return find_pairs(folder).pairs


def test_both_images_are_augmented_alike(tmp_path):
    pairs = PairDataset(one_picture_twice(tmp_path, 20, 30), 16)
    samples = [pairs[position] for position in range(50)]
    assert all(sar.shape == (3, 16, 16) and torch.equal(sar, eo) for sar, eo in samples)
    assert len({sar.numpy().tobytes() for sar, _ in samples}) > 25


def test_without_flips_a_sample_is_a_crop_and_no_more(tmp_path):
    pairs = one_picture_twice(tmp_path, 16, 16)
    ours, flipped = (PairDataset(pairs, 16, flips=flips) for flips in (False, True))
    assert all(torch.equal(ours[position][0], ours[0][0]) for position in range(20))
    assert len({flipped[position][0].numpy().tobytes() for position in range(200)}) == 8


def test_all_eight_orientations_occur_as_often_as_the_paper_has_them():
    image = torch.arange(4.0).reshape(1, 2, 2)
    all_eight = {tuple(data.orient(image, k).flatten().tolist()) for k in range(8)}
    assert len(all_eight) == 8
    drawn = [augmented(image, 2, i).flatten().tolist() for i in range(2000)]
    counts = {key: sum(tuple(x) == key for x in drawn) for key in all_eight}
    odd = [counts.pop(tuple(data.orient(image, k).flatten().tolist())) for k in (1, 3, 5, 7)]
    assert all(80 < count < 170 for count in odd)  # a rotation has p = 1/2, and half of them are odd: 1/16 each
    assert all(310 < count < 440 for count in counts.values())  # so 3/16 each


def test_flips_before_the_turn_equal_the_orientation():
    image = torch.randn(1, 6, 6)
    for seed in range(40):
        top, left, orientation = data.draw_augmentation(6, 6, 6, generator(seed))
        g = generator(seed)
        draws = [int(torch.randint(n, (), generator=g)) for n in (1, 1, 2, 2, 2, 4)]
        expected = image.flip(-1) if draws[2] else image
        expected = expected.flip(-2) if draws[3] else expected
        expected = expected.rot90(draws[5], (-2, -1)) if draws[4] else expected
        assert (top, left) == (0, 0) and torch.equal(data.orient(image, orientation), expected)


def test_crops_reach_every_place():
    places = {data.draw_augmentation(5, 6, 4, generator(i))[:2] for i in range(200)}
    assert places == {(top, left) for top in range(2) for left in range(3)}


def test_a_crop_larger_than_the_image_is_refused():
    image = torch.zeros(3, 16, 20)
    for crop in (lambda: data.center_crop(image, 17), lambda: augmented(image, 17, 0)):
        with pytest.raises(ValueError, match="20x16 pixels is smaller than the crop of 17x17"):
            crop()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return find_pairs(sen12(tmp_path_factory.mktemp("sen12"), scenes=2, patches=3)).pairs


def load(pairs, start, stop, seed=0, workers=0, **ranks):
    dataset = PairDataset(pairs, 8, seed)
    return list(DataLoader(dataset, batch_sampler=data.batch_positions(start, stop, 4, **ranks), num_workers=workers))


def equal(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for xs, ys in zip(a, b) for x, y in zip(xs, ys))


def test_samples_depend_on_seed_and_position_alone(pairs):
    whole = load(pairs, 0, 7)
    assert equal(whole, load(pairs, 0, 7, workers=2))
    assert equal(whole[4:], load(pairs, 4, 7))  # a resumed run
    assert not equal(whole, load(pairs, 0, 7, seed=1))
    for rank in range(2):
        part = load(pairs, 0, 7, rank=rank, world=2)
        assert equal(part, [[x[rank::2] for x in batch] for batch in whole])


def test_each_epoch_sees_every_pair_once_in_another_order_and_place(pairs):
    dataset = PairDataset(pairs, 8)
    epochs = [[dataset.pair(e * len(pairs) + i) for i in range(len(pairs))] for e in range(3)]
    assert all(sorted(epoch) == sorted(pairs) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    again = epochs[1].index(epochs[0][0]) + len(pairs)
    assert not torch.equal(dataset[0][0], dataset[again][0])


def test_testing_is_from_the_centre(pairs):
    for pair in pairs:
        sar, eo = data.read_center(pair, 8)
        assert torch.equal(sar, images.read_sar(pair.sar)[:, 4:12, 4:12])
        assert torch.equal(eo, images.read_eo(pair.eo)[:, 4:12, 4:12])


def test_a_pair_of_unequal_sizes_is_named_with_both_sizes(tmp_path):
    picture(tmp_path / "sar/a.png", noise(16, 24))
    picture(tmp_path / "eo/a.png", noise(16, 16))
    dataset = PairDataset(find_pairs(tmp_path).pairs, 8)
    with pytest.raises(ValueError, match=r"sar/a\.png' is 24x16 but .*eo/a\.png' is 16x16"):
        dataset[0]


@pytest.mark.parametrize(
    "read", [lambda pairs: data.read_center(pairs[0], 32), lambda pairs: PairDataset(pairs, 32)[0]]
)
def test_an_image_smaller_than_the_crop_is_named(pairs, read):
    with pytest.raises(ValueError, match=r"_s1_.*\.png.*16x16 pixels is smaller than the crop of 32x32"):
        read(pairs)


# ----------------------------------------------------------------------------------------------------------
# The cache


@pytest.fixture(scope="module")
def samples(dataset):
    return PairDataset(find_pairs(dataset).pairs, size=64, seed=3)


@pytest.fixture(scope="module")
def model(base):
    return CDiffSET.from_pretrained(base)


@pytest.fixture(scope="module")
def folder(model, samples, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    build_cache(model, samples, folder)
    return folder


@torch.no_grad()
def test_a_cached_sample_is_the_sample_encoded_in_every_orientation(model, samples, folder):
    latents, orientations = CachedLatents(folder, samples), set()
    for position in range(60):
        encoded = model.encode(torch.stack(samples[position]))
        cached = torch.stack(latents[position])
        assert cached.dtype == torch.float32 and cached.shape == (2, 4, 16, 16)
        torch.testing.assert_close(cached, encoded, rtol=2**-10, atol=1e-5)
        orientations.add(samples.augmentation(position, 64, 64)[2])
    assert orientations == set(range(8))
    assert (folder / "latents.bin").stat().st_size == len(samples) * 8 * 2 * 4 * 16 * 16 * 2


@torch.no_grad()
def test_without_flips_the_cache_holds_one_orientation(model, samples, tmp_path):
    upright = PairDataset(samples.pairs, 64, flips=False)
    build_cache(model, upright, tmp_path)
    assert (tmp_path / "latents.bin").stat().st_size == len(samples) * 2 * 4 * 16 * 16 * 2
    latents = CachedLatents(tmp_path, upright)
    for position in range(10):
        encoded = model.encode(torch.stack(upright[position]))
        torch.testing.assert_close(torch.stack(latents[position]), encoded, rtol=2**-10, atol=1e-5)


@torch.no_grad()
def test_encoding_an_oriented_image_is_not_orienting_the_latent(model, samples):
    """So the cache must hold all eight: this is what the test above would not see with a symmetric encoder."""
    sar = samples[0][0][None]
    difference = model.encode(sar.flip(-1)) - model.encode(sar).flip(-1)
    assert float(difference.abs().max()) > 0.01


def test_a_cache_killed_at_random_moments_goes_on_to_the_same_bytes(base, samples, folder, tmp_path):
    def main(arguments):
        build_cache(CDiffSET.from_pretrained(base), samples, tmp_path / arguments[0])

    run_with_kills(main, ["undisturbed"], ["cache"], kills=4, share=0.4)
    for name in ("latents.bin", "cache.json"):
        assert (tmp_path / "cache" / name).read_bytes() == (folder / name).read_bytes()


def test_only_what_is_missing_is_encoded_again(model, samples, folder, tmp_path, monkeypatch):
    copy = shutil.copytree(folder, tmp_path / "cache")
    whole = (copy / "latents.bin").read_bytes()
    record = len(whole) // len(samples)
    (copy / "latents.bin").write_bytes(whole[: 17 * record + 100])  # the 18th was being written
    seen, encode = [], model.encode
    monkeypatch.setattr(model, "encode", lambda image: seen.append(len(image)) or encode(image))
    build_cache(model, samples, copy)
    assert seen == [16] * 3 and (copy / "latents.bin").read_bytes() == whole
    build_cache(model, samples, copy)
    assert len(seen) == 3


def test_the_cache_of_another_vae_dataset_or_size_is_refused_and_left_alone(model, samples, folder, dataset, tmp_path):
    other_vae = CDiffSET.from_pretrained(write_base(tmp_path / "other", seed=1))
    scaled = CDiffSET.from_pretrained(tmp_path / "other")
    scaled.vae.load_state_dict(model.vae.state_dict())
    scaled.vae.scaling_factor = scaled.vae.config["scaling_factor"] = 0.5
    touched = shutil.copytree(dataset, tmp_path / "touched")
    os.utime(next(touched.rglob("*_s1_*.png")), (0, 0))
    before = (folder / "latents.bin").read_bytes()
    for changed, others in (
        (other_vae, samples),
        (scaled, samples),
        (model, PairDataset(samples.pairs[1:], 64)),
        (model, PairDataset(samples.pairs, 32)),
        (model, PairDataset(find_pairs(touched).pairs, 64)),
        (model, PairDataset(samples.pairs, 64, flips=False)),
        (model, PairDataset(samples.pairs, 64, reading=Reading(stretch=(1, 99)))),
        (model, PairDataset([pair._replace(window=(0, 0, 64, 64)) for pair in samples.pairs], 64)),
    ):
        with pytest.raises(
            ValueError,
            match="another model, dataset .or copied files., split .--seed., --size, --no-flips or --scale: del",
        ):
            build_cache(changed, others, folder)
    assert (folder / "latents.bin").read_bytes() == before
    build_cache(model, PairDataset(samples.pairs, 64, seed=4), folder)  # another order of the same pairs is fine


def test_too_little_disk_is_said_before_anything_is_encoded(model, samples, tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(data.shutil, "disk_usage", lambda _: usage(free=1000))
    with pytest.raises(ValueError, match=r"too little disk, it takes 0.0 GB for the cache, and 0.0 GB are free"):
        build_cache(model, samples, tmp_path)
    assert not (tmp_path / "latents.bin").exists()


def test_a_disk_that_fills_up_is_one_line_and_the_cache_goes_on(base, samples, folder, tmp_path):
    def main():
        build_cache(CDiffSET.from_pretrained(base), samples, tmp_path / "cache")

    code, line = run(main, before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)))
    assert code == 2 and line.startswith("error: ") and "latents.bin" in line and "File too large" in line
    assert run(main)[0] == 0
    assert (tmp_path / "cache" / "latents.bin").read_bytes() == (folder / "latents.bin").read_bytes()
