"""The one exception that is the user's to fix."""


class OdcftError(Exception):
    """A mistake the user can fix: a flag, path, recipe, checkpoint or data.

    The message is one sentence or two: what is wrong, with the value, and what to do next. The command line prints it
    without a traceback and exits with 2. Our own mistakes are assertions, and do show their traceback.
    """
