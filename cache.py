"""The latents of a training set, encoded once: the frozen VAE need not run in every step.

    images of the training size -> all 8 flips and rotations -> VAE encoder -> float16 -> one memory-mapped file

(Without flips, `train.py --no-flips`, one of them: an eighth of the time and of the disk.)

A sample from the cache is the sample that `PairDataset` would have read and the model encoded in float32, up to the
rounding to float16. The cache is bound to the VAE, the files and the size by a fingerprint, and is resumed if
interrupted.
"""

import hashlib
import shutil
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from cdiffset import CDiffSET
from common import exclusive, read_json, write_json
from data import PairDataset, orient, read_pair
from weights import network_digest


class CachedLatents(Dataset):
    """The samples of `pairs` as latents: position -> (z_sar, z_eo), each float32 (C, h, w). See `build_cache`."""

    def __init__(self, folder: Path, pairs: PairDataset):
        self.file, self.shape = folder / "latents.bin", read_json(folder / "cache.json")["shape"]
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor]:
        _, _, orientation = self.pairs.augmentation(position, self.pairs.size, self.pairs.size)
        latents = np.memmap(self.file, np.float16, "r", shape=(len(self), *self.shape))  # nothing is read yet
        return tuple(torch.from_numpy(latents[self.pairs.index(position), orientation].astype(np.float32)))


def fingerprint(model: CDiffSET, pairs: PairDataset) -> str:
    """What the cached numbers depend on: the VAE, the files (name, length, time of change), the size."""
    digest = hashlib.sha256(f"{network_digest(model.vae)} {pairs.size}".encode())
    for pair in pairs.pairs:
        for path in (pair.sar, pair.eo):
            state = path.stat()
            digest.update(f"\0{path.name}\0{state.st_size}\0{state.st_mtime_ns}".encode(errors="surrogateescape"))
    return digest.hexdigest()


@torch.no_grad()
def build_cache(model: CDiffSET, pairs: PairDataset, folder: Path) -> None:
    """Encodes what is not encoded yet into folder/latents.bin, a record a pair: float16 (8 or 1, 2, C, h, w).

    The model runs on the device it is on. Raises ValueError if another process fills the folder, if it holds the
    cache of something else, if an image is not of the training size (random crops of larger ones cannot be
    cached), or if the disk is too small.
    """
    side = pairs.size // model.vae.factor
    orientations = 8 if pairs.flips else 1
    shape = (orientations, 2, model.vae.config["latent_channels"], side, side)
    about = {"fingerprint": fingerprint(model, pairs), "shape": list(shape)}
    file, manifest = folder / "latents.bin", folder / "cache.json"
    with exclusive(folder):
        was = read_json(manifest) if manifest.exists() else None
        held = file.stat().st_size if file.exists() else 0
        if was != about:
            if was is not None and held:
                what = "the cache of another model, dataset (or copied files), split (--seed), --size or --no-flips"
                raise ValueError(f"{folder} holds {what}: delete it, or name another folder")
            file.unlink(missing_ok=True)
            held = 0
            write_json(manifest, about)
        record = 2 * prod(shape)  # bytes
        done = held // record
        needed, free = record * (len(pairs) - done), shutil.disk_usage(folder).free
        if needed > free:
            space = f"{needed / 1e9:.1f} GB for the cache, and {free / 1e9:.1f} GB are free"
            raise ValueError(f"{folder}: there is too little disk, it takes {space}; name another folder")
        try:
            with file.open("ab") as output:
                output.truncate(done * record)
                for pair in tqdm(pairs.pairs[done:], initial=done, total=len(pairs), unit="pair", desc="encoding"):
                    images = torch.stack(read_pair(pair))  # (2, 3, H, W)
                    if images.shape[2:] != (pairs.size, pairs.size):
                        size = f"{images.shape[3]}x{images.shape[2]} pixels, not --size {pairs.size}"
                        advice = "train without --cache, or cut the images first"
                        raise ValueError(f"{pair.sar}: {size}; random crops cannot be cached: {advice}")
                    turned = torch.cat([orient(images, i) for i in range(orientations)])
                    latents = model.encode(turned).cpu().numpy().astype(np.float16)
                    output.write(latents.tobytes())
        except OSError as error:
            raise ValueError(f"{file}: {error}; the same command goes on where it stopped") from error
