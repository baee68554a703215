"""What tests share: a small dataset, a small model to start from, processes to be killed, packages to be found."""

import multiprocessing
import os
import random
import signal
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch._dynamo  # which an optimizer's first step imports: here, so that not every process takes the seconds
from safetensors.torch import load_file
from torch import nn
from tqdm import tqdm

import common
from cdiffset import CDiffSET
from experiments.pretrain import CONTEXT, TOKENS, small_unet, small_vae
from experiments.synth import write_dataset
from metrics import PACKAGES
from scheduler import DDPMScheduler

# One thread, here and in all processes that tests start: forked ones compute with one whatever this one does, and
# runs are compared to the last bit.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell turns off in a background job


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Gives every test the same random numbers, in whatever order and process it runs."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Path:
    """20 synthetic pairs of 64x64 pixels, in ten scenes."""
    folder = tmp_path_factory.mktemp("data") / "sen12"
    write_dataset(folder, pairs=20, size=64)
    return folder


def write_base(folder: Path, seed: int = 0, width: int = 8, **schedule) -> Path:
    """A stand-in for Stable Diffusion with random weights: factor 4, 4 channels in and out."""
    torch.manual_seed(seed)
    vae, unet = small_vae([width] * 3), small_unet([width, 2 * width])
    CDiffSET(vae, unet, torch.randn(1, TOKENS, CONTEXT), DDPMScheduler(**schedule)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """The folder of a small model to start from."""
    return write_base(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """The folder of a small model that translates, if badly."""
    folder = tmp_path_factory.mktemp("trained")
    model = CDiffSET.from_pretrained(write_base(folder / "base", width=16))
    torch.nn.init.normal_(model.unet.conv_out.weight[4:], std=0.1)  # of the variance
    model.save_pretrained(folder / "model")
    return folder / "model"


class Forked:
    """A process of its own that runs a script's main() as the shell would; its output goes to a file.

    It is forked, so PyTorch need not be imported again, and leads a process group, as in a terminal.
    """

    def __init__(self, main: Callable[..., int], *arguments, before: Callable[[], None] = lambda: None):
        handle, name = tempfile.mkstemp(suffix=".txt")
        os.close(handle)
        self.output = Path(name)

        def target():
            os.setsid()
            os.dup2(os.open(self.output, os.O_WRONLY), 1)
            os.dup2(1, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
            torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
            # tqdm's own is shared with the process that forked, which would wait for ever if this one dies with it
            tqdm.set_lock(threading.RLock())
            before()
            common.run(lambda: main(*arguments))

        self.process = multiprocessing.get_context("fork").Process(target=target)
        self.process.start()

    def signal(self, number: int, group: bool = False) -> None:
        """Sends a signal to the process, or to all of its group, and returns at once."""
        if self.process.is_alive():
            (os.killpg if group else os.kill)(self.process.pid, number)

    def wait(self) -> tuple[int, str]:
        """-> exit code (-9 if killed), the last line that it printed."""
        end = time.monotonic() + 400
        while self.process.exitcode is None:  # join() would also wait for its children
            assert time.monotonic() < end, "the process hangs"
            time.sleep(0.005)
        text = self.output.read_text()
        self.output.unlink()
        return self.process.exitcode, (text.strip().splitlines() or [""])[-1]


def run(main: Callable[..., int], *arguments, **options) -> tuple[int, str]:
    """Runs main() in a process of its own: -> exit code, last line."""
    return Forked(main, *arguments, **options).wait()


def run_with_kills(
    main: Callable[..., int],
    undisturbed: list[str],
    arguments: list[str],
    kills: int,
    share: float,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Runs main(undisturbed), then main(arguments) with `kill -9` at random moments, resuming each time, to its end.

    The moments lie in the first `share` of the time that the first run took, so that they strike on every machine.
    After each, `check` may look at what is there.
    """
    began = time.monotonic()
    code, line = run(main, undisturbed)
    assert code == 0, line
    took, moments, struck = time.monotonic() - began, random.Random(0), 0
    for _ in range(kills):
        process = Forked(main, [*arguments, "--resume"])
        time.sleep(moments.uniform(0, share * took))
        process.signal(signal.SIGKILL)
        struck += process.wait()[0] == -signal.SIGKILL
        check()
    code, line = run(main, [*arguments, "--resume"])
    assert code == 0, line
    print(f"\nundisturbed {took:.1f} s; killed {struck} times {time.monotonic() - began - took:.1f} s", end=" ")
    assert struck > kills // 2


def tensors_under(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors in the safetensors files below a folder, by file and name."""
    files = sorted(folder.rglob("[!.]*.safetensors"))
    return {f"{f.relative_to(folder)}:{name}": tensor for f in files for name, tensor in load_file(f).items()}


def assert_same_tensors(folder: Path, other: Path) -> None:
    """The same files with the same tensors, to the last bit."""
    ours, theirs = tensors_under(folder), tensors_under(other)
    assert ours and ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


# ----------------------------------------------------------------------------------------------------------
# Stand-ins for packages that need not be installed, with their interfaces


class LPIPS(nn.Module):
    """lpips 0.1.4's: the distance here is the mean absolute difference."""

    seen = []

    def __init__(self, net: str = "alex", verbose: bool = True):
        super().__init__()
        assert net == "vgg" and not verbose

    def forward(self, in0: torch.Tensor, in1: torch.Tensor) -> torch.Tensor:
        self.seen.append((in0, in1))
        return (in0 - in1).abs().mean(dim=(1, 2, 3), keepdim=True)


class InceptionV3(nn.Module):
    """pytorch-fid 0.3.0's: the features here are the mean colours."""

    BLOCK_INDEX_BY_DIM = {64: 0, 192: 1, 768: 2, 2048: 3}

    def __init__(self, output_blocks: list[int]):
        super().__init__()
        assert output_blocks == [3]

    def forward(self, inp: torch.Tensor) -> list[torch.Tensor]:
        assert not self.training and inp.min() >= 0 and inp.max() <= 1
        return [inp.mean(dim=(2, 3), keepdim=True)]


@pytest.fixture()
def packages(monkeypatch, tmp_path):
    """Stand-ins for lpips and pytorch-fid with their weights, which are empty files: -> the folder of these."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(LPIPS, "seen", [])
    for name, attribute in (("lpips", LPIPS), ("pytorch_fid", None), ("pytorch_fid.inception", InceptionV3)):
        module = types.ModuleType(name)
        if attribute:
            setattr(module, attribute.__name__, attribute)
        monkeypatch.setitem(sys.modules, name, module)
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    for _, url in PACKAGES.values():
        (folder / Path(url).name).touch()
    return folder
