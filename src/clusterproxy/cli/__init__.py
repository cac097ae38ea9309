"""The command line: one module per program, which parses flags, builds a config and runs it."""
