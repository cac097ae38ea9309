"""What a program may want to know of its requests."""

from __future__ import annotations


class Observer:
    """Told what happens; does nothing itself."""

    def began(self) -> None:
        """A request has come."""

    def ended(self, method: str, status: int) -> None:
        """It is over; *status* is that of the answer, 499 if the client left before there was one."""

    def failed(self, origin: str) -> None:
        """An origin, as logs call it, was not reached or did not answer as it should."""
