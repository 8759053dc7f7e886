"""Callbacks: what may be told of the moments of a run, one kind a file."""
