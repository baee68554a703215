"""data.py: layouts, splits without leaks, augmentation, the order of the samples."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import geotiff, noise, picture
from PIL import Image
from torch.utils.data import DataLoader

import data
import images


def sen12(root, scenes=5, patches=4):
    for season in ("ROIs1158_spring", "ROIs1868_summer"):
        for scene in range(scenes):
            for patch in range(patches):
                for kind in ("s1", "s2"):
                    picture(root / season / f"{kind}_{scene}" / f"{season}_{kind}_{scene}_p{patch}.png")
    return root


def pairs_of(*scenes):
    return [data.Pair(Path(f"s{i}.png"), Path(f"e{i}.png"), scene, None) for i, scene in enumerate(scenes)]


# ----------------------------------------------------------------------------------------------------------
# Layouts

PICTURES = {  # layout: some SAR images, their EO images, the scenes
    "SEN1-2": (
        [
            "ROIs1158_spring/s1_0/ROIs1158_spring_s1_0_p30.png",
            "ROIs1158_spring/s1_7/ROIs1158_spring_s1_7_p3.png",
        ],
        [
            "ROIs1158_spring/s2_0/ROIs1158_spring_s2_0_p30.png",
            "ROIs1158_spring/s2_7/ROIs1158_spring_s2_7_p3.png",
        ],
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
    "SAR2Opt": (
        ["testA/3 b.png", "trainA/x.png"],
        ["testB/3 b.png", "trainB/x.png"],
        ["test_3 b", "train_x"],
    ),
    "sar/ and eo/": (
        ["sar/more/b.JPG", "sar/ü.png"],
        ["eo/more/b.JPG", "eo/ü.png"],
        ["more", "ü"],
    ),
}
GEOTIFFS = {
    "SEN12MS": (
        ["ROIs1158_spring/s1_1/ROIs1158_spring_s1_1_p30.tif"],
        ["ROIs1158_spring/s2_1/ROIs1158_spring_s2_1_p30.tif"],
        ["ROIs1158_spring_1"],
    ),
    "SpaceNet6": (
        ["SAR-Intensity/SN6_Train_AOI_11_Rotterdam_SAR-Intensity_20190804111224_20190804111453_tile_1.tif"],
        ["PS-RGB/SN6_Train_AOI_11_Rotterdam_PS-RGB_20190804111224_20190804111453_tile_1.tif"],
        ["20190804111224_20190804111453"],
    ),
}


@pytest.mark.parametrize("below", ["", "unpacked/here/"])
@pytest.mark.parametrize("layout", [*PICTURES, *GEOTIFFS])
def test_every_layout_is_recognised_from_the_folder_alone(tmp_path, layout, below):
    sars, eos, scenes = {**PICTURES, **GEOTIFFS}[layout]
    for name in sars + eos:
        (tmp_path / below / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / below / name).touch()
    (tmp_path / "README.txt").touch()
    found = data.find_pairs(tmp_path)
    assert found.layout == layout and not found.unpaired
    assert [p.sar.relative_to(tmp_path / below).as_posix() for p in found.pairs] == sars
    assert [p.eo.relative_to(tmp_path / below).as_posix() for p in found.pairs] == eos
    assert [p.scene for p in found.pairs] == scenes


def test_in_folders_sar_and_eo_pair_whatever_their_endings_and_two_of_one_name_are_refused(tmp_path):
    picture(tmp_path / "sar" / "rome" / "1.tif")
    picture(tmp_path / "eo" / "rome" / "1.png")
    (pair,) = data.find_pairs(tmp_path).pairs
    assert (pair.sar.name, pair.eo.name, pair.scene) == ("1.tif", "1.png", "rome")
    picture(tmp_path / "eo" / "rome" / "1.jpg")
    with pytest.raises(ValueError, match=r"1\.\w+' and '.*1\.\w+' differ only in their endings"):
        data.find_pairs(tmp_path)


def test_geotiff_layouts_are_read_as_the_paper_says(tmp_path):
    sars, eos, _ = GEOTIFFS["SpaceNet6"]
    sar = np.stack([np.linspace(0, 10 + i, 32 * 32, dtype="float32").reshape(32, 32) for i in range(4)])
    geotiff(tmp_path / sars[0], sar)
    geotiff(tmp_path / eos[0], noise(3, 32, 32))
    image = images.read_sar(tmp_path / sars[0])
    low, high = np.percentile(sar, (1, 99), axis=(1, 2))
    x = (np.clip(sar.transpose(1, 2, 0), low, high) - low) / (high - low) * 2 - 1
    expected = np.stack((x[..., 0], (x[..., 1] + x[..., 2]) / 2, x[..., 3]))
    assert np.allclose(image, expected, atol=1e-5)
    assert "4 band(s) of float32" in "".join(data.describe(data.find_pairs(tmp_path)))

    sars, eos, _ = GEOTIFFS["SEN12MS"]
    reflectance = np.zeros((13, 16, 16), "uint16")
    reflectance[3], reflectance[2], reflectance[1] = 3000, 1500, 0  # red, green, blue
    eo = images.read_eo(geotiff(tmp_path / eos[0], reflectance))
    assert [float(c.unique()) for c in eo] == [1, 0, -1]


@pytest.mark.parametrize("total, number", [(199, 100), (63, 32), (10, 3), (5, 9)])
def test_a_choice_of_pairs_is_spread_over_all_of_them(total, number):
    chosen = data.evenly(list(range(total)), number)
    assert len(chosen) == len(set(chosen)) == min(total, number)
    gaps = np.diff([*chosen, total])
    assert chosen[0] == 0 and gaps.max() - gaps.min() <= 1


def test_the_held_out_pairs_are_those_of_the_split_beside_the_model(tmp_path, monkeypatch):
    """Also if both sides of SAR2Opt have equal names, and if the model is named from within."""
    for name in ("trainA/1.png", "trainB/1.png", "testA/1.png", "testB/1.png"):
        picture(tmp_path / name)
    pairs = data.find_pairs(tmp_path).pairs
    model = tmp_path / "run" / "model"
    model.mkdir(parents=True)
    test = [pair.scene for pair in pairs if pair.split == "test"]
    (model.parent / "split.json").write_text(json.dumps({"scenes": {"test": test}}))
    monkeypatch.chdir(model)
    for path in (model, Path()):
        train, held_out, source = data.held_out_pairs(pairs, path)
        assert [pair.split for pair in train] == ["train"] and [pair.split for pair in held_out] == ["test"]
        assert source.endswith("split.json")


def test_the_split_of_sar2opt_is_the_given_one(tmp_path):
    for name in ("trainA/a", "trainB/a", "trainA/b", "trainB/b", "testA/c", "testB/c"):
        picture(tmp_path / f"{name}.png")
    train, test = data.split_pairs(data.find_pairs(tmp_path).pairs)
    assert [p.sar.parent.name for p in train] == ["trainA"] * 2
    assert [p.sar.parent.name for p in test] == ["testA"]


def test_what_has_no_partner_is_counted_and_named(tmp_path):
    sen12(tmp_path)
    lost = tmp_path / "ROIs1158_spring/s2_0/ROIs1158_spring_s2_0_p1.png"
    lost.unlink()
    found = data.find_pairs(tmp_path)
    assert len(found.pairs) == 39
    assert [path.name for path in found.unpaired] == ["ROIs1158_spring_s1_0_p1.png"]
    text = "\n".join(data.describe(found))
    assert "SEN1-2: 39 pairs in 10 scenes" in text and "16x16, 3 band(s) of uint8" in text
    assert "1 image(s) without a partner" in text and "s1_0_p1.png" in text


def test_masks_beside_the_pairs_are_ignored_but_can_be_asked_for(tmp_path):
    sen12(tmp_path)
    mask = picture(tmp_path / "ROIs1158_spring/change_0/ROIs1158_spring_change_0_p0.png")
    found = data.find_pairs(tmp_path)
    assert len(found.pairs) == 40 and not found.unpaired
    assert data.mask_path(found.pairs[0], "change") == mask
    assert data.mask_path(found.pairs[0], "class") is None


def test_hidden_files_and_loops_of_links_do_no_harm(tmp_path):
    for kind in ("sar", "eo"):
        picture(tmp_path / kind / "a.png")
        picture(tmp_path / kind / "._a.png")
    (tmp_path / "sar" / "loop").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "sar" / "dead.png").symlink_to(tmp_path / "nowhere")
    found = data.find_pairs(tmp_path)
    assert [p.sar.name for p in found.pairs] == ["a.png"]
    assert [path.name for path in found.unpaired] == ["dead.png"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "is empty"),
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
        data.find_pairs(tmp_path)
    assert tmp_path.name in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_or_nothing_is_no_folder(tmp_path):
    for path in (picture(tmp_path / "a.png"), tmp_path / "nowhere"):
        with pytest.raises(ValueError, match="is not a folder"):
            data.find_pairs(path)


# ----------------------------------------------------------------------------------------------------------
# Splits


@pytest.mark.parametrize("seed", range(20))
def test_no_scene_is_on_both_sides(seed):
    sizes = np.random.default_rng(seed).integers(1, 30, 2 + 3 * seed)
    pairs = pairs_of(*(f"scene {i}" for i, size in enumerate(sizes) for _ in range(size)))
    train, test = data.split_pairs(pairs, seed)
    assert train and test and sorted(train + test) == sorted(pairs)
    assert not {p.scene for p in train} & {p.scene for p in test}
    if len(sizes) > 10:
        assert 0.15 < len(test) / len(pairs) < 0.25


def test_the_terrains_of_one_scene_stay_together(tmp_path):
    for terrain in ("agri", "urban"):
        for scene in range(4):
            for kind in ("s1", "s2"):
                picture(tmp_path / terrain / kind / f"ROIs1868_summer_{kind}_{scene}_p{len(terrain)}.png")
    train, test = data.split_pairs(data.find_pairs(tmp_path).pairs)
    assert len(train) == 6 and {p.sar.parts[-3] for p in test} == {"agri", "urban"}


def test_the_split_depends_on_seed_and_names_alone():
    pairs = pairs_of(*(f"scene {i // 3}" for i in range(60)))
    assert data.split_pairs(pairs, 1) == data.split_pairs(pairs, 1)
    assert data.split_pairs(pairs, 1) != data.split_pairs(pairs, 2)
    _, test = data.split_pairs(pairs, 1)
    _, test_of_reversed = data.split_pairs(pairs[::-1], 1)
    assert sorted(test) == sorted(test_of_reversed)
    assert sorted({p.scene for p in test}) == ["scene 1", "scene 16", "scene 2", "scene 3"]  # on any machine


@pytest.mark.parametrize("scenes", [[], ["a"], ["a", "a", "a"]])
def test_fewer_than_two_scenes_cannot_be_split(scenes):
    with pytest.raises(ValueError, match="too few scenes"):
        data.split_pairs(pairs_of(*scenes))


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
    return data.find_pairs(folder).pairs


def test_both_images_are_augmented_alike(tmp_path):
    pairs = data.PairDataset(one_picture_twice(tmp_path, 20, 30), 16)
    samples = [pairs[position] for position in range(50)]
    assert all(sar.shape == (3, 16, 16) and torch.equal(sar, eo) for sar, eo in samples)
    assert len({sar.numpy().tobytes() for sar, _ in samples}) > 25


def test_without_flips_a_sample_is_a_crop_and_no_more(tmp_path):
    pairs = one_picture_twice(tmp_path, 16, 16)
    ours, flipped = (data.PairDataset(pairs, 16, flips=flips) for flips in (False, True))
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


def test_the_central_crop_is_central():
    image = torch.arange(100).reshape(1, 10, 10)
    assert torch.equal(data.center_crop(image, 4), image[:, 3:7, 3:7])


def test_a_crop_larger_than_the_image_is_refused():
    image = torch.zeros(3, 16, 20)
    for crop in (lambda: data.center_crop(image, 17), lambda: augmented(image, 17, 0)):
        with pytest.raises(ValueError, match="20x16 pixels is smaller than the crop of 17x17"):
            crop()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return data.find_pairs(sen12(tmp_path_factory.mktemp("sen12"), scenes=2, patches=3)).pairs


def load(pairs, start, stop, seed=0, workers=0, **ranks):
    dataset = data.PairDataset(pairs, 8, seed)
    loader = DataLoader(dataset, batch_sampler=data.batch_positions(start, stop, 4, **ranks), num_workers=workers)
    return list(loader)


def equal(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for xs, ys in zip(a, b) for x, y in zip(xs, ys))


def test_workers_do_not_change_the_samples(pairs):
    assert equal(load(pairs, 0, 7), load(pairs, 0, 7, workers=2))


def test_the_seed_does(pairs):
    assert not equal(load(pairs, 0, 2), load(pairs, 0, 2, seed=1))


def test_resuming_at_a_step_gives_the_rest_of_the_run(pairs):
    assert equal(load(pairs, 0, 7)[4:], load(pairs, 4, 7))


def test_ranks_share_each_batch(pairs):
    whole = load(pairs, 0, 5)
    for rank in range(2):
        part = load(pairs, 0, 5, rank=rank, world=2)
        assert equal(part, [[x[rank::2] for x in batch] for batch in whole])


def test_each_epoch_sees_every_pair_once_in_another_order_and_place(pairs):
    dataset = data.PairDataset(pairs, 8)
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
    dataset = data.PairDataset(data.find_pairs(tmp_path).pairs, 8)
    with pytest.raises(ValueError, match=r"sar/a\.png' is 24x16 but .*eo/a\.png' is 16x16"):
        dataset[0]


@pytest.mark.parametrize(
    "read", [lambda pairs: data.read_center(pairs[0], 32), lambda pairs: data.PairDataset(pairs, 32)[0]]
)
def test_an_image_smaller_than_the_crop_is_named(pairs, read):
    with pytest.raises(ValueError, match=r"_s1_.*\.png.*16x16 pixels is smaller than the crop of 32x32"):
        read(pairs)
