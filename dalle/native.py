"""Attention of single states by a compiled loop, `attend.c`, where this machine has a C compiler.

A step of drawing writes one key and one value for each sequence and head, and reads all those before them. For a single
query torch does this at half the rate of the memory or less (README, "Speed"); `Attention` remains what is computed, up
to rounding, and what computes everything else.
"""

import ctypes
import functools
import hashlib
import os
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
from dvae.files import write_bytes

SOURCE = Path(__file__).with_name("attend.c")


class Native(Attention):
    """The layers of an `Attention` on a CPU, in float32; its single states attend by what `attend` gives."""

    def __init__(self, plain: Attention, function: Callable[..., None]):
        nn.Module.__init__(self)
        self.heads, self.qkv, self.out, self.function = plain.heads, plain.qkv, plain.out, function

    def forward(self, x: Tensor, store: Store | None = None, reads: Reads | None = None) -> Tensor:
        """As of `Attention`."""
        slots = reads is None or isinstance(reads, Tensor) and reads.dtype == torch.int64
        if x.shape[1] > 1 or not isinstance(store, Store) or not slots:
            return super().forward(x, store, reads)
        qkv, (cache, layer) = self.qkv(x), store
        assert qkv.dtype == cache.stored.dtype == torch.float32 and qkv.is_contiguous()  # it reads bare memory
        stored, at = cache.stored[layer], cache.slot(layer)
        _, rows, heads, _, size = stored.shape
        y = torch.empty(rows, 1, heads * size)
        first, others, more = at + 1, None, 0
        if reads is not None:
            slots = reads + cache.rooms[layer]
            first, others, more = cache.first, slots.data_ptr(), len(slots)
        places = qkv.data_ptr(), stored.data_ptr(), y.data_ptr()
        self.function(*places, rows, heads, size, *stored.stride()[:3], at, first, others, more)
        return self.out(y)


@functools.cache
def attend() -> Callable[..., None] | None:
    """The function of `attend.c`; None without a compiler for it, with a warning, and on systems other than Linux.

    It is compiled when it is first asked for, and kept in the user's cache folder.
    """
    if sys.platform != "linux":
        return None
    try:
        function = ctypes.CDLL(str(_compiled())).attend
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:  # no compiler, home, room or thread library
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        warn(
            f"attention is not compiled here, and drawing slower for it: {said[0] if said else error}",
            "install gcc, or name a C compiler with OpenMP in CC",
        )
        return None
    function.argtypes = [*[ctypes.c_void_p] * 3, *[ctypes.c_int64] * 8, ctypes.c_void_p, ctypes.c_int64]
    function.restype = None
    return function


def _compiled() -> Path:
    """`attend.c` as a library for this kind of processor, which is made if there is none yet."""
    flags = ["-std=c11", "-O3", "-fPIC", "-fopenmp", "-ffast-math", "-fno-finite-math-only"]  # NaN stays NaN
    if torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        flags += ["-mavx2", "-mfma"]
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = hashlib.sha256(SOURCE.read_bytes() + " ".join(flags).encode()).hexdigest()[:16]
    library = caches / "trainable-dalle" / f"attend-{name}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory() as folder:
            parts, made = f"{folder}/attend.o", f"{folder}/attend.so"
            compiler, quiet = shlex.split(os.environ.get("CC", "cc")), {"check": True, "capture_output": True}
            subprocess.run([*compiler, *flags, "-c", str(SOURCE), "-o", parts], text=True, **quiet)
            # -fopenmp would now bring threads of its own, where it is to find those of torch
            subprocess.run([*compiler, "-shared", "-nostdlib", parts, "-o", made], text=True, **quiet)
            write_bytes(library, Path(made).read_bytes())
    return library
