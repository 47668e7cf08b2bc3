"""One command line for both packages: a command is a plain function, and its docstring is its help.

Mistakes become one line what and one line how to mend it (see `errors`); nothing here knows what a command does.
"""

import importlib
import importlib.resources
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from dvae.errors import UserError, report

TRAININGS = ("fit", "validate", "test")


class Plain:
    """Makes a jsonargparse parser say what is wrong in one line, with a hint, instead of printing its usage."""

    def error(self, message: str, ex: Exception | None = None) -> None:
        lines = [line.strip() for line in str(message).splitlines() if line.strip()]
        raise UserError(" ".join(lines)[:500], "--help lists every setting with its meaning") from ex


class Parser(Plain, ArgumentParser):
    pass


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
    raise UserError(f"there is no config {name}", f"give a path, or one of the shipped names: {', '.join(shipped)}")


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


def call(program: str, command: Callable, args: Sequence[str], optional: dict[str, str] | None = None) -> None:
    """Run `command` with arguments from a command line.

    Parameters without a default are positional, the others are `--options`; those in `optional` (name and help) are
    positional too and may be left away. A switch may stand alone: `--exact` means `--exact true`. A parameter
    `settings` is a dictionary of all `--options` with a dot in their names.
    """
    optional, given, parameters = optional or {}, list(args), inspect.signature(command).parameters
    given, settings = dotted(given) if "settings" in parameters else (given, {})
    switches = {f"--{name}" for name, p in parameters.items() if p.annotation is bool}
    for place in reversed(range(len(given))):
        if given[place] in switches and given[place + 1 : place + 2] not in (["true"], ["false"]):
            given.insert(place + 1, "true")
    parser = Parser(prog=program, description=(command.__doc__ or "").split("\n\n")[0])
    parser.add_function_arguments(command, as_group=False, as_positional=True, skip=set(optional))
    for name, text in optional.items():
        parser.add_argument(name, nargs="?", help=text)
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
    if not args or args[0] in ("-h", "--help", "help"):
        print(text, end="")
        return 0 if args else UserError.code
    words = 2 if " ".join(args[:2]) in commands else 1
    name, rest = " ".join(args[:words]), args[words:]
    second = [command.removeprefix(f"{name} ") for command in commands if command.startswith(f"{name} ")]

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
