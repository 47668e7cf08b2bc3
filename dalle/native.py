"""Attention of single states by a compiled loop, `attend.c`, on a Linux machine that has a C compiler.

A step of drawing stores one key and one value for each sequence and head, and reads all those before them. torch takes
about twice as long for this (README, "Speed"). What comes out is that of `Attention`, up to rounding; several states at
a time, and masks, are left to it.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from dalle.model import Attention, Reads, Store
from dvae.errors import warn

SOURCE = Path(__file__).with_name("attend.c")


class Native(Attention):
    """The layers of an `Attention` on a CPU, in float32, whose single states attend by `function`, see `attend`."""

    def __init__(self, plain: Attention, function: Callable[..., None]):
        nn.Module.__init__(self)
        self.heads, self.qkv, self.out, self.function = plain.heads, plain.qkv, plain.out, function

    def forward(
        self, x: Tensor, store: Callable[..., Tensor] | None = None, reads: Reads | None = None
    ) -> Tensor:  # (B, n, E) -> (B, n, E)
        """As of `Attention`."""
        masked = reads is not None and not (isinstance(reads, Tensor) and reads.dtype == torch.int64)
        if x.shape[1] > 1 or not isinstance(store, Store) or masked:
            return super().forward(x, store, reads)
        qkv, (cache, layer) = self.qkv(x), store
        stored, at = cache.stored[layer], cache.slot(layer)
        _, rows, heads, slots, size = stored.shape
        # what is called knows bare memory only
        assert qkv.shape == (rows, 1, 3 * heads * size) and qkv.is_contiguous() and at < slots
        assert qkv.dtype == stored.dtype == torch.float32
        y = qkv.new_empty(rows, 1, heads * size)
        first, others, more = at + 1, None, 0
        if reads is not None:
            window = reads + cache.rooms[layer]  # has to live until the call is over
            first, others, more = cache.first, window.data_ptr(), len(window)
        places = qkv.data_ptr(), stored.data_ptr(), y.data_ptr()
        self.function(*places, rows, heads, size, *stored.stride()[:3], at, first, others, more)
        return self.out(y)


@functools.cache
def attend() -> Callable[..., None] | None:
    """The function of `attend.c`, compiled when it is first asked for and kept in the user's cache folder; None on
    other systems than Linux, and with a warning where it cannot be compiled or loaded."""
    if sys.platform != "linux":
        return None
    try:
        function = _loaded()
    except subprocess.CalledProcessError as error:
        return _without((error.stderr.strip() or f"{error.cmd[0]} ended with {error.returncode}").splitlines()[0])
    except (OSError, RuntimeError, ValueError, AttributeError) as error:  # no compiler, folder or threads
        return _without(str(error))
    function.argtypes = [*[ctypes.c_void_p] * 3, *[ctypes.c_int64] * 8, ctypes.c_void_p, ctypes.c_int64]
    function.restype = None
    return function


def _without(reason: str) -> None:
    warn(
        f"attention is not compiled here, and drawing slower for it: {reason}",
        "install gcc, or name a C compiler with OpenMP in CC, and see that your cache folder can be written",
    )


def _loaded() -> Callable[..., None]:
    """The function from the library in the cache folder, which is made anew if there is none that can be loaded."""
    compiler = shlex.split(os.environ.get("CC") or "cc")
    flags = ["-std=c11", "-O3", "-fPIC", "-fopenmp", "-ffast-math", "-fno-finite-math-only"]  # NaN stays NaN
    if torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        flags += ["-mavx2", "-mfma"]
    made_of = SOURCE.read_text(), *compiler, *flags, platform.machine()
    caches = Path(os.environ.get("XDG_CACHE_HOME", ""))
    caches = (caches if caches.is_absolute() else Path.home() / ".cache") / "trainable-dalle"
    library = caches / f"attend-{hashlib.sha256(repr(made_of).encode()).hexdigest()[:16]}.so"
    with contextlib.suppress(OSError):
        return ctypes.CDLL(str(library)).attend
    caches.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=caches) as folder:
        parts, made = f"{folder}/attend.o", f"{folder}/attend.so"
        run = functools.partial(subprocess.run, check=True, capture_output=True, text=True)
        run([*compiler, *flags, "-c", str(SOURCE), "-o", parts])
        # Linked without -fopenmp and its libraries, for it is to find the threads that torch has; and without start
        # files, for those of -ffast-math would make the whole process round small numbers to 0.
        run([*compiler, "-shared", "-nostdlib", parts, "-o", made])
        function = ctypes.CDLL(made).attend  # before it is kept, for not all compilers' code finds these threads
        os.replace(made, library)
    return function
