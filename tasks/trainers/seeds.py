"""What is drawn in a training depends on its seed, and on what it is drawn for."""

from random import Random


def mixed(*numbers: int) -> int:
    """A seed, 63 bits, of several numbers in this order."""
    return Random("/".join(map(str, numbers))).getrandbits(63)
