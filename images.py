"""Pictures made of pictures: labelled grids, and confidence as the paper shows it."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor


def confidence_picture(confidence: Tensor) -> np.ndarray:
    """(1, H, W) -> uint8 (H, W), min-max normalised as in the paper: white is the most confident of this image."""
    x = confidence.float().cpu().numpy()[0]
    low, high = x.min(), x.max()
    return np.round(255 * (x - low) / (high - low)).astype(np.uint8) if high > low else np.full(x.shape, 255, np.uint8)


def grid(rows: Sequence[Sequence[np.ndarray]], titles: Sequence[str] = (), gap: int = 4) -> np.ndarray:
    """Lays out uint8 pictures, (H, W) or (H, W, 3), all of one size, with a title over each column -> (H', W', 3)."""
    height, width = rows[0][0].shape[:2]
    font = ImageFont.load_default(size=max(12, height // 12))
    header = round(font.size * 1.6) if titles else gap
    size = (gap + len(rows[0]) * (width + gap), header + len(rows) * (height + gap))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for x, title in enumerate(titles):
        draw.text((gap + x * (width + gap) + width // 2, header // 2), title, "black", font, anchor="mm")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            sheet.paste(Image.fromarray(picture), (gap + x * (width + gap), header + y * (height + gap)))
    return np.asarray(sheet)
