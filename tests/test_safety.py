"""What the README says under "Safety": nothing is unpickled, run, fetched or written elsewhere; what is the same."""

import getpass
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from bad_images import rasterio
from hostile import noise, outcome, save, tree
from PIL import Image

import evaluate
import sample
import train
from experiments import pretrain, synth
from images import read_sar
from scene_files import Source

PRETRAIN = "--size 16 --vae-size 16 --vae-steps 2 --unet-steps 2 --vae-widths 8 8 --unet-widths 8 16 --batch-size 2"
TRAIN = "--size 64 --steps 2 --batch-size 2 --save-every 1 --validate-images 1 --validate-steps 1 --ema 0.9"

# Python tells about these itself (PEP 578), whoever does them; with a path, they are allowed in one folder alone
FORBIDDEN = {
    "pickle.find_class", "socket.connect", "socket.bind", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname",
    "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.forkpty", "pty.spawn",
    "webbrowser.open", "urllib.Request", "shutil.unpack_archive",
}  # fmt: skip
WITH_PATHS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.chmod", "os.truncate"}


def watch(folder: Path, may: frozenset[str] = frozenset()) -> None:
    """From here on, this process ends at once when it does what it must not, or writes outside the folder."""
    # torch makes an empty folder of its own beside the temporary ones when an optimizer takes its first step
    allowed = (folder.resolve(), Path(os.devnull), Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}")
    sys.dont_write_bytecode = True

    def stop(event: str, arguments: tuple) -> None:
        os.write(2, f"forbidden: {event}{arguments}\n".encode(errors="replace"))
        os._exit(99)

    def hook(event: str, arguments: tuple) -> None:
        if event == "subprocess.Popen" and arguments[1] == ["uname", "-p"]:
            return  # how Python's platform module learns the kind of processor
        if event in FORBIDDEN - may:
            stop(event, arguments)
        paths = [path for path in arguments[:2] if isinstance(path, (str, bytes))] if event in WITH_PATHS else []
        if event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
            paths = [path for path in arguments[:1] if isinstance(path, (str, bytes))]
        for path in paths:
            path = Path(os.fsdecode(path)).absolute()
            path = path.parent.resolve() / path.name
            if not any(path.is_relative_to(place) for place in allowed):
                stop(event, arguments)

    sys.addaudithook(hook)


def programs(data: Path, base: Path, trained: Path, pictures: Path, out: Path) -> dict:
    """Every script, with options that reach what it writes."""
    sampling = f"{pictures} --model {trained} --out {out} --steps 1 --tile 32 --samples 2 --contact-sheet {out}/s.png"
    training = f"--data {data} --model {base} --out {out}/run --cache {out}/cache --workers 0 --device cpu {TRAIN}"
    return {
        "sample": (sample.main, sampling),
        "train": (train.main, training),
        "pretrain": (pretrain.main, f"--data {data} --out {out}/base --workers 0 --device cpu {PRETRAIN}"),
        "synth": (synth.main, f"{out}/sen12 --pairs 4 --size 64"),
        "evaluate": (
            evaluate.main,
            f"--data {data} --model {trained} --out {out}/results --steps 1 --limit 1 --device cpu",
        ),
    }


@pytest.mark.parametrize("name", ["sample", "train", "pretrain", "synth", "evaluate"])
def test_no_program_unpickles_runs_or_fetches_anything_or_writes_elsewhere(dataset, base, trained, tmp_path, name):
    pictures, out = tmp_path / "in", tmp_path / "out"
    save(pictures / "a.png"), save(pictures / "large.png", noise(40, 70))
    if rasterio:
        geotiff(pictures / "g.tif")
    out.mkdir()
    before = tree(dataset, base, trained, pictures)
    main, options = programs(dataset, base, trained, pictures, out)[name]
    # processes of synth.py hand each other their tasks; evaluate.py asks git for the commit
    allowed = {"synth": {"pickle.find_class"}, "evaluate": {"subprocess.Popen", "os.posix_spawn"}}
    may = frozenset(allowed.get(name, ()))
    result = outcome(main, options.split(), before=lambda: watch(out, may))
    assert result.code == 0 and not [line for line in result.err if line.startswith("forbidden")], result
    assert any(path.is_file() for path in out.rglob("*")) and set(tmp_path.iterdir()) == {pictures, out}
    assert tree(dataset, base, trained, pictures) == before


@pytest.mark.parametrize(
    "deed",
    [
        "__import__('pickle').loads(__import__('pickle').dumps(len))",
        "__import__('torch').load(ARGUMENT + '/a.pt', weights_only=False)",
        "__import__('socket').create_connection(('127.0.0.1', 9))",
        "__import__('os').system('true')",
        "__import__('subprocess').run(['true'])",
        "open(ARGUMENT + '/b', 'w')",
        "__import__('pathlib').Path(ARGUMENT, 'a.pt').unlink()",
    ],
)
def test_the_watch_above_sees_each_of_these(tmp_path, deed):
    torch.save({"a": Path("b")}, tmp_path / "a.pt")
    (tmp_path / "out").mkdir()
    done = outcome(eval, deed, {"ARGUMENT": str(tmp_path)}, before=lambda: watch(tmp_path / "out"))
    assert done.code == 99 and done.err[0].startswith("forbidden: "), done
    assert (tmp_path / "a.pt").exists() and not (tmp_path / "b").exists()


# ----------------------------------------------------------------------------------------------------------
# Ways out of the folders


def geotiff(path: Path, value: float = 1.0, side: int = 40) -> Path:
    """A GeoTIFF of one value."""
    place = rasterio.transform.from_origin(500000, 9e6, 10, 10)
    with rasterio.open(path, "w", "GTiff", side, side, 1, dtype="float32", crs="EPSG:32737", transform=place) as file:
        file.write(np.full((1, side, side), value, np.float32))
    return path


@pytest.mark.skipif(rasterio is None, reason="rasterio is not installed")
@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")
@pytest.mark.parametrize("kind", [".ovr", ".aux.xml"])
def test_files_beside_a_geotiff_cannot_make_gdal_read_others(tmp_path, kind):
    """It opens a.tif.ovr, or what a.tif.aux.xml names, with any driver: one that reads other files, or the network."""
    path, secret = geotiff(tmp_path / "a.tif", side=2000), geotiff(tmp_path / "secret.tif", 7.0, 500)
    source = f"<SimpleSource><SourceFilename>{secret}</SourceFilename><SourceBand>1</SourceBand></SimpleSource>"
    band = f"<VRTRasterBand dataType='Float32' band='1'>{source}</VRTRasterBand>"
    lure = tmp_path / ("a.tif.ovr" if kind == ".ovr" else "x.vrt")
    lure.write_text(f"<VRTDataset rasterXSize='500' rasterYSize='500'>{band}</VRTDataset>")
    if kind == ".aux.xml":
        named = f"<MDI key='OVERVIEW_FILE'>{lure}</MDI>"
        (tmp_path / "a.tif.aux.xml").write_text(
            f"<PAMDataset><Metadata domain='OVERVIEWS'>{named}</Metadata></PAMDataset>"
        )
    source = Source(path)
    assert (source.overview(100).bands == 1).all()


def test_results_replace_links_and_never_what_they_point_to(trained, tmp_path):
    victim, out = tmp_path / "victim", tmp_path / "out"
    victim.write_text("mine")
    out.mkdir()
    save(tmp_path / "a.png")
    arguments = [str(tmp_path / "a.png"), "--model", str(trained), "--steps", "1", "--out", str(out)]

    def lay_links():
        for name in ("a_eo.png", f".a_eo.{os.getpid()}.png", "a_confidence.png"):
            (out / name).symlink_to(victim)

    assert outcome(sample.main, arguments, before=lay_links).code == 0
    assert victim.read_text() == "mine" and not any(path.is_symlink() for path in out.iterdir())


def test_a_run_folder_with_links_empties_nothing(dataset, base, tmp_path):
    (tmp_path / "victim").write_text("mine")
    out = tmp_path / "run"
    out.mkdir()
    for name in (".lock", "log.csv", "split.json", "summary.json"):
        (out / name).symlink_to(tmp_path / "victim")
    options = f"--data {dataset} --model {base} --out {out} --workers 0 --device cpu {TRAIN}"
    assert outcome(train.main, options.split()).code == 0
    assert (tmp_path / "victim").read_text() == "mine"


def test_a_linked_folder_of_images_is_translated_into_out_alone(trained, tmp_path):
    save(tmp_path / "elsewhere" / "deep" / "a.png")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link").symlink_to(tmp_path / "elsewhere")
    before = tree(tmp_path / "elsewhere", tmp_path / "in")
    arguments = [str(tmp_path / "in"), "--model", str(trained), "--steps", "1", "--out", str(tmp_path / "out")]
    assert outcome(sample.main, arguments).code == 0
    assert (tmp_path / "out" / "link" / "deep" / "a_eo.png").exists()
    assert tree(tmp_path / "elsewhere", tmp_path / "in") == before


# ----------------------------------------------------------------------------------------------------------
# Determinism


def pixels(folder: Path) -> dict[str, np.ndarray]:
    """The pictures in a folder, by name."""
    return {path.name: np.asarray(Image.open(path)).astype(int) for path in sorted(folder.glob("*.png"))}


def test_the_same_seed_gives_the_same_bytes_in_another_process_and_a_level_at_most_with_other_threads(
    trained, tmp_path
):
    for i in range(3):
        save(tmp_path / "in" / f"{i}.png", noise(40, 56, seed=i))
    for out, threads, batch in (("a", 1, 1), ("b", 1, 1), ("c", 2, 3)):
        command = [sys.executable, Path(sample.__file__), "in", "--model", trained, "--steps", "4", "--out", out]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        subprocess.run([*command, "--batch-size", str(batch)], cwd=tmp_path, env=environment, check=True)
    assert len(pixels(tmp_path / "a")) == 6
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    for name, picture in pixels(tmp_path / "c").items():
        assert abs(picture - pixels(tmp_path / "a")[name]).max() <= 1, name


def test_the_same_seed_gives_the_same_checkpoints_and_models_byte_for_byte(dataset, base, tmp_path):
    for out in ("a", "b"):
        options = f"--data {dataset} --model {base} --out {tmp_path / out} --workers 0 --device cpu {TRAIN}"
        assert outcome(train.main, options.split()).code == 0
    files = [
        path.relative_to(tmp_path / "a")
        for path in (tmp_path / "a").rglob("*.*")
        if path.suffix in (".safetensors", ".png")
    ]
    assert len(files) >= 6
    for path in files:
        assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes(), path


def test_another_seed_gives_another_picture(trained, tmp_path):
    path = save(tmp_path / "a.png")
    assert read_sar(path).shape == (3, 16, 16)
    for seed in ("1", "2"):
        arguments = [str(path), "--model", str(trained), "--steps", "1", "--seed", seed, "--out", str(tmp_path / seed)]
        assert outcome(sample.main, arguments).code == 0
    first, second = (pixels(tmp_path / seed)["a_eo.png"] for seed in ("1", "2"))
    assert (first != second).any()
