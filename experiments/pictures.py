r"""Draws two pictures of the README's pages, and prints numbers about them.

strip: ten held-out pairs, not selected, as SAR, EO, generated EO and confidence.

    python -m experiments.pictures strip sen12-synthetic/ models/tiny docs/strip.png

scene: a part of a scene and its translation, with ticks where tiles begin and end. Also prints the mean difference
between neighbouring rows (columns) at borders of tiles, and at other borders of latent pixels.

    python -m experiments.synth big/ --pairs 1 --size 8192
    rio convert big/ROIs1158_spring/s1_0/ROIs1158_spring_s1_0_p0.png big/scene.tif --co tiled=yes \
        --co blockxsize=256 --co blockysize=256
    rio edit-info big/scene.tif --crs EPSG:32632 --transform "[3, 0, 500000, 0, -3, 5000000]"
    python sample.py big/scene.tif --steps 2 --dtype bfloat16
    python -m experiments.pictures scene big/scene.tif big/scene_eo.tif docs/scene.jpg
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from common import Parser, run
from data import evenly, find_pairs, read_pair
from images import grid, read_raster, save_image, to_uint8
from sample import DEFAULT_SPACING, DEFAULT_STEPS, load_model
from scene import starts
from splits import held_out_pairs

PAIRS = 10  # of the strip
TILE, FACTOR = 512, 4  # pixels: sample.py's tile for models/tiny, and the factor of its VAE
TOP, LEFT, PART = 4000, 4000, 400  # of the scene, the part that is shown, pixels
RED = (214, 39, 40)


def strip(data: Path, model: Path, picture: Path) -> None:
    """Translates the middle pair of each tenth of the held-out pairs with the defaults of sample.py."""
    test = held_out_pairs(find_pairs(data).pairs, model)[0].test
    pairs = [read_pair(pair) for pair in evenly(test[len(test) // PAIRS // 2 :], PAIRS)]
    sar, eo = (torch.stack(images) for images in zip(*pairs))
    made, confidence = load_model(model, "cpu").translate(sar, DEFAULT_STEPS, spacing=DEFAULT_SPACING)
    # one logarithmic scale for all pairs, from the 1st to the 99th percentile
    logs = confidence.log()
    low, high = logs.quantile(torch.tensor([0.01, 0.99]))
    print(f"confidence: {low.exp():.2g} is black, {high.exp():.2g} is white")
    scaled = ((logs - low) / (high - low) * 2 - 1).expand(-1, 3, -1, -1)
    sheet = grid([[to_uint8(image) for image in images] for images in (sar, eo, made, scaled)])

    margin = Image.new("RGB", (len(sheet), 28), "white")  # turned by 90 degrees, it holds the titles of the rows
    for i, title in enumerate(("confidence", "generated", "EO truth", "SAR")):
        at = ((i + 0.5) * len(sheet) / 4, 16)
        ImageDraw.Draw(margin).text(at, title, "black", ImageFont.load_default(size=20), anchor="mm")
    save_image(picture, np.concatenate([np.rot90(margin), sheet], axis=1))


def borders(size: int) -> list[int]:
    """Where tiles begin and end along an axis of `size` pixels, except at the ends of the axis."""
    begin = [start * FACTOR for start in starts(size // FACTOR, TILE // FACTOR)]
    return sorted({*begin, *(start + TILE for start in begin)} - {0, size})


def differences(image: np.ndarray) -> str:
    """Mean absolute difference of neighbouring rows of an image (H, W, 3) uint8, with the standard error."""
    edges = np.arange(FACTOR, len(image), FACTOR)
    rows = image.astype(np.int16)
    mean = np.array([np.abs(rows[i] - rows[i - 1]).mean() for i in edges])
    at = np.isin(edges, borders(len(image)))
    kinds = {"borders of tiles": mean[at], "other borders of latent pixels": mean[~at]}
    return "; ".join(f"{name} {x.mean():.2f} ± {x.std(ddof=1) / len(x) ** 0.5:.2f}" for name, x in kinds.items())


def scene(sar: Path, eo: Path, picture: Path) -> None:
    """Draws the same part of two GeoTIFFs side by side."""
    images = [np.moveaxis(read_raster(path).bands, 0, 2) for path in (sar, eo)]
    print(f"rows: {differences(images[1])}\ncolumns: {differences(images[1].swapaxes(0, 1))}")
    parts = [image[TOP : TOP + PART, LEFT : LEFT + PART].squeeze() for image in images]
    sheet = Image.fromarray(grid([parts], ["SAR", "generated"], gap=10))
    draw, top = ImageDraw.Draw(sheet), sheet.height - PART - 10
    for at in borders(images[0].shape[1]):
        for left in (10, PART + 20):
            if LEFT < at < LEFT + PART:
                x = left + at - LEFT
                draw.rectangle((x - 1, top - 9, x, top - 1), RED)
                draw.rectangle((x - 1, top + PART, x, top + PART + 9), RED)
    for at in borders(len(images[0])):
        if TOP < at < TOP + PART:
            y = top + at - TOP
            draw.rectangle((0, y - 1, 8, y), RED)
            draw.rectangle((2 * PART + 21, y - 1, 2 * PART + 29, y), RED)
    sheet.save(picture, quality=88)


def main(arguments: list[str] | None = None) -> int:
    """Draws one of the pictures; returns the exit code."""
    parser = Parser(__doc__)
    parser.add_argument("picture", choices=("strip", "scene"), help="which picture")
    parser.add_argument("files", nargs=3, type=Path, help="dataset, model, picture; or SAR scene, translation, picture")
    args = parser.parse_args(arguments)
    (strip if args.picture == "strip" else scene)(*args.files)
    return 0


if __name__ == "__main__":
    run(main)
