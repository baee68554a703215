"""The synthetic dataset: what is drawn, what the masks mark, what is written; and the land cover agreement."""

import json

import numpy as np
import pytest
from PIL import Image

import common
from data import find_pairs
from experiments import land_cover, synth
from experiments.world import AMBIGUOUS, COLOURS, NAMES, ROOF, SHIP, WATER, Objects, plan


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_scenes_are_those_that_the_bundled_model_was_trained_on():
    """Recorded means and class counts, with a tolerance for other libraries and processors."""
    for scene, sar, eo, classes in (
        (0, 130.3, (170.3, 175.4, 89.1), [0, 536, 0, 0, 0, 1079, 1863, 0, 80, 288, 250, 0]),
        (1, 106.7, (135.3, 146.0, 98.7), [995, 253, 0, 0, 484, 1472, 651, 0, 241, 0, 0, 0]),
        (2, 79.3, (98.8, 110.7, 104.5), [2092, 293, 0, 805, 0, 600, 0, 283, 7, 0, 0, 16]),
    ):
        drawn = synth.draw(0, scene, 0, size=64)
        assert drawn.sar.mean() == pytest.approx(sar, abs=0.5)
        assert drawn.eo.mean(axis=(0, 1)) == pytest.approx(eo, abs=0.5)
        assert np.bincount(drawn.classes.ravel(), minlength=12) == pytest.approx(classes, abs=20)


def test_unmarked_pixels_are_as_if_no_object_had_changed():
    changed, half = 0, synth.CHANGED / 2
    for number in range(12):
        world = plan(5, number, 0, 128)
        always = (world.objects.coin >= half) & (world.objects.coin < 1 - half)
        calm_world = world._replace(objects=Objects(*(column[always] for column in world.objects)))
        scene, calm = (synth.render(w, np.random.default_rng(number), looks=4) for w in (world, calm_world))
        sar_same, eo_same = (scene.change & side == 0 for side in (1, 2))
        assert np.array_equal(scene.sar[sar_same], calm.sar[sar_same])
        assert np.array_equal(scene.eo[eo_same], calm.eo[eo_same])
        assert not calm.change.any()
        changed += int(not sar_same.all()) + int(not eo_same.all())
    assert changed >= 6


def test_objects_of_one_image_leave_no_trace_in_the_other():
    world = next(w for w in (plan(5, n, 0, 192) for n in range(50)) if len(w.objects.coin) > 20)

    def shown(coin):
        objects = world.objects._replace(coin=np.full(len(world.objects.coin), coin))
        return synth.render(world._replace(objects=objects), np.random.default_rng(0), looks=4)

    both, sar_only, eo_only = shown(0.5), shown(0.0), shown(1.0)
    assert np.array_equal(both.sar, sar_only.sar) and np.array_equal(both.eo, eo_only.eo)
    assert np.isin(both.classes, [ROOF, SHIP]).any() and not np.isin(sar_only.classes, [ROOF, SHIP]).any()
    assert set(np.unique(sar_only.change)) == {0, 1} and set(np.unique(eo_only.change)) == {0, 2}
    assert not np.isin(eo_only.classes, [ROOF, SHIP])[eo_only.change == 0].any()


@pytest.mark.parametrize("looks", [1, 4, 16])
def test_speckle_has_the_wanted_number_of_looks(looks):
    power = synth.speckle(np.random.default_rng(0), 512, looks)
    assert power.mean() == pytest.approx(1, rel=0.01)
    assert power.mean() ** 2 / power.var() == pytest.approx(looks, rel=0.03)


def test_land_cover_shows_in_backscatter_and_colour():
    scenes = [synth.draw(5, number, patch=1, size=128) for number in range(24)]
    sar, classes = np.stack([s.sar for s in scenes]), np.stack([s.classes for s in scenes])
    order = ("water", "bare soil", "meadow", "wheat", "rapeseed", "maize")  # from dark to bright
    assert min(np.diff([sar[classes == NAMES.index(name)].mean() for name in order])) > 12
    assert np.mean([land_cover.land_cover_agreement(s.eo, s.classes) for s in scenes]) > 0.92


def test_land_cover_agreement_is_the_share_of_the_nearest_class_without_roofs():
    classes = np.array([[WATER, 8], [7, AMBIGUOUS[0]]], np.uint8)
    eo = COLOURS[[[WATER, 8], [3, WATER]]] + 3  # one right in water, one in forest, one wrong, one roof
    assert land_cover.land_cover_agreement(eo.astype(np.uint8), classes) == pytest.approx(2 / 3)


def test_the_files_have_the_layout_of_sen12_whatever_the_number_of_workers(tmp_path):
    out = tmp_path / "two"
    synth.write_dataset(out, pairs=20, size=64, seed=3, workers=2)
    synth.write_dataset(tmp_path / "one", pairs=20, size=64, seed=3)
    written = files(out)
    assert written == files(tmp_path / "one") and len(written) == 20 * 4 + 1
    scene = synth.draw(3, 5, 1, size=64)
    for kind, pixels, mode in zip(("s1", "s2", "change", "class"), scene, ("L", "RGB", "P", "P")):
        with Image.open(out / f"ROIs1868_summer/{kind}_5/ROIs1868_summer_{kind}_5_p1.png") as picture:
            assert picture.mode == mode and np.array_equal(picture, pixels)
    assert json.loads(written["synth.json"])["class"][SHIP] == "ship"
    pair = next(p for p in find_pairs(out).pairs if p.eo.name == "ROIs1868_summer_s2_5_p1.png")
    assert np.array_equal(synth.read_mask(pair, "change"), scene.change)
    assert np.array_equal(synth.read_mask(pair, "class", size=32), scene.classes[16:48, 16:48])
    assert synth.mask_path(pair._replace(eo=pair.sar), "class") is None


def test_the_land_cover_of_evaluated_images(dataset, tmp_path, capsys):
    with pytest.raises(ValueError, match="holds no translations"):
        land_cover.main([str(tmp_path), "--data", str(dataset)])
    expected = []
    for pair in find_pairs(dataset).pairs[:3]:
        made = tmp_path / "eo" / pair.eo.relative_to(dataset)
        made.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(pair.eo) as image:
            crop = image.crop((16, 16, 48, 48))
        crop.save(made)
        expected.append(land_cover.land_cover_agreement(np.asarray(crop), synth.read_mask(pair, "class", 32)))
    assert land_cover.main([str(tmp_path), "--data", str(dataset)]) == 0
    assert capsys.readouterr().out == f"land cover agreement {np.mean(expected):.1%} (3 images)\n"


@pytest.mark.parametrize(
    "options", ["--pairs 0", "--size 63", "--seed -1", "--looks nan", "--workers 0", "--colour red", "a full folder"]
)
def test_a_wrong_argument_is_reported_in_one_line(options, tmp_path, capsys):
    out = tmp_path / "out"
    if options == "a full folder":
        out.mkdir()
        (out / "mine.txt").write_text("precious")
    before = files(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        common.run(lambda: synth.main([str(out), *(options.split() if options.startswith("-") else [])]))
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1 and files(tmp_path) == before
