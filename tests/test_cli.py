"""cli.py and files.py: one-line errors, exit codes, and files that are whole or not there."""

import argparse
import ctypes
import importlib
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from common import atomic, choose_device

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("synth", "pretrain", "train", "sample", "evaluate", "confidence", "claims")


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("error", ["ValueError('so\\nand so')", "OSError('so\\nand so')"])
def test_the_users_errors_are_one_line_and_exit_code_2(error):
    done = python(f"import cli\ndef main(): raise {error}\ncli.run(main)")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: so and so\n")


def test_our_own_errors_keep_their_traceback():
    done = python("import cli\ncli.run(lambda: {}['missing'])")
    assert done.returncode == 1 and "Traceback" in done.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_unwind_and_set_the_exit_code(number, code):
    program = (
        "import cli, time\ndef main():\n try:\n  print('up', flush=True); time.sleep(60)\n finally: print('tidy')\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program + "common.run(main)"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "up\n"
    process.send_signal(number)
    assert process.communicate(timeout=20)[0] == "tidy\n"
    assert process.returncode == code


def test_a_device_that_is_not_there_is_refused():
    assert choose_device("cpu") == "cpu"
    for name in ("nonsense", "meta", "privateuseone"):
        with pytest.raises(ValueError, match=f"--device {name} cannot be used here"):
            choose_device(name)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    (tmp_path / "model.json").write_text("old")
    with pytest.raises(RuntimeError), atomic(tmp_path / "model.json") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["model.json"]
    assert (tmp_path / "model.json").read_text() == "old"


def test_a_written_file_has_the_usual_permissions(tmp_path):
    (tmp_path / "usual").touch()
    with atomic(tmp_path / "ours") as temporary:
        temporary.touch(0o600)
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "usual").stat().st_mode


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_shows_a_command_to_paste_and_describes_every_option(name, monkeypatch, capsys):
    seen = []

    def take(parser, *_):
        seen.append(parser)
        parser.exit()

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", take)
    with pytest.raises(SystemExit):
        importlib.import_module(name).main([])
    seen[0].print_help()
    assert f"python {name}.py " in capsys.readouterr().out
    for action in seen[0]._actions:
        assert action.help, f"{action.option_strings} is not described"
        if action.default not in (None, False, argparse.SUPPRESS):
            assert "default" in action.help, f"{action.option_strings} does not say its default"


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_wrong_option_is_one_line_and_exit_code_2(name):
    done = subprocess.run([sys.executable, f"{name}.py", "--nonsense"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="glibc's malloc alone is told to keep memory")
def test_freed_memory_is_kept():
    """So that the pages of a tensor are cleared by the system once, not each time that one is made."""
    program = (
        "import cli, resource, torch\n"
        "def main():\n"
        " torch.ones(2**27)\n"
        " before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        " torch.ones(2**26)\n"  # 256 MB, 65,536 pages
        " print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)\n"
    )
    assert int(python(program + "common.run(main)").stdout) < 1000
