"""Randomness as a function, never as a state.

Every random decision is drawn from a generator that is made on the spot from what it belongs to: the run's seed and
the epoch, index, step or rank. A resumed run therefore needs to remember no generator, and the number of loader
workers, validations or log lines cannot shift anything.
"""

import hashlib

import numpy as np
import torch


def key(*parts: int | str) -> int:
    """A 63-bit number that depends on every part and on their order; equal on every machine."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=8).digest(), "little") >> 1


def generator(*parts: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator for torch, keyed by `parts`; that of another kind of device gives other numbers."""
    return torch.Generator(device).manual_seed(key(*parts))


def rng(*parts: int | str) -> np.random.Generator:
    """A generator for numpy, keyed by `parts`."""
    return np.random.Generator(np.random.Philox(key(*parts)))
