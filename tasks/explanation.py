"""Where in an image a prediction comes from: heat maps by gradients, for convolutions and transformers alike."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from flashtask.data.decoding import Pixels
from flashtask.data.inputs import Input
from flashtask.data.transforms import eval_transform

if TYPE_CHECKING:
    from flashtask.tasks.task import Task

__all__ = ["heat_maps", "heated", "heated_whole"]

#: Images at a time.
_BATCH = 16


def heat_maps(task: Task, inputs: Sequence[Input]) -> list[np.ndarray[Any, Any]] | None:
    """How much each place of an image speaks for its largest output, from 0 to 1, in a map (h, w) over the input.

    It is HiResCAM (Draelos and Carin, 2020): the gradient times the last features that have places, summed over
    channels. With a mean over the places and a linear head it is the same as Grad-CAM.

    Args:
        task: in eval mode, with outputs (B, K).
        inputs: pictures.

    Returns:
        None if the backbone has no features with places, or the outputs are not one row an image.
    """
    transform = eval_transform(task.preprocessing)
    if transform.is_tiled:
        return None
    found: list[np.ndarray[Any, Any]] = []
    with _frozen(task):
        place: nn.Module | None = None
        for start in range(0, len(inputs), _BATCH):
            own = inputs[start : start + _BATCH]
            images = torch.stack([transform.rest(one.read(transform.first)) for one in own]).to(task.device)
            if place is None and (place := _last_with_places(task, images[:1])) is None:
                return None
            found += _maps(task, place, images)
    return found


@contextmanager
def _frozen(task: Task) -> Iterator[None]:
    """Eval mode and no gradients of weights; each part's own state comes back afterwards."""
    modes = [(part, part.training) for part in task.modules()]
    wanted = [(one, one.requires_grad) for one in task.parameters()]
    task.eval()
    for one, _ in wanted:
        one.requires_grad_(False)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for one, requires in wanted:
            one.requires_grad_(requires)
        for part, mode in modes:
            part.training = mode


def _score(task: Task, images: Tensor) -> Tensor | None:
    """The sum of the largest outputs of the images; None if they are not numbers (B, K)."""
    outputs = task(images)
    if not isinstance(outputs, Tensor) or outputs.ndim != 2:
        return None
    return outputs.amax(dim=1).sum()


def _last_with_places(task: Task, image: Tensor) -> nn.Module | None:
    """The last module of the backbone whose output has places that the largest output depends on."""
    seen: list[tuple[nn.Module, Tensor]] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.requires_grad and _grid(output, task) is not None:
            seen.append((module, output))

    with ExitStack() as stack:
        for part in task.backbone.modules():
            stack.callback(part.register_forward_hook(keep).remove)
        score = _score(task, image.clone().requires_grad_())
    if score is None or not score.requires_grad or not seen:
        return None
    # Of a transformer only whole tokens count, not the parts of them that attention is made of.
    if any(output.ndim == 3 for _, output in seen):
        seen = [one for one in seen if one[1].ndim == 3]
    gradients = torch.autograd.grad(score, [output for _, output in seen], allow_unused=True)
    for (module, _), gradient in zip(reversed(seen), reversed(gradients), strict=True):
        if gradient is not None and _places(gradient, task).abs().sum() > 0 and _is_once(module, seen):
            return module
    return None


def _is_once(module: nn.Module, seen: Sequence[tuple[nn.Module, Tensor]]) -> bool:
    return sum(one is module for one, _ in seen) == 1


def _grid(output: Tensor, task: Task) -> tuple[int, int] | None:
    """(height, width) of the places in features; None if they have none."""
    height, width = task.preprocessing.input_size[1:]
    if output.ndim == 3 and output.shape[2] == task.num_features:
        for prefix in range(6):
            rows = math.isqrt((output.shape[1] - prefix) * height // width) if output.shape[1] > prefix else 0
            if rows > 1 and rows * (rows * width // height) == output.shape[1] - prefix:
                return rows, rows * width // height
        return None
    if output.ndim != 4:
        return None
    sides = output.shape[1:3] if _is_channels_last(output, task) else output.shape[2:]
    is_map = min(sides) > 1 and abs(sides[0] * width - sides[1] * height) <= width + height
    return (sides[0], sides[1]) if is_map else None


def _is_channels_last(output: Tensor, task: Task) -> bool:
    return output.shape[3] == task.num_features != output.shape[1]


def _places(output: Tensor, task: Task) -> Tensor:
    """Features (B, h, w, C)."""
    grid = _grid(output, task)
    assert grid is not None
    if output.ndim == 3:
        return output[:, output.shape[1] - grid[0] * grid[1] :].reshape(len(output), *grid, -1)
    return output if _is_channels_last(output, task) else output.permute(0, 2, 3, 1)


def _maps(task: Task, place: nn.Module, images: Tensor) -> list[np.ndarray[Any, Any]]:
    held: list[Tensor] = []

    def cut(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        held.append(output.detach().requires_grad_())  # nothing before it needs a gradient
        return held[-1]

    with ExitStack() as stack:
        stack.callback(place.register_forward_hook(cut).remove)
        score = _score(task, images)
    assert score is not None
    (gradient,) = torch.autograd.grad(score, held)
    maps = (_places(gradient, task) * _places(held[0].detach(), task)).sum(dim=3).clamp(min=0)
    most = maps.flatten(1).amax(dim=1).clamp(min=1e-12)
    return [*(maps / most[:, None, None]).cpu().numpy()]


def heated(picture: Image.Image, heat: np.ndarray[Any, Any]) -> Image.Image:
    """A copy of a picture, in mode RGB, on which a heat map (h, w) over all of it lies in red and yellow."""
    whole = Image.fromarray((heat * 255).astype(np.uint8)).resize(picture.size, Image.Resampling.BICUBIC)
    strength = np.asarray(whole, dtype=np.float32)[..., None] / 255
    colour = np.concatenate([np.full_like(strength, 255), 220 * strength, np.zeros_like(strength)], axis=2)
    pixels: Pixels = np.asarray(picture.convert("RGB"), dtype=np.float32)
    share = 0.65 * strength
    return Image.fromarray((pixels * (1 - share) + colour * share).round().astype(np.uint8))


def heated_whole(task: Task, given: Input, side: int) -> Image.Image | None:
    """A picture as it is in its file, in mode RGB, with its heat map where the model has looked.

    Args:
        task: as for `heat_maps`.
        given: the picture; what the crop cuts off stays as it is.
        side: pixels that the longer side of the result has at the most.

    Returns:
        None as for `heat_maps`.
    """
    maps = heat_maps(task, [given])
    if maps is None:
        return None
    picture = given.thumbnail(side)
    picture.thumbnail((side, side))
    place = given.placed(task.preprocessing)
    edges = place.points_in_file(torch.tensor([(0, 0), place.size], dtype=torch.float64))
    edges = edges * torch.tensor([ours / whole for ours, whole in zip(picture.size, place.whole, strict=True)])
    left, top, right, bottom = edges.round().long().flatten().tolist()
    seen = Image.fromarray((maps[0] * 255).astype(np.uint8))
    seen = seen.resize((max(1, right - left), max(1, bottom - top)), Image.Resampling.BICUBIC)
    heat = Image.new("L", picture.size)
    heat.paste(seen, (left, top))
    return heated(picture, np.asarray(heat, dtype=np.float32) / 255)
