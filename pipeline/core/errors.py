"""The four ways in which an asset, a request or a run ends early."""

from __future__ import annotations

from typing import Any


class Reject(Exception):
    """An asset is not usable.

    The verdict is deterministic. The manifest records it and it is never retried.

    Args:
        reason: A fixed snake_case word. The report counts rejected assets by this word.
        **numbers: The measured values that the rule looked at, by name.
    """

    def __init__(self, reason: str, **numbers: Any):
        super().__init__(reason, numbers)
        self.reason = reason
        self.numbers = numbers

    def __str__(self) -> str:
        return self.reason + "".join(f" {name}={value}" for name, value in self.numbers.items())


class Transient(Reject):
    """A problem outside the asset that may be gone later, such as a lost connection.

    The runner retries the asset. If every attempt fails, the manifest records a failure and not a
    rejection.
    """


class UserError(Exception):
    """A request of the user cannot be fulfilled. Exit code 2.

    The message says why and what to do.
    """


class RunError(Exception):
    """A run that has started cannot continue, for example because the disk is full.

    Committed work is kept. Exit code 1.
    """
