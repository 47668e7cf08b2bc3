"""Whoever makes the batches, they are the same, and what goes wrong with one is told as if it were made at home."""

import contextlib
import multiprocessing
import os
import signal
import sys
import warnings

import pytest
from torch.utils.data import DataLoader, Dataset

from dvae import loading
from dvae.errors import DataError, EnvironmentProblem
from dvae.loading import but_orphaned, deaths_told, loader, once


class Squares(Dataset):
    """Raises `mistake` at row 5."""

    def __init__(self, length, mistake=None):
        self.length, self.mistake = length, mistake

    def __len__(self):
        return self.length

    def __getitems__(self, rows):
        if self.mistake and (0, 5) in rows:
            raise self.mistake
        return [index**2 for _, index in rows]


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("length, batch", [(0, 3), (1, 3), (6, 3), (7, 3), (2, 9)])
def test_each_row_comes_once_and_in_order(length, batch, workers):
    batches = list(once(Squares(length), batch, workers))
    assert sum(batches, []) == [index**2 for index in range(length)]
    assert all(len(some) == batch for some in batches[:-1])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "mistake", [DataError("a.png changed", "bring it back"), OSError(5, "Input/output error", "some/file")], ids=repr
)
def test_mistakes_come_home_whole_and_in_their_turn(mistake, workers):
    batches = once(Squares(9, mistake), 2, workers)
    assert [next(batches), next(batches)] == [[0, 1], [4, 9]]
    with pytest.raises(type(mistake)) as caught:
        next(batches)
    assert vars(caught.value) == vars(mistake) and str(caught.value) == str(mistake)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_loading_processes_leave_signals_to_their_parent(number):
    """A shell sends Ctrl-C, and many a scheduler its termination, to all processes at once."""
    batches = iter(DataLoader(list(range(40)), num_workers=1, worker_init_fn=loading.deaf, timeout=60))
    next(batches)
    os.kill(batches._workers[0].pid, number)
    assert [int(row) for row in batches] == list(range(1, 40))


def test_a_loading_process_that_is_killed_is_told():
    with pytest.raises(EnvironmentProblem, match=r"^a loading process died: .*pid.*$") as caught:
        with deaths_told("take fewer"):
            batches = once(Squares(40), 1, 1)
            next(batches)
            for process in multiprocessing.active_children():
                os.kill(process.pid, signal.SIGKILL)
                process.join()
            list(batches)
    assert caught.value.hint == "take fewer"
    for error in (RuntimeError("some other"), ValueError("DataLoader worker (pid")):
        with pytest.raises(type(error)), deaths_told("take fewer"):
            raise error


def test_nobody_is_left_behind_when_the_parent_gives_up():
    before = multiprocessing.active_children()
    with contextlib.closing(once(Squares(40), 1, 2)) as batches:
        next(batches)
        assert len(multiprocessing.active_children()) == len(before) + 2
    del batches
    assert multiprocessing.active_children() == before


def test_more_processes_than_cores_are_the_users_choice():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loader(Squares(3), [[(0, 1)]], workers=1000)


def test_a_loading_process_says_nothing_of_the_end_of_its_parent(monkeypatch):
    told = []
    monkeypatch.setattr(sys, "__excepthook__", lambda *what: told.append(what[0]))
    for error in (ConnectionResetError(), EOFError(), ValueError(), MemoryError()):
        but_orphaned(type(error), error, None)
    assert told == [ValueError, MemoryError]
