"""Check what a load generator saw against what the product has written down."""

from deploy.bench.stack import Stack

KEPT_PACE = 1.05


class Books:
    """Count what was answered, and compare it with the ledger at the end."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._answered = self._failed = self._cut_off = 0
        self._kept_pace = True
        self._before = stack.count_ledger()

    def add(self, answered: int, *, failed: int = 0, cut_off: int = 0) -> None:
        """Note answers. Up to ``cut_off`` requests more may be in the ledger: they were under way as their client hung up."""
        self._answered += answered
        self._failed += failed
        self._cut_off += cut_off

    def check_pace(self, elapsed_s: float, seconds: float) -> None:
        """Note whether an open load took no longer than it was to take."""
        self._kept_pace = self._kept_pace and elapsed_s < seconds * KEPT_PACE + 1

    def close(self) -> bool:
        """Wait for the ledger, print the comparison, and tell whether the run was good."""
        settled, waited_s = self._stack.wait_ledger(self._before + self._answered)
        settled -= self._before
        print(f"\n{self._answered} requests were answered, {settled} are in the ledger {waited_s:.0f} s later")
        missing = max(self._answered - settled, 0)
        surplus = max(settled - self._answered - self._cut_off, 0)
        if self._failed or missing or surplus or not self._kept_pace:
            print(
                f"NOT A GOOD RUN: {self._failed} failed or were dropped, {missing} answers are not in the ledger, {surplus} are there "
                f"that nobody got, pace kept: {self._kept_pace}"
            )
            return False
        return True
