"""Averages of weights: callbacks, and what they share."""
