"""One command line for both packages: a command is a plain function, and its docstring is its help.

Mistakes become one line what and one line how to mend it (see `errors`); nothing here knows what a command does.
"""

import importlib
import inspect
from collections.abc import Callable, Sequence

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


def call(program: str, command: Callable, args: Sequence[str], optional: dict[str, str] | None = None) -> None:
    """Run `command` with arguments from a command line.

    Parameters without a default are positional, the others are `--options`; those in `optional` (name and help) are
    positional too and may be left away. A switch may stand alone: `--exact` means `--exact true`.
    """
    optional, given = optional or {}, list(args)
    switches = {f"--{name}" for name, p in inspect.signature(command).parameters.items() if p.annotation is bool}
    for place in reversed(range(len(given))):
        if given[place] in switches and given[place + 1 : place + 2] not in (["true"], ["false"]):
            given.insert(place + 1, "true")
    parser = Parser(prog=program, description=(command.__doc__ or "").split("\n\n")[0])
    parser.add_function_arguments(command, as_group=False, as_positional=True, skip=set(optional))
    for name, text in optional.items():
        parser.add_argument(name, nargs="?", help=text)
    command(**vars(parser.parse_args(given).clone(with_meta=False)))


def dispatch(
    program: str,
    text: str,
    commands: dict[str, str],
    train: str,
    args: Sequence[str],
    optional: dict[str, dict[str, str]] | None = None,
) -> int:
    """Run one command line of `program`, whose help is `text`; returns the exit code.

    `commands` and `train` name functions as "module:function"; a module is opened when its command is called.
    """
    debug = "--debug" in args
    args = [arg for arg in args if arg != "--debug"]
    if not args or args[0] in ("-h", "--help", "help"):
        print(text, end="")
        return 0 if args else UserError.code
    name, rest = args[0], args[1:]

    def command() -> None:
        if name in TRAININGS:
            function(train)(args)
        elif name in commands:
            call(f"{program} {name}", function(commands[name]), rest, (optional or {}).get(name))
        else:
            raise UserError(f"{program} has no command {name!r}", f"{program} --help lists the commands")

    return report(command, debug)
