import errno
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dvae import errors

ROOT = Path(__file__).resolve().parents[2]


def raising(error):
    def command():
        raise error

    return command


@pytest.mark.parametrize(
    "kind, code",
    [
        (errors.UserError, 2),
        (errors.DataError, 3),
        (errors.ArtefactError, 4),
        (errors.EnvironmentProblem, 5),
        (errors.NumericsError, 6),
    ],
)
def test_a_mistake_is_two_lines_and_a_code(kind, code, capsys):
    assert errors.report(raising(kind("the thing is wrong", "mend the thing"))) == code
    shown = capsys.readouterr()
    assert shown.err == "error: the thing is wrong\nhint: mend the thing\n"
    assert shown.out == ""


def test_debug_adds_the_traceback(capsys):
    assert errors.report(raising(errors.DataError("what", "hint")), debug=True) == 3
    shown = capsys.readouterr().err
    assert "Traceback" in shown and shown.endswith("error: what\nhint: hint\n")


def test_done_is_zero_and_silent(capsys):
    assert errors.report(lambda: "anything") == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "error, code", [(errors.Stopped(15), 143), (errors.Stopped(2), 130), (KeyboardInterrupt(), 130)]
)
def test_signals_have_their_codes(error, code, capsys):
    assert errors.report(raising(error)) == code
    assert "Traceback" not in capsys.readouterr().err


def test_the_machine_says_no(capsys):
    full = OSError(errno.ENOSPC, "No space left on device", "out/model")
    assert errors.report(raising(full)) == 5
    shown = capsys.readouterr().err
    assert shown.startswith("error: No space left on device (out/model)\nhint: ")


@pytest.mark.parametrize(
    "error, said",
    [
        (MemoryError(), "error: the memory is not enough\n"),
        (
            RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 139.8 GiB"),
            "error: the memory is not enough: 20.00 MiB more were asked for\n",
        ),
    ],
)
def test_too_little_memory_is_told_in_two_lines(error, said, capsys):
    assert errors.report(raising(error)) == 5
    assert capsys.readouterr().err == f"{said}hint: " + (
        "use a smaller batch or a smaller model, or --model.checkpointing true in stage 2\n"
    )


def test_torch_says_how_much_memory_it_lacks(capsys):
    assert errors.report(lambda: torch.empty(1 << 60, dtype=torch.uint8)) == 5
    assert capsys.readouterr().err.startswith(f"error: the memory is not enough: {1 << 60} bytes more were asked for\n")


def test_of_a_replacement_the_target_is_named(tmp_path, capsys):
    (tmp_path / ".part-1").touch()
    (tmp_path / "folder").mkdir()
    assert errors.report(lambda: os.replace(tmp_path / ".part-1", tmp_path / "folder")) == 5
    assert capsys.readouterr().err.startswith(f"error: Is a directory ({tmp_path / 'folder'})\n")


def test_our_own_mistakes_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        errors.report(lambda: 1 / 0)


def test_errors_travel_between_processes():
    for kind in (errors.UserError, errors.DataError, errors.NumericsError):
        error = pickle.loads(pickle.dumps(kind("what", "hint")))
        assert type(error) is kind and (error.what, error.hint, str(error)) == ("what", "hint", "what")


def test_a_reader_that_leaves_early_is_no_error():
    program = (
        "import sys; from dvae.errors import report\n"
        "def command():\n    for line in range(100_000): print('line', line)\n"
        "sys.exit(report(command))"
    )
    writer = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert writer.stdout.readline() == "line 0\n"
    writer.stdout.close()
    assert writer.stderr.read() == ""
    assert writer.wait() == 0
