"""A cache of values that are made once, although several threads ask for them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")


class ThreadSafeCache(Generic[Key, Value]):
    """A cache of recently used values. One thread makes a value while others wait for it.

    Args:
        max_size: Number of values to keep.
    """

    def __init__(self, max_size: int):
        self.max_size = max_size
        self._lock = threading.Lock()
        # Each key has a lock, and a list that is empty until the value is made.
        self._entries: OrderedDict[Key, tuple[threading.Lock, list[Value]]] = OrderedDict()

    def get(self, key: Key, make: Callable[[], Value]) -> Value:
        """Return the value of a key, calling `make` if it is not cached."""
        with self._lock:
            key_lock, values = self._entries.setdefault(key, (threading.Lock(), []))
            self._entries.move_to_end(key)
            while len(self._entries) > self.max_size:
                self._entries.popitem(last=False)
        with key_lock:
            if not values:
                values.append(make())
        return values[0]
