"""Options of downloads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class FetchConfig:
    """How files are downloaded. These options do not change the contents of a dataset."""

    cache: Path = Path("~/.cache/sparse3d")
    """Directory for unfinished downloads, recorded failures and kept files. All builds on one
    machine can share it."""

    keep: bool = False
    """Keep downloaded files in the cache, so that a later build does not download them again.
    The cache then grows to the size of all source files."""

    connect_timeout_s: float = 10.0
    """Seconds to wait for a connection to a server."""

    read_timeout_s: float = 30.0
    """Seconds without data after which a connection counts as lost."""

    attempt_timeout_s: float = 600.0
    """Seconds that one response may take in total, and seconds to wait for a free connection to a
    host. Increase it for large files on slow connections."""

    retries: int = 5
    """Number of times that a request is repeated after a temporary error. 0 disables retries."""

    backoff_s: float = 0.5
    """Seconds to wait before the first retry. Each further wait is twice as long, and up to this
    many seconds are added at random."""

    max_wait_s: float = 120.0
    """Longest wait in seconds between two attempts, even if the server asks for more in its
    Retry-After header."""

    max_redirects: int = 5
    """Number of redirects that a request follows before the file is rejected."""

    per_host: int = 8
    """Number of simultaneous connections from this machine to one host, over all processes. Reduce
    it if a server answers with status 429 or 503."""

    negative_ttl_h: float = 24.0
    """Hours during which a file that was missing, refused or wrong is not requested again. 0 always
    requests it again."""

    proxy: str = ""
    """URL of an HTTP proxy, such as http://proxy:3128. Empty connects directly."""

    def __post_init__(self):
        for name in ("connect_timeout_s", "read_timeout_s", "attempt_timeout_s", "per_host"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("retries", "backoff_s", "max_wait_s", "max_redirects", "negative_ttl_h"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")

    @property
    def root(self) -> Path:
        """The cache directory with "~" expanded."""
        return self.cache.expanduser()
