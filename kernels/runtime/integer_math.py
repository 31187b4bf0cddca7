"""Arithmetic of launches on Python's integers; triton's functions of these names cost a call microseconds each."""


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is n or more; n >= 1."""
    return 1 << (n - 1).bit_length()
