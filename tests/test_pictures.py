"""experiments/pictures.py: the numbers about tiles, and both pictures of small images."""

import numpy as np
from PIL import Image

from experiments import pictures


def test_steps_at_tile_borders_and_elsewhere_are_told_apart(monkeypatch):
    monkeypatch.setattr(pictures, "TILE", 16)
    borders = pictures.borders(32)
    assert borders and set(borders) < set(range(4, 32, 4))
    image = np.zeros((32, 8, 3), np.uint8)
    for number, edge in enumerate(range(4, 32, 4)):
        image[edge:] = image[edge - 1] + (10 if edge in borders else 2 + number % 2)
    found = pictures.differences(image)
    assert found.startswith("borders of tiles 10.00 ± 0.00; other borders of latent pixels 2.")


def test_both_pictures_are_drawn(dataset, trained, tmp_path, capsys, monkeypatch):
    assert pictures.main(["strip", str(dataset), str(trained), str(tmp_path / "strip.png")]) == 0
    assert "is white" in capsys.readouterr().out
    with Image.open(tmp_path / "strip.png") as picture:
        count = min(10, len(list(dataset.rglob("s2_*/*.png"))) // 5)
        assert picture.size == (28 + 4 + count * 68, 4 + 4 * 68)

    for name, value in {"TILE": 64, "TOP": 20, "LEFT": 20, "PART": 100}.items():
        monkeypatch.setattr(pictures, name, value)
    noise = np.random.default_rng(0).integers(0, 255, (160, 160, 3), np.uint8)
    Image.fromarray(noise[..., 0]).save(tmp_path / "sar.png")
    Image.fromarray(noise).save(tmp_path / "eo.png")
    files = [str(tmp_path / name) for name in ("sar.png", "eo.png", "scene.png")]
    assert pictures.main(["scene", *files]) == 0
    assert capsys.readouterr().out.count("borders of tiles") == 2
    with Image.open(tmp_path / "scene.png") as picture:
        sheet = np.asarray(picture.convert("RGB"))
    assert np.array_equal(sheet[-110:-10, -110:-10], noise[20:120, 20:120])
    columns = sorted({x - 120 + 20 for x in np.flatnonzero((sheet[-5] == pictures.RED).all(-1)) if 120 < x < 220})
    assert columns == [at + side for at in pictures.borders(160) if 20 < at < 120 for side in (-1, 0)]
