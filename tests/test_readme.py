"""The README tells the truth about the house: its file map, its commands, its configs, its exit codes."""

import re
import shlex
from pathlib import Path

import dalle.__main__
import dvae.__main__
from dvae import errors
from dvae.commands import TRAININGS, find_config

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = {"dvae": dvae.__main__.COMMANDS, "dalle": dalle.__main__.COMMANDS}


def blocks(language):
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
    return [content for name, content in fenced if name == language]


def test_the_file_map_names_every_room_and_no_other():
    (plan,) = [block for block in blocks("") if block.startswith("dvae/")]
    named = {"dvae": set(), "dalle": set()}
    for line in plan.splitlines():
        if not line.startswith(" "):
            package = line.split("/")[0]
        elif package in named:
            named[package].add(line.split()[0])
    for package, rooms in named.items():
        files = {path.name for path in (ROOT / package).iterdir() if path.suffix in (".py", ".c")}
        assert rooms == files - {"__init__.py"}


def test_every_command_line_is_one_that_exists():
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.startswith(("dvae ", "dalle "))]
    assert len(lines) > 8
    for line in lines:
        program, command, *rest = shlex.split(line, comments=True)
        assert {command, " ".join([command, *rest[:1]])} & {*TRAININGS, *COMMANDS[program]}, line
        if command in TRAININGS:
            find_config(rest[rest.index("--config") + 1])


def test_the_exit_codes_are_the_real_ones():
    kinds = (errors.UserError, errors.DataError, errors.ArtefactError, errors.EnvironmentProblem, errors.NumericsError)
    said = README[README.index("### Exit codes") :][:400]
    assert [kind.code for kind in kinds] == [2, 3, 4, 5, 6]
    for word in ("0 done", "2 usage", "3 data", "4 artefact", "5 environment", "6 a loss", "130 and 143"):
        assert word in said


def test_no_place_is_left_to_be_filled():
    assert "@@" not in README
