"""The root of every error Darkroom raises on purpose; one subclass per kind of failure stands beside the code that raises it."""


class DarkroomError(Exception):
    """Something a person can act on. The message says what was received, where, and what to do next."""


class Stopped(DarkroomError):
    """The run this work was for has ended."""
