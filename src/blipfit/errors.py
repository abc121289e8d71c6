"""The one exception a user is meant to see."""


class UserError(Exception):
    """A mistake of the user: one sentence that names the thing and the mend.

    The command line prints it without a traceback and exits with code 2. Everything else that is raised is
    a defect of blipfit and keeps its traceback.
    """
