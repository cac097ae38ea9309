"""Logs, metrics and the health and admin ports. Stands beside the layers: any of them may use the cells."""
