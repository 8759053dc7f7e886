"""Predictions over HTTP: the same scores as `predict`, in small batches, within limits of size, count and time."""

from flashtask.serve.app import create_app
from flashtask.serve.limits import Limits

__all__ = ["Limits", "create_app"]
