"""Files of weights that others wrote -> tensors, without running anything in them.

Files of torch hold pickles, and a pickle is a program. Here it is read as a text: opcode by opcode, by closed lists of
opcodes and names, into dicts, lists, tensors and `Inert` records. Nothing that a file names is looked up, imported or
called, all tensors together are no larger than the file, and the work grows no faster than it. Knows no model.
"""

import io
import math
import pickletools
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from dvae.errors import ArtefactError

_LARGEST_PICKLE = 1 << 20  # bytes; the names and shapes of a checkpoint, its numbers stand beside it
_LONGEST_KEY = 200  # characters
_ZIP = b"PK\x03\x04"
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # what files from before torch 1.6 begin with
FETCH_AGAIN = "fetch the file again from those who published it, and compare its size with theirs"

_DTYPES = {
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.DoubleStorage": torch.float64,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}

# Classes whose objects a file may hold: of each only the name and the attributes are kept.
_CLASSES = {
    "dall_e.encoder.Encoder",
    "dall_e.encoder.EncoderBlock",
    "dall_e.decoder.Decoder",
    "dall_e.decoder.DecoderBlock",
    "dall_e.utils.Conv2d",
    "torch.nn.modules.activation.ReLU",
    "torch.nn.modules.container.Sequential",
    "torch.nn.modules.linear.Identity",
    "torch.nn.modules.pooling.MaxPool2d",
    "torch.nn.modules.upsampling.Upsample",
    # of a Lightning checkpoint, beside its state dict: callbacks and hyperparameters
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata",
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    "omegaconf.nodes.AnyNode",
    "typing.Any",
    "__builtin__.dict",
    "__builtin__.list",
    "__builtin__.long",
}


# What reading a damaged file may raise.
_DAMAGE = (ValueError, TypeError, LookupError, RuntimeError, OverflowError, EOFError, struct.error)
_DAMAGE += (zipfile.BadZipFile, safetensors.SafetensorError)


class _Refused(Exception):
    """A file holds what no file of weights needs."""


@dataclass(frozen=True)
class Name:
    """A class or function that a file mentions."""

    path: str


@dataclass(eq=False)
class Inert:
    """An object of a file: the name of its class, and its attributes."""

    kind: str
    state: dict[str, Any] = field(default_factory=dict)


def read(path: str | Path) -> Any:
    """What a file of torch or safetensors holds: tensors in dicts, lists, tuples and `Inert` records. Runs nothing.

    Both formats of torch are read, the archive and the one from before torch 1.6.

    Raises:
        ArtefactError: it is missing, damaged, or holds more than weights.
    """
    source = Path(path)
    if not source.is_file():
        raise ArtefactError(f"there is no file {path}", "name a file that you have fetched")
    size = source.stat().st_size
    try:
        with open(source, "rb") as file:
            start = file.read(512)
            file.seek(0)
            # safetensors begin with the length of the JSON that follows
            if start[8:9] == b"{" and 8 + int.from_bytes(start[:8], "little") <= size:
                return safetensors.torch.load(file.read())
            if start.startswith(_ZIP):
                return _read_archive(file, size)
            if start.startswith(_LEGACY):
                return _read_legacy(file, size)
    except _Refused as error:
        raise ArtefactError(f"{path} was not read: {error}", FETCH_AGAIN) from error
    except _DAMAGE as error:
        raise ArtefactError(f"{path} is damaged: it was cut or changed since it was written", FETCH_AGAIN) from error
    web = start.lstrip().startswith(b"<")
    what = "is empty" if not size else "is a web page" if web else "is no file of torch or safetensors"
    raise ArtefactError(f"{path} {what}", FETCH_AGAIN)


def _read_archive(file: BinaryIO, size: int) -> Any:
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        pickles = [name for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1:
            raise _Refused("it is a zip archive, but no checkpoint of torch")
        folder = pickles[0].removesuffix("data.pkl")
        if f"{folder}byteorder" in names and _record(archive, f"{folder}byteorder", size) != b"little":
            raise _Refused("its numbers are big-endian")
        pickle = _Pickle(size)
        tree = pickle.read(io.BytesIO(_record(archive, pickles[0], _LARGEST_PICKLE)))
        for key, flat in pickle.storages.items():
            content = _record(archive, f"{folder}data/{key}", size)
            if len(content) != flat.nbytes:
                raise _Refused(f"it declares {flat.nbytes:,} bytes of numbers and holds {len(content):,}")
            _bytes(flat)[:] = content
    return tree


def _record(archive: zipfile.ZipFile, name: str, most: int) -> bytes:
    """One record, compared with its checksum; torch compresses none."""
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.file_size > most:
        raise _Refused("it is compressed, or larger than it can be")
    return archive.read(info)


def _read_legacy(file: BinaryIO, size: int) -> Any:
    """From before torch 1.6, of `size` bytes: pickles in a row, then all numbers, each storage after its length."""
    head, pickle = io.BytesIO(file.read(_LARGEST_PICKLE)), _Pickle(size)
    head.seek(len(_LEGACY))
    version, machine, tree, keys = (pickle.read(head) for _ in range(4))
    if version != 1001 or _of(dict, machine).get("little_endian") is not True:
        raise _Refused("it is of an unknown version, or its numbers are big-endian")
    file.seek(head.tell())
    for key in _of(list, keys):
        flat = pickle.storages[_of(str, key)]
        if int.from_bytes(file.read(8), "little") != len(flat) or file.readinto(_bytes(flat)) != flat.nbytes:
            raise _Refused("its numbers are cut off")
    if set(keys) != pickle.storages.keys():
        raise _Refused("it does not hold all numbers that it declares")
    return tree


def _bytes(flat: Tensor) -> memoryview:
    return memoryview(flat.view(torch.uint8).numpy())


class _Pickle:
    """Reads pickles of protocol 2, as torch writes them; tensors are left to be filled, see `storages`.

    Args:
        limit: bytes of numbers that they may declare, and of tensors that they may make of these.
    """

    def __init__(self, limit: int):
        self.undeclared = self.unmade = limit
        self.storages: dict[str, Tensor] = {}  # flat and empty, by the key under which the file holds their numbers

    def read(self, stream: BinaryIO) -> Any:
        """The tree that one pickle describes; the stream stands behind it then.

        Raises:
            _Refused: it holds more than weights.
            one of _DAMAGE: it is damaged.
        """
        stack: list[Any] = []
        marks: list[int] = []
        memo: dict[int, Any] = {}

        def marked() -> list[Any]:
            start = marks.pop()
            items = stack[start:]
            del stack[start:]
            return items

        for opcode, argument, _ in pickletools.genops(stream):
            match opcode.name:
                case "PROTO":
                    if argument != 2:
                        raise _Refused(f"it is a pickle of protocol {argument}, and torch writes protocol 2")
                case "STOP":
                    return stack.pop()
                case "MARK":
                    marks.append(len(stack))
                case "BINPUT" | "LONG_BINPUT":
                    memo[argument] = stack[-1]
                case "BINGET" | "LONG_BINGET":
                    stack.append(memo[argument])
                case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE":
                    stack.append(argument)
                case "NONE" | "NEWTRUE" | "NEWFALSE":
                    stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode.name])
                case "EMPTY_DICT":
                    stack.append({})
                case "EMPTY_LIST":
                    stack.append([])
                case "EMPTY_TUPLE":
                    stack.append(())
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    count = int(opcode.name[-1])
                    stack[-count:] = [tuple(stack[-count:])]
                case "TUPLE":
                    stack.append(tuple(marked()))
                case "APPEND":
                    item = stack.pop()
                    _of(list, stack[-1]).append(item)
                case "APPENDS":
                    items = marked()
                    _of(list, stack[-1]).extend(items)
                case "SETITEM":
                    key, value = stack.pop(-2), stack.pop()
                    _of(dict, stack[-1])[_key(key)] = value
                case "SETITEMS":
                    items = marked()
                    _of(dict, stack[-1]).update(zip(map(_key, items[::2]), items[1::2], strict=True))
                case "GLOBAL":
                    stack.append(_name(argument))
                case "REDUCE":
                    arguments, function = _of(tuple, stack.pop()), _of(Name, stack.pop())
                    if function.path not in _CALLS:
                        raise _Refused(f"it calls {function.path}")
                    stack.append(_CALLS[function.path](self, *arguments))
                case "NEWOBJ":
                    arguments, kind = _of(tuple, stack.pop()), _of(Name, stack.pop())
                    if kind.path not in _CLASSES or arguments:
                        raise _Refused(f"it makes a {kind.path} in an unknown way")
                    stack.append(Inert(kind.path))
                case "BUILD":
                    state, target = _of(dict, stack.pop()), stack[-1]
                    if type(target) is Inert:
                        if target.state:
                            raise _Refused("it fills an object twice")
                        target.state = state
                    else:
                        _of(dict, target)  # an OrderedDict's own attributes, such as the versions of a state dict
                case "BINPERSID":
                    stack.append(self._outside(*_of(tuple, stack.pop())))
                case name:
                    raise _Refused(f"its pickle has the opcode {name}, which no checkpoint of this kind needs")
        raise _Refused("its pickle has no end")

    def _outside(self, what: Any, kind: Name, *where: Any) -> Any:
        """What a persistent id stands for: numbers `(count,)` beside the pickle or, before torch 1.6, a class's `Name`.

        Raises:
            _Refused: they are more than the file can hold, of an unknown type, or declared in two ways.
        """
        if what == "module":
            return _of(Name, kind)
        key, _, count, *view = where
        dtype = _DTYPES[_of(Name, kind).path]
        if what != "storage" or any(view) or _of(int, count) < 0:
            raise _Refused("its numbers are stored in an unknown way")
        if _of(str, key) not in self.storages:
            self.undeclared -= count * dtype.itemsize
            if self.undeclared < 0:
                raise _Refused("it declares more numbers than it holds")
            self.storages[key] = torch.empty(count, dtype=dtype)
        flat = self.storages[key]
        if flat.dtype != dtype or len(flat) != count:
            raise _Refused("it declares the same numbers in two ways")
        return flat

    def _tensor(
        self, flat: Tensor, offset: int, shape: tuple, stride: tuple, grad: bool, hooks: Any, metadata: Any = None
    ) -> Tensor:
        """A view of stored numbers. Views may share them, but together they are no larger than the file."""
        if metadata:  # such as a sign that is still to be turned
            raise _Refused("a tensor is more than its numbers")
        sizes = [_of(int, size) for size in (offset, *_of(tuple, shape), *_of(tuple, stride))]
        last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        if min(sizes) < 0 or len(shape) > 8 or last >= len(_of(Tensor, flat)):
            raise _Refused("a tensor is larger than its numbers")
        self.unmade -= math.prod(shape) * flat.itemsize
        if self.unmade < 0:
            raise _Refused("its tensors are larger than the file")
        return flat.as_strided(shape, stride, offset)


def _of(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise _Refused(f"its pickle has a {type(value).__name__} where a {kind.__name__} belongs")
    return value


def _key(key: Any) -> Any:
    """Of a dict: a name or a count. The hash of a nested tuple may end the process, those of large integers collide."""
    short = type(key) is str and len(key) <= _LONGEST_KEY
    if not (short or type(key) is Name or (type(key) is int and 0 <= key < 2**31)):
        raise _Refused("its pickle has a dict with keys that are no names")
    return key


def _name(argument: str) -> Name:
    path = argument.replace(" ", ".", 1)
    if path not in _CLASSES and path not in _CALLS and path not in _DTYPES:
        raise _Refused(f"it names {shown([path])}, which no checkpoint of this kind needs")
    return Name(path)


# Our own functions in place of those that a file calls; their first argument is the reader.
_CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": lambda reader: {},
    "collections.defaultdict": lambda reader, factory: {},
    "torch._utils._rebuild_tensor_v2": _Pickle._tensor,
    "torch._utils._rebuild_parameter": lambda reader, tensor, grad, hooks: tensor,
    "torch.device": lambda *_: None,
    "__builtin__.set": lambda *_: None,
}


def tensors(path: str | Path, tree: Any) -> dict[str, Tensor]:
    """The tensors of a module or of a state dict by their keys, as a state dict has them.

    Raises:
        ArtefactError: the tree is neither.
    """
    found = tree
    if type(tree) is Inert:
        found, seen = {}, set()
        for prefix, module in modules(path, tree):
            for part in (module.state.get("_parameters"), module.state.get("_buffers")):
                if id(part) in seen:  # a small file could make much of one dict in many modules
                    raise ArtefactError(f"{path} holds no tree of modules", FETCH_AGAIN)
                if type(part) is dict:
                    seen.add(id(part))
                    found |= {f"{prefix}{name}": tensor for name, tensor in part.items() if tensor is not None}
    if type(found) is dict and type(found.get("state_dict")) is dict:
        hint = "`dvae import vqgan` reads those of VQGANs; of another model give the state dict alone"
        raise ArtefactError(f"{path} is a checkpoint of a training, with a state dict among other things", hint)
    if type(found) is not dict or not found or not all(type(tensor) is Tensor for tensor in found.values()):
        raise ArtefactError(f"{path} holds neither a module nor a state dict", FETCH_AGAIN)
    return found


def modules(path: str | Path, tree: Inert) -> Iterator[tuple[str, Inert]]:
    """A module and all below it, each with the prefix of its keys; none may stand in two places."""
    waiting, seen = [("", tree)], set()
    while waiting:
        prefix, module = waiting.pop()
        children = module.state.get("_modules") if type(module) is Inert else None
        if type(children) is not dict or id(module) in seen or len(prefix) > _LONGEST_KEY:
            raise ArtefactError(f"{path} holds no tree of modules", FETCH_AGAIN)
        seen.add(id(module))
        yield prefix, module
        waiting += [(f"{prefix}{name}.", child) for name, child in children.items()]


def shown(keys: list[Any]) -> str:
    """Some keys of a file, which may hold anything, as one short line."""
    some = ", ".join(ascii(key)[1:-1][:60] if type(key) is str else type(key).__name__ for key in keys[:3])
    return some + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
