"""The latents of a training set, encoded once: the frozen VAE need not run in every step.

    images of the training size -> all 8 flips and rotations -> VAE encoder -> float16 -> one memory-mapped file

A sample from the cache is the sample that `PairDataset` would have read and the model encoded, up to the rounding
to float16. The cache is bound to the VAE, the files and the size by a fingerprint, and is resumed if interrupted.
"""

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from cdiffset import CDiffSET
from data import Pair, PairDataset, draw_augmentation, orient, read_pair
from weights import read_json, write_json

ORIENTATIONS = 8
FLUSH_EVERY = 64  # pairs; at most these are encoded again after an interruption


class CachedLatents(Dataset):
    """The samples of `pairs` as latents: position -> (z_sar, z_eo), each float32 (4, h, w). See `build_cache`."""

    def __init__(self, file: Path, pairs: PairDataset):
        self.latents = np.load(file, mmap_mode="r")  # (pairs, 8, 2, 4, h, w)
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor]:
        size = self.pairs.size
        _, _, orientation = draw_augmentation(size, size, size, self.pairs.generator(position))
        z_sar, z_eo = torch.from_numpy(self.latents[self.pairs.index(position), orientation].astype(np.float32))
        return z_sar, z_eo


def fingerprint(model: CDiffSET, pairs: Sequence[Pair], size: int) -> str:
    """What the cached numbers depend on: the VAE's weights, the files (name, length, time of change), the size."""
    digest = hashlib.sha256(f"{size} {model.vae.scaling_factor}".encode())
    for name, tensor in model.vae.state_dict().items():
        digest.update(name.encode() + tensor.float().cpu().contiguous().numpy().tobytes())
    for pair in pairs:
        for path in (pair.sar, pair.eo):
            state = path.stat()
            digest.update(f"{path.name}\0{state.st_size}\0{state.st_mtime_ns}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()


@torch.no_grad()
def build_cache(model: CDiffSET, pairs: PairDataset, folder: Path) -> Path:
    """Encodes what is not encoded yet; returns the file that `CachedLatents` reads.

    The model runs on the device it is on. Raises ValueError if the folder holds another cache, an image is not
    of the training size (random crops of larger ones cannot be cached), or the disk is too small.
    """
    device = model.prompt_embedding.device
    channels, side = model.vae.config["latent_channels"], pairs.size // model.vae.factor
    shape = (len(pairs), ORIENTATIONS, 2, channels, side, side)
    key = fingerprint(model, pairs.pairs, pairs.size)
    folder.mkdir(parents=True, exist_ok=True)
    file, manifest = folder / "latents.npy", folder / "cache.json"
    done = 0
    if manifest.exists():
        state = read_json(manifest)
        if state.get("fingerprint") != key:
            raise ValueError(f"{folder}: holds the cache of another model, dataset or size; delete it or name another")
        done = int(state["done"])
    if done < len(pairs) and not file.exists():
        done, needed, free = 0, 2 * int(np.prod(shape)), shutil.disk_usage(folder).free
        if needed > free:
            raise ValueError(f"{folder}: the cache needs {needed / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB free")
    if done == len(pairs):
        return file
    latents = np.lib.format.open_memmap(file, "r+" if file.exists() else "w+", np.float16, shape)
    for i in tqdm(range(done, len(pairs)), initial=done, total=len(pairs), unit="pair", desc="encoding"):
        images = torch.stack(read_pair(pairs.pairs[i]))  # (2, 3, H, W)
        if images.shape[2:] != (pairs.size, pairs.size):
            height, width = images.shape[2:]
            raise ValueError(
                f"{pairs.pairs[i].sar}: {width}x{height} pixels, not --size {pairs.size}: random crops of larger "
                "images cannot be cached; train without --cache, or cut the images first"
            )
        turned = torch.cat([orient(images, o) for o in range(ORIENTATIONS)]).to(device)
        latents[i] = model.encode(turned).float().cpu().numpy().reshape(shape[1:])
        if (i + 1) % FLUSH_EVERY == 0 or i + 1 == len(pairs):
            latents.flush()
            write_json(manifest, {"fingerprint": key, "done": i + 1})
    return file
