"""A backbone and a head of another package, found by flashtask through entry points."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["ScaledHead", "tiny_convnet"]


def tiny_convnet(pretrained: bool = True, in_chans: int = 3, width: int = 8) -> nn.Module:
    """Two convolutions that give maps of 2 * width channels; it has no pretrained weights."""
    if pretrained:
        raise ValueError("example_tiny has no pretrained weights: pretrained=False")
    return nn.Sequential(nn.Conv2d(in_chans, width, 3, stride=4), nn.ReLU(), nn.Conv2d(width, 2 * width, 3, stride=2))


class ScaledHead(nn.Module):
    """A linear map whose outputs are divided by a temperature."""

    def __init__(self, num_features: int, num_outputs: int, *, temperature: float = 1.0) -> None:
        super().__init__()
        self.linear, self.temperature = nn.Linear(num_features, num_outputs), temperature

    def forward(self, features: Tensor) -> Tensor:
        """Outputs (B, num_outputs) of features (B, num_features)."""
        outputs: Tensor = self.linear(features) / self.temperature
        return outputs
