"""Kubernetes for tests: real control planes on loopback, and what plays the nodes."""
