"""How much one API key may send: token buckets of requests and of tokens.

Invariant: a key never gets more than its rate and one minute's savings, and the `x-ratelimit-*`
headers (OpenAI's names) tell what is left of them. Rates count per replica.
"""

import time


class Bucket:
    """`rate` per second, at most `capacity` saved up."""

    def __init__(self, rate: float, capacity: float) -> None:
        self.rate = rate
        self.capacity = max(1.0, capacity)
        self.level = self.capacity
        self._filled_at = time.monotonic()

    def take(self, cost: float, now: float) -> float:
        """0 and the cost is taken, or the seconds until it could be."""
        self.fill(now)
        if self.level < max(cost, 0.0) or self.level < 0:
            return (max(cost, 0.0) - self.level) / self.rate
        self.level -= cost
        return 0.0

    def fill(self, now: float) -> None:
        self.level = min(self.capacity, self.level + (now - self._filled_at) * self.rate)
        self._filled_at = now


class Rate:
    """The bucket of one key for `what` (requests or tokens), `per_minute` > 0."""

    def __init__(self, what: str, per_minute: int) -> None:
        self.what = what
        self.per_minute = per_minute
        self.bucket = Bucket(per_minute / 60.0, per_minute)

    def headers(self) -> dict[str, str]:
        """`x-ratelimit-limit-requests: 60` and what is left, and the seconds until it is full."""
        bucket = self.bucket
        bucket.fill(time.monotonic())
        full_in_s = (bucket.capacity - bucket.level) / bucket.rate
        return {
            f"x-ratelimit-limit-{self.what}": str(self.per_minute),
            f"x-ratelimit-remaining-{self.what}": str(max(0, int(bucket.level))),
            f"x-ratelimit-reset-{self.what}": f"{full_in_s:.1f}s",
        }
