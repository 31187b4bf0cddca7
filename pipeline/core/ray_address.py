"""Whether a Ray cluster answers at the address that the user gives."""

from __future__ import annotations

import socket

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
