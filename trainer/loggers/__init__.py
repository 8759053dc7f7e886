"""Loggers: where logged values go, one kind a file."""
