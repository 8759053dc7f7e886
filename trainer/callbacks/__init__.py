"""Callbacks: objects with hooks that a run calls, one kind a file."""
