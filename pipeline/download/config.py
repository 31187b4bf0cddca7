"""Options of downloads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class FetchConfig:
    """How files are downloaded. None of it belongs to a dataset's identity."""

    cache: Path = Path(
        "~/.cache/sparse3d"
    )  # unfinished downloads, what is known to be gone; one a machine
    keep: bool = False  # keep the files too, for the next build
    connect_timeout_s: float = 10.0
    read_timeout_s: float = 30.0  # silence after which a connection counts as lost
    attempt_timeout_s: float = 600.0  # of one answer as a whole, however it trickles
    retries: int = 5  # of one request, with growing, jittered waits; Retry-After is honoured
    backoff_s: float = (
        0.5  # the first wait; each is twice the last, and up to this much more at random
    )
    max_wait_s: float = 120.0  # no wait is longer, whatever the server asks for
    max_redirects: int = 5
    per_host: int = 8  # connections that this machine keeps to one host at a time
    negative_ttl_h: float = (
        24.0  # how long a file that was refused, missing or not what it should be is left alone
    )
    proxy: str = ""  # URL of an HTTP proxy

    def __post_init__(self):
        for name in ("connect_timeout_s", "read_timeout_s", "attempt_timeout_s", "per_host"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("retries", "backoff_s", "max_wait_s", "max_redirects", "negative_ttl_h"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")

    @property
    def root(self) -> Path:
        return self.cache.expanduser()
