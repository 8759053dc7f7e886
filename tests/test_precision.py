"""Number formats: what weights, batches, gradients and steps are in each, and what survives a file."""

from __future__ import annotations

import math

import pytest
import torch
from small import Net, loaders, net
from torch.nn.utils.rnn import pack_sequence

from flashtask import Module, Trainer, read_checkpoint
from flashtask.core.errors import DivergedError, UsageError
from flashtask.trainer.devices.accelerators import CPUAccelerator
from flashtask.trainer.devices.precision import (
    MixedPrecision,
    Precision,
    ScaledPrecision,
    TruePrecision,
    check_precision,
    resolve_precision,
    take_formats,
)

CPU = torch.device("cpu")
TRUE = {"16-true": torch.float16, "bf16-true": torch.bfloat16, "64-true": torch.float64}


def quiet(tmp_path, **options):
    settings = {"max_epochs": 1, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    return Trainer(output_dir=tmp_path / "run", **{**settings, **options})


# ---- names


@pytest.mark.parametrize(
    ("spellings", "kind", "name"),
    [
        ((32, "32", "32-true", "full"), Precision, "32"),
        (("bf16", "bf16-mixed"), MixedPrecision, "bf16-mixed"),
        ((16, "16", "16-mixed"), ScaledPrecision, "16-mixed"),
        (("16-true", "half"), TruePrecision, "16-true"),
        (("bf16-true",), TruePrecision, "bf16-true"),
        ((64, "64", "64-true", "double"), TruePrecision, "64-true"),
    ],
)
def test_s115_every_spelling_of_a_precision_is_read(spellings, kind, name):
    for spelling in spellings:
        found = resolve_precision(spelling, CPU)
        assert (type(found), found.name, found.dtype) == (kind, name, TRUE.get(name))


def test_s115_auto_asks_the_accelerator():
    class Fast(CPUAccelerator):
        def computes_bfloat16(self, device):
            return True

    class Slow(CPUAccelerator):
        def computes_bfloat16(self, device):
            return False

    assert resolve_precision("auto", CPU, Fast()).name == "bf16-mixed"
    assert resolve_precision("auto", CPU, Slow()).name == "32"
    expected = "bf16-mixed" if CPUAccelerator().computes_bfloat16(CPU) else "32"
    assert resolve_precision("auto", CPU).name == expected


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("bf16mixed", "did you mean 'bf16-mixed'"),
        ("64true", "did you mean '64-true'"),
        ("doubel", "did you mean 'double'"),
        ("fp8", "choose one of 16-mixed, 16-true, 32, 64-true, auto, bf16-mixed, bf16-true"),
        (True, "no precision named True"),
        (TruePrecision, "TruePrecision()"),
    ],
)
def test_s115_a_wrong_precision_is_told(wrong, words):
    with pytest.raises(UsageError) as caught:
        check_precision(wrong)
    assert words in str(caught.value)


def test_s115_a_device_without_float64_says_so():
    with pytest.raises(UsageError, match="MPS has no float64"):
        resolve_precision("64-true", torch.device("mps"))


# ---- what is converted


def test_s115_the_default_converts_nothing():
    module, batch = net(), (torch.zeros(2, 4), torch.zeros(2).long())
    before = {name: value.data_ptr() for name, value in module.state_dict().items()}
    for precision in (Precision(), MixedPrecision("cpu"), ScaledPrecision("cpu")):
        assert precision.dtype is None
        precision.convert_module(module)
        assert precision.convert_batch(batch) is batch
    assert {name: value.data_ptr() for name, value in module.state_dict().items()} == before


@pytest.mark.parametrize(("name", "dtype"), TRUE.items())
def test_s115_a_true_precision_converts_what_is_floating_and_nothing_else(name, dtype):
    precision, module = TruePrecision(name), net()
    precision.convert_module(module)
    dtypes = {key: value.dtype for key, value in module.state_dict().items()}
    assert dtypes.pop("backbone.2.num_batches_tracked") == torch.int64
    assert set(dtypes.values()) == {dtype}
    batch = {
        "inputs": torch.zeros(2, 4),
        "labels": torch.zeros(2, dtype=torch.int64),
        "mask": torch.zeros(2, dtype=torch.bool),
        "sequence": pack_sequence([torch.zeros(3), torch.zeros(2)]),
        "path": "a.jpg",
    }
    changed = precision.convert_batch(batch)
    assert changed["inputs"].dtype == changed["sequence"].data.dtype == dtype
    assert changed["labels"] is batch["labels"]
    assert changed["mask"] is batch["mask"]
    assert changed["path"] == "a.jpg"


class Recording(Net):
    """Notes the formats of batches, outputs and gradients, as training and validation see them."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def training_step(self, batch, batch_idx):
        self.seen |= {batch[0].dtype, self(batch[0]).dtype}
        assert batch[1].dtype == torch.int64
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.seen.add(batch[0].dtype)
        super().validation_step(batch, batch_idx)

    def on_before_optimizer_step(self, optimizer):
        self.seen |= {parameter.grad.dtype for parameter in self.parameters()}


@pytest.mark.parametrize("name", ["64-true", "bf16-true"])
def test_s115_a_run_in_a_true_precision_is_in_it_all_the_way(tmp_path, name):
    torch.manual_seed(0)
    module = Recording()
    trainer = quiet(tmp_path, precision=name)
    trainer.fit(module, *loaders())
    assert module.seen == {TRUE[name]}
    assert {parameter.dtype for parameter in module.parameters()} == {TRUE[name]}
    assert math.isfinite(trainer.callback_metrics["val_loss"])
    assert read_checkpoint(tmp_path / "run" / "last.ckpt")["precision"]["name"] == name


def test_s115_float64_differs_from_float32_by_rounding_alone(tmp_path):
    class Plain(Net):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    losses = {}
    for name in ("32", "64-true"):
        torch.manual_seed(0)
        module = Plain()
        module.drop.p = 0.0
        trainer = quiet(tmp_path / name, precision=name)
        trainer.fit(module, *loaders())
        losses[name] = trainer.callback_metrics["val_loss"]
    assert losses["32"] != losses["64-true"]
    assert losses["32"] == pytest.approx(losses["64-true"], rel=1e-5)


# ---- files


@pytest.mark.parametrize("name", ["64-true", "bf16-true"])
def test_s115_a_checkpoint_of_a_true_precision_loads_in_it(tmp_path, name):
    trainer, module = quiet(tmp_path, precision=name), net()
    trainer.fit(module, *loaders())
    loaded = Net.load_from_checkpoint(tmp_path / "run" / "last.ckpt")
    for key, value in module.state_dict().items():
        other = loaded.state_dict()[key]
        assert other.dtype == value.dtype
        assert torch.equal(other, value)
    expected = trainer.validate(module, loaders()[1])
    # Nothing is said of the precision: the module knows it.
    assert quiet(tmp_path / "b").validate(loaded, loaders()[1]) == expected


@pytest.mark.long
@pytest.mark.parametrize("name", ["64-true", "bf16-true"])
def test_s115_a_run_in_a_true_precision_resumes_bit_by_bit(tmp_path, name):
    whole, first, rest = net(), net(), net()
    quiet(tmp_path / "whole", precision=name, max_epochs=4).fit(whole, *loaders())
    quiet(tmp_path / "first", precision=name, max_epochs=2).fit(first, *loaders())
    last = tmp_path / "first" / "run" / "last.ckpt"
    quiet(tmp_path / "rest", precision=name, max_epochs=4).fit(rest, *loaders(), ckpt_path=last)
    for key, value in whole.state_dict().items():
        assert torch.equal(rest.state_dict()[key], value), key


def test_s115_a_module_comes_back_to_float32_when_it_is_told(tmp_path):
    module = net()
    quiet(tmp_path / "a", precision="64-true").fit(module, *loaders())
    assert module.default_precision == "64-true"
    quiet(tmp_path / "b", precision="32").fit(module, *loaders())
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    assert module.default_precision == Module.default_precision


def test_take_formats_leaves_alone_what_is_as_it_was_stored():
    module, plain = net(), net()
    take_formats(module, plain.state_dict())
    assert "default_precision" not in vars(module)
    mixed = {name: value.half() if name == "head.weight" else value for name, value in plain.state_dict().items()}
    take_formats(module, mixed)
    assert module.head.weight.dtype == torch.float16
    assert module.head.bias.dtype == torch.float32
    assert "default_precision" not in vars(module)


# ---- 16-mixed


class Steep(Module):
    """One weight whose gradient a test chooses: the loss is finite whatever it is."""

    def __init__(self, slopes):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.slopes, self.gradients, self.weights = slopes, [], []

    def training_step(self, batch, batch_idx):
        self.weights.append(self.weight.item())
        return (self.weight * self.slopes[batch_idx]).sum() - self.weight.detach().sum() * self.slopes[batch_idx]

    def on_before_optimizer_step(self, optimizer):
        self.gradients.append(self.weight.grad.item())

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=1.0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def single_batches(count):
    return torch.utils.data.DataLoader(torch.zeros(count, 1), batch_size=1)


def test_s115_a_step_that_overflows_in_16_mixed_is_left_out_and_the_next_is_taken(tmp_path):
    module = Steep([1e35, 2.0, 3.0])
    trainer = quiet(tmp_path, precision=16, gradient_clip_val=100.0)
    trainer.fit(module, single_batches(3))
    # 1e35 times the scale of 65536 is no float32; hooks see true sizes.
    assert module.gradients == [math.inf, 2.0, 3.0]
    assert module.weights == pytest.approx([1.0, 1.0, 0.8])
    assert module.weight.item() == pytest.approx(0.5)
    assert trainer.global_step == 3
    assert trainer.fit_run.precision.scaler.get_scale() == 32768.0


def test_s115_the_scale_survives_a_resume(tmp_path):
    quiet(tmp_path / "a", precision=16, limit_train_batches=1).fit(Steep([1e35]), single_batches(3))
    again = quiet(tmp_path / "b", precision=16, max_epochs=2, limit_train_batches=1)
    again.fit(Steep([1e35]), single_batches(3), ckpt_path=tmp_path / "a" / "run" / "last.ckpt")
    assert again.fit_run.precision.scaler.get_scale() == 65536.0 / 4


def test_s115_a_nan_loss_in_16_mixed_still_ends_the_run(tmp_path):
    class Broken(Steep):
        def training_step(self, batch, batch_idx):
            return self.weight.sum() * math.nan

    with pytest.raises(DivergedError, match="the loss became"):
        quiet(tmp_path, precision=16).fit(Broken([1.0]), single_batches(3))


def test_s115_gradients_that_overflow_at_every_scale_end_the_run(tmp_path):
    class Trap(Steep):
        def training_step(self, batch, batch_idx):
            # A finite value whose derivative is 0 times infinity.
            return torch.where(self.weight > 5, (self.weight - self.weight.detach()).sqrt(), self.weight).sum()

    module = Trap([])
    with pytest.raises(DivergedError, match="overflow at every scale"):
        quiet(tmp_path, precision=16).fit(module, single_batches(100))
    assert module.weight.item() == 1.0


def test_s115_16_mixed_learns_on_the_cpu(tmp_path):
    class Watching(Net):
        def forward(self, inputs):
            outputs = super().forward(inputs)
            assert outputs.dtype == torch.float16
            return outputs

    torch.manual_seed(0)
    module = Watching()
    trainer = quiet(tmp_path, precision="16-mixed", max_epochs=8)
    trainer.fit(module, *loaders())
    history = [row["val_loss"] for row in trainer.fit_run.history]
    assert history[-1] < history[0]
    assert module.head.weight.dtype == torch.float32


def scaled(value=3.0):
    precision, weight = ScaledPrecision("cpu"), torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    precision.backward((weight * value).sum())
    return precision, weight, optimizer


def test_unscaling_once_more_changes_nothing():
    precision, weight, optimizer = scaled()
    assert weight.grad.item() == 3.0 * 65536
    for _ in range(3):
        precision.unscale(optimizer)
        assert weight.grad.item() == 3.0
    precision.step(optimizer)
    precision.unscale(optimizer)
    precision.update()
    precision.update()
    assert weight.item() == pytest.approx(0.7)
    optimizer.zero_grad()
    precision.backward((weight * 2).sum())
    precision.unscale(optimizer)
    assert weight.grad.item() == 2.0


def test_an_optimizer_without_gradients_steps_beside_one_with_them():
    precision, weight, optimizer = scaled()
    other = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    for one in (optimizer, other):
        precision.unscale(one)
        precision.step(one)
    precision.update()
    assert weight.item() == pytest.approx(0.7)
    assert other.param_groups[0]["params"][0].item() == 1.0


def test_two_optimizers_of_one_loss_are_unscaled_by_the_same_scale():
    precision, weights = ScaledPrecision("cpu"), [torch.nn.Parameter(torch.ones(1)) for _ in range(2)]
    optimizers = [torch.optim.SGD([weight], lr=0.1) for weight in weights]
    precision.backward((weights[0] * 1e35 + weights[1] * 2).sum())
    for optimizer in optimizers:
        precision.step(optimizer)
    precision.update()
    assert weights[0].item() == 1.0
    assert weights[1].item() == pytest.approx(0.8)


class ByHand(Module):
    """One loss for two optimizers, then another for the first of them: the first gradient of all overflows."""

    automatic_optimization = False

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Parameter(torch.ones(1)), torch.nn.Parameter(torch.ones(1))

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        slope = 1e35 if batch_idx == 0 else 1.0
        for optimizer in (first, second):
            optimizer.zero_grad()
        self.manual_backward(((self.first - self.first.detach()) * slope + self.second * 2).sum())
        first.step()
        second.step()
        first.zero_grad()
        self.manual_backward((self.first * 3).sum())
        first.step()

    def configure_optimizers(self):
        return [torch.optim.SGD([parameter], lr=0.1) for parameter in (self.first, self.second)]


def test_s115_by_hand_every_gradient_is_unscaled_by_the_scale_it_was_computed_with(tmp_path):
    module = ByHand()
    trainer = quiet(tmp_path, precision=16)
    trainer.fit(module, single_batches(2))
    assert module.second.item() == pytest.approx(1 - 2 * 0.2)
    assert module.first.item() == pytest.approx(1 - 0.3 - 0.1 - 0.3)
    assert trainer.fit_run.precision.scaler.get_scale() == 32768.0


def test_a_module_knows_its_number_format():
    assert Net().dtype is torch.float32
    assert Net().double().dtype is torch.float64
    assert Module().dtype is torch.get_default_dtype()


def test_a_closure_steps_in_32_and_is_refused_with_a_scaler():
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.LBFGS([weight], lr=0.5)

    def closure():
        optimizer.zero_grad()
        loss = (weight**2).sum()
        Precision().backward(loss)
        return loss

    assert Precision().step(optimizer, closure).item() == 1.0
    assert weight.item() < 0.9
    with pytest.raises(UsageError, match="LBFGS with a closure cannot train in 16-mixed"):
        ScaledPrecision("cpu").step(optimizer, closure)


def test_backward_takes_the_options_of_a_tensor():
    for precision in (Precision(), ScaledPrecision("cpu")):
        weight = torch.nn.Parameter(torch.ones(1))
        loss = (weight * 2).sum()
        precision.backward(loss, retain_graph=True)
        precision.backward(loss)
        assert weight.grad.item() in (4.0, 4.0 * 65536)


# ---- a precision of one's own


class Doubled(Precision):
    """Counts what it is asked for, and doubles the loss before its backward pass."""

    def __init__(self):
        self.asked = []

    def backward(self, loss, **options):
        self.asked.append("backward")
        super().backward(loss * 2, **options)

    def step(self, optimizer, closure=None):
        self.asked.append("step")
        return super().step(optimizer, closure)


@pytest.mark.parametrize("where", ["precision", "plugins"])
def test_s115_a_precision_of_ones_own_is_used(tmp_path, where):
    own, module = Doubled(), Steep([2.0, 3.0])
    given = {"precision": own} if where == "precision" else {"plugins": [own]}
    quiet(tmp_path, **given).fit(module, single_batches(2))
    assert own.asked == ["backward", "step"] * 2
    assert module.gradients == [4.0, 6.0]
    assert read_checkpoint(tmp_path / "run" / "last.ckpt")["precision"]["name"] == "Doubled"


def test_a_precision_without_a_name_is_called_by_its_class():
    class Named(Precision):
        name = "mine"

    class Further(Named):
        """No name of its own."""

    assert (Doubled.name, Named.name, Further.name, Precision.name) == ("Doubled", "mine", "Further", "32")


def test_inference_takes_no_tf32_on_a_gpu_and_puts_it_back(monkeypatch):
    """torch's switches are there without a GPU; that cuDNN obeys them is not seen here."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    cudnn = torch.backends.cudnn
    assert (cudnn.conv.fp32_precision, cudnn.allow_tf32) == ("tf32", True)
    with Precision().inference():
        assert (cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision, cudnn.allow_tf32) == ("none", "none", False)
        assert torch.backends.fp32_precision == "none"  # which conv and rnn follow: float32
    assert (cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision, cudnn.allow_tf32) == ("tf32", "tf32", True)
    cudnn.conv.fp32_precision = "ieee"
    try:
        with Precision().inference():
            assert (cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision) == ("ieee", "tf32")
    finally:
        cudnn.conv.fp32_precision = "tf32"
