"""Convolutions in bfloat16 on a CPU: the same outputs, gradients as near to the exact ones, in any use."""

import pytest
import torch
from torch import nn

from flashtask import Module, Trainer
from flashtask.trainer.devices.bfloat16_convolutions import bfloat16_convolutions, has_bad_gradients
from flashtask.trainer.devices.precision import resolve_precision

#: kernel, stride, padding, dilation, bias
SHAPES = [
    (3, 2, 1, 1, False),
    (5, 1, 2, 1, True),
    (5, 2, 2, 1, True),
    (5, 1, 4, 2, False),
    (3, (1, 2), (0, 1), 1, True),
]


def autocast():
    return torch.autocast("cpu", dtype=torch.bfloat16)


def gradients(context, layer, images, weights):
    layer.zero_grad()
    images = images.clone().requires_grad_()
    with context:
        output = layer(images)
    (output.double() * weights).sum().backward()
    return output.detach(), [images.grad, *(parameter.grad for parameter in layer.parameters())]


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize(("kernel", "stride", "padding", "dilation", "bias"), SHAPES)
def test_outputs_are_those_of_autocast_and_gradients_no_further_from_the_exact_ones(
    kernel, stride, padding, dilation, bias, memory_format
):
    torch.manual_seed(0)
    layer = nn.Conv2d(24, 24, kernel, stride, padding, dilation, groups=24, bias=bias).to(memory_format=memory_format)
    images = torch.randn(8, 24, 15, 17).to(memory_format=memory_format)
    weights = torch.randn(layer(images).shape)
    plain, plain_gradients = gradients(autocast(), layer, images, weights)
    fast, fast_gradients = gradients(bfloat16_convolutions(), layer, images, weights)
    exact_layer = nn.Conv2d(24, 24, kernel, stride, padding, dilation, groups=24, bias=bias).double()
    exact_layer.load_state_dict(layer.state_dict())
    _, exact = gradients(torch.autocast("cpu", enabled=False), exact_layer, images.double(), weights)
    assert fast.dtype is torch.bfloat16
    assert torch.equal(plain, fast)
    assert fast.stride() == plain.stride()
    for ours, theirs, true in zip(fast_gradients, plain_gradients, exact, strict=True):
        assert ours.dtype is torch.float32
        near = (ours.double() - true).abs().max()
        # CPUs without AVX512_BF16 add up in bfloat16, in torch's own kernels too.
        assert near <= 0.02 * true.abs().max()
        assert near <= 1.05 * (theirs.double() - true).abs().max()


def test_a_frozen_layer_and_frozen_inputs_get_no_gradient():
    layer = nn.Conv2d(8, 8, 5, 2, 2, groups=8)
    layer.weight.requires_grad_(False)
    with bfloat16_convolutions():
        layer(torch.randn(2, 8, 9, 9)).float().sum().backward()
    assert layer.weight.grad is None
    assert layer.bias.grad is not None


def test_gradients_of_gradients_are_those_of_the_plain_path():
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 6, 5, 2, 2, groups=6)
    found = []
    for context in (autocast(), bfloat16_convolutions()):
        images = torch.randn(2, 6, 9, 9, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with context:
            output = layer(images).float().pow(2).sum()
        (first,) = torch.autograd.grad(output, images, create_graph=True)
        found.append(torch.autograd.grad(first.pow(2).sum(), [images, layer.weight]))
    for plain, fast in zip(*found, strict=True):
        assert (plain - fast).abs().max() <= 0.05 * plain.abs().max()


def test_torch_func_can_ask_for_gradients():
    layer = nn.Conv2d(6, 6, 5, 2, 2, groups=6)
    images = torch.randn(2, 6, 9, 9)

    def loss(parameters):
        return torch.func.functional_call(layer, parameters, (images,)).float().sum()

    with bfloat16_convolutions():
        found = torch.func.grad(loss)(dict(layer.named_parameters()))
    assert found["weight"].shape == layer.weight.shape
    assert found["weight"].abs().sum() > 0


@pytest.mark.parametrize(
    ("layer", "is_slow", "is_bad"),
    [
        (nn.Conv2d(8, 8, 3, 2, groups=8), True, True),
        (nn.Conv2d(8, 16, 5, 1, groups=8), True, True),
        (nn.Conv2d(8, 8, 3, 1, groups=8), False, False),
        (nn.Conv2d(8, 8, 5, 1), False, False),
        (nn.Conv2d(8, 8, 1, 2), False, False),
        (nn.Conv2d(8, 8, 5, 2), False, True),
        (nn.Conv2d(8, 8, 5, 2, groups=2), False, True),
        (nn.Conv2d(1, 8, 5, 2), False, True),
    ],
)
def test_only_what_would_be_slow_is_computed_otherwise(layer, is_slow, is_bad):
    assert has_bad_gradients(nn.Sequential(layer)) is is_bad
    with bfloat16_convolutions():
        name = layer(torch.randn(2, layer.in_channels, 9, 9)).grad_fn.name()
    assert ("Depthwise" in name) is is_slow


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(48, 64, 3, 2, 1), (4, 48, 1, 1)),
        (nn.Conv2d(48, 64, 3, 2, 1), (4, 48, 4, 1)),
        (nn.Conv2d(3, 16, 7, 4, 3, bias=False), (4, 3, 3, 3)),
        (nn.Conv1d(32, 64, 3, 2, 1), (4, 32, 1)),
        (nn.Conv3d(16, 32, 3, 2, 1), (2, 16, 3, 3, 1)),
    ],
)
def test_gradients_of_an_input_narrower_than_the_stride_hold_no_foreign_memory(layer, shape):
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weights = torch.randn(layer(images).shape)
    _, exact = gradients(torch.autocast("cpu", enabled=False), layer, images, weights)
    exact = [one.clone() for one in exact]
    for _ in range(4):
        freed = [torch.full((size,), torch.nan) for size in (2**10, 2**14, 2**18, 2**20) for _ in range(4)]
        del freed
        output, found = gradients(bfloat16_convolutions(), layer, images, weights)
        assert output.dtype is torch.bfloat16
        for ours, true in zip(found, exact, strict=True):
            assert (ours - true).abs().max() <= 0.01 * true.abs().max()


def test_a_convolution_that_is_called_with_plain_numbers_is_left_as_it_is():
    images, weight = torch.randn(2, 8, 9, 9), torch.randn(8, 1, 5, 5, requires_grad=True)
    with bfloat16_convolutions():
        made = nn.functional.conv2d(images, weight, None, 2, 2, 1, 8)
    made.float().sum().backward()
    assert "Depthwise" not in made.grad_fn.name()
    assert weight.grad is not None


class Net(Module):
    def __init__(self, **convolution):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(4, 4, groups=4, **convolution), nn.Flatten(), nn.LazyLinear(2))
        self.layers(torch.zeros(1, 4, 8, 8))
        self.seen = []

    def training_step(self, batch, batch_idx):
        made = self.layers[0](batch[0])
        self.seen.append(made.grad_fn.name())
        return nn.functional.cross_entropy(self.layers[1:](made).float(), batch[1])

    def validation_step(self, batch, batch_idx):
        self.seen.append(str(self.layers[0](batch[0]).grad_fn))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("precision", "kernel", "is_used"), [("bf16-mixed", 5, True), ("bf16-mixed", 3, False), ("32", 5, False)]
)
def test_a_fit_uses_it_where_it_helps_and_validation_does_not(tmp_path, precision, kernel, is_used):
    data = [(torch.randn(4, 8, 8), number % 2) for number in range(8)]
    loader = torch.utils.data.DataLoader(data, batch_size=4)
    net = Net(kernel_size=kernel)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(default_root_dir=tmp_path, precision=precision, max_epochs=1, num_sanity_val_steps=0, **quiet)
    trainer.fit(net, loader, loader)
    assert ["Depthwise" in name for name in net.seen] == [is_used, is_used, False, False]


def test_prediction_is_never_in_the_mode():
    precision = resolve_precision("bf16-mixed", torch.device("cpu"))
    precision.convert_module(nn.Conv2d(8, 8, 5, groups=8))
    with precision.forward():
        assert torch.overrides._get_current_function_mode() is not None
    with torch.no_grad(), precision.forward():
        assert torch.overrides._get_current_function_mode() is None
