"""A number that a module or data module trains by, found and changed by its name: a learning rate, a batch size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from flashtask.core.errors import UsageError

__all__ = ["NamedValue"]


class NamedValue:
    """A number under one name, in every place that has it: attributes and saved hyper-parameters.

    Args:
        name: of the attribute and of the hyper-parameter.
        owners: modules and data modules that may have it.
    """

    def __init__(self, name: str, owners: Iterable[Any]) -> None:
        self.name = name
        self._owners = list(owners)
        self._attributes = [owner for owner in self._owners if _has_attribute(owner, name)]
        self._hparams = [o._hparams for o in self._owners if o._hparams is not None and name in o._hparams]

    @classmethod
    def find(cls, names: Sequence[str], owners: Iterable[Any], missing: Callable[[], UsageError]) -> NamedValue:
        """The first of several names that is there.

        Raises:
            UsageError: `missing()`, if none is.
        """
        owners = list(owners)
        for name in names:
            found = cls(name, owners)
            if found.is_there:
                return found
        raise missing()

    @property
    def is_there(self) -> bool:
        """Whether anybody has a value of this name."""
        return bool(self._attributes or self._hparams)

    @property
    def value(self) -> Any:
        """The value in the first place that has it: an attribute, else a hyper-parameter."""
        return getattr(self._attributes[0], self.name) if self._attributes else self._hparams[0][self.name]

    def give(self, value: float) -> None:
        """Put a value into every place; hyper-parameters that an owner resolves from it follow."""
        for owner in self._attributes:
            setattr(owner, self.name, value)
        for hparams in self._hparams:
            hparams[self.name] = value
        for owner in self._owners:
            if owner._hparams is not None:
                resolved = owner.resolved_hyperparameters()
                owner._hparams.update({name: v for name, v in resolved.items() if name in owner._hparams})


def _has_attribute(owner: Any, name: str) -> bool:
    """Whether an owner has an attribute that can be set; a property that only reads the hyper-parameters cannot."""
    own = getattr(type(owner), name, None)
    return hasattr(owner, name) and not (isinstance(own, property) and own.fset is None)
