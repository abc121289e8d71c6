"""The exceptions that end a command without a traceback."""

import signal


class UserError(Exception):
    """A mistake of the user: one sentence that names the thing and the mend.

    The command line prints it without a traceback and exits with code 2. Everything else that is raised is
    a defect of blipfit and keeps its traceback.
    """


class Interrupted(BaseException):
    """A signal that stops the command; no `except Exception` catches it, and no library turns it into something else.

    `number`: the signal. `is_saved`: whether the work up to now was saved.
    """

    def __init__(self, number: int, is_saved: bool = False):
        super().__init__(number)
        self.number, self.is_saved = number, is_saved

    @property
    def exit_code(self) -> int:
        """130 for SIGINT as shells use it, 143 for SIGTERM and for SIGUSR1, which announces it."""
        return 130 if self.number == signal.SIGINT else 143
