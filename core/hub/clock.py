"""How long something on the network may take as a whole."""

from __future__ import annotations

import time

__all__ = ["Clock", "ExpiredError"]


class ExpiredError(Exception):
    """The time is over; no error of the network, so that no library takes it for one and tries again."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"it did not finish within {seconds:g} s")


class Clock:
    """A deadline, in seconds from now."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds until the deadline; ExpiredError when there are none."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise ExpiredError(self.seconds)
        return left

    def within(self, seconds: float) -> Clock:
        """A clock for one step, which ends no later than this one."""
        return Clock(min(seconds, self.left()))
