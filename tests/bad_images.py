"""Image files that cannot be used, or look so: name -> content. Those called "maybe_..." may be whole after all."""

import contextlib
import io
import os
import socket
import struct
import warnings
import zlib
from functools import cache
from pathlib import Path

import numpy as np
from hostile import chunk, damaged, gray, noise, png, save, tiff
from PIL import Image

try:
    import rasterio
except ImportError:
    rasterio = None


def encoded(picture: np.ndarray | Image.Image, kind: str, **options) -> bytes:
    """A picture as a file of this kind."""
    file = io.BytesIO()
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(file, kind, **options)
    return file.getvalue()


def encoded_by_gdal(tmp_path: Path, array: np.ndarray, **options) -> bytes:
    """bands (C, H, W) as a GeoTIFF."""
    path = tmp_path / "made.tif"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kind = {"dtype": array.dtype, **options}
        with rasterio.open(path, "w", "GTiff", array.shape[2], array.shape[1], len(array), **kind) as file:
            file.write(array)
    content = path.read_bytes()
    path.unlink()
    return content


@cache
def bad_pngs() -> dict[str, bytes]:
    """PNGs: damaged, lying, bombs, of kinds that are no images."""
    whole, two = encoded(noise(40, 40), "PNG"), [Image.fromarray(noise(16, 16, seed=i)) for i in range(2)]
    cases = {f"cut{i}.png": damaged(whole, "cut", i) for i in range(12)}
    cases |= {f"maybe_{how}{i}.png": damaged(whole, how, i) for how in ("flipped", "zeros") for i in range(8)}
    sizes = [(0, 0), (0, 9), (2**31 - 1,) * 2, (30_000, 30_000), (70_000, 70_000), (2**31 - 1, 8), (8, 2**31 - 1)]
    cases |= {f"lies{w}x{h}.png": png(w, h) for w, h in sizes}
    cases |= {f"kind{d}-{c}.png": png(16, 16, d, c, bytes(4096)) for d, c in ((3, 0), (8, 5), (4, 2), (0, 0), (64, 6))}
    bomb = zlib.compress(bytes(10**8), 1)
    profile = chunk(b"iCCP", b"x\0\0" + bomb)
    text = chunk(b"zTXt", b"x\0\0" + bomb)
    international = b"".join(chunk(b"iTXt", b"x\0\1\0\0\0" + zlib.compress(bytes(2**20), 1)) for _ in range(80))
    return cases | {
        "empty.png": b"",
        "byte.png": b"\x89",
        "signature.png": whole[:8],
        "header.png": whole[:33],
        "bomb.png": png(9000, 9000, data=bytes(81 * 10**6)),
        "bomb-grey.png": png(40_000, 2000, data=bytes(8 * 10**7)),
        "text-bomb.png": png(16, 16, data=b"\0" * 272, extra=text),
        "texts-bomb.png": png(16, 16, data=b"\0" * 272, extra=international),
        "maybe_profile-bomb.png": png(16, 16, data=b"\0" * 272, extra=profile),
        "maybe_too-much.png": png(16, 16, data=bytes(10**8)),
        "too-little.png": png(16, 16, data=bytes(30)),
        "maybe_no-palette.png": png(16, 16, 8, 3, b"\0" * 272),
        "long-chunk.png": whole[:33] + struct.pack(">I", 2**32 - 1) + b"IDAT" + whole[41:],
        "no-data.png": whole[:33] + chunk(b"IEND", b""),
        "twice.png": whole[:8] + b"junk" + whole[8:],
        "animated.png": encoded(two[0], "PNG", save_all=True, append_images=two[1:]),
    }


@cache
def bad_jpegs() -> dict[str, bytes]:
    """JPEGs: damaged, lying, of several pictures, for printing; and other kinds of files under their names."""
    whole, picture = encoded(noise(40, 40, (3,)), "JPEG"), Image.fromarray(noise(16, 16, (3,)))
    frame = whole.index(b"\xff\xc0") + 5  # height and width
    cases = {f"maybe_{how}{i}.jpg": damaged(whole, how, i) for how in ("flipped", "zeros") for i in range(10)}
    cases |= {f"cut{i}.jpg": whole[: len(whole) * i // 8] for i in range(1, 8)}
    for size in ((65_500, 65_500), (65_500, 9000), (0, 40), (0, 0)):
        cases[f"lies{size[0]}x{size[1]}.jpg"] = whole[:frame] + struct.pack(">HH", *size) + whole[frame + 4 :]
    others = {kind: encoded(picture, kind) for kind in ("GIF", "BMP", "PPM", "PDF", "TGA", "ICO")}
    return cases | {f"really-{kind}.jpg": content for kind, content in others.items()} | {
        "empty.jpg": b"",
        "start.jpg": b"\xff\xd8\xff",
        "cmyk.jpg": encoded(picture.convert("CMYK"), "JPEG"),
        "two.jpg": encoded(picture, "MPO", save_all=True, append_images=[picture]),
        "text.jpg": b"not an image\n" * 9,
        "script.png": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
        "postscript.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n(/etc/passwd) run\n",
        "vrt.tif": b"<VRTDataset rasterXSize='16' rasterYSize='16'></VRTDataset>",
        "zip.tif": b"PK\3\4" + bytes(60),
        "pickle.png": b"\x80\4\x95cos\nsystem\n(S'touch owned'\ntR.",
    }  # fmt: skip


@cache
def bad_tiffs() -> dict[str, bytes]:
    """TIFFs without compression, which Pillow reads: damaged, lying, of kinds that are no images."""
    whole, plain = encoded(noise(40, 40), "TIFF"), gray(16, 16)
    pages = [Image.fromarray(noise(16, 16, seed=i)) for i in range(2)]
    cases = {f"cut{i}.tif": whole[: len(whole) * i // 8] for i in range(1, 8)}
    cases |= {f"maybe_{how}{i}.tif": damaged(whole, how, i) for how in ("flipped", "zeros") for i in range(10)}
    sizes = [(2**32 - 1, 2**32 - 1), (2**31, 8), (60_000, 60_000), (0, 16), (16, 0), (200_000, 9), (5000, 5000)]
    cases |= {f"lies{w}x{h}.tif": tiff(gray(w, h)) for w, h in sizes}
    tags = {
        "bits0": {258: (3, 1, 0)}, "bits3": {258: (3, 1, 3)}, "bits12": {258: (3, 1, 12)}, "bits64": {258: (3, 1, 64)},
        "compression": {259: (3, 1, 999)}, "beyond": {273: (4, 1, 10**9)}, "negative": {273: (9, 1, 2**32 - 1)},
        "many-strips": {273: (4, 2**31, 8), 279: (4, 2**31, 8)}, "bands": {277: (3, 1, 65_535)},
        "bands0": {277: (3, 1, 0)}, "text-width": {256: (2, 4, 0x41414141)}, "huge-tag": {270: (2, 2**32 - 1, 1024)},
        "separated": {262: (3, 1, 5)}, "mask": {262: (3, 1, 99)}, "double": {256: (12, 1, 8)},
        "no-strips": {273: (4, 0, 0)}, "tile0": {322: (3, 1, 0), 323: (3, 1, 0), 324: (4, 1, 1024), 325: (4, 1, 0)},
        "geo-lies": {33550: (12, 2**31, 8), 42112: (2, 2**31, 8)}, "jpeg": {259: (3, 1, 7)},
        "deflate": {259: (3, 1, 8)}, "lzw": {259: (3, 1, 5)}, "packbits": {259: (3, 1, 32_773)},
        "old-jpeg": {259: (3, 1, 6)},
    }  # fmt: skip
    # what a reader may put right by itself is "maybe"
    cases |= {
        f"{'' if name in SURELY_BAD else 'maybe_'}{name}.tif": tiff(plain | changes) for name, changes in tags.items()
    }
    loop = tiff(plain)
    end = 10 + 12 * len(plain)
    return cases | {
        "empty.tif": b"",
        "magic.tif": b"II*\0",
        "big.tif": b"II+\0\x08\0\0\0" + bytes(8),
        "big-lies.tif": b"II+\0\x08\0\0\0" + struct.pack("<Q", 2**63) + bytes(64),
        "nothing.tif": tiff({}),
        "far.tif": b"II*\0" + struct.pack("<I", 2**32 - 1) + bytes(64),
        "maybe_loop.tif": loop[:end] + struct.pack("<I", 8) + loop[end + 4 :],
        "pages.tif": encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:]),
        "cmyk.tif": encoded(Image.fromarray(noise(16, 16, (3,))).convert("CMYK"), "TIFF"),
        "lab.tif": encoded(Image.fromarray(noise(16, 16, (3,))).convert("LAB"), "TIFF"),
        "int32.tif": encoded(Image.fromarray(noise(16, 16).astype(np.int32)), "TIFF"),
        "nan.tif": encoded(Image.fromarray(np.full((16, 16), np.nan, np.float32)), "TIFF"),
        "infinite.tif": encoded(Image.fromarray(np.full((16, 16), -np.inf, np.float32)), "TIFF"),
    }


SURELY_BAD = ("bits0", "bits12", "bits64", "compression", "beyond", "bands", "no-strips")


def bad_geotiffs(tmp_path: Path) -> dict[str, bytes]:
    """TIFFs that GDAL reads: damaged, lying, of kinds that are no images."""
    values = np.random.default_rng(0).normal(-12, 4, (2, 40, 40)).astype(np.float32)
    place = {"crs": "EPSG:32737", "transform": rasterio.transform.from_origin(500000, 9e6, 10, 10)}
    cases = {}
    for compress in ("none", "deflate", "lzw"):
        whole = encoded_by_gdal(tmp_path, values, compress=compress, **place)
        cases |= {f"cut-{compress}{i}.tif": whole[: len(whole) * i // 6] for i in range(1, 6)}
        cases |= {
            f"maybe_{how}-{compress}{i}.tif": damaged(whole, how, i) for how in ("flipped", "zeros") for i in range(4)
        }

    def made(shape: tuple, dtype: str = "float32", value: float = 1, **options) -> bytes:
        return encoded_by_gdal(tmp_path, np.full(shape, value, dtype), **place | options)

    tags = {"bits": gray(16, 16), "size": gray(60_000, 60_000), "far": gray(16, 16) | {273: (4, 1, 10**9)}}
    geo = {33550: (12, 3, 2048), 33922: (12, 6, 2048)}
    cases |= {f"lies-{name}.tif": tiff(entries | geo | {259: (3, 1, 8)}) for name, entries in tags.items()}
    return cases | {
        "complex.tif": made((1, 16, 16), "complex64"),
        "complex-int.tif": made((1, 16, 16), "complex128"),
        "five-bands.tif": made((5, 16, 16)),
        "thirteen-bands.tif": made((13, 16, 16), "uint16"),
        "int16.tif": made((1, 16, 16), "int16"),
        "uint32.tif": made((1, 16, 16), "uint32"),
        "small.tif": made((1, 7, 16)),
        "all-nan.tif": made((1, 16, 16), value=np.nan),
        "all-no-data.tif": made((1, 16, 16), value=-9999, nodata=-9999),
        "twelve-bits.tif": made((1, 16, 16), "uint16", nbits=12),
        "sparse-bomb.tif": made_sparse(tmp_path, 60_000),
    }  # fmt: skip


def made_sparse(tmp_path: Path, side: int) -> bytes:
    """A GeoTIFF without any data: GDAL gives zeros for what is missing."""
    with rasterio.open(tmp_path / "sparse.tif", "w", "GTiff", side, side, 1, dtype="uint8", sparse_ok=True, tiled=True):
        pass
    return (tmp_path / "sparse.tif").read_bytes()


def special_files(folder: Path) -> list[str]:
    """What is no file, or one that never ends."""
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "a.png").symlink_to("b.png")
    (folder / "b.png").symlink_to("a.png")
    (folder / "dangling.png").symlink_to("nowhere")
    (folder / "endless.png").symlink_to("/dev/zero")
    (folder / "null.tif").symlink_to("/dev/null")
    (folder / "again.png").symlink_to(folder)
    (folder / "up").symlink_to("..")
    os.mkfifo(folder / "pipe.png")
    os.mkfifo(folder / "pipe.tif")
    with contextlib.chdir(folder), socket.socket(socket.AF_UNIX) as s:  # whose name must be short
        s.bind("socket.jpg")
    names = [
        "loop.png",
        "a.png",
        "b.png",
        "dangling.png",
        "endless.png",
        "null.tif",
        "pipe.png",
        "pipe.tif",
        "socket.jpg",
    ]
    if os.geteuid():  # root reads anything
        save(folder / "secret.png").chmod(0)
        names.append("secret.png")
    return names
