"""The synthetic country keeps its promises: what is drawn, what is marked, what is written."""

import json
import os
import signal

import numpy as np
import pytest
from PIL import Image

import common
from experiments import synth
from experiments.world import (
    AMBIGUOUS,
    COLOURS,
    MAIZE,
    MEADOW,
    RAPESEED,
    ROOF,
    SHIP,
    SOIL,
    WATER,
    WHEAT,
    Objects,
    blur,
    plan,
)


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def country(count, size=128, **options):
    return [synth.draw(5, scene, patch=1, size=size, **options) for scene in range(count)]


def without_changes(world):
    """The world in which the objects that one image lacks never were."""
    coin, half = world.objects.coin, synth.CHANGED / 2
    always = (coin >= half) & (coin < 1 - half)
    return world._replace(objects=Objects(*(column[always] for column in world.objects)))


def test_a_scene_follows_from_its_arguments_alone():
    for first, again in zip(synth.draw(1, 2, 3, size=96), synth.draw(1, 2, 3, size=96), strict=True):
        assert np.array_equal(first, again)
    for other in (synth.draw(2, 2, 3, size=96), synth.draw(1, 6, 3, size=96), synth.draw(1, 2, 4, size=96)):
        assert not np.array_equal(other.eo, synth.draw(1, 2, 3, size=96).eo)


def test_the_country_is_the_one_that_models_tiny_was_trained_in():
    """Recorded; with a tolerance, since libraries and processors may round otherwise."""
    for scene, sar, eo, classes in (
        (0, 130.3, (170.3, 175.4, 89.1), [0, 536, 0, 0, 0, 1079, 1863, 0, 80, 288, 250, 0]),
        (1, 106.7, (135.3, 146.0, 98.7), [995, 253, 0, 0, 484, 1472, 651, 0, 241, 0, 0, 0]),
        (2, 79.3, (98.8, 110.7, 104.5), [2092, 293, 0, 805, 0, 600, 0, 283, 7, 0, 0, 16]),
    ):
        drawn = synth.draw(0, scene, 0, size=64)
        assert drawn.sar.mean() == pytest.approx(sar, abs=0.5)
        assert drawn.eo.mean(axis=(0, 1)) == pytest.approx(eo, abs=0.5)
        assert np.bincount(drawn.classes.ravel(), minlength=12) == pytest.approx(classes, abs=20)


@pytest.mark.parametrize("size", [64, 101, 128])
def test_shapes_and_types(size):
    scene = synth.draw(size=size)
    assert scene.sar.shape == scene.classes.shape == scene.change.shape == (size, size)
    assert scene.eo.shape == (size, size, 3)
    assert scene.sar.dtype == scene.eo.dtype == scene.change.dtype == scene.classes.dtype == np.uint8
    assert scene.change.max() <= 3


def test_outside_the_masks_both_images_are_as_if_nothing_had_changed():
    changed = 0
    for number in range(12):
        world = plan(5, number, 0, 128)
        scene, calm = (synth.render(w, np.random.default_rng(number), looks=4) for w in (world, without_changes(world)))
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
    objects = [ROOF, SHIP]
    assert np.isin(both.classes, objects).any() and not np.isin(sar_only.classes, objects).any()
    assert set(np.unique(sar_only.change)) == {0, 1} and set(np.unique(eo_only.change)) == {0, 2}
    assert np.isin(eo_only.classes, objects)[eo_only.change == 0].sum() == 0


def test_about_the_stated_share_of_objects_changes():
    coins = np.concatenate([plan(0, n, 0, 256).objects.coin for n in range(30)])
    low, high = (coins < synth.CHANGED / 2).mean(), (coins >= 1 - synth.CHANGED / 2).mean()
    assert len(coins) > 500
    assert abs(low - synth.CHANGED / 2) < 0.03 and abs(high - synth.CHANGED / 2) < 0.03


def test_ships_lie_on_water_and_houses_do_not():
    ships = 0
    for number in range(20):
        world = plan(5, number, 0, 160)
        everything = synth.draw_objects(
            world.objects, np.ones(len(world.objects.coin), bool), np.zeros((160, 160), np.int32)
        )
        kind = synth.by_number(world.objects.kind, everything)
        assert (world.classes[kind == SHIP] == WATER).all()
        assert (world.classes[kind == ROOF] == WATER).mean() < 0.01 if (kind == ROOF).any() else True
        ships += (world.objects.kind == SHIP).sum()
    assert ships > 10


@pytest.mark.parametrize("looks", [1, 4, 16])
def test_speckle_has_the_looks_that_were_asked_for(looks):
    power = synth.speckle(np.random.default_rng(0), 512, looks)
    assert power.mean() == pytest.approx(1, rel=0.01)
    assert power.mean() ** 2 / power.var() == pytest.approx(looks, rel=0.03)


def test_calm_water_in_the_image_has_the_looks_that_were_asked_for():
    """Equivalent number of looks in 5x5 boxes of open water, whose backscatter hardly varies."""
    low, high = synth.DB_RANGE
    found = []
    for scene in country(20, looks=8):
        power = 10 ** ((scene.sar / 255.0 * (high - low) + low) / 10)
        boxes = power[:125, :125].reshape(25, 5, 25, 5).swapaxes(1, 2).reshape(-1, 25)
        calm = blur((scene.classes != WATER) | (scene.change & 1), 8) == 0  # away from echoes of ships
        calm = calm[:125, :125].reshape(25, 5, 25, 5).swapaxes(1, 2).reshape(-1, 25).all(1)
        found += list(boxes[calm].var(1, ddof=1) / boxes[calm].mean(1) ** 2)
    assert len(found) > 300
    assert 1 / np.mean(found) == pytest.approx(8, rel=0.15)


def test_the_radar_sees_the_kinds_of_land_as_dark_and_bright_as_stated():
    scenes = country(24)
    sar, classes = np.stack([s.sar for s in scenes]), np.stack([s.classes for s in scenes])
    order = [WATER, SOIL, MEADOW, WHEAT, RAPESEED, MAIZE]
    levels = [sar[classes == kind].mean() for kind in order]
    assert all(brighter - darker > 12 for darker, brighter in zip(levels, levels[1:], strict=False))


def test_land_cover_can_be_read_back_from_the_colours_of_the_eo_image():
    scenes = country(24)
    eo, classes = np.stack([s.eo for s in scenes]), np.stack([s.classes for s in scenes])
    distance = [((eo - colour) ** 2).sum(-1) for colour in COLOURS]
    clear = ~np.isin(classes, AMBIGUOUS)
    assert (np.argmin(distance, 0) == classes)[clear].mean() > 0.93


def test_the_files_are_laid_out_as_in_sen12(tmp_path):
    synth.write_dataset(tmp_path / "out", pairs=20, size=64, seed=3)
    written = files(tmp_path / "out")
    assert len(written) == 20 * 4 + 1
    for kind in ("s1", "s2", "change", "class"):
        assert f"ROIs1868_summer/{kind}_5/ROIs1868_summer_{kind}_5_p1.png" in written
    scene, base = synth.draw(3, 5, 1, size=64), tmp_path / "out" / "ROIs1868_summer"
    pictures = {
        kind: Image.open(base / f"{kind}_5/ROIs1868_summer_{kind}_5_p1.png") for kind in ("s1", "s2", "change", "class")
    }
    assert [picture.mode for picture in pictures.values()] == ["L", "RGB", "P", "P"]
    assert np.array_equal(pictures["s1"], scene.sar) and np.array_equal(pictures["s2"], scene.eo)
    assert np.array_equal(pictures["change"], scene.change) and np.array_equal(pictures["class"], scene.classes)
    assert json.loads(written["synth.json"])["class"][SHIP] == "ship"


def test_the_number_of_workers_does_not_matter(tmp_path):
    synth.write_dataset(tmp_path / "one", pairs=12, size=64)
    synth.write_dataset(tmp_path / "two", pairs=12, size=64, workers=2)
    assert files(tmp_path / "one") == files(tmp_path / "two")


@pytest.mark.parametrize(
    "options", ["--pairs 0", "--size 63", "--size big", "--seed -1", "--looks nan", "--workers 0", "--colour red"]
)
def test_a_wrong_option_is_one_line_and_exit_code_2(options, tmp_path, capsys):
    code, message = run_script([str(tmp_path / "out"), *options.split()], capsys)
    assert code == 2 and message.count("\n") == 1 and message.startswith("error: ")
    assert not (tmp_path / "out").exists()


def test_a_folder_with_files_is_left_alone(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("precious")
    for place in (tmp_path, tmp_path / "mine.txt"):
        code, message = run_script([str(place)], capsys)
        assert code == 2 and message.count("\n") == 1
    assert files(tmp_path) == {"mine.txt": b"precious"}


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("")
    code, message = run_script([str(tmp_path / "mine.txt" / "out"), "--pairs", "1"], capsys)
    assert code == 2 and message.count("\n") == 1


def test_a_process_that_is_killed_ends_the_others_with_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(synth, "write_pair", die)
    code, message = run_script([str(tmp_path / "out"), "--pairs", "9", "--workers", "2"], capsys)
    assert code == 2 and "error: out of memory: a process that draws was killed: use fewer --workers\n" in message
    assert not (tmp_path / "out" / "synth.json").exists()


def die(index, **_):
    """In place of write_pair: as the system does when memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)


def run_script(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        common.run(lambda: synth.main(arguments))
    return exit_.value.code, capsys.readouterr().err
