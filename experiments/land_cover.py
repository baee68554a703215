"""Is the land cover in translations of the synthetic dataset right?

    python evaluate.py --data sen12-synthetic/ --model models/tiny --limit 256
    python -m experiments.land_cover results/tiny --data sen12-synthetic/

Prints the land cover agreement of the images in results/tiny/eo/: the share of pixels whose nearest class colour is
that of the true class. Roofs are left out, since their colour does not follow from the SAR image.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from common import Parser, run
from data import find_pairs
from experiments.synth import mask_path, read_mask
from experiments.world import AMBIGUOUS, COLOURS


def land_cover_agreement(eo: np.ndarray, classes: np.ndarray) -> float:
    """eo uint8 (H, W, 3), classes uint8 (H, W), the class mask -> the share of pixels with the right class."""
    distance = np.square(eo[:, :, None].astype(np.float32) - COLOURS).sum(axis=-1)
    known = ~np.isin(classes, AMBIGUOUS)
    return float((distance.argmin(axis=-1) == classes)[known].mean())


def main(arguments: list[str] | None = None) -> int:
    """Prints the mean agreement of all images; returns the exit code."""
    parser = Parser(__doc__)
    parser.add_argument("results", type=Path, help="a folder that evaluate.py wrote")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="the synthetic dataset")
    args = parser.parse_args(arguments)
    values = []
    for pair in find_pairs(args.data).pairs:
        made = args.results / "eo" / pair.eo.relative_to(args.data).with_suffix(".png")
        if made.exists() and mask_path(pair, "class"):
            with Image.open(made) as image:
                eo = np.asarray(image.convert("RGB"))
            values.append(land_cover_agreement(eo, read_mask(pair, "class", size=len(eo))))
    if not values:
        raise ValueError(f"{args.results}/eo holds no translations of pairs with class masks in {args.data}")
    print(f"land cover agreement {np.mean(values):.1%} ({len(values)} images)")
    return 0


if __name__ == "__main__":
    run(main)
