"""Entry point of `blipfit` and `python -m blipfit`: how a command ends, with which message and exit code."""

import signal
import sys
import traceback
from typing import NoReturn

from blipfit import disk_space
from blipfit.errors import Interrupted, UserError
from blipfit.runtime import interruption, launcher


def main() -> NoReturn:
    """Entry point: a mistake of the user is one sentence and exit code 2, a defect of ours a traceback.

    A signal is one sentence and exit code 130 (SIGINT) or 143 (SIGTERM, SIGUSR1).
    """
    try:
        interruption.install()
        launcher.watch_parent()
        from blipfit.cli import app  # after the handlers are installed: this takes a quarter of a second

        code = app(standalone_mode=False)
    except UserError as error:
        _print_error(str(error))
        sys.exit(2)
    except Interrupted as error:
        _print_error(_describe_interruption(error))
        sys.exit(error.exit_code)
    except KeyboardInterrupt:  # where another program handles the signals
        _print_error(_describe_interruption(Interrupted(signal.SIGINT)))
        sys.exit(130)
    except Exception as error:
        if sentence := disk_space.describe_full_disk(error):
            _print_error(sentence)
            sys.exit(2)
        if isinstance(error, OSError) and error.filename is not None:
            _print_error(f"{error.filename}: {error.strerror}; choose another place or make room")
            sys.exit(2)
        if hasattr(error, "format_message"):  # click's usage errors
            context = getattr(error, "ctx", None)
            hint = f" (see `{context.command_path} --help`)" if context else ""
            _print_error(f"{error.format_message()}{hint}")
            sys.exit(2)
        if launcher.write_message(traceback.format_exc()):
            sys.exit(1)
        raise
    sys.exit(code or 0)


def _describe_interruption(error: Interrupted) -> str:
    name = signal.Signals(error.number).name
    if error.is_saved:
        return f"stopped by {name}, everything is saved; the same command again continues where it was"
    return f"stopped by {name}; no file is half-written, and the same command again continues from what is there"


def _print_error(message: str) -> None:
    from blipfit.report import terminal

    if not launcher.write_message(terminal.format_error(message)):
        terminal.print_error(message)


if __name__ == "__main__":
    main()
