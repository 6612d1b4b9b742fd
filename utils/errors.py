"""The one error a user can mend."""


class UserError(Exception):
    """A mistake in the input, told in one sentence: the file, what is wrong, and the command or change that mends it.

    Scripts print the sentence and exit with code 2; no traceback is shown.
    """
