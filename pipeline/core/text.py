"""Words of log lines."""


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: "1 shard", "2 shards", "12,000 assets"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
