"""The two ways a run ends early that are no defect."""


class UserError(ValueError):
    """A mistake of the user: one or several lines, shown without a traceback; exit code 2."""

    exit_code = 2


class Interrupted(Exception):
    """The run was stopped and can be resumed from its last snapshot; exit code 3."""

    exit_code = 3
