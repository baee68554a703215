r"""Draws docs/scene.jpg, a part of a scene and of its translation, with ticks at the borders of tiles; and prints how
large the step from one column (row) to the next is there, and at other edges of latent pixels.

python synth.py big/ --pairs 1 --size 8192
rio convert big/ROIs1158_spring/s1_0/ROIs1158_spring_s1_0_p0.png big/scene.tif --co tiled=yes --co blockxsize=256 \
    --co blockysize=256
rio edit-info big/scene.tif --crs EPSG:32632 --transform "[3, 0, 500000, 0, -3, 5000000]"
python sample.py big/scene.tif --steps 2 --dtype bfloat16
python docs/draw_scene.py big/scene.tif big/scene_eo.tif docs/scene.jpg
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from images import read_raster
from scene import starts

TILE, FACTOR = 512, 4  # pixels: what sample.py takes for models/tiny, and its VAE's factor
PART, TOP, LEFT = 400, 4000, 4000  # of the scene, pixels
GAP, MARGIN = 10, 12
RED = (214, 39, 40)


def borders(size: int) -> list[int]:
    """Where tiles begin and end along an axis of so many pixels, but for the ends of the scene."""
    begin = [start * FACTOR for start in starts(size // FACTOR, TILE // FACTOR)]
    return sorted({*begin, *(start + TILE for start in begin)} - {0, size})


def steps(image: np.ndarray, axis: int) -> str:
    """The mean absolute step (levels of 0..255) across tile borders and across other edges of latent pixels, each with
    the standard error of the mean over the edges.
    """
    rows = np.moveaxis(image, axis, 0).astype(np.int16)
    mean = np.array([np.abs(rows[i] - rows[i - 1]).mean() for i in range(FACTOR, len(rows), FACTOR)])
    at = np.isin(np.arange(FACTOR, len(rows), FACTOR), borders(len(rows)))
    kinds = {"borders of tiles": mean[at], "other edges of latent pixels": mean[~at]}
    return "; ".join(f"{name} {x.mean():.2f} ± {x.std(ddof=1) / len(x) ** 0.5:.2f}" for name, x in kinds.items())


def main(sar: str, eo: str, picture: str) -> None:
    """Reads both GeoTIFFs whole."""
    images = [np.moveaxis(read_raster(path).bands, 0, 2) for path in (sar, eo)]
    for axis, name in enumerate(("rows", "columns")):
        print(f"{name}: {steps(images[1], axis)}")
    header = 28
    sheet = Image.new("RGB", (2 * MARGIN + 2 * PART + GAP, header + PART + MARGIN), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=20)
    for i, (title, image) in enumerate(zip(("SAR", "generated"), images)):
        left = MARGIN + i * (PART + GAP)
        part = image[TOP : TOP + PART, LEFT : LEFT + PART].squeeze()
        sheet.paste(Image.fromarray(part), (left, header))
        draw.text((left + PART / 2, header / 2 - 2), title, "black", font, anchor="mm")
        for x in borders(image.shape[1]):
            if LEFT < x < LEFT + PART:
                for y in (header - MARGIN + 2, header + PART):
                    draw.rectangle((left + x - LEFT - 1, y, left + x - LEFT, y + MARGIN - 3), RED)
    for y in borders(len(images[0])):
        if TOP < y < TOP + PART:
            for x in (1, MARGIN + 2 * PART + GAP + 1):
                draw.rectangle((x, header + y - TOP - 1, x + MARGIN - 3, header + y - TOP), RED)
    sheet.save(picture, quality=88)


if __name__ == "__main__":
    main(*sys.argv[1:])
