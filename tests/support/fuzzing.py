"""What the fuzzes of images and of configurations share: what they found, and how much memory that took."""

import resource
from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Found:
    """What came of the cases of a fuzz."""

    outcomes: Counter = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    slowest: tuple[float, int, str] = (0.0, -1, "")
    before: int = field(default_factory=lambda: peak_megabytes())

    def __str__(self) -> str:
        seconds, number, name = self.slowest
        return "\n".join((
            *self.failures, *(f"{n:7,} {what}" for what, n in self.outcomes.most_common()),
            f"slowest: {seconds:.2f} s, number {number} ({name}); peak memory {peak_megabytes():,} MB, "
            f"{self.before:,} MB before; {len(self.failures)} failures",
        ))  # fmt: skip


def peak_megabytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
