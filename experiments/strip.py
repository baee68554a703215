"""Draws docs/strip.png: held-out scenes, not selected, as SAR, EO, generated EO and confidence; a column a scene.

python docs/strip.py sen12-synthetic/ models/tiny docs/strip.png
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cdiffset import CDiffSET
from data import evenly, find_pairs, read_pair, split_pairs
from images import grid, save_image, to_uint8
from sample import DEFAULT_SPACING, DEFAULT_STEPS

SCENES = 10
ROWS = "SAR", "EO truth", "generated", "confidence"


def main(data: str, model: str, picture: str) -> None:
    """Translates the middle one of every tenth of the held-out pairs, with the defaults of sample.py."""
    held_out = split_pairs(find_pairs(data).pairs)[1]
    pairs = [read_pair(pair) for pair in evenly(held_out[len(held_out) // SCENES // 2 :], SCENES)]
    sar, eo = (torch.stack(images) for images in zip(*pairs))
    made, confidence = CDiffSET.from_pretrained(model).translate(sar, DEFAULT_STEPS, spacing=DEFAULT_SPACING)
    rows = [[to_uint8(image) for image in images] for images in (sar, eo, made, on_one_scale(confidence))]
    save_image(picture, with_labels(grid(rows), ROWS))


def on_one_scale(confidence: Tensor) -> Tensor:
    """(B, 1, H, W) -> (B, 3, H, W), on a logarithmic scale that all images share: its ends, the 1st and the 99th
    percentile of them all, become -1 and 1, and are printed.
    """
    x = confidence.log()
    low, high = x.quantile(torch.tensor([0.01, 0.99]))
    print(f"confidence: {low.exp():.2g} is black, {high.exp():.2g} is white")
    return ((x - low) / (high - low) * 2 - 1).expand(-1, 3, -1, -1)


def with_labels(sheet: np.ndarray, labels: Sequence[str]) -> np.ndarray:
    """A sheet of as many rows as labels, with the labels at its left, reading upwards."""
    margin = Image.new("RGB", (len(sheet), 28), "white")
    draw, font = ImageDraw.Draw(margin), ImageFont.load_default(size=20)
    for i, label in enumerate(reversed(labels)):
        draw.text(((i + 0.5) * len(sheet) / len(labels), 16), label, "black", font, anchor="mm")
    return np.concatenate([np.rot90(margin), sheet], axis=1)


if __name__ == "__main__":
    main(*sys.argv[1:])
