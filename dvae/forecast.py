"""What a training takes, told before it takes it: memory, and the time to its end.

Memory is that of one update on tensors with shapes and without numbers (torch's FakeTensorMode), which cost nothing:
what each operation of the forward and backward pass would allocate, torch itself says. So this holds for every model,
loss and optimiser, and nothing has to be counted again when one of them changes. Knows neither Lightning nor a stage.
"""

import copy
import re
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from dvae.errors import EnvironmentProblem

# the precisions that are known here, and what is computed in 16 bits in them
PRECISIONS = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
SHORT = {"32": "32-true", "None": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}  # as Lightning takes them, too


class Stage(Protocol):
    """What is asked of a training."""

    def example(self, batch_size: int) -> dict[str, Any]:
        """A batch of the shapes that the training sees."""

    def step(self, batch: Any, update: int, batch_index: int) -> tuple[Tensor, Any]: ...
    def configure_optimizers(self) -> torch.optim.Optimizer: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...
    def buffers(self) -> Iterator[Tensor]: ...


class Living(TorchDispatchMode):
    """While it is entered, the bytes of all tensors that were made and live: `now`, and the `most` that there were."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()  # storages: views share one

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in tree_iter(made):
            if isinstance(tensor, Tensor):
                self.see(tensor.untyped_storage())
        return made

    def see(self, storage: torch.UntypedStorage) -> None:
        place, size = storage._cdata, storage.nbytes()
        if place in self.known:
            return
        self.known.add(place)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self.forget, place, size)

    def forget(self, place: int, size: int) -> None:
        self.known.discard(place)
        self.now -= size


def memory(stage: Stage, batch_size: int, precision: str, accumulates: bool, averages: bool) -> int:
    """Bytes of all tensors at the height of an update on one device: weights, their averages, gradients, moments, what
    the backward pass needs and what it makes on its way.

    The allocator's gaps, kernels' working memory and, with several devices, the buffers that exchange gradients come on
    top.

    Args:
        stage: the training, not changed by this.
        batch_size: pictures at a time.
        precision: one of `PRECISIONS`.
        accumulates: whether gradients of batches before it are there already.
        averages: whether averaged weights are kept.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    own = (*stage.parameters(), *stage.buffers())
    stage = copy.deepcopy(stage, {id(tensor): mode.from_tensor(tensor) for tensor in own})  # of no numbers
    with mode, Living() as living:
        for tensor in (*stage.parameters(), *stage.buffers()):
            living.see(tensor.untyped_storage())
        optimiser = stage.configure_optimizers()
        for parameter in stage.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimiser.step()  # from here on it has its moments
        if not accumulates:
            optimiser.zero_grad()
        with _autocast(precision):
            loss, _ = stage.step(stage.example(batch_size), 0, 0)
        loss.backward()
        optimiser.step()
    return living.most + averages * sum(tensor.nbytes for tensor in own)


def _autocast(precision: str) -> AbstractContextManager:
    """As Lightning casts; on the CPU, whose rules are much the same."""
    dtype = PRECISIONS[precision]
    return torch.autocast("cpu", dtype, cache_enabled=False) if dtype else nullcontext()


def built(make: Callable[[], nn.Module]) -> nn.Module:
    """What `make` builds, if the machine has room for its weights: they are counted before they are there.

    Raises:
        EnvironmentProblem: there is no room.
    """
    with torch.device("meta"):
        weights = sum(parameter.nbytes for parameter in make().parameters())
    free = available(torch.device("cpu"))
    if free is not None and weights > free:
        raise EnvironmentProblem(
            f"the memory is not enough: the weights alone take {size(weights)}, and {size(free)} are there",
            "give smaller sizes of the model, or a machine with more memory",
        )
    return make()


def check(
    need: Callable[[int, int], int], batch_size: int, accumulate: int, interval: int, free: int, other: str = ""
) -> None:
    """Refuse a training that the memory cannot hold, and say which settings make it one that it can.

    Args:
        need: bytes that so many pictures at a time take, so many times to an update.
        batch_size: pictures at a time, as asked for.
        accumulate: batches to an update, as asked for.
        interval: batches from one validation to the next, as asked for.
        free: bytes that there are.
        other: a setting of the stage that takes less, with its value; "" where there is none.

    Raises:
        EnvironmentProblem: it is not enough.
    """
    asked = need(batch_size, accumulate)
    if asked <= free:
        return
    fitting, times, ways = batch_size, 1, []
    while fitting % 2 == 0:
        fitting, times = fitting // 2, 2 * times
        if need(fitting, accumulate * times) <= free:
            ways = [
                f"--data.batch_size {fitting} --trainer.accumulate_grad_batches {accumulate * times} "
                f"--trainer.val_check_interval {interval * times} for as many pictures an update"
            ]
            break
    ways += [f"{other}, which takes less"] * bool(other)
    raise EnvironmentProblem(
        f"the memory is not enough: {batch_size:,} pictures at a time need about {size(asked)}, and {size(free)} are "
        "there",
        f"give {'; or '.join(ways or ['smaller sizes of the model, or a machine with more memory'])}",
    )


def available(device: torch.device, system: Path = Path("/")) -> int | None:
    """Bytes of memory that `device` has left; None where that cannot be known.

    On Linux main memory without swapping, at most what the control group may have.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    try:
        free = re.search(r"^MemAvailable: +(\d+) kB$", (system / "proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        return None
    if not free:
        return None
    bounds = [int(free[1]) * 1024]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # of versions 2 and 1; of none outside a container
        path = system / "sys/fs/cgroup" / name
        if path.is_file() and (said := path.read_text().strip()).isdigit():  # or "max"
            bounds.append(int(said))
    return min(bounds)


def fast_bfloat16() -> bool:
    """Whether torch's kernels for this CPU take bfloat16; true where they cannot be asked."""
    return not torch.backends.mkldnn.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def size(count: int) -> str:
    """Bytes for people."""
    return f"{count / 2**20:,.0f} MiB" if count < 10 * 2**30 else f"{count / 2**30:,.1f} GiB"


def to_the_end(seconds: float, updates: int, now: datetime) -> str:
    """One line: how long an update takes, and when the last of so many `updates` will be done."""
    rest = seconds * updates
    end = now + timedelta(seconds=rest)
    when = f"{end:at %H:%M}" if end.date() == now.date() else f"{end:on %d %B %Y at %H:%M}"
    pace = f"{seconds:.0f}" if seconds >= 10 else f"{seconds:.2g}"
    return f"{pace} s an update: {updates:,} updates end in about {_duration(rest)}, {when}"


def _duration(seconds: float) -> str:
    for most, unit, name in ((90, 1, "s"), (5400, 60, "min"), (2 * 86400, 3600, "hours")):
        if seconds < most:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds / 86400:.1f} days"
