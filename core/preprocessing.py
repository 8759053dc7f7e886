"""What a backbone wants its images to look like: the one record that the data room and the checkpoint share."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from flashtask.core.errors import UsageError, did_you_mean
from flashtask.core.keywords import named_arguments

__all__ = ["Preprocessing"]

_DECODINGS = ("scaled", "whole")
_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")


@dataclass(frozen=True)
class Preprocessing:
    """Size, crop and normalisation of images for evaluation, as the backbone's weights were trained.

    Args:
        input_size: (channels, height, width) in pixels.
        mean: per channel, in units of 0..1.
        std: per channel, in units of 0..1, above 0.
        crop_pct: share of the resized image that the centre crop keeps, in (0, 1].
        interpolation: nearest, bilinear, bicubic, lanczos, box or hamming.
        crop_mode: `center` (shorter side to size / crop_pct, then centre crop), `squash` (both sides) or
            `border` (longer side, then pad), with timm's meanings.
        decode: `scaled` lets a JPEG file that is much too large be decoded at a half, a quarter or an eighth of its
            size, at least twice as large as what the resize makes of it; `whole` decodes every pixel.
    """

    input_size: tuple[int, int, int] = (3, 224, 224)
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    crop_pct: float = 0.875
    interpolation: str = "bilinear"
    crop_mode: str = "center"
    decode: str = "scaled"

    def __post_init__(self) -> None:
        object.__setattr__(self, "input_size", tuple(int(n) for n in self.input_size))
        object.__setattr__(self, "mean", tuple(float(m) for m in self.mean))
        object.__setattr__(self, "std", tuple(float(s) for s in self.std))
        channels = self.input_size[0]
        if len(self.input_size) != 3 or min(self.input_size) < 1 or max(self.input_size) > 16384:
            raise UsageError(f"input_size must be (channels, height, width) of 1 to 16384, not {self.input_size}")
        if len(self.mean) != channels or len(self.std) != channels or min(self.std) <= 0:
            raise UsageError(f"mean and std need {channels} values (std above 0), not mean={self.mean} std={self.std}")
        if not 0 < self.crop_pct <= 1:
            raise UsageError(f"crop_pct must be above 0 and at most 1, not {self.crop_pct}")
        if self.interpolation not in _INTERPOLATIONS:
            raise UsageError(
                f"no interpolation named {self.interpolation!r}",
                fix=did_you_mean(str(self.interpolation), _INTERPOLATIONS) or f"one of {', '.join(_INTERPOLATIONS)}",
            )
        if self.crop_mode not in ("center", "squash", "border"):
            raise UsageError(f"crop_mode must be center, squash or border, not {self.crop_mode!r}")
        if self.decode not in _DECODINGS:
            raise UsageError(f"decode must be scaled or whole, not {self.decode!r}", fix='decode="scaled"')

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, ready for JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Preprocessing:
        """The record that `to_dict` wrote; unknown keys are an error. One that does not say `decode` means `whole`."""
        unknown = set(values) - set(cls.__dataclass_fields__)
        if unknown:
            raise UsageError(f"preprocessing has unknown keys: {', '.join(sorted(unknown))}")
        return cls(**{"decode": "whole", **values})


Preprocessing.__init__ = named_arguments(Preprocessing.__init__)  # type: ignore[method-assign]
