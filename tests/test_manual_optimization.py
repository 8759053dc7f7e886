"""Modules that optimize by themselves: what they step is scaled, counted, told of and guarded like any other step."""

from __future__ import annotations

import pytest
import torch
from small import Net, digest, loaders, net

from flashtask import Callback, Module, Trainer
from flashtask.core.errors import DivergedError, UsageError


def quiet(tmp_path, **options):
    options = {"output_dir": tmp_path / "run", "enable_progress_bar": False, "enable_model_summary": False, **options}
    return Trainer(**options)


class ByHand(Net):
    """The same training as `Net`, written out."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        loss = super().training_step(batch, batch_idx)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        if self.trainer.train_dataloader is not None and batch_idx + 1 == len(self.trainer.train_dataloader):
            self.lr_schedulers().step()


def test_s112_a_step_by_hand_gives_the_bits_of_an_automatic_one(tmp_path):
    digests = []
    for name, kind in (("automatic", Net), ("manual", ByHand)):
        torch.manual_seed(1)
        module = kind()
        trainer = quiet(tmp_path, max_epochs=3, output_dir=tmp_path / name)
        trainer.fit(module, *loaders())
        digests.append((digest(module), trainer.global_step, trainer.fit_run.history[-1]["learning_rate"]))
    assert digests[0] == digests[1]


class Pair(Module):
    """Two players with an optimizer each; the second plays every other batch."""

    automatic_optimization = False

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(4, 1), torch.nn.Linear(4, 1)
        self.wanted = []

    def training_step(self, batch, batch_idx):
        for index, (optimizer, player) in enumerate(zip(self.optimizers(), (self.first, self.second), strict=True)):
            if index == 1 and batch_idx % 2:
                continue
            self.toggle_optimizer(optimizer)
            self.wanted.append((self.first.weight.requires_grad, self.second.weight.requires_grad))
            loss = player(batch[0]).square().mean()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.untoggle_optimizer(optimizer)
            self.log(f"loss_{index}", loss)

    def configure_optimizers(self):
        return [torch.optim.SGD(self.first.parameters(), lr=0.1), torch.optim.SGD(self.second.parameters(), lr=0.1)]


def test_s112_several_optimizers_are_stepped_as_the_module_likes_and_a_batch_counts_once(tmp_path):
    module = Pair()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    trainer = quiet(tmp_path, max_epochs=1, log_every_n_steps=1)
    trainer.fit(module, loaders(samples=32)[0])
    assert trainer.global_step == 4
    assert module.wanted == [(True, False), (False, True), (True, False), (True, False), (False, True), (True, False)]
    assert module.first.weight.requires_grad
    assert module.second.weight.requires_grad
    assert all(not torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert {"loss_0", "loss_1"} <= set(trainer.callback_metrics)


def test_s112_batches_without_a_step_are_not_counted(tmp_path):
    class EveryOther(ByHand):
        def training_step(self, batch, batch_idx):
            self.manual_backward(Net.training_step(self, batch, batch_idx) / 2)
            if batch_idx % 2:
                self.optimizers().step()
                self.optimizers().zero_grad()

    trainer = quiet(tmp_path, max_steps=3, max_epochs=9)
    trainer.fit(EveryOther(), *loaders(samples=64))
    assert (trainer.global_step, trainer.fit_run.batch_idx) == (3, 6)


def test_s112_the_hooks_around_a_step_are_told_and_logging_goes_on_as_in_the_step(tmp_path):
    told = []

    class Watch(Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            told.append(("step", type(optimizer).__name__))

        def on_before_zero_grad(self, trainer, module, optimizer):
            told.append(("zero", type(optimizer).__name__))

        def on_after_backward(self, trainer, module):
            told.append(("after", any(p.grad is not None for p in module.parameters())))

    class Logging(ByHand):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            self.log("late", 1.0)

    trainer = quiet(tmp_path, max_steps=1, callbacks=[Watch()], log_every_n_steps=1)
    trainer.fit(Logging(), *loaders())
    assert told == [("zero", "AdamW"), ("after", True), ("step", "AdamW")]
    assert trainer.callback_metrics["late"] == 1.0


def test_s112_an_optimizer_that_needs_a_closure_is_stepped_by_hand(tmp_path):
    class Closure(ByHand):
        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()

            def closure():
                optimizer.zero_grad()
                loss = torch.nn.functional.mse_loss(self.head(self.backbone(batch[0]))[:, 0], batch[1].float())
                self.manual_backward(loss)
                self.losses.append(loss.item())
                return loss

            optimizer.step(closure)

        def configure_optimizers(self):
            self.losses = []
            return torch.optim.LBFGS(self.parameters(), line_search_fn="strong_wolfe")

    module = Closure()
    quiet(tmp_path, max_steps=4).fit(module, loaders(batch_size=50)[0])
    assert len(module.losses) > 4
    assert module.losses[-1] < module.losses[0]


def test_s112_a_loss_that_is_nan_never_touches_the_weights(tmp_path):
    class Broken(ByHand):
        def training_step(self, batch, batch_idx):
            if batch_idx == 2:
                self.kept = [p.detach().clone() for p in self.parameters()]
                self.manual_backward(self(batch[0]).sum() * float("nan"))
                self.optimizers().step()
            else:
                super().training_step(batch, batch_idx)

    module = Broken()
    with pytest.raises(DivergedError, match="batch 2"):
        quiet(tmp_path, max_epochs=1).fit(module, *loaders())
    assert all(torch.equal(now, before) for now, before in zip(module.parameters(), module.kept, strict=True))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"accumulate_grad_batches": 2}, "every so many batches"),
        ({"gradient_clip_val": 1.0}, "self.clip_gradients"),
    ],
)
def test_s112_what_the_engine_cannot_do_by_itself_is_told(tmp_path, options, words):
    with pytest.raises(UsageError, match=words):
        quiet(tmp_path, max_epochs=1, **options).fit(ByHand(), *loaders())


def test_s112_gradients_are_clipped_where_the_module_asks(tmp_path):
    norms = []

    class Clipping(ByHand):
        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(100 * Net.training_step(self, batch, batch_idx))
            self.clip_gradients(optimizer, gradient_clip_val=0.5)
            norms.append(torch.nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None]))
            optimizer.step()

    quiet(tmp_path, max_steps=3).fit(Clipping(), *loaders())
    assert norms == pytest.approx([0.5] * 3, rel=1e-4)


def test_s112_manual_steps_are_told_outside_of_a_fit():
    with pytest.raises(UsageError, match="not being fitted"):
        net().optimizers()


def test_s112_a_manual_run_resumes_with_the_same_bits(tmp_path):
    torch.manual_seed(1)
    whole = ByHand()
    quiet(tmp_path, max_epochs=3, output_dir=tmp_path / "whole").fit(whole, *loaders())
    torch.manual_seed(1)
    quiet(tmp_path, max_epochs=1, output_dir=tmp_path / "part").fit(ByHand(), *loaders())
    continued = ByHand()
    trainer = quiet(tmp_path, max_epochs=3, output_dir=tmp_path / "part")
    trainer.fit(continued, *loaders(), ckpt_path="last")
    assert digest(continued) == digest(whole)
