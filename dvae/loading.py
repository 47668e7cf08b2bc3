"""Batches that are made ahead: loading processes, whose mistakes come home whole and whose end is told.

    for images in once(dataset, 64, workers=1):  # each row once, in order, whatever the number of workers
        ...

A data set here answers a list of (epoch, index) pairs with a finished batch. This file knows nothing of what is in it,
nor of Lightning.
"""

import contextlib
import signal
import sys
import warnings
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any

from torch.utils.data import DataLoader, Dataset

from dvae.errors import EnvironmentProblem, UserError


def whole(batch: Any) -> Any:
    """Collate nothing: our data sets answer a list of rows with a finished batch."""
    return batch


class Told(Dataset):
    """Answers a mistake of the user or the disk instead of a batch: of one that is raised torch carries only a text."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __getitems__(self, rows: list[tuple[int, int]]) -> Any:
        try:
            return self.dataset.__getitems__(rows)
        except (UserError, OSError) as error:
            return error


def deaf(worker: int) -> None:
    """A Ctrl-C or a termination may reach the loading processes too; only their parent decides what it means."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    sys.excepthook = but_orphaned


def but_orphaned(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Tell what went wrong in a loading process, unless it is only that its parent ended amid a batch."""
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)


class Once:
    """A batch sampler of each row once, in order, as (epoch 0, index) pairs."""

    def __init__(self, length: int, batch: int):
        self.length, self.batch = length, batch

    def __len__(self) -> int:
        return -(-self.length // self.batch)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for first in range(0, self.length, self.batch):
            yield [(0, index) for index in range(first, min(first + self.batch, self.length))]


def loader(
    dataset: Dataset, order: Iterable[list[tuple[int, int]]], workers: int, persistent: bool = False
) -> DataLoader:
    """The batches of an order, or in place of one the mistake that was made with it; 0 workers make them when asked."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice on the number of workers
        return DataLoader(
            Told(dataset),
            batch_sampler=order,
            collate_fn=whole,
            num_workers=workers,
            worker_init_fn=deaf,
            persistent_workers=persistent and workers > 0,
        )


def once(dataset: Dataset, batch: int, workers: int) -> Iterator[Any]:
    """Batches of each row once, in order; raises the mistake that was made with one."""
    for made in loader(dataset, Once(len(dataset), batch), workers):
        if isinstance(made, Exception):
            raise made
        yield made


@contextlib.contextmanager
def deaths_told(hint: str) -> Iterator[None]:
    """Say in words that a loading process died, which torch raises wherever the work is just then."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker (pid" not in str(error):  # others come from within it, with their own reasons
            raise
        raise EnvironmentProblem(f"a loading process died: {' '.join(str(error).split())}", hint) from error
