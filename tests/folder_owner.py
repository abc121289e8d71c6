"""A process that owns a folder, for test_folder_lock.py. Arguments: FOLDER BEAT LEASE ACTION TEXT CLOCK_ERROR.

It prints `owns` when it does, and the sentence of a UserError when it does not. Actions: `hold` waits for a line on
stdin and then writes; `write` stops inside a write until that line comes; `unchecked` does so without asking whether it
still owns the folder, as a process that is stopped between the question and the rename. CLOCK_ERROR: seconds by which
the clock of the day is wrong (faketime would change the monotonic clock too).
"""

import sys
import time
from datetime import datetime, timedelta
from pathlib import Path

from blipfit import folder_lock
from blipfit.errors import UserError
from blipfit.run_folder import Run, replacing, write_text


def set_clock(error: int) -> None:
    real = time.time
    time.time = lambda: real() + error

    class WrongClock(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(tz) + timedelta(seconds=error)

    folder_lock.datetime = WrongClock


def main(folder: str, beat: str, lease: str, action: str, text: str, clock_error: str) -> None:
    set_clock(int(clock_error))
    folder_lock.HEARTBEAT_SECONDS, folder_lock.LEASE_SECONDS = float(beat), float(lease)
    run = Run(Path(folder))
    try:
        with run.lock():
            if action == "unchecked":
                folder_lock.require = lambda path: None
            print("owns", flush=True)
            if action == "hold":
                sys.stdin.readline()
                write_text(run.folder / "text", text)
            else:
                with replacing(run.folder / "text") as temporary:
                    temporary.write_text(text)
                    print("writes", flush=True)
                    sys.stdin.readline()
        print("left", flush=True)
    except UserError as error:
        print(error, flush=True)
    except FileNotFoundError as error:
        print(f"FileNotFoundError {error}", flush=True)


main(*sys.argv[1:])
