"""Entry point of `blipfit` and `python -m blipfit`: how a command ends, with which message and exit code."""

import sys
from typing import NoReturn

import typer

from blipfit.cli import app
from blipfit.errors import UserError


def main() -> NoReturn:
    """Entry point: a mistake of the user is one sentence and exit code 2, a defect of ours a traceback."""
    try:
        code = app(standalone_mode=False)
    except UserError as error:
        _print_error(str(error))
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        _print_error("stopped; the same command again continues where it was")
        sys.exit(130)
    except OSError as error:
        if error.filename is None:
            raise
        _print_error(f"{error.filename}: {error.strerror}; choose another place or make room")
        sys.exit(2)
    except Exception as error:
        if hasattr(error, "format_message"):  # click's usage errors
            context = getattr(error, "ctx", None)
            hint = f" (see `{context.command_path} --help`)" if context else ""
            _print_error(f"{error.format_message()}{hint}")
            sys.exit(2)
        raise
    sys.exit(code or 0)


def _print_error(message: str) -> None:
    from blipfit.report import terminal

    terminal.print_error(message)


if __name__ == "__main__":
    main()
