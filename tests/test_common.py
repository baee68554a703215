"""What all scripts share: one-line errors and exit codes, devices, and files that are whole or absent."""

import argparse
import ctypes
import importlib
import os
import re
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
from hostile import outcome

import common
from common import atomic, exclusive, one_line, read_json

ROOT = Path(common.__file__).parent
PATHS = [path.relative_to(ROOT) for path in (*ROOT.glob("*.py"), *ROOT.glob("experiments/*.py"))]
SCRIPTS = sorted(".".join(path.with_suffix("").parts) for path in PATHS if "    run(main)" in (ROOT / path).read_text())


def fail(error: BaseException):
    raise error


# ----------------------------------------------------------------------------------------------------------
# Scripts


@pytest.mark.parametrize(
    "error, line",
    [
        (ValueError("so\nand \x1b[2Jso"), "error: so and \\x1b[2Jso"),
        (OSError("so"), "error: so"),
        (MemoryError("so"), "error: out of memory: so"),
        (RuntimeError("CUDA out of memory"), "error: out of memory: CUDA out of memory"),
    ],
)
def test_errors_that_a_user_can_mend_are_one_line_and_exit_code_2(error, line):
    assert outcome(fail, error) == (2, [], [line])


def test_bugs_keep_their_traceback():
    for error in (KeyError("missing"), RuntimeError("shapes differ")):
        done = outcome(fail, error)
        assert done.code == 1 and "Traceback" in done.err[0]


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_unwind_the_stack_and_set_the_exit_code(number, code):
    def main():
        try:
            os.kill(os.getpid(), number)
            time.sleep(60)
        finally:
            print("tidy")

    assert outcome(main) == (code, ["tidy"], [])


def test_a_long_error_is_cut_and_names_cannot_control_the_terminal():
    assert one_line("a\n b\tc\x9b") == "a b c\\x9b"
    assert len(one_line("\x1b" * 5000)) <= 1000 and one_line("a" * 2000 + "end").endswith("aend")


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_s_help_shows_commands_and_describes_every_option(name, monkeypatch, capsys):
    main, seen, parse_args = importlib.import_module(name).main, [], argparse.ArgumentParser.parse_args
    monkeypatch.setattr(
        argparse.ArgumentParser, "parse_args", lambda parser, *_: seen.append(parser) or parse_args(parser, ["--none"])
    )
    with pytest.raises(SystemExit) as end:
        main([])
    assert end.value.code == 2
    assert re.fullmatch("error: .*; see --help\n", capsys.readouterr().err)
    text = seen[0].format_help()
    assert f"python {name}.py " in text or f"python -m {name}" in text
    for action in seen[0]._actions:
        assert action.help, f"{action.option_strings} is not described"
        if action.default not in (None, False, argparse.SUPPRESS):
            assert "default" in action.help, f"{action.option_strings} does not say its default"


def test_argument_types_take_whole_numbers_in_range():
    assert (
        common.positive("12") == 12 and common.seed_number("0") == 0 and common.seed_number("4294967295") == 2**32 - 1
    )
    for kind, texts in (
        (common.positive, ("0", "-1", "1.5", "", "²")),
        (common.seed_number, ("-1", "4294967296", "a")),
    ):
        for text in texts:
            with pytest.raises(argparse.ArgumentTypeError, match="is not a whole number"):
                kind(text)


# ----------------------------------------------------------------------------------------------------------
# Devices


def test_a_device_that_is_not_there_is_refused():
    assert common.choose_device("cpu") == "cpu"
    for name in ("nonsense", "meta", "privateuseone"):
        with pytest.raises(ValueError, match=f"--device {name} cannot be used here"):
            common.choose_device(name)


@pytest.mark.parametrize(
    "device, machine, sampling, training",
    [
        ("cpu", "flags : avx512f avx512_bf16 amx_bf16 amx_tile", "bfloat16", "bfloat16"),
        ("cpu", "flags : avx2 avx512_bf16", "bfloat16", "bfloat16"),
        ("cpu", "flags : avx2 avx512f", "float32", "float32"),
        ("cpu", None, "float32", "float32"),  # no /proc/cpuinfo, as on macOS
        ("mps", "flags : amx_bf16", "float32", "float32"),
        ("cuda", (9, 0), "bfloat16", "bfloat16"),
        ("cuda:1", (8, 0), "bfloat16", "bfloat16"),
        ("cuda", (7, 5), "float16", "float32"),
    ],
)
def test_the_dtype_is_the_fast_one_of_the_machine(tmp_path, monkeypatch, device, machine, sampling, training):
    if isinstance(machine, str):
        (tmp_path / "cpuinfo").write_text(machine)
    monkeypatch.setattr(common, "Path", lambda name: tmp_path / Path(name).name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda of: machine if of == device else None)
    assert common.choose_dtype(None, device) == sampling
    assert common.choose_dtype(None, device, training=True) == training
    assert common.choose_dtype("float32", device) == "float32"


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="only glibc has the setting")
def test_freed_memory_is_kept_for_the_next_tensor():
    def main():
        torch.ones(2**25)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2**24)  # 64 MB, 16,384 pages
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

    assert int(outcome(main).out[0]) < 1000


# ----------------------------------------------------------------------------------------------------------
# Files


def test_a_file_is_written_whole_with_the_usual_permissions_or_the_old_one_stays_alone(tmp_path):
    path, usual = tmp_path / "model.json", tmp_path / "usual"
    usual.touch()
    with atomic(path) as temporary:
        temporary.write_text("old")
        temporary.chmod(0o600)
    assert path.stat().st_mode == usual.stat().st_mode
    with pytest.raises(RuntimeError), atomic(path) as temporary:
        temporary.write_text("half")
        assert path.read_text() == "old" and temporary.suffix == ".json"
        raise RuntimeError
    assert set(tmp_path.iterdir()) == {path, usual} and path.read_text() == "old"


def test_a_folder_has_one_writer_at_a_time(tmp_path):
    def main():
        with exclusive(tmp_path / "new"):
            print("mine")

    with exclusive(tmp_path / "new"):
        done = outcome(main)
        assert done.code == 2 and not done.out and "another run is writing there" in done.err[0]
    assert outcome(main).out == ["mine"]


def test_json_comes_back_and_what_is_not_a_json_object_is_refused_by_name(tmp_path):
    path = tmp_path / "new" / "a.json"
    common.write_json(path, {"ü": [1, None]})
    assert read_json(path) == {"ü": [1, None]}
    for content in (b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000, b'{"a": "%s"}' % (b" " * common.JSON_MAX)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.json: (not a readable JSON file|expected a JSON object)"):
            read_json(path)
    os.mkfifo(tmp_path / "pipe.json")  # reading it would block for ever
    for name in ("pipe.json", "new"):
        with pytest.raises(ValueError, match=f"{name}: not a file"):
            read_json(tmp_path / name)
