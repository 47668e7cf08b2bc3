"""The wheel holds all that is needed: both packages, their programs and the shipped configs."""

import configparser
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def unpacked(wheel, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture
def python(unpacked, tmp_path):
    """Run Python on the wheel's files, which come before any installed ones, from another folder."""
    environment = os.environ | {"PYTHONPATH": str(unpacked)}

    def run(*args: str) -> str:
        done = subprocess.run([sys.executable, *args], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_what_the_wheel_holds(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (entry_points,) = [name for name in names if name.endswith(".dist-info/entry_points.txt")]
        programs = configparser.ConfigParser()
        programs.read_string(archive.read(entry_points).decode())
    sources = [path for package in ("dvae", "dalle") for path in (ROOT / package).iterdir()]
    modules = {str(path.relative_to(ROOT)) for path in sources if path.suffix in (".py", ".c")}
    configs = {f"dvae/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*.yaml")}
    assert {"dvae/__init__.py", "dalle/__init__.py"} <= modules and "dvae/configs/dvae/demo.yaml" in configs
    models = {str(path.relative_to(ROOT)) for path in (ROOT / "dalle" / "pretrained").rglob("*") if path.is_file()}
    inside = {name for name in names if ".dist-info/" not in name}
    assert inside == modules | configs | models, "nothing is missing, and no tests or runs are packed by mistake"
    assert dict(programs["console_scripts"]) == {"dvae": "dvae.__main__:main", "dalle": "dalle.__main__:main"}
    assert any(name.endswith("LICENSE") for name in names)


def test_the_wheel_finds_its_own_models(python, unpacked):
    look = "from dvae import artefact\nprint(*artefact.pretrained(), artefact.find('emoji', 'dalle'), sep='\\n')"
    assert python("-c", look).splitlines() == ["emoji", str(unpacked / "dalle" / "pretrained" / "emoji")]


def test_the_wheel_finds_its_own_configs(python, unpacked):
    look = "import dalle, dvae.commands as c\nprint(dalle.__file__, c.__file__, c.find_config('dvae/demo'), sep='\\n')"
    places = [Path(line) for line in python("-c", look).splitlines()]
    names = ("dalle/__init__.py", "dvae/commands.py", "dvae/configs/dvae/demo.yaml")
    assert places == [unpacked / name for name in names]


@pytest.mark.parametrize("package", ["dvae", "dalle"])
def test_the_wheel_reads_its_own_configs(package, python, unpacked):
    (unpacked / "dvae" / "configs" / package / "only-here.yaml").write_text("run: from-the-wheel\n")
    args = ["-m", package, "fit", "--config", f"{package}/demo", "--config", f"{package}/only-here", "--print_config"]
    settings = yaml.safe_load(python(*args))
    shipped = yaml.safe_load((ROOT / "configs" / package / "demo.yaml").read_text())
    assert settings["run"] == "from-the-wheel"
    assert settings["trainer"]["max_steps"] == shipped["trainer"]["max_steps"]
