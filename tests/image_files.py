"""Image files to try: random pictures and GeoTIFFs."""

import numpy as np
import pytest
from PIL import Image

RNG = np.random.default_rng(0)


def noise(*shape, dtype="uint8", high=256):
    return RNG.integers(0, high, shape).astype(dtype)


def picture(path, pixels=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(16, 16, 3) if pixels is None else pixels).save(path, **options)
    return path


def geotiff(path, bands, names=None, scales=None, offsets=None, east=5e5, north=5e6, **profile):
    """bands (C, H, W), north-up with pixels of 10 m; `east` and `north` of the top left corner; what bands declare."""
    rasterio = pytest.importorskip("rasterio")
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = bands.shape
    shape = {"count": count, "height": height, "width": width, "dtype": bands.dtype}
    place = {"crs": "EPSG:32631", "transform": rasterio.transform.from_origin(east, north, 10, 10)}
    with rasterio.open(path, "w", driver="GTiff", **shape, **{**place, **profile}) as dataset:
        dataset.write(bands)
        for key, value in (("descriptions", names), ("scales", scales), ("offsets", offsets)):
            if value:
                setattr(dataset, key, value)
    return path
