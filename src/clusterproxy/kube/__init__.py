"""Kubernetes from trio: calls, watches, controllers, leader election, events (design: docs/architecture.md)."""
