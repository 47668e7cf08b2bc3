"""Caption -> image: the transformer of DALL-E (stage 2), sampling, and ranking without CLIP.

    import dalle
    pipeline = dalle.load("runs/demo/dalle")
    pictures = pipeline("a red circle above a small blue square", count=16, keep=4)

Names are imported when they are first used, so that `import dalle` opens one room, not the whole house.
"""

import importlib

_ROOMS = {"DALLE": "model", "DALLEConfig": "model", "Pipeline": "pipeline", "load": "pipeline"}
__all__ = sorted(_ROOMS)


def __getattr__(name: str):
    if name not in _ROOMS:
        raise AttributeError(f"module 'dalle' has no attribute {name!r}")
    return getattr(importlib.import_module(f"dalle.{_ROOMS[name]}"), name)
