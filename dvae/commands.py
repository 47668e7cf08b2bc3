"""One command line for both packages: a command is a plain function, and its docstring is its help.

Mistakes become one line what and one line how to mend it (see `errors`); nothing here knows what a command does.
"""

import importlib
import importlib.resources
import inspect
import pydoc
import re
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from dvae.errors import UserError, report

TRAININGS = ("fit", "validate", "test")
ASKS_FOR_HELP = ("-h", "--help", "help")


class Plain:
    """Makes a jsonargparse parser say what is wrong in one line, with a hint, instead of printing its usage."""

    def error(self, message: str, ex: Exception | None = None) -> None:
        raise UserError(plainly(str(message))[:500], "--help lists every setting with its meaning") from ex


class Parser(Plain, ArgumentParser):
    pass


_BESIDE = ("Does not validate", "Errors:", "Given value type:", "Expected a path but", "Expected a dot import path")
_INSIDE = ("Namespace(", "NestedArg(")  # what the parser has made of a value


def plainly(message: str) -> str:
    """On one line which setting is wrong, what it was given and what it takes, of what jsonargparse says on many."""
    key, given, takes, said = "", "", "", []
    for line in message.splitlines():
        line = line.strip().removeprefix("- ")
        if found := re.match(r'Parser key "(.+?)":? *', line):
            key, given, takes, line = found[1], "", "", line[found.end() :]  # the last one is the innermost
        expected, _, got = line.partition(". Got value: ")
        if line.startswith("Given value: "):
            given = line.removeprefix("Given value: ")
            break
        elif loaded := re.fullmatch(r"""Unable to load config (["'])(.*)\1""", line):
            given, takes = loaded[2], "its settings, each by its name"
        elif line.startswith("Subtypes: ["):
            takes = kinds(line[len("Subtypes: [") : -1])
        elif re.match("Expected a (<class|typing)", line):
            if not takes:  # of a choice all were named before
                given, takes = got, kinds(expected.removeprefix("Expected a "))
                break
        elif line and not line.startswith(_BESIDE):
            said.append(line)
    if not key:
        return " ".join(said)
    given = "" if given.startswith(_INSIDE) else given
    takes = takes and f"{'; it' * bool(given)} takes {takes}"
    return key + f" is {given}" * bool(given) + takes + f": {' '.join(said)}" * bool(said)


def kinds(names: str) -> str:
    """Python's names of types as they are called in a config: null, int, {settings of a group}."""

    def plain(found: re.Match) -> str:
        kind = pydoc.locate(found[1])
        if is_dataclass(kind):
            return f"{{{', '.join(field.name for field in fields(kind))}}}"
        return found[1].rpartition(".")[2].replace("NoneType", "null")

    choice = re.split(r", (?=<|[a-z]+[.[])", names)
    names = " or ".join(sorted(choice, key=lambda name: "NoneType" in name))  # null comes last
    names = re.sub(r"<class '(.+?)'>", plain, names)
    names = re.sub(r"typing\.Literal\[(.*?)\]", r"\1", names)
    return re.sub(r"(?:[a-z_]+\.)+(?=\w)", "", names)


def function(name: str) -> Callable:
    """What "module:function" names."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def find_config(name: str) -> Path:
    """The config file at the path `name`, or the shipped one of that name."""
    if Path(name).is_file():
        return Path(name)
    package = Path(str(importlib.resources.files("dvae")))
    short = name.removeprefix("configs/").removesuffix(".yaml") + ".yaml"
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / short).is_file():
            return folder / short
    shipped = sorted(
        str(path.relative_to(folder).with_suffix(""))
        for folder in (package / "configs", package.parent / "configs")
        for path in folder.rglob("*.yaml")
    )
    if (Path(name) / "config.yaml").is_file():
        hint = f"it is the folder of a run: give {Path(name) / 'config.yaml'}"
    elif alike := [other for other in shipped if other.endswith(f"/{name}")]:
        hint = f"give {' or '.join(alike)}"
    else:
        hint = f"give a path, or one of the shipped names: {', '.join(shipped)}"
    raise UserError(f"there is no config {name}", hint)


def dotted(args: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """The arguments without `--model.depth 4`, `--data.tokens=runs/tokens` and their like, and what these say."""
    rest, settings, given = [], {}, iter(args)
    for arg in given:
        name, equals, value = arg.partition("=")
        if not name.startswith("--") or "." not in name:
            rest.append(arg)
            continue
        try:
            value = value if equals else next(given)
            settings[name.removeprefix("--")] = yaml.safe_load(value)
        except StopIteration:
            raise UserError(f"{name} has no value", f"give one, such as {name} 1") from None
        except yaml.YAMLError:
            settings[name.removeprefix("--")] = value
    return rest, settings


def options_first(args: Sequence[str]) -> list[str]:
    """The arguments with each `--name value` before all others: argparse fills a list with those positional arguments
    that stand together, and does not go on with it after an option."""
    options, rest, given = [], [], iter(args)
    for arg in given:
        if arg == "--":  # no option comes after it
            rest += [arg, *given]
        elif not arg.startswith("--"):
            rest.append(arg)
        elif "=" in arg or arg in ASKS_FOR_HELP:
            options.append(arg)
        elif (value := next(given, None)) is None:
            return list(args)  # the parser says that it has no value
        else:
            options += [arg, value]
    return options + rest


def call(program: str, command: Callable, args: Sequence[str], optional: dict[str, str] | None = None) -> None:
    """Run `command` with arguments from a command line.

    Parameters without a default are positional, the others are `--options`; those in `optional` (name and help) are
    positional too and may be left away. A switch may stand alone: `--exact` means `--exact true`. A parameter
    `settings` is a dictionary of all `--options` with a dot in their names, and no option itself. A `list[str]` without
    a default takes all positional arguments that are left, none too, to the letter.
    """
    optional, given, parameters = optional or {}, list(args), inspect.signature(command).parameters
    given, settings = dotted(given) if "settings" in parameters else (given, {})
    switches = {f"--{name}" for name, p in parameters.items() if p.annotation is bool}
    for place in reversed(range(len(given))):
        if given[place] in switches and given[place + 1 : place + 2] not in (["true"], ["false"]):
            given.insert(place + 1, "true")
    lists = [name for name, p in parameters.items() if p.annotation == list[str] and p.default is p.empty]
    given = options_first(given) if lists else given
    parser = Parser(prog=program, description=(command.__doc__ or "").split("\n\n")[0])
    parser.add_function_arguments(command, as_group=False, as_positional=True, skip={"settings", *optional, *lists})
    for name, text in optional.items():
        parser.add_argument(name, nargs="?", help=text)
    for name in lists:
        found = re.search(rf"^ +{name}: (.+(?:\n {{8}}.+)*)", inspect.getdoc(command) or "", re.MULTILINE)
        parser.add_argument(name, nargs="*", help=" ".join(found[1].split()) if found else None)
    values = vars(parser.parse_args(given).clone(with_meta=False))
    command(**(values | {"settings": settings} if settings else values))


def dispatch(
    program: str,
    text: str,
    commands: dict[str, str],
    train: str,
    args: Sequence[str],
    optional: dict[str, dict[str, str]] | None = None,
) -> int:
    """Run one command line of `program`, whose help is `text`; returns the exit code.

    `commands` and `train` name functions as "module:function"; a module is opened when its command is called. The name
    of a command is one word or two.
    """
    debug = "--debug" in args
    args = [arg for arg in args if arg != "--debug"]
    words = 2 if " ".join(args[:2]) in commands else 1
    name, rest = " ".join(args[:words]), args[words:]
    second = [command.removeprefix(f"{name} ") for command in commands if command.startswith(f"{name} ")]
    if not args or name in ASKS_FOR_HELP or (second and rest[:1] and rest[0] in ASKS_FOR_HELP):
        print(text, end="")
        return 0 if args else UserError.code

    def command() -> None:
        if name in TRAININGS:
            function(train)(args)
        elif name in commands:
            call(f"{program} {name}", function(commands[name]), rest, (optional or {}).get(name))
        elif second:
            raise UserError(f"{program} {name} must be followed by what: {', '.join(second)}", f"see {program} --help")
        else:
            raise UserError(f"{program} has no command {name!r}", f"{program} --help lists the commands")

    return report(command, debug)
