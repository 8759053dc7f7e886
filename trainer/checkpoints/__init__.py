"""Checkpoints of a run: what is in them, when they are written, which are kept, and the way back."""
