"""The decoders of segmentation_models_pytorch as heads: `smp/unet`, `smp/unetplusplus`, `smp/deeplabv3plus`, ..."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from flashtask.core.errors import MissingInputError
from flashtask.core.registry import RegistryEntry

if TYPE_CHECKING:
    from torch import nn

__all__ = ["SmpDecoders"]

_LIBRARY, _PREFIX = "segmentation_models_pytorch", "smp/"

#: Name -> module and class below `decoders`, and the arguments that the library's own models give it.
_DECODERS: Mapping[str, tuple[str, str, Mapping[str, Any]]] = {
    "unet": ("unet", "UnetDecoder", {"decoder_channels": (256, 128, 64, 32, 16)}),
    "unetplusplus": ("unetplusplus", "UnetPlusPlusDecoder", {"decoder_channels": (256, 128, 64, 32, 16)}),
    "manet": ("manet", "MAnetDecoder", {"decoder_channels": (256, 128, 64, 32, 16)}),
    "linknet": ("linknet", "LinknetDecoder", {}),
    "fpn": ("fpn", "FPNDecoder", {}),
    "upernet": ("upernet", "UPerNetDecoder", {}),
    "segformer": ("segformer", "SegformerDecoder", {}),
}


class SmpDecoders:
    """The decoders as entries of a registry; the library is imported when one is built."""

    def names(self) -> Iterator[str]:
        """`smp/NAME` of each, if the library is installed."""
        return (f"{_PREFIX}{name}" for name in (_DECODERS if find_spec(_LIBRARY) else ()))

    spellings = names

    def find(self, name: str) -> RegistryEntry | None:
        """The entry of `smp/NAME`."""
        bare = name.removeprefix(_PREFIX)
        if bare == name or bare not in _DECODERS:
            return None
        described = {
            "provider": _LIBRARY,
            "description": f"{_DECODERS[bare][1]} of {_LIBRARY}",
            "library_licence": "MIT",
        }
        return RegistryEntry(name, "head", described, partial(_load, bare))


def _load(name: str) -> Any:
    if find_spec(_LIBRARY) is None:
        raise MissingInputError(
            f"the head {_PREFIX}{name} needs {_LIBRARY}", fix="pip install 'flashtask[segmentation]'"
        )
    return _Builder(name)


class _Builder:
    """Builds the head of a name."""

    takes = "maps"

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, features: Any, num_outputs: int, **options: Any) -> nn.Module:
        from flashtask.heads.smp_head import SmpHead

        return SmpHead(self.name, _DECODERS[self.name], features, num_outputs, options)
