"""splits.py: the dataset's own split, no ground on both sides, blocks of large images, a training's split again."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_base
from image_files import RNG, geotiff, noise, picture

import rasters
import splits
from cdiffset import CDiffSET
from data import CachedLatents, Pair, PairDataset, build_cache, find_pairs, read_pair
from images import Reading
from splits import cut_large, held_out_pairs, split_names, split_pairs


def pairs_of(*scenes):
    return [Pair(Path(f"s{i}.png"), Path(f"e{i}.png"), scene, None) for i, scene in enumerate(scenes)]


def names(pairs):
    return [pair.sar.name for pair in pairs]


# ----------------------------------------------------------------------------------------------------------
# The dataset's own split


def dataset_in(root, *folders):
    """One pair in the plain layout in each of the folders, named after it."""
    for folder in folders:
        for kind in ("sar", "eo"):
            picture(root / folder / kind / f"{Path(folder).name}.png")
    return find_pairs(root).pairs


@pytest.mark.parametrize(
    ("folders", "train", "val", "test", "said"),
    [
        (["train", "val", "test"], ["train"], ["val"], ["test"], ""),
        (["a/Train", "a/VALIDATION", "a/Test"], ["Train"], ["VALIDATION"], ["Test"], ""),
        (["training", "test"], ["training"], ["test"], ["test"], "validates on its test images"),
        (["train", "valid"], ["train"], ["valid"], ["valid"], "no test folder"),
        (["rome", "oslo", "test"], ["oslo", "rome"], ["test"], ["test"], "validates on its test images"),
        (["train", "test", "more"], ["train"], ["test"], ["test"], "1 pair(s) outside"),
    ],
)
def test_the_folders_of_a_dataset_decide(tmp_path, folders, train, val, test, said):
    split = split_pairs(dataset_in(tmp_path, *folders), seed=1)
    assert [names(side) for side in split[:3]] == [[f"{name}.png" for name in side] for side in (train, val, test)]
    assert said in " ".join(split.notes) and bool(said) == (len(split.notes) > 1)


def test_folders_inside_sar_and_eo_decide_too_and_the_split_of_sar2opt_is_the_given_one(tmp_path):
    for folder, kind in itertools.product(("train", "test"), ("sar", "eo")):
        picture(tmp_path / "plain" / kind / folder / f"{folder}.png")
    for name in ("trainA/a", "trainB/a", "trainA/b", "trainB/b", "testA/c", "testB/c"):
        picture(tmp_path / "sar2opt" / f"{name}.png")
    for folder, train, test in (("plain", ["train.png"], ["test.png"]), ("sar2opt", ["a.png", "b.png"], ["c.png"])):
        split = split_pairs(find_pairs(tmp_path / folder).pairs)
        assert names(split.train) == train and names(split.test) == test


def test_a_single_side_is_no_split(tmp_path):
    split = split_pairs(dataset_in(tmp_path, "train/a", "train/b"))
    assert len(split.train) == len(split.test) == 1 and not split.notes


# ----------------------------------------------------------------------------------------------------------
# By scene


@pytest.mark.parametrize("seed", range(20))
def test_no_scene_is_on_both_sides(seed):
    sizes = np.random.default_rng(seed).integers(1, 30, 2 + 3 * seed)
    pairs = pairs_of(*(f"scene {i}" for i, size in enumerate(sizes) for _ in range(size)))
    train, _, test, _ = split_pairs(pairs, seed)
    assert train and test and sorted(train + test) == sorted(pairs)
    assert not {p.scene for p in train} & {p.scene for p in test}
    if len(sizes) > 10:
        assert 0.15 < len(test) / len(pairs) < 0.25


def test_the_terrains_of_one_scene_stay_together(tmp_path):
    for terrain, scene, kind in itertools.product(("agri", "urban"), range(4), ("s1", "s2")):
        picture(tmp_path / terrain / kind / f"ROIs1868_summer_{kind}_{scene}_p{len(terrain)}.png")
    split = split_pairs(find_pairs(tmp_path).pairs)
    assert len(split.train) == 6 and {p.sar.parts[-3] for p in split.test} == {"agri", "urban"}


def test_the_split_by_scene_depends_on_seed_and_names_alone():
    pairs = pairs_of(*(f"scene {i // 3}" for i in range(60)))
    assert split_pairs(pairs, 1) == split_pairs(pairs, 1) != split_pairs(pairs, 2)
    test, test_of_reversed = split_pairs(pairs, 1).test, split_pairs(pairs[::-1], 1).test
    assert sorted(test) == sorted(test_of_reversed)
    assert sorted({p.scene for p in test}) == ["scene 1", "scene 16", "scene 2", "scene 3"]  # on any machine


@pytest.mark.parametrize("scenes", [[], ["a"], ["a", "a", "a"]])
def test_fewer_than_two_scenes_cannot_be_split(scenes):
    with pytest.raises(ValueError, match="too few scenes"):
        split_pairs(pairs_of(*scenes))


# ----------------------------------------------------------------------------------------------------------
# By place


def overlap(a, b):
    """Whether two boxes (left, low, right, high) share ground: more than a border."""
    return min(a[2], b[2]) - max(a[0], b[0]) > 1e-3 and min(a[3], b[3]) - max(a[1], b[1]) > 1e-3


@pytest.mark.parametrize("seed", range(20))
def test_no_ground_is_on_both_sides_of_a_line(seed):
    random = np.random.default_rng(seed)
    corner, size = random.uniform(0, (9000, 900)[:: (-1) ** seed], (60, 2)), random.uniform(10, 800, (60, 2))
    boxes = np.hstack([corner, corner + size])
    sides = splits._divide_by_line(boxes)
    train, test = boxes[sides == "train"], boxes[sides == "test"]
    assert not any(overlap(a, b) for a in train for b in test)
    assert 0.1 < len(test) / 60 < 0.3 and len(train) > 30
    assert (sides == "left out").sum() < 15


def test_two_flight_strips_over_the_same_ground_are_split_by_place(tmp_path):
    for strip, tile in itertools.product(("20190804111224_20190804111453", "20190822070610_20190822070846"), range(8)):
        for kind, bands in (
            ("SAR-Intensity", RNG.uniform(1, 90, (4, 16, 16)).astype("float32")),
            ("PS-RGB", noise(3, 16, 16)),
        ):
            name = f"{kind}/SN6_Train_AOI_11_Rotterdam_{kind}_{strip}_tile_{tile}.tif"
            geotiff(tmp_path / name, bands, east=5e5 + (150 if tile else 0) * tile)
    split = split_pairs(find_pairs(tmp_path).pairs)
    tiles = [{int(pair.sar.stem[-1]) for pair in side} for side in (split.train, split.test)]
    assert tiles == [{0, 1, 2, 3, 4}, {6, 7}]  # neighbours share a column of pixels
    assert len(split.train) == 10 and len(split.test) == 4 and "2 pair(s)" in split.notes[0]


def plain(root, places, size=16, **profile):
    """Pairs in the plain layout at (east, north)."""
    for i, (east, north) in enumerate(places):
        geotiff(
            root / f"sar/{i}.tif",
            RNG.uniform(-20, -5, (1, size, size)).astype("float32"),
            None,
            None,
            None,
            east,
            north,
            **profile,
        )
        geotiff(root / f"eo/{i}.tif", noise(3, size, size), None, None, None, east, north, **profile)
    return find_pairs(root).pairs


def test_plain_georeferenced_pairs_are_split_along_the_line_that_leaves_few_out(tmp_path):
    split = split_pairs(plain(tmp_path, [(5e5 + 10 * i, 5e6 - 160 * i) for i in range(10)]))  # a column, adjoining
    assert names(split.train) == [f"{i}.tif" for i in range(2, 10)] and names(split.test) == ["0.tif", "1.tif"]
    assert split.notes == ["split by place, along a line"]


def test_ground_is_compared_over_several_map_projections_and_by_control_points(tmp_path):
    rasterio = pytest.importorskip("rasterio")
    warp = pytest.importorskip("rasterio.warp")
    pairs = plain(tmp_path, [(5e5 + 1000 * i, 5e6) for i in range(4)])
    places = [splits._place(pair)[1] for pair in pairs]
    for i, (left, low, right, high) in enumerate(places):  # the same ground in the zone beside it
        left, low, right, high = warp.transform_bounds("EPSG:32631", "EPSG:32632", left, low, right, high)
        for kind, bands in (("sar", noise(1, 16, 16)), ("eo", noise(3, 16, 16))):
            to = rasterio.transform.from_bounds(left, low, right, high, 16, 16)
            options = {"transform": to}
            if i % 2:  # located by control points alone
                corners = [(r, c, *(to @ (c, r)), 0) for r in (0, 16) for c in (0, 16)]
                options = {"transform": None, "gcps": [rasterio.control.GroundControlPoint(*x) for x in corners]}
            geotiff(tmp_path / kind / f"b{i}.tif", bands, crs="EPSG:32632", **options)
    split = split_pairs(find_pairs(tmp_path).pairs)
    sides = [{name[-5] for name in names(side)} for side in (split.train, split.test)]
    assert sides[0] and sides[1] and not sides[0] & sides[1] and len(split.train) + len(split.test) == 8


def test_pairs_on_one_ground_cannot_be_split(tmp_path):
    with pytest.raises(ValueError, match="4 pair.*all on the same ground.*folders train/ and test/"):
        split_pairs(plain(tmp_path, [(5e5 + 50 * i, 5e6 + 50 * i) for i in range(4)]))


# ----------------------------------------------------------------------------------------------------------
# Large images


@pytest.fixture(autouse=True)
def _large(monkeypatch):
    monkeypatch.setattr(splits, "LARGE", 1000)  # pixels, so that tests are quick


def scenes_of(root, count, height=80, width=100, end="png"):
    """Pairs of large images in the plain layout."""
    for i, (kind, bands) in itertools.product(range(count), (("sar", 1), ("eo", 3))):
        pixels = noise(bands, height, width)
        if end == "tif":
            geotiff(root / kind / f"{i}.tif", pixels, east=1e5 * i + 2e5, tiled=True, blockxsize=16, blockysize=16)
        else:
            picture(root / kind / f"{i}.png", np.moveaxis(pixels, 0, 2).squeeze())
    return find_pairs(root).pairs


def test_blocks_cover_a_large_image_evenly_without_overlap(tmp_path):
    (pair,) = cut_large(scenes_of(tmp_path / "one", 1, 40, 45), 32, cached=True)
    assert pair.window == (4, 6, 32, 32)
    blocks = cut_large(scenes_of(tmp_path / "six", 1), 32, cached=True)
    assert [block.window[:2] for block in blocks] == [(top, left) for top in (0, 48) for left in (0, 34, 68)]
    whole = read_pair(blocks[0]._replace(window=None))
    for block in blocks:
        top, left, height, width = block.window
        for part, image in zip(read_pair(block), whole):
            assert torch.equal(part, image[:, top : top + height, left : left + width])


def test_small_images_are_not_cut_but_for_a_cache(tmp_path):
    pairs = scenes_of(tmp_path, 2, 31, 32)
    assert cut_large(pairs, 16) == pairs  # below LARGE
    assert cut_large(pairs, 32, cached=True) == pairs  # too small, which read_pair will say
    assert len(cut_large(pairs, 16, cached=True)) == 4


def test_crops_of_geotiffs_are_read_by_windows(tmp_path, monkeypatch):
    pairs = cut_large(scenes_of(tmp_path, 1, end="tif"), 16)
    assert len(pairs) == 5 * 6
    samples, seen, read = PairDataset(pairs, 16, reading=Reading("full", None, "full")), [], rasters.read_window
    monkeypatch.setattr(
        rasters, "read_window", lambda *args, **options: seen.append(read(*args, **options)) or seen[-1]
    )
    for position in range(40):
        sar, eo = samples[position]
        assert sar.shape == eo.shape == (3, 16, 16)
    assert {raster.valid.shape for raster in seen} == {(16, 16)}


def test_other_large_images_are_refused_with_advice_or_cut_once_into_the_cache(tmp_path, monkeypatch):
    found = scenes_of(tmp_path / "data", 2)
    with pytest.raises(ValueError, match=r"0\.png' is 100x80 pixels.*--cache DIR.*gdal_translate -of GTiff"):
        cut_large(found, 32)
    model = CDiffSET.from_pretrained(write_base(tmp_path / "base"))
    split = split_pairs(cut_large(found, 32, cached=True))
    reading = Reading("full", None, "full")
    samples, decoded, read = PairDataset(split.train, 32, 0, False, reading), [], rasters.read_picture
    monkeypatch.setattr(rasters, "read_picture", lambda path: decoded.append(path) or read(path))
    build_cache(model, samples, tmp_path / "cache")
    assert len(decoded) == len(set(decoded)) == 4  # each image once
    latents = CachedLatents(tmp_path / "cache", samples)
    for position in range(8):
        with torch.no_grad():
            encoded = model.encode(torch.stack(samples[position]))
        torch.testing.assert_close(torch.stack(latents[position]), encoded, rtol=2**-10, atol=1e-5)


@pytest.mark.parametrize("end", ["png", "tif"])
def test_few_large_scenes_are_divided_along_a_line(tmp_path, end):
    pairs = cut_large(scenes_of(tmp_path, 2, end=end), 16, cached=True)
    split = split_pairs(pairs)
    assert 0.1 < len(split.test) / len(pairs) < 0.3
    for a, b in itertools.product(split.train, split.test):
        boxes = [(left, top, left + width, top + height) for top, left, height, width in (a.window, b.window)]
        assert a.sar != b.sar or not overlap(*boxes)
    if end == "png":  # each of them
        assert {pair.sar for pair in split.test} == {pair.sar for pair in split.train}


def test_many_large_scenes_are_kept_whole(tmp_path):
    split = split_pairs(cut_large(scenes_of(tmp_path, 6), 32, cached=True))
    assert split.test and not {pair.sar for pair in split.test} & {pair.sar for pair in split.train}


# ----------------------------------------------------------------------------------------------------------
# The split of a training


@pytest.mark.parametrize("kind", ["scenes", "places", "blocks"])
def test_the_split_of_a_training_is_found_beside_the_model_wherever_the_data_lie(tmp_path, monkeypatch, kind):
    root, about = tmp_path / "data", {}
    if kind == "scenes":
        for scene, modality in itertools.product(range(9), ("s1", "s2")):
            picture(root / f"ROIs1158_spring/{modality}_{scene}/ROIs1158_spring_{modality}_{scene}_p1.png")
        pairs = find_pairs(root).pairs
    elif kind == "places":
        pairs = plain(root, [(5e5 + 100 * i, 5e6) for i in range(10)])
    else:
        about = {"size": 16, "cached": True}
        pairs = cut_large(scenes_of(root, 2), 16, cached=True)
    split = split_pairs(pairs, seed=5)
    model = tmp_path / "run" / "model"
    model.mkdir(parents=True)
    (model.parent / "split.json").write_text(json.dumps({"scenes": split_names(split), **about}))
    root.rename(tmp_path / "moved")
    found = find_pairs(tmp_path / "moved").pairs
    monkeypatch.chdir(model)
    for path in (model, Path()):  # also if the model is named from within
        again, source = held_out_pairs(found, path)
        assert source.endswith("split.json")
        for ours, theirs in zip(again[:3], split[:3]):
            assert [(p.sar.name, p.window) for p in ours] == [(p.sar.name, p.window) for p in theirs]
    (model.parent / "split.json").write_text('{"scenes": {"train": ["elsewhere"], "test": ["far"]}}')
    assert "of another dataset" in held_out_pairs(found, model)[1]
    part = json.dumps({"scenes": split_names(split) | {"test": ["elsewhere"], "val": ["elsewhere"]}, **about})
    for text, message in (
        (part, "does not fit"),
        ('{"scenes": {"train": 7, "test": []}}', "is no split"),
        ("[]", "JSON"),
    ):
        (model.parent / "split.json").write_text(text)
        with pytest.raises(ValueError, match=rf"split\.json.*{message}"):
            held_out_pairs(found, model)


def test_without_a_training_beside_it_the_folders_or_seed_0_decide(tmp_path):
    pairs = dataset_in(tmp_path / "own", "train", "test")
    split, source = held_out_pairs(pairs, tmp_path / "model")
    assert names(split.test) == ["test.png"] and "folders" in source
    pairs = pairs_of(*"abcdefgh")
    for pair in pairs:
        picture(tmp_path / pair.sar)
    pairs = [pair._replace(sar=tmp_path / pair.sar) for pair in pairs]
    assert held_out_pairs(pairs, tmp_path / "model") == (split_pairs(pairs), "the split of seed 0")
