"""What a user is told when something is wrong: one line what, one line how to mend it, a fixed exit code.

Exit codes: 0 done, 2 usage or config, 3 data, 4 artefact, 5 environment (disk, memory, permission, device),
6 numerics, 130 interrupted (Ctrl-C), 143 terminated.
"""

import re
import sys
import traceback
from collections.abc import Callable


class UserError(Exception):
    """A mistake that its maker can mend: `what` went wrong and a `hint` how to go on."""

    code = 2

    def __init__(self, what: str, hint: str):
        super().__init__(what)
        self.what, self.hint = what, hint

    def __reduce__(self):  # travels whole from a data-loading worker to its parent
        return type(self), (self.what, self.hint)


class DataError(UserError):
    """The images or captions cannot be used."""

    code = 3


class ArtefactError(UserError):
    """A trained model on disk is missing, damaged, of another kind, or belongs to another."""

    code = 4


class EnvironmentProblem(UserError):
    """The machine says no: no space, no memory, no permission, no such device."""

    code = 5


class NumericsError(UserError):
    """A loss, gradient or logit is not a finite number."""

    code = 6


class Stopped(Exception):
    """A training that was asked to stop by a signal, after its state was saved."""

    def __init__(self, signal_number: int):
        super().__init__(f"stopped by signal {signal_number}; the state is saved, --ckpt_path last goes on from here")
        self.code = 128 + signal_number


def warn(what: str, hint: str) -> None:
    """Tell the user something that does not stop the work."""
    print(f"warning: {what}\nhint: {hint}", file=sys.stderr)


def report(command: Callable[[], object], debug: bool = False) -> int:
    """Run `command` and turn how it ended into an exit code; mistakes become two lines on stderr.

    With `debug` the traceback is printed too. What is nobody's mistake but ours keeps its traceback.
    """
    try:
        command()
    except UserError as error:
        if debug:
            traceback.print_exc()
        print(f"error: {error.what}\nhint: {error.hint}", file=sys.stderr)
        return error.code
    except Stopped as stop:
        print(stop, file=sys.stderr)
        return stop.code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has left, as `| head` does
        sys.stderr.close()
        return 0
    except OSError as error:
        if debug:
            traceback.print_exc()
        name = error.filename2 or error.filename  # the target of a replacement, rather than its temporary file
        where = f" ({name})" if name else ""
        print(
            f"error: {error.strerror or error}{where}\nhint: check the path, its permissions and the free space",
            file=sys.stderr,
        )
        return EnvironmentProblem.code
    except (MemoryError, RuntimeError) as error:  # torch's are of the second kind, on a device and on the CPU
        asked = re.search(r"tried to allocate ([\d.]+ ?\w+)", str(error), re.IGNORECASE)
        if not (asked or isinstance(error, MemoryError)):
            raise
        if debug:
            traceback.print_exc()
        what = f"the memory is not enough{f': {asked[1]} more were asked for' if asked else ''}"
        print(
            f"error: {what}\nhint: use a smaller batch or a smaller model, or --model.checkpointing true in stage 2",
            file=sys.stderr,
        )
        return EnvironmentProblem.code
    return 0
