"""The plan of the house, checked: who imports whom, what is forbidden everywhere, what lies at the top level."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("dvae", "dalle")

# Every room may import the rooms before it, and no other.
ROOMS = """
    dvae.errors dvae.files dvae.seeds dvae.schedules dvae.images dvae.scenes dvae.listing dvae.tables dvae.data
    dvae.loading dvae.likelihood dvae.quantize dvae.artefact dvae.model dvae.vqgan dvae.tokenizer dvae.codebook
    dvae.drawings dvae.plots dvae.evaluate dvae.inspect dvae.foreign dvae.importers dvae.commands dvae.optim
    dvae.forecast dvae.lit dvae.train dvae.__main__
    dalle.layout dalle.text dalle.tokens dalle.pairs dalle.scaling dalle.model dalle.native dalle.packing dalle.gpu
    dalle.describe dalle.sampling dalle.rerank dalle.caption dalle.edit dalle.pipeline dalle.shrink dalle.samples
    dalle.captions dalle.complete dalle.prepare dalle.check dalle.candidates dalle.evaluate dalle.compare
    dalle.maps dalle.symptoms dalle.diagnose dalle.report dalle.train dalle.demo dalle.__main__
""".split()
WITH_LIGHTNING = {"dvae.lit", "dvae.train", "dalle.train"}
MAY_BRING_LIGHTNING = WITH_LIGHTNING | {"dalle.demo"}  # it trains
TOP_LEVEL = {"pyproject.toml", *PACKAGES, "configs", "tests", "notebooks", "README.md", "LICENSE", "SECURITY.md"}
LARGEST_FILE, LARGEST_MODEL = 1_000_000, 16_000_000  # bytes; of a shipped model, with all that it needs


def module_files():
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            yield ".".join(path.relative_to(ROOT).with_suffix("").parts), path


MODULES = dict(module_files())
EXISTING = [room for room in ROOMS if room in MODULES]


def imports(tree):
    """(module, names taken from it or None, line) of every import, also of those inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, None, node.lineno
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or ""), [alias.name for alias in node.names], node.lineno


def rooms_of(module, names):
    """The rooms that an import opens; `from dvae import images` opens dvae.images."""
    if module in PACKAGES:
        return [f"{module}.{name}" for name in names or ["__init__"]]
    return [module] if module.split(".")[0] in PACKAGES else []


def faults(name, source):
    """What in a module's source goes against the plan, as sentences."""
    tree = ast.parse(source)
    earlier = ROOMS[: ROOMS.index(name)] if name in ROOMS else []
    for module, names, line in imports(tree):
        if module.startswith("."):
            yield f"{name}:{line} imports relatively"
        for room in rooms_of(module, names):
            if room not in earlier:
                yield f"{name}:{line} imports {room}, which is not an earlier room"
        top = module.split(".")[0]
        if top in {"lightning", "pytorch_lightning", "lightning_fabric"} and name not in WITH_LIGHTNING:
            yield f"{name}:{line} imports Lightning"
        if top in {"pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}:
            yield f"{name}:{line} imports {top}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            for fault in call_faults(node):
                yield f"{name}:{node.lineno} {fault}"


def call_faults(node):
    called = ast.unparse(node.func)
    options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    if called in {"eval", "exec", "compile", "__import__", "os.system", "os.popen"}:
        yield f"calls {called}"
    if called.endswith((".extractall", ".extract")):
        yield "unpacks an archive to the disk"
    if called in {"yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load"}:
        yield f"calls {called}"
    if called == "torch.load" and options.get("weights_only") != "True":
        yield "calls torch.load without weights_only=True"
    for option, value in [("weights_only", "False"), ("allow_pickle", "True"), ("trust_remote_code", "True")]:
        if options.get(option) == value:
            yield f"says {option}={value}"


def test_every_module_has_its_place_in_the_list():
    inits = {f"{package}.__init__" for package in PACKAGES}
    assert set(MODULES) - inits <= set(ROOMS), "a new room needs a line in ROOMS"
    assert inits < set(MODULES) and len(EXISTING) > 5
    assert len(ROOMS) == len(set(ROOMS))


@pytest.mark.parametrize("name", MODULES)
def test_the_plan_is_kept(name):
    assert list(faults(name, MODULES[name].read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "name, line, fault",
    [
        ("dvae.images", "def f():\n    from dvae.model import DVAE", "imports dvae.model"),
        ("dvae.images", "from dvae import files, data", "imports dvae.data"),
        ("dvae.train", "import dalle.layout", "imports dalle.layout"),
        ("dvae.model", "import dvae", "imports dvae.__init__"),
        ("dvae.model", "from . import files", "imports relatively"),
        ("dalle.sampling", "from lightning.pytorch import Trainer", "imports Lightning"),
        ("dalle.train", "import pickle", "imports pickle"),
        ("dalle.train", "torch.load(path)", "without weights_only=True"),
        ("dalle.train", "trainer.fit(model, weights_only=False)", "weights_only=False"),
        ("dvae.data", "tarfile.open(path).extractall()", "unpacks"),
        ("dvae.lit", "yaml.load(text)", "yaml.load"),
        ("dvae.lit", "eval(text)", "calls eval"),
    ],
)
def test_the_check_itself_sees_what_is_forbidden(name, line, fault):
    assert any(fault in found for found in faults(name, line))
    harmless = "import torch\nfrom dvae.errors import UserError\nmodel.eval()\ntorch.load(path, weights_only=True)"
    assert list(faults(name, harmless)) == []


# Each room is imported in a forked child, in which no other room has been imported yet.
IMPORT_ALONE = """
import importlib, json, os, sys
import {heavy}
found = {{}}
for room in {rooms!r}:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            importlib.import_module(room)
            answer = "lightning" if "lightning" in sys.modules and "lightning" not in {heavy!r} else "alone"
        except BaseException as error:
            answer = f"{{type(error).__name__}}: {{error}}"
        os.write(write, answer.encode()[:4000])
        os._exit(0)
    os.close(write)
    found[room] = os.fdopen(read).read()
    os.waitpid(child, 0)
print(json.dumps(found))
"""


def python(program):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.parametrize("lightning", [False, True])
def test_every_module_imports_alone(lightning):
    """And those that are not about training do so without Lightning."""
    rooms = [room for room in EXISTING if (room in MAY_BRING_LIGHTNING) == lightning]
    heavy = "lightning.pytorch" if lightning else "torch"
    found = json.loads(python(IMPORT_ALONE.format(heavy=heavy, rooms=rooms)))
    assert found == dict.fromkeys(rooms, "alone")


def test_the_packages_open_no_room_by_themselves():
    shown = python("import sys, dvae, dalle; print(*sorted(sys.modules))").split()
    assert {"dvae", "dalle"} <= set(shown)
    assert not {"torch", "numpy", "PIL", "lightning", *EXISTING} & set(shown)


# ------------------------------------------------------------------------------------------------------ the repository


def tracked():
    """The files that git tracks or would track; without git, all but what .gitignore names."""
    if (ROOT / ".git").exists():
        git = [
            "git",
            "-c",
            f"safe.directory={ROOT}",
            "-C",
            str(ROOT),
            "ls-files",
            "-z",
            "-c",
            "-o",
            "--exclude-standard",
        ]
        run = subprocess.run(git, capture_output=True, text=True, check=True)
        names = [name for name in run.stdout.split("\0") if name]
    else:
        ignored = {"__pycache__", "dist", "build", "runs", "wandb", "PKG-INFO"}
        found = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file())
        names = [
            path.as_posix()
            for path in found
            if not any(part in ignored or part.startswith(".") or part.endswith(".egg-info") for part in path.parts)
        ]
    files = [ROOT / name for name in names if (ROOT / name).is_file()]
    assert Path(__file__).resolve() in files and len(files) > 10
    return files


def test_the_top_level_holds_only_what_belongs_there():
    top = {path.relative_to(ROOT).parts[0] for path in tracked()}
    assert {name for name in top if not name.startswith(".")} <= TOP_LEVEL


def test_no_file_is_large_and_no_shipped_model_too():
    sizes = {path.relative_to(ROOT).as_posix(): path.stat().st_size for path in tracked()}
    models = {name: size for name, size in sizes.items() if name.startswith("dalle/pretrained/")}
    assert {name: size for name, size in sizes.items() if size > LARGEST_FILE and name not in models} == {}
    for model in {name.split("/")[2] for name in models}:
        assert sum(size for name, size in models.items() if name.split("/")[2] == model) < LARGEST_MODEL, model


def test_no_file_names_a_place_on_one_machine():
    place = re.compile(
        rb"(?<![\w./{}<>$-])/(?:" + b"|".join([b"work", b"root", b"opt", b"home/\\w+", b"Users/\\w+"]) + rb")/\w"
    )
    assert place.search(b"see /" + b"opt/thing") and not place.search(b"a/work/b and https://x.org/opt/b")
    found = [path.relative_to(ROOT).as_posix() for path in tracked() if place.search(path.read_bytes())]
    assert found == []
