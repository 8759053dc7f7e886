"""Trained tasks as folders in timm's layout, which the hub holds and plain timm reads as far as it can."""
