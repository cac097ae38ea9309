"""The documentation's own steps, end to end: ``make e2e``."""
