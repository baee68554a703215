"""Draws docs/strip.png: held-out scenes, not selected, as SAR, EO, generated EO and confidence; a column a scene.

python docs/strip.py sen12-synthetic/ models/tiny docs/strip.png
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cdiffset import CDiffSET
from data import evenly, find_pairs, read_pair, split_pairs
from images import confidence_picture, grid, save_image, to_uint8
from sample import DEFAULT_SPACING, DEFAULT_STEPS

SCENES = 10


def main(data: str, model: str, picture: str) -> None:
    """Translates the middle one of every tenth of the held-out pairs, with the defaults of sample.py."""
    held_out = split_pairs(find_pairs(data).pairs)[1]
    pairs = [read_pair(pair) for pair in evenly(held_out[len(held_out) // SCENES // 2 :], SCENES)]
    sar, eo = (torch.stack(images) for images in zip(*pairs))
    made, confidence = CDiffSET.from_pretrained(model).translate(sar, DEFAULT_STEPS, spacing=DEFAULT_SPACING)
    rows = [[to_uint8(image) for image in images] for images in (sar, eo, made)]
    save_image(picture, grid([*rows, [confidence_picture(image) for image in confidence]]))


if __name__ == "__main__":
    main(*sys.argv[1:])
