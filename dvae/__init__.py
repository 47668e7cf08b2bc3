"""Images <-> tokens: the discrete VAE of DALL-E (stage 1).

This package owns pixels. It knows nothing of captions or of the transformer in `dalle`.
Names are imported when they are first used, so that `import dvae` opens one room, not the whole house.
"""

import importlib

_ROOMS = {"DVAE": "model", "DVAEConfig": "model", "load": "tokenizer"}
__all__ = sorted(_ROOMS)


def __getattr__(name: str):
    if name not in _ROOMS:
        raise AttributeError(f"module 'dvae' has no attribute {name!r}")
    return getattr(importlib.import_module(f"dvae.{_ROOMS[name]}"), name)
