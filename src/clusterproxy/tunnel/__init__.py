"""The rules of a konnectivity tunnel that need no input or output: budgets, stalls, identifiers."""

from __future__ import annotations
