"""Errors that are a user's to mend: one line with what was got, what was expected, what to do."""


class GristmillError(ValueError):
    """A mistake in what the user gave: shown as one line, never as a traceback."""
