"""Clear errors where a Ray cluster does not answer, or where Ray cannot start on this machine."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.core.errors import RunError, UserError

PROBE_TIMEOUT_S = 10.0  # for the head of the cluster to answer


def check_answers(address: str) -> None:
    """Check that something listens at the address of a Ray cluster.

    Ray itself would try for minutes, and then end the process.

    Args:
        address: Value of RAY_ADDRESS. Only the form [ray://]HOST:PORT is checked.

    Raises:
        OSError: If nothing listens there within PROBE_TIMEOUT_S.
    """
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if host and port.isdigit() and int(port) < 1 << 16:
        socket.create_connection((host.strip("[]"), int(port)), PROBE_TIMEOUT_S).close()


@contextmanager
def connecting(address: str | None, advice: str = "correct or unset it") -> Iterator[None]:
    """Let `ray.init` fail in one line. The caller calls it inside this context.

    Args:
        address: Value of RAY_ADDRESS, which is checked first. None starts a Ray on this machine.
        advice: What to do if no cluster answers there.

    Raises:
        UserError: If no cluster answers at the address.
        RunError: If Ray cannot start on this machine.
    """
    try:
        if address:
            check_answers(address)
        yield
    except Exception as error:
        cause = " ".join(str(error).split()) or type(error).__name__
        if address:
            raise UserError(f"no Ray at RAY_ADDRESS={address}: {cause}; {advice}") from error
        raise RunError(
            f"Ray cannot start on this machine: {cause}; free memory and disk space, set "
            "RAY_TMPDIR to a short path of a writable directory, or set RAY_ADDRESS to a cluster"
        ) from error
