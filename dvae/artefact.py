"""The artefact: a trained model as a folder that says what it is, can be checked byte for byte, and runs no code.

    artefact.json                      format, kind, config, about, and the SHA-256 of everything below
    weights-<digest>.safetensors       the tensors
    <role>-<digest>.json               other texts, such as a tokenizer
    <role>-<digest>/                   a part: a whole artefact of its own, such as the dVAE of a transformer

Everything but `artefact.json` is named by its content and never rewritten, so replacing that one file is the commit:
a kill at any moment leaves the old artefact or the new one. `load` compares every byte with its digest before it is
used; only `about` (metrics, versions; read by people) is outside the digest. This file knows no model.
"""

import json
import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from dvae import files as disk
from dvae.errors import ArtefactError, NumericsError

MANIFEST = "artefact.json"
PRETRAINED = Path(__file__).parent.parent / "dalle" / "pretrained"  # models that come with the project, by name
FORMAT = 1
KINDS = ("dvae", "dalle")

_LARGEST_MANIFEST = 1 << 20  # bytes
_LARGEST_TEXT = 1 << 26
_KEYS = {"format", "kind", "config", "about", "files", "parts", "digest"}
_ROLE = re.compile(r"[a-z][a-z0-9_]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_OURS = re.compile(r"[a-z][a-z0-9_]*-[0-9a-f]{12}(\.safetensors|\.json)?")


@dataclass(frozen=True)
class Artefact:
    """What `load` found: `files` are texts by role, `parts` folders of further artefacts by role."""

    kind: str
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    files: dict[str, str]
    parts: dict[str, Path]
    about: dict[str, Any]
    digest: str


def save(
    folder: str | Path,
    kind: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    files: Mapping[str, str] | None = None,
    parts: Mapping[str, str | Path] | None = None,
    about: Mapping[str, Any] | None = None,
) -> str:
    """Write an artefact, or replace the one in `folder`, and return its digest.

    Args:
        config: what the model is built from; JSON values.
        tensors: the weights, all finite.
        files: further texts by role, each a JSON document.
        parts: folders of other artefacts by role; they are checked and copied.
        about: small facts for people (versions, step, metrics), not part of the digest; a number that is not finite
            becomes null, JSON having no word for it.

    Raises:
        NumericsError: a tensor holds values that are not finite; nothing was written.
        ArtefactError: a part is not a whole artefact.
    """
    assert kind in KINDS, kind
    folder = Path(folder)
    tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise NumericsError(f"tensor {name} holds values that are not finite", "save an earlier state of the run")
    contents = {"weights": safetensors.torch.save(tensors)}
    contents |= {role: text.encode() for role, text in (files or {}).items()}
    described = {}
    for role, content in contents.items():
        assert _ROLE.fullmatch(role), role
        sha256 = disk.sha256(content)
        described[role] = {"file": _file_name(role, sha256), "sha256": sha256, "bytes": len(content)}
    sources = {role: (Path(path), verify(path)) for role, path in (parts or {}).items()}
    facts = {key: None if _is_not_finite(value) else value for key, value in (about or {}).items()}
    manifest: dict[str, Any] = {"format": FORMAT, "kind": kind, "config": dict(config), "about": facts}
    manifest["files"] = described
    manifest["parts"] = {
        role: {"folder": _folder_name(role, part["digest"]), "digest": part["digest"]}
        for role, (_, part) in sources.items()
    }
    manifest["digest"] = _digest(manifest)

    for role, content in contents.items():
        _put(folder / described[role]["file"], content)
    for role, (source, part) in sources.items():
        _copy(source, part, folder / manifest["parts"][role]["folder"])
    disk.write_json(folder / MANIFEST, manifest)  # the commit
    _sweep(folder, manifest)
    return manifest["digest"]


def load(folder: str | Path, kind: str) -> Artefact:
    """Read an artefact of this kind, every byte of it and of its parts compared with its digest.

    Raises:
        ArtefactError: it is missing, of another kind, damaged, or of a newer format.
    """
    folder = Path(folder)
    while True:
        before = _read_manifest(folder)
        try:
            return _load(folder, _expect(folder, before, kind))
        except ArtefactError:  # it may have been replaced under our hands by a training that goes on
            if _read_manifest(folder) == before:
                raise


def _load(folder: Path, manifest: dict[str, Any]) -> Artefact:
    _verify_parts(folder, manifest)
    contents = {role: _read_file(folder, entry) for role, entry in manifest["files"].items()}
    weights = folder / manifest["files"]["weights"]["file"]
    try:
        tensors = safetensors.torch.load(contents.pop("weights"))
        texts = {role: content.decode() for role, content in contents.items()}
    except (safetensors.SafetensorError, UnicodeDecodeError, KeyError, ValueError) as error:
        raise _damaged(weights, str(error)) from error
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise _damaged(weights, f"tensor {name} holds values that are not finite")
    parts = {role: folder / entry["folder"] for role, entry in manifest["parts"].items()}
    return Artefact(manifest["kind"], manifest["config"], tensors, texts, parts, manifest["about"], manifest["digest"])


def digest(folder: str | Path) -> str:
    """The identity of an artefact: SHA-256 over kind, config, files and parts, not over `about`."""
    return _read_manifest(Path(folder))["digest"]


def find(run: str | Path, kind: str) -> Path:
    """The artefact's folder, given that folder itself, the run folder whose `model` it is, or a name in `PRETRAINED`.

    Where what is found carries an artefact of this kind as a part, as a transformer its image tokenizer, that is meant.

    Raises:
        ArtefactError: there is none, or it is of another kind.
    """
    run, names = Path(run), pretrained()
    for folder in (run, run / "model", *([PRETRAINED / run] if str(run) in names else [])):
        if (folder / MANIFEST).is_file():
            manifest = _read_manifest(folder)
            if part := manifest["parts"].get(kind):
                return folder / part["folder"]
            _expect(folder, manifest, kind)
            return folder
    raise ArtefactError(
        f"no trained {kind} in {run}: neither {MANIFEST} nor model/{MANIFEST} is there",
        "give a run folder whose training has validated at least once, or the model folder itself"
        + (f", or a model that comes with the project: {', '.join(names)}" if names else ""),
    )


def pretrained() -> list[str]:
    """The names of the models that come with the project."""
    return sorted(folder.parent.name for folder in PRETRAINED.glob(f"*/{MANIFEST}"))


def verify(folder: str | Path) -> dict[str, Any]:
    """Compare every file of an artefact and of its parts with its digest, and return the manifest.

    Raises:
        ArtefactError: something is missing or damaged.
    """
    manifest = _read_manifest(Path(folder))
    for entry in manifest["files"].values():
        _read_file(Path(folder), entry)
    _verify_parts(Path(folder), manifest)
    return manifest


def copy(source: str | Path, target: str | Path) -> str:
    """Copy a whole artefact to the folder `target`, in the place of one that is there, and return its digest.

    Raises:
        ArtefactError: the source is missing or damaged.
    """
    manifest = verify(source)
    _copy(Path(source), manifest, Path(target))
    _sweep(Path(target), manifest)
    return manifest["digest"]


def _verify_parts(folder: Path, manifest: dict[str, Any]) -> None:
    for entry in manifest["parts"].values():
        if verify(folder / entry["folder"])["digest"] != entry["digest"]:
            raise _damaged(folder / entry["folder"], "it is another part than the one that was saved")


def _read_file(folder: Path, entry: dict[str, Any]) -> bytes:
    path = folder / entry["file"]
    try:
        size = path.stat().st_size
        if not path.is_file() or size != entry["bytes"]:
            raise _damaged(path, f"{size:,} bytes instead of {entry['bytes']:,}")
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise _damaged(path, "it is missing") from error
    if disk.sha256(content) != entry["sha256"]:
        raise _damaged(path, "its SHA-256 differs")
    return content


def _read_manifest(folder: Path) -> dict[str, Any]:
    """`artefact.json`, with every key known and of its type, every name derived from its digest, itself undamaged."""
    path = folder / MANIFEST
    if not path.is_file():
        raise ArtefactError(f"{folder} is no artefact: {MANIFEST} is missing", "give the model folder of a run")
    if path.stat().st_size > _LARGEST_MANIFEST:
        raise _damaged(path, f"larger than {_LARGEST_MANIFEST:,} bytes")
    try:
        manifest = json.loads(path.read_bytes(), object_pairs_hook=_no_key_twice, parse_constant=_no_constant)
        version = manifest.get("format") if isinstance(manifest, dict) else None
        if type(version) is int and version > FORMAT:
            raise ArtefactError(
                f"{folder} has format {version}, newer than this program reads ({FORMAT})", "update this program"
            )
        fault = _fault(manifest)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"not JSON as it was saved ({error})") from error
    if fault:
        raise _damaged(path, fault)
    return manifest


def _fault(manifest: Any) -> str | None:
    """What in a manifest is not as `save` writes it."""
    if not isinstance(manifest, dict):
        return "not a JSON object"
    if unknown := sorted(manifest.keys() - _KEYS):
        return f"unknown key {unknown[0]!r}"
    if missing := sorted(_KEYS - manifest.keys()):
        return f"key {missing[0]!r} is missing"
    if type(manifest["format"]) is not int or manifest["format"] != FORMAT:
        return f"format {manifest['format']!r}"
    if manifest["kind"] not in KINDS:
        return f"kind {manifest['kind']!r}"
    for key in ("config", "about", "files", "parts"):
        if not isinstance(manifest[key], dict):
            return f"{key!r} is not an object"
    if "weights" not in manifest["files"]:
        return "there are no weights"
    for role, entry in manifest["files"].items():
        if not _is_entry(role, entry, {"file", "sha256", "bytes"}, "sha256"):
            return f"entry {role!r} of 'files'"
        if entry["file"] != _file_name(role, entry["sha256"]):  # so no name can lead out of the folder
            return f"file name {entry['file']!r}"
        if type(entry["bytes"]) is not int or (role != "weights" and entry["bytes"] > _LARGEST_TEXT):
            return f"size of {role!r}"
    for role, entry in manifest["parts"].items():
        if not _is_entry(role, entry, {"folder", "digest"}, "digest"):
            return f"entry {role!r} of 'parts'"
        if entry["folder"] != _folder_name(role, entry["digest"]):
            return f"folder name {entry['folder']!r}"
    if manifest["digest"] != _digest(manifest):
        return "its digest differs"
    return None


def _is_entry(role: str, entry: Any, keys: set[str], digest: str) -> bool:
    return (
        _ROLE.fullmatch(role) is not None
        and isinstance(entry, dict)
        and entry.keys() == keys
        and isinstance(entry[digest], str)
        and _SHA256.fullmatch(entry[digest]) is not None
    )


def _expect(folder: Path, manifest: dict[str, Any], kind: str) -> dict[str, Any]:
    found = manifest["kind"]
    if found != kind:
        raise ArtefactError(
            f"{folder}: this is a {found} artefact, a {kind} artefact was expected", f"give a run of `{kind} fit`"
        )
    return manifest


def _is_not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _damaged(path: Path, how: str) -> ArtefactError:
    return ArtefactError(f"{path} is damaged: {how}", "fetch or copy the artefact again, or train again")


def _digest(manifest: dict[str, Any]) -> str:
    identity = {key: manifest[key] for key in ("kind", "config", "files", "parts")}
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return disk.sha256(canonical.encode())


def _file_name(role: str, sha256: str) -> str:
    return f"{role}-{sha256[:12]}.{'safetensors' if role == 'weights' else 'json'}"


def _folder_name(role: str, digest: str) -> str:
    return f"{role}-{digest[:12]}"


def _put(path: Path, content: bytes) -> None:
    """Write content under the name that it determines; what is there already and whole stays untouched."""
    if not (path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content):
        disk.write_bytes(path, content)


def _copy(source: Path, manifest: dict[str, Any], target: Path) -> None:
    """Copy a verified artefact, its manifest last."""
    for entry in manifest["files"].values():
        _put(target / entry["file"], _read_file(source, entry))
    for entry in manifest["parts"].values():
        _copy(source / entry["folder"], verify(source / entry["folder"]), target / entry["folder"])
    _put(target / MANIFEST, (source / MANIFEST).read_bytes())
    disk.sync_folder(target.parent)


def _sweep(folder: Path, manifest: dict[str, Any]) -> None:
    """Remove earlier weights and parts that nothing refers to any more, and what a killed process left behind."""
    disk.sweep(folder)
    kept = {entry["file"] for entry in manifest["files"].values()}
    kept |= {entry["folder"] for entry in manifest["parts"].values()}
    for path in folder.iterdir():
        if path.name not in kept and _OURS.fullmatch(path.name):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
    for entry in manifest["parts"].values():
        _sweep(folder / entry["folder"], _read_manifest(folder / entry["folder"]))
