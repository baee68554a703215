"""Splits the pairs of a dataset into training, validation and test pairs that share no ground.

    pairs -> cut_large -> split_pairs -> Split -> split_names -> split.json
    pairs, split.json -> held_out_pairs -> the same Split

docs/data.md describes the rules for users.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common import read_json
from data import LOOKED_AT, Pair, evenly, seed_of
from rasters import image_size, needs_rasterio, open_geotiff

TEST_SHARE = 0.2  # of the pairs, if a dataset has no split of its own
LARGE = 2**20  # pixels; to decode a larger image takes much longer than to train on a crop of it
FEW_SCENES = 5  # with fewer, a part of each scene is held out instead of whole scenes


class Split(NamedTuple):
    """The sides of a split. `val` and `test` are the same pairs if the dataset has only one of them."""

    train: list[Pair]
    val: list[Pair]
    test: list[Pair]
    notes: list[str]  # lines to print


def split_pairs(pairs: Sequence[Pair], seed: int = 0) -> Split:
    """Splits by the dataset's folders; without train and test folders by place, or else by scene. Keeps the order.

    By place, for georeferenced images: a straight line on the map divides them. Blocks of a few large scenes are
    divided by a line through each scene. By scene: about TEST_SHARE of the pairs are held out in whole scenes; the seed
    and the names of the scenes decide which. ValueError: every split would put the same ground or scene on both sides.
    """
    if own := _own_split(pairs):
        return own
    places, groups = _places(pairs), defaultdict(list)  # {map or file, None if unknown: indexes of its pairs}
    for i, place in enumerate(places):
        groups[place and place[0]].append(i)
    sides = np.full(len(pairs), "left out")
    for where, members in groups.items():
        if where is None:
            test = _test_scenes([pairs[i].scene for i in members], seed)
            sides[members] = ["test" if pairs[i].scene in test else "train" for i in members]
        else:
            sides[members] = _divide_by_line(np.array([places[i][1] for i in members]))
    train, test = ([pair for pair, its_side in zip(pairs, sides) if its_side == side] for side in ("train", "test"))
    if not train or not test:
        scenes = len({pair.scene for pair in pairs})
        reason = "they are all on the same ground" if groups.keys() - {None} else "there are too few scenes"
        raise ValueError(
            f"{len(pairs)} pair(s) from {scenes} scene(s) cannot be split without a leak: {reason}; "
            "add pairs of another place, or make folders train/ and test/"
        )
    straddling = len(pairs) - len(train) - len(test)
    by_place = "split by place, along a line"
    if straddling:
        by_place += f"; {straddling} pair(s) that straddle it are left out"
    return Split(train, test, test, [by_place] if groups.keys() - {None} else [])


def _own_split(pairs: Sequence[Pair]) -> Split | None:
    """Splits by the dataset's folders. None: they do not name pairs to train on and pairs to test on."""
    loose, train, val, test = ([p for p in pairs if p.split == side] for side in (None, "train", "val", "test"))
    if not train:  # there is a test folder only: the other pairs train
        loose, train = [], loose
    if not train or not (val or test):
        return None
    notes = ["split as the dataset's folders say"]
    if not val:
        notes.append("it has no validation folder: training validates on its test images")
    if not test:
        notes.append("it has no test folder: its validation images are the test images, too")
    if loose:
        notes.append(f"{len(loose)} pair(s) outside of these folders are left out")
    return Split(train, val or test, test or val, notes)


def _test_scenes(scenes: Sequence[str], seed: int) -> set[str]:
    """Chooses scenes that hold about TEST_SHARE of the pairs. scenes: one for each pair. Of a single scene: none."""
    sizes = Counter(scenes)
    order = sorted(sizes, key=lambda scene: seed_of(seed, scene))
    test, taken = set(), 0
    for scene in order[1:]:  # the first scene always trains
        if taken + sizes[scene] / 2 <= TEST_SHARE * len(scenes):  # brings the share nearer to TEST_SHARE
            test.add(scene)
            taken += sizes[scene]
    return test or set(sorted(order[1:], key=sizes.__getitem__)[:1])


# ----------------------------------------------------------------------------------------------------------
# Places

Box = tuple[float, float, float, float]  # left, low, right, high, in units of the map or pixels of the file


def _places(pairs: Sequence[Pair]) -> list[tuple[str, Box] | None]:
    """Locates each pair: (coordinate system, box on the map); (file, box in it) for blocks of a few scenes; or None."""
    places = [_place(pair) if pair.by_place else None for pair in pairs]
    if len({crs for crs, _ in filter(None, places)}) > 1:
        from rasterio.warp import transform_bounds

        world = "EPSG:4326"
        places = [place and (world, transform_bounds(place[0], world, *place[1])) for place in places]
    cut = [i for i, pair in enumerate(pairs) if pair.by_place and pair.window and not places[i]]
    files, scenes = {pairs[i].sar for i in cut}, {pairs[i].scene for i in cut}
    if len(files) == len(scenes) < FEW_SCENES:  # one file a scene: two files of a scene may overlap
        for i in cut:
            top, left, height, width = pairs[i].window
            places[i] = str(pairs[i].sar), (left, top, left + width, top + height)
    return places


def _place(pair: Pair) -> tuple[str, Box] | None:
    """Locates a pair on the map: (coordinate system, box). None: neither image is georeferenced."""
    for path in (pair.sar, pair.eo):
        if path.suffix.lower() in (".tif", ".tiff") and needs_rasterio(path):
            with open_geotiff(path) as dataset:
                from rasterio.transform import from_gcps

                points, crs = dataset.gcps
                transform = from_gcps(points) if points else dataset.transform
                if crs := crs or dataset.crs:
                    top, left, height, width = pair.window or (0, 0, *dataset.shape)
                    a, b, c, d, e, f = transform[:6]
                    # the corners in pixels, then on the map
                    x, y = np.array([[left, left + width] * 2, [top, top, top + height, top + height]])
                    x, y = a * x + b * y + c, d * x + e * y + f
                    return crs.to_wkt(), (x.min(), y.min(), x.max(), y.max())
    return None


def _divide_by_line(boxes: np.ndarray) -> np.ndarray:
    """Divides boxes, (n, 4), by a line parallel to an axis: "train", "test" or, on the line, "left out" for each.

    Chooses the line with the test share nearest to TEST_SHARE and the fewest boxes on it. If every line leaves one side
    empty, all boxes are "train".
    """
    count, best, sides = len(boxes), np.inf, np.full(len(boxes), "train")
    margin = 1e-6 * (boxes[:, 2:] - boxes[:, :2])  # rounding: borders that neighbours share differ in their last bits
    lows, highs = boxes[:, :2] + margin, boxes[:, 2:] - margin
    for low, high, lines in zip(lows.T, highs.T, (boxes[:, [0, 2]], boxes[:, [1, 3]])):
        lines = np.unique(lines)
        train = np.searchsorted(np.sort(high), lines, "right")
        test = count - np.searchsorted(np.sort(low), lines, "left")
        cost = np.where(train * test > 0, abs(test - TEST_SHARE * count) + (count - train - test), np.inf)
        if cost.min() < best:
            best, line = cost.min(), lines[cost.argmin()]
            sides = np.where(high <= line, "train", np.where(low >= line, "test", "left out"))
    return sides


# ----------------------------------------------------------------------------------------------------------
# Large images


def cut_large(pairs: Sequence[Pair], size: int, cached: bool = False, decode_whole: bool = False) -> list[Pair]:
    """Cuts pairs of large images into a grid of blocks of size x size pixels, which are read separately.

    An image is large if it has more than LARGE pixels and is longer than two blocks; for a cache, if it is longer than
    one block. Without a cache, nothing is cut if none of LOOKED_AT images is large.
    decode_whole: also cut images that can only be decoded whole, for evaluation, which reads each block once.
    ValueError: such an image is large, and neither `cached` nor `decode_whole` is given.
    """

    def is_large(height: int, width: int) -> bool:
        return max(height, width) > size if cached else height * width > LARGE and max(height, width) > 2 * size

    if not cached and not any(is_large(*image_size(pair.sar)) for pair in evenly(pairs, LOOKED_AT)):
        return list(pairs)
    cut = []
    for pair in pairs:
        height, width = image_size(pair.sar)
        if pair.window or not is_large(height, width) or (height, width) != image_size(pair.eo):
            cut.append(pair)  # read_pair raises an error if the sizes differ
        elif cached or decode_whole or needs_rasterio(pair.sar) and needs_rasterio(pair.eo):
            tops, lefts = _spread(height, size), _spread(width, size)
            cut += [pair._replace(window=(top, left, size, size)) for top in tops for left in lefts]
        else:
            raise ValueError(
                f"{str(pair.sar)!r} is {width}x{height} pixels, and a crop would decode all of it: give --cache DIR, "
                "or convert the images: gdal_translate -of GTiff -co TILED=YES IN OUT.tif"
            )
    return cut


def _spread(side: int, size: int) -> list[int]:
    """Spreads blocks without overlap evenly from end to end, a single block in the middle: where each begins."""
    count = side // size
    return [i * (side - size) // (count - 1) for i in range(count)] if count > 1 else [(side - size) // 2] * count


# ----------------------------------------------------------------------------------------------------------
# The split of a finished training


def split_names(split: Split) -> dict[str, list[str]]:
    """Names the scenes on each side, or the pairs if they are split by place: "scenes" in split.json."""
    root = _root([*split.train, *split.val, *split.test])
    return {side: sorted({_name(pair, root) for pair in getattr(split, side)}) for side in ("train", "val", "test")}


def _name(pair: Pair, root: str) -> str:
    """Names what stays on one side of a split: the scene, or the pair (file and window) if split by place."""
    if not pair.by_place:
        return pair.scene
    return f"{pair.sar.relative_to(root).as_posix()} {' '.join(map(str, pair.window or ()))}".strip()


def _root(pairs: Sequence[Pair]) -> str:
    return os.path.commonpath([pair.sar.parent for pair in pairs])


def held_out_pairs(pairs: Sequence[Pair], model: Path) -> tuple[Split, str]:
    """Restores the split that a model was trained with.

    Returns it and its source, for messages: the dataset's folders, split.json beside the model, or seed 0. Large images
    are cut as for training. ValueError: split.json is damaged, or knows only a part of the dataset.
    """
    file = model.resolve().parent / "split.json"
    about = read_json(file) if file.is_file() else {}
    pairs = cut_large(pairs, about.get("size", 256), about.get("cached", False), decode_whole=True)
    if own := _own_split(pairs):
        return own, "the dataset's folders"
    if not about:
        return split_pairs(pairs), "the split of seed 0"
    try:
        names = {side: set(about["scenes"][side]) for side in ("train", "test")}
        names["val"] = set(about["scenes"].get("val", names["test"]))
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is no split that train.py wrote ({error}): move it away to use seed 0") from error
    root = _root(pairs)
    if not set.union(*names.values()) & {_name(pair, root) for pair in pairs}:
        return split_pairs(pairs), f"the split of seed 0, since {file} is of another dataset"
    train, val, test = ([p for p in pairs if _name(p, root) in names[side]] for side in ("train", "val", "test"))
    if not train or not val or not test:
        raise ValueError(f"{file} does not fit this dataset, of which a part is missing; move it away to use seed 0")
    return Split(train, val, test, []), str(file)
