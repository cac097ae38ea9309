"""Rounds in which the contenders take turns, so that what disturbs the machine disturbs all of them."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Protocol

from .programs import NotMeasured
from .samples import Result, Row, Sample

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .cases import Case


class Measurable(Protocol):
    """A contender, as far as the rounds go."""

    @property
    def most_rounds(self) -> int | None:
        """The rounds that it takes part in; None: all."""
        ...

    def measure(self, case: Case, seconds: float) -> Sample:
        """Run a case once."""
        ...


def order(keys: Sequence[str], number: int) -> list[str]:
    """Return who goes when: every other round backwards, so that nobody always follows the same."""
    return list(keys if number % 2 == 0 else reversed(keys))


def interleaved(case: Case, get: Callable[[str], Measurable], rounds: int, seconds: float) -> Row:
    """Measure a case in all its rounds.

    Who cannot be had, or whose load fails, has no further samples, and says why.
    """
    samples: dict[str, list[Sample]] = {key: [] for key in case.contenders}
    skipped: dict[str, str] = {}
    for number in range(min(rounds, case.most_rounds or rounds)):
        for key in order(case.contenders, number):
            if key in skipped:
                continue
            try:
                contender = get(key)
                if contender.most_rounds is not None and number >= contender.most_rounds:
                    continue
                sample = contender.measure(case, seconds * case.stretch)
            except NotMeasured as error:
                skipped[key] = str(error)
                print(f"  {case.part}: {case.name}: {key}: {error}", file=sys.stderr, flush=True)
                continue
            if sample.errors:
                print(f"  {case.part}: {case.name}: {key}: {dict(sample.errors)}", file=sys.stderr, flush=True)
            samples[key].append(sample)
    return Row(
        part=case.part,
        name=case.name,
        figure=case.figure,
        unit=case.unit,
        better=case.better,
        results={key: Result(samples=tuple(found), skipped=skipped.get(key, "")) for key, found in samples.items()},
    )
