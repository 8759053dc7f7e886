"""What automatic optimization does with optimizers, schedules, clipping and accumulation."""

from __future__ import annotations

import pytest
import torch
from small import Net, digest, loaders, net
from torch.optim.lr_scheduler import ExponentialLR, ReduceLROnPlateau, StepLR

from flashtask import Callback, Module, Trainer
from flashtask.core.errors import DivergedError, UnknownNameError, UsageError
from flashtask.trainer.loss_checks import NanGuard


def quiet(tmp_path, **options):
    options = {"output_dir": tmp_path / "run", "enable_progress_bar": False, "enable_model_summary": False, **options}
    return Trainer(**options)


class Line(Module):
    """One linear layer on the sum of its inputs; `optimizers` is what `configure_optimizers` returns."""

    def __init__(self, optimizers=None, scale: float = 1.0):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
        torch.nn.init.constant_(self.layer.weight, 0.5)
        torch.nn.init.zeros_(self.layer.bias)
        self._given, self.scale = optimizers, scale

    def training_step(self, batch, batch_idx):
        loss = self.scale * (self.layer(batch[0])[:, 0] - batch[0].sum(1)).square().mean()
        self.log("train_loss", loss, on_epoch=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1) if self._given is None else self._given(self)


class GradientsAtTheStep(Callback):
    """The gradients that each step of an optimizer finds, after clipping."""

    def on_before_zero_grad(self, trainer, module, optimizer):
        self.seen = [*getattr(self, "seen", []), [p.grad.clone() for p in module.parameters()]]


def norms(watch):
    return [float(torch.nn.utils.get_total_norm(gradients)) for gradients in watch.seen]


def test_s29_the_norm_of_all_gradients_is_kept_below_the_limit(tmp_path):
    free, clipped = GradientsAtTheStep(), GradientsAtTheStep()
    for watch, limit in ((free, 0), (clipped, 0.5)):
        trainer = quiet(
            tmp_path, max_steps=3, gradient_clip_val=limit, callbacks=[watch], output_dir=tmp_path / str(limit)
        )
        trainer.fit(Line(), loaders()[0])
    assert norms(free)[0] > 1
    assert norms(clipped) == pytest.approx([0.5] * 3, rel=1e-4)
    first = [torch.cat([g.flatten() for g in watch.seen[0]]) for watch in (free, clipped)]
    assert torch.allclose(first[0] / first[0].norm(), first[1] / first[1].norm(), atol=1e-5)


def test_s30_each_gradient_is_kept_below_the_limit(tmp_path):
    watch = GradientsAtTheStep()
    options = {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"}
    quiet(tmp_path, max_steps=3, callbacks=[watch], **options).fit(Line(), loaders()[0])
    assert max(float(g.abs().max()) for step in watch.seen for g in step) == pytest.approx(0.05)


def by_hand(module, batches, groups):
    """Steps from groups of batches, each loss by its share of the group's samples."""
    optimizer, numbers = module.configure_optimizers(), iter(batches)
    for size in groups:
        group = [next(numbers) for _ in range(size)]
        total = sum(len(inputs) for inputs, _ in group)
        optimizer.zero_grad()
        for inputs, _ in group:
            loss = (module.layer(inputs)[:, 0] - inputs.sum(1)).square().mean()
            (loss * len(inputs) / total).backward()
        optimizer.step()
    return module


def test_s31_a_step_is_taken_from_the_samples_of_several_batches_and_the_last_short_group_steps_too(tmp_path):
    batches = list(loaders(samples=50, batch_size=8)[1])  # 7 batches, the last of 2 samples
    module = Line()
    trainer = quiet(tmp_path, max_epochs=1, accumulate_grad_batches=3)
    trainer.fit(module, batches)
    assert trainer.global_step == 3
    assert torch.allclose(module.layer.weight, by_hand(Line(), batches, [3, 3, 1]).layer.weight, atol=1e-7)


def test_s31_batches_for_a_step_may_change_with_the_epoch(tmp_path):
    batches = list(loaders(samples=32, batch_size=8)[1])
    module = Line()
    trainer = quiet(tmp_path, max_epochs=3, accumulate_grad_batches={1: 2, 2: 4})
    trainer.fit(module, batches)
    assert trainer.global_step == trainer.estimated_stepping_batches == 4 + 2 + 1
    expected = by_hand(Line(), batches * 3, [1, 1, 1, 1, 2, 2, 4])
    assert torch.allclose(module.layer.weight, expected.layer.weight, atol=1e-7)


@pytest.mark.parametrize("given", [0, -1, 1.5, "4", True, {}, {0: 0}, {-1: 2}, None])
def test_s31_what_cannot_be_meant_is_told_at_construction(given):
    with pytest.raises(UsageError, match=r"accumulate_grad_batches|scheduling"):
        Trainer(accumulate_grad_batches=given)


def test_s34_optimizers_step_every_batch_and_schedulers_every_epoch(tmp_path):
    rates = []

    class Watch(Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            rates.append(optimizer.param_groups[0]["lr"])

    def optimizers(module):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        return {"optimizer": optimizer, "lr_scheduler": ExponentialLR(optimizer, 0.1)}

    quiet(tmp_path, max_epochs=3, callbacks=[Watch()]).fit(Line(optimizers), loaders(samples=16)[0])
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"interval": "step"}, [0.1, 0.05, 0.025, 0.0125]),
        ({"interval": "step", "frequency": 2}, [0.1, 0.1, 0.05, 0.05]),
        ({"interval": "epoch", "frequency": 2}, [0.1, 0.1, 0.1, 0.1]),
        ({}, [0.1, 0.1, 0.05, 0.05]),
    ],
)
def test_s35_interval_and_frequency_say_when_a_scheduler_steps(tmp_path, settings, expected):
    rates = []

    class Watch(Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            rates.append(optimizer.param_groups[0]["lr"])

    def optimizers(module):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": StepLR(optimizer, 1, gamma=0.5), **settings}}

    quiet(tmp_path, max_epochs=2, callbacks=[Watch()]).fit(Line(optimizers), loaders(samples=16)[0])
    assert rates == pytest.approx(expected)


class Players(Module):
    """A generator and a critic with an optimizer each; what wants gradients in each turn is recorded."""

    def __init__(self, pairs):
        super().__init__()
        self.first, self.second = torch.nn.Linear(4, 1), torch.nn.Linear(4, 1)
        self.turns, self._pairs = [], pairs

    def training_step(self, batch, batch_idx, optimizer_idx):
        self.turns.append((optimizer_idx, self.first.weight.requires_grad, self.second.weight.requires_grad))
        player = self.first if optimizer_idx == 0 else self.second
        return player(batch[0]).square().mean() + (self.first(batch[0]) - self.second(batch[0])).square().mean()

    def configure_optimizers(self):
        optimizers = [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.first, self.second)]
        return self._pairs(*optimizers)


def test_s36_each_optimizer_has_its_turn_with_every_batch(tmp_path):
    module = Players(lambda a, b: ([a, b], [StepLR(a, 1, gamma=0.5), StepLR(b, 1, gamma=0.1)]))
    trainer = quiet(tmp_path, max_epochs=1)
    trainer.fit(module, loaders(samples=16)[0])
    assert module.turns == [(0, True, False), (1, False, True)] * 2
    assert trainer.global_step == 2
    assert [o.param_groups[0]["lr"] for o in trainer.optimizers] == pytest.approx([0.05, 0.01])


def test_s36_two_optimizers_give_what_the_loop_of_the_notes_gives(tmp_path):
    batches = list(loaders(samples=24)[1])
    torch.manual_seed(3)
    module = Players(lambda a, b: [a, b])
    expected = Players(lambda a, b: [a, b])
    expected.load_state_dict(module.state_dict())
    optimizers = expected.configure_optimizers()
    for batch_idx, batch in enumerate(batches):
        for index, optimizer in enumerate(optimizers):
            for part, wanted in ((expected.first, index == 0), (expected.second, index == 1)):
                part.requires_grad_(wanted)
            optimizer.zero_grad()
            expected.training_step(batch, batch_idx, index).backward()
            optimizer.step()
    quiet(tmp_path, max_epochs=1).fit(module, batches)
    assert digest(module) == digest(expected)


SGD, DECAY = ("sgd", {"lr": 0.2}), ("exponentiallr", {"gamma": 0.5})


def _schedule(optimizer):
    return StepLR(optimizer, 1, gamma=0.5)


@pytest.mark.parametrize(
    ("form", "optimizers", "schedulers"),
    [
        (lambda a, b: a, 1, 0),
        (lambda a, b: [a], 1, 0),
        (lambda a, b: (a, b), 2, 0),
        (lambda a, b: ([a], [_schedule(a)]), 1, 1),
        (lambda a, b: ([a, b], [_schedule(a), {"scheduler": _schedule(b), "interval": "step"}]), 2, 2),
        (lambda a, b: ([a, b], []), 2, 0),
        (lambda a, b: {"optimizer": a}, 1, 0),
        (lambda a, b: {"optimizer": a, "lr_scheduler": _schedule(a)}, 1, 1),
        (lambda a, b: {"optimizer": a, "lr_scheduler": {"scheduler": _schedule(a), "frequency": 2}}, 1, 1),
        (lambda a, b: ({"optimizer": a}, {"optimizer": b, "lr_scheduler": _schedule(b)}), 2, 1),
        (lambda a, b: None, 0, 0),
    ],
)
def test_s37_every_form_that_configure_optimizers_may_return_trains(tmp_path, form, optimizers, schedulers):
    class Either(Players):
        def training_step(self, batch, batch_idx, optimizer_idx=0):
            return super().training_step(batch, batch_idx, optimizer_idx)

    module = Either(form)
    before = module.first.weight.detach().clone()
    trainer = quiet(tmp_path, max_epochs=1)
    trainer.fit(module, loaders(samples=16)[0])
    assert (len(trainer.optimizers), len(trainer.lr_scheduler_configs)) == (optimizers, schedulers)
    assert torch.equal(before, module.first.weight) == (optimizers == 0)
    if schedulers:
        assert trainer.optimizers[-1].param_groups[0]["lr"] in (0.05, 0.1, 0.025)


@pytest.mark.parametrize(
    ("returned", "kind", "rate"),
    [
        ("adam", torch.optim.Adam, 1e-3),
        (("SGD", {"lr": 0.2, "momentum": 0.9}), torch.optim.SGD, 0.2),
        ({"optimizer": SGD, "lr_scheduler": ("steplr", {"step_size": 1, "gamma": 0.5})}, torch.optim.SGD, 0.1),
        ({"optimizer": SGD, "lr_scheduler": {"scheduler": DECAY, "interval": "step"}}, torch.optim.SGD, 0.05),
        ((["adamw"], [(*DECAY, {"interval": "step"})]), torch.optim.AdamW, 2.5e-4),
        ({"optimizer": SGD, "lr_scheduler": "cosine"}, torch.optim.SGD, 0.0),
    ],
)
def test_s37_optimizers_and_schedulers_may_be_names_with_arguments(tmp_path, returned, kind, rate):
    trainer = quiet(tmp_path, max_epochs=1)
    trainer.fit(Line(lambda module: returned), loaders(samples=16)[0])
    (optimizer,) = trainer.optimizers
    assert type(optimizer) is kind
    assert optimizer.param_groups[0]["lr"] == pytest.approx(rate, abs=1e-9)


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ("adamm", "did you mean 'adam'"),
        (("sgd", {"lr": 0.1, "momentun": 0.9}), "did you mean 'momentum'"),
        ({"optimizer": "sgd", "lr_scheduler": ("steplr", {"stepsize": 1})}, "did you mean 'step_size'"),
        ({"optimizer": "sgd", "lr_scheduler": {"scheduler": "cosine", "intervall": "step"}}, "did you mean 'interval'"),
        ((["sgd", "adam"], ["cosine"]), "not one optimizer"),
    ],
)
def test_s37_a_mistyped_name_or_argument_is_told(tmp_path, returned, words):
    with pytest.raises(UsageError, match=words):
        quiet(tmp_path, max_epochs=1).fit(Line(lambda module: returned), loaders()[0])


class Plateau(Net):
    """Validation that never gets better; `logged` is how the loss is logged."""

    def __init__(self, monitor="val_loss", strict=True, logged="val_loss"):
        super().__init__()
        self.monitor_of_rate, self.strict_rate, self.logged = monitor, strict, logged

    def validation_step(self, batch, batch_idx):
        chart, _, series = self.logged.partition("/")
        self.log(chart, {series: 1.0, "other": 5.0} if series else 1.0)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        rate = ReduceLROnPlateau(optimizer, factor=0.1, patience=0)
        settings = {"scheduler": rate, "monitor": self.monitor_of_rate, "strict": self.strict_rate}
        return {"optimizer": optimizer, "lr_scheduler": settings}


@pytest.mark.parametrize("logged", ["val_loss", "cost/entropy"])
def test_s38_s39_a_plateau_scheduler_is_given_the_metric_it_monitors(tmp_path, logged):
    trainer = quiet(tmp_path, max_epochs=3)
    trainer.fit(Plateau(monitor=logged, logged=logged), *loaders())
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.001)


def test_s38_a_metric_that_is_not_logged_is_an_error_with_the_nearest_name(tmp_path):
    with pytest.raises(UnknownNameError, match="did you mean 'val_loss'"):
        quiet(tmp_path, max_epochs=1).fit(Plateau(monitor="vall_loss"), *loaders())


def test_s38_without_strict_the_scheduler_waits(tmp_path):
    trainer = quiet(tmp_path, max_epochs=3)
    trainer.fit(Plateau(monitor="vall_loss", strict=False), *loaders())
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.1


def test_s38_a_plateau_scheduler_without_a_metric_is_told(tmp_path):
    with pytest.raises(UsageError, match="metric to watch"):
        quiet(tmp_path, max_epochs=1).fit(Plateau(monitor=None), *loaders())


def nan_at(step: int, kind=Net):
    class Broken(kind):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if batch_idx == step:
                self.kept = [p.detach().clone() for p in self.parameters()]
                return loss * float("nan")
            return loss

    torch.manual_seed(1)
    return Broken()


def test_a_loss_that_is_nan_ends_the_run_before_the_step(tmp_path):
    module = nan_at(3)
    with pytest.raises(DivergedError, match="epoch 0, batch 3, step 3"):
        quiet(tmp_path, max_epochs=1).fit(module, *loaders())
    assert all(torch.equal(now, before) for now, before in zip(module.parameters(), module.kept, strict=True))


class OnADevice(Callback):
    """Lets the guard look as it does on an accelerator, where nothing may wait for the device."""

    def on_fit_start(self, trainer, module):
        trainer.fit_run.guard = NanGuard(torch.device("cpu"), waits=False)


class Fused(Net):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01, fused=True)


def test_on_an_accelerator_a_fused_optimizer_skips_every_step_from_the_bad_loss_on(tmp_path):
    module = nan_at(3, Fused)
    with pytest.raises(DivergedError, match="at or before"):
        quiet(tmp_path, max_epochs=1, callbacks=[OnADevice()]).fit(module, *loaders())
    assert all(torch.equal(now, before) for now, before in zip(module.parameters(), module.kept, strict=True))


def test_on_an_accelerator_no_nan_reaches_the_weights_of_another_optimizer(tmp_path):
    module = nan_at(3)
    trainer = quiet(tmp_path, max_epochs=1, callbacks=[OnADevice()], log_every_n_steps=5)
    with pytest.raises(DivergedError, match=r"batch 4, step 5"):
        trainer.fit(module, *loaders())
    assert all(torch.isfinite(p).all() for p in module.parameters())
    assert not (tmp_path / "run" / "last.ckpt").exists()


def test_gradients_are_looked_at_when_asked(tmp_path):
    class Root(Line):
        def training_step(self, batch, batch_idx):
            return (self.layer.weight.sum() * 0).sqrt() + super().training_step(batch, batch_idx)

    with pytest.warns(UserWarning, match="weight.sum"), pytest.raises(DivergedError, match="became NaN in MulBackward"):
        quiet(tmp_path, max_epochs=1, detect_anomaly=True).fit(Root(), loaders()[0])
    assert not torch.is_anomaly_enabled()
    with pytest.raises(DivergedError, match="norm of the gradients"):
        quiet(tmp_path, max_epochs=1, gradient_clip_val=1.0, output_dir=tmp_path / "b").fit(Root(), loaders()[0])


def test_min_epochs_and_min_steps_hold_back_an_early_stop(tmp_path):
    class Stop(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            trainer.should_stop = True

    for options, steps in (({}, 1), ({"min_epochs": 3}, 21), ({"min_steps": 10}, 10)):  # 7 steps an epoch
        trainer = quiet(tmp_path, max_epochs=5, callbacks=[Stop()], output_dir=tmp_path / str(steps), **options)
        trainer.fit(net(), *loaders())
        assert trainer.global_step == steps
