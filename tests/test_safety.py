"""What the README says under "Safety": nothing is unpickled, run, fetched or written elsewhere; what is the same."""

import getpass
import os
import pickle
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from bad_images import rasterio
from hostile import geotiff, names, noise, outcome, pixels, save, tree

import evaluate
import images
import sample
import scene
import train
from experiments import pretrain, synth

SAMPLE = "--model {trained} --dtype float32 --device cpu --steps 1"
TRAIN = (
    "--data {data} --model {base} --size 64 --steps 2 --batch-size 2 --save-every 1 --validate-images 1 "
    "--validate-steps 1 --ema 0.9 --workers 0 --dtype float32 --device cpu"
)
PROGRAMS = {  # with options that reach all that they write
    "sample": (sample.main, f"{{pictures}} --out {{out}} {SAMPLE} --tile 32 --samples 2"),
    "train": (train.main, f"{TRAIN} --out {{out}}/run --cache {{out}}/cache"),
    "pretrain": (
        pretrain.main,
        "--data {data} --out {out}/base --workers 0 --device cpu --size 16 --vae-size 16 --vae-steps 2 --unet-steps 2 "
        "--vae-widths 8 8 --unet-widths 8 16 --batch-size 2",
    ),
    "synth": (synth.main, "{out}/sen12 --pairs 4 --size 64"),
    "evaluate": (
        evaluate.main,
        "--data {data} --model {trained} --out {out}/results --steps 1 --limit 1 --device cpu",
    ),
}

# Python reports these events itself (PEP 578), whoever causes them. Those with paths are allowed in one folder only.
FORBIDDEN = {
    "pickle.find_class", "socket.connect", "socket.bind", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname",
    "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.forkpty", "pty.spawn",
    "webbrowser.open", "urllib.Request", "shutil.unpack_archive",
}  # fmt: skip
WITH_PATHS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.chmod", "os.truncate"}


def watch(folder: Path, may: frozenset[str] = frozenset()) -> None:
    """From here on, this process ends at once if it does what it must not, or writes outside the folder."""
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
        paths = arguments[:2] if event in WITH_PATHS else ()
        if event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
            paths = arguments[:1]
        for path in [Path(os.fsdecode(path)).absolute() for path in paths if isinstance(path, (str, bytes))]:
            path = path.parent.resolve() / path.name
            if not any(path.is_relative_to(place) for place in allowed):
                stop(event, arguments)

    sys.addaudithook(hook)


@pytest.mark.parametrize("name", PROGRAMS)
def test_no_program_unpickles_runs_or_fetches_anything_or_writes_elsewhere(dataset, base, trained, tmp_path, name):
    pictures, out = tmp_path / "in", tmp_path / "out"
    save(pictures / "a.png"), save(pictures / "large.png", noise(40, 70))
    if rasterio:
        geotiff(pictures / "g.tif", side=40)
    out.mkdir()
    before = tree(dataset, base, trained, pictures)
    main, options = PROGRAMS[name]
    options = options.format(data=dataset, base=base, trained=trained, pictures=pictures, out=out)
    # the processes of synth.py hand each other their tasks; evaluate.py asks git for the commit
    allowed = {"synth": {"pickle.find_class"}, "evaluate": {"subprocess.Popen", "os.posix_spawn"}}
    result = outcome(main, options.split(), before=lambda: watch(out, frozenset(allowed.get(name, ()))))
    assert result.code == 0 and not [line for line in result.err if line.startswith("forbidden")], result
    assert names(out) and set(tmp_path.iterdir()) == {pictures, out}
    assert tree(dataset, base, trained, pictures) == before


DEEDS = {
    "pickle": lambda folder: pickle.loads(pickle.dumps(len)),
    "unpickling weights": lambda folder: torch.load(folder / "a.pt", weights_only=False),
    "network": lambda folder: socket.create_connection(("127.0.0.1", 9)),
    "shell": lambda folder: os.system("true"),
    "command": lambda folder: subprocess.run(["true"]),
    "writing": lambda folder: (folder / "b").write_text("b"),
    "deleting": lambda folder: (folder / "a.pt").unlink(),
}


@pytest.mark.parametrize("deed", DEEDS)
def test_the_watch_above_sees_each_of_these(tmp_path, deed):
    torch.save({"a": Path("b")}, tmp_path / "a.pt")
    (tmp_path / "out").mkdir()
    done = outcome(DEEDS[deed], tmp_path, before=lambda: watch(tmp_path / "out"))
    assert done.code == 99 and done.err[0].startswith("forbidden: "), done
    assert (tmp_path / "a.pt").exists() and not (tmp_path / "b").exists()


# ----------------------------------------------------------------------------------------------------------
# Ways out of the folders


@pytest.mark.skipif(rasterio is None, reason="rasterio is not installed")
@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")
@pytest.mark.parametrize("kind", [".ovr", ".aux.xml"])
def test_files_beside_a_geotiff_cannot_make_gdal_read_others(tmp_path, monkeypatch, kind):
    """GDAL opens a.tif.ovr, or what a.tif.aux.xml names, with any driver, even those that read the network."""
    monkeypatch.setattr(images, "OVERVIEW", 100)
    path = geotiff(tmp_path / "a.tif", np.full((1, 2000, 2000), 1, np.float32))
    secret = geotiff(tmp_path / "secret.tif", np.full((1, 500, 500), 7, np.float32))
    source = f"<SimpleSource><SourceFilename>{secret}</SourceFilename><SourceBand>1</SourceBand></SimpleSource>"
    band = f"<VRTRasterBand dataType='Float32' band='1'>{source}</VRTRasterBand>"
    lure = tmp_path / ("a.tif.ovr" if kind == ".ovr" else "x.vrt")
    lure.write_text(f"<VRTDataset rasterXSize='500' rasterYSize='500'>{band}</VRTDataset>")
    if kind == ".aux.xml":
        named = f"<Metadata domain='OVERVIEWS'><MDI key='OVERVIEW_FILE'>{lure}</MDI></Metadata>"
        (tmp_path / "a.tif.aux.xml").write_text(f"<PAMDataset>{named}</PAMDataset>")
    assert (scene.Source(path).scale.limits == 1).all()


def test_results_replace_links_and_never_what_they_point_to(trained, tmp_path):
    victim, out = tmp_path / "victim", tmp_path / "out"
    victim.write_text("mine")
    out.mkdir()
    save(tmp_path / "a.png")

    def lay_links():
        for name in ("a_eo.png", f".a_eo.{os.getpid()}.png", "a_confidence.png"):
            (out / name).symlink_to(victim)

    options = f"{tmp_path}/a.png --out {out} {SAMPLE.format(trained=trained)}"
    assert outcome(sample.main, options.split(), before=lay_links).code == 0
    assert victim.read_text() == "mine" and not any(path.is_symlink() for path in out.iterdir())


def test_a_linked_folder_of_images_is_translated_into_out_alone(trained, tmp_path):
    save(tmp_path / "elsewhere" / "deep" / "a.png")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link").symlink_to(tmp_path / "elsewhere")
    before = tree(tmp_path / "elsewhere", tmp_path / "in")
    options = f"{tmp_path}/in --out {tmp_path}/out {SAMPLE.format(trained=trained)}"
    assert outcome(sample.main, options.split()).code == 0
    assert (tmp_path / "out" / "link" / "deep" / "a_eo.png").exists()
    assert tree(tmp_path / "elsewhere", tmp_path / "in") == before


# ----------------------------------------------------------------------------------------------------------
# Determinism


def test_a_seed_gives_the_same_bytes_in_each_process_and_a_level_at_most_with_other_threads(trained, tmp_path):
    for i in range(3):
        save(tmp_path / "in" / f"{i}.png", noise(40, 56, seed=i))
    for out, threads, batch in (("a", 1, 1), ("b", 1, 1), ("c", 2, 3)):
        options = f"{tmp_path}/in --out {tmp_path}/{out} --batch-size {batch} {SAMPLE.format(trained=trained)}"
        done = outcome(sample.main, options.split(), before=lambda n=threads: torch.set_num_threads(n))
        assert done.code == 0, done
    assert len(names(tmp_path / "a")) == 6
    for name in names(tmp_path / "a"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        assert abs(pixels(tmp_path / "a" / name) - pixels(tmp_path / "c" / name)).max() <= 1, name


def test_a_seed_gives_the_same_checkpoints_and_models_and_links_in_a_run_folder_empty_nothing(dataset, base, tmp_path):
    victim, linked = tmp_path / "victim", tmp_path / "linked"
    victim.write_text("mine")
    linked.mkdir()
    for name in (".lock", "log.csv", "validation.csv", "split.json", "summary.json"):
        (linked / name).symlink_to(victim)
    for out in (linked, tmp_path / "plain"):
        assert outcome(train.main, f"{TRAIN} --out {out}".format(data=dataset, base=base).split()).code == 0
    assert victim.read_text() == "mine"
    files = {name for name in names(linked) if name.endswith((".safetensors", ".png"))}
    assert len(files) >= 6
    for name in files:
        assert (linked / name).read_bytes() == (tmp_path / "plain" / name).read_bytes(), name
