"""Modules: what has to be written, what steps may return, who gets it, and in which modes they run."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from small import Net, digest, loaders, net
from torch.utils.data import DataLoader

import flashtask
from flashtask import Callback, DataModule, Module, Trainer
from flashtask.core.errors import UsageError


def quiet(tmp_path, **options):
    options = {"output_dir": tmp_path / "run", "enable_progress_bar": False, "enable_model_summary": False, **options}
    return Trainer(**options)


def cross_entropy(module, batch):
    return torch.nn.functional.cross_entropy(module(batch[0]), batch[1])


class Least(Module):
    """The three methods that a module needs, and no more."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 3)

    def forward(self, inputs):
        return self.layer(inputs)

    def training_step(self, batch, batch_idx):
        return cross_entropy(self, batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


class Data(DataModule):
    """Loaders of another length for each stage: 2, 3, 4 and 5 batches."""

    def train_dataloader(self):
        return loaders(samples=16)[0]

    def val_dataloader(self):
        return loaders(samples=24)[1]

    def test_dataloader(self):
        return loaders(samples=32)[1]

    def predict_dataloader(self):
        return loaders(samples=40)[1]


class Counting(Net):
    """Counts the calls of each step."""

    def __init__(self):
        super().__init__()
        self.calls = dict.fromkeys(("training", "validation", "test", "predict"), 0)

    def training_step(self, batch, batch_idx):
        self.calls["training"] += 1
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.calls["validation"] += 1
        super().validation_step(batch, batch_idx)

    def test_step(self, batch, batch_idx):
        self.calls["test"] += 1
        super().test_step(batch, batch_idx)

    def predict_step(self, batch, batch_idx):
        self.calls["predict"] += 1
        return self(batch[0])


def test_s10_a_module_a_datamodule_and_a_trainer_are_all_that_training_takes(tmp_path):
    assert flashtask.LightningModule is Module
    assert flashtask.LightningDataModule is DataModule
    torch.manual_seed(0)
    module, batch = Least(), next(iter(loaders(samples=16, batch_size=16)[1]))
    before = float(cross_entropy(module, batch).detach())
    quiet(tmp_path, max_epochs=20).fit(module, Data())
    assert float(cross_entropy(module, batch).detach()) < before / 2


def test_s11_each_stage_runs_the_step_of_its_own_over_the_data_of_its_own(tmp_path):
    module, trainer, data = Counting(), quiet(tmp_path, max_epochs=1, num_sanity_val_steps=0), Data()
    trainer.fit(module, data)
    assert module.calls == {"training": 2, "validation": 3, "test": 0, "predict": 0}
    trainer.validate(module, data)
    assert module.calls == {"training": 2, "validation": 6, "test": 0, "predict": 0}
    trainer.test(module, data)
    assert module.calls == {"training": 2, "validation": 6, "test": 4, "predict": 0}
    assert len(trainer.predict(module, data)) == 5
    assert module.calls == {"training": 2, "validation": 6, "test": 4, "predict": 5}


@pytest.mark.parametrize("name", ["training_step", "configure_optimizers"])
def test_s12_a_module_needs_training_step_and_configure_optimizers_and_the_one_missing_is_named(tmp_path, name):
    lacking = type("Lacking", (Least,), {name: getattr(Module, name)})
    with pytest.raises(UsageError, match=f"Lacking has no {name}") as caught:
        quiet(tmp_path).fit(lacking(), Data())
    assert f"def {name}(self" in caught.value.fix


def test_s12_forward_is_needed_for_inference_only(tmp_path):
    class Headless(Least):
        forward = Module.forward

        def training_step(self, batch, batch_idx):
            return torch.nn.functional.cross_entropy(self.layer(batch[0]), batch[1])

    trainer = quiet(tmp_path, max_epochs=1)
    trainer.fit(Headless(), Data())
    assert trainer.global_step == 2
    with pytest.raises(NotImplementedError, match="forward"):
        trainer.predict(Headless(), Data())


@pytest.mark.parametrize(("stage", "word"), [("validate", "validation"), ("test", "test")])
def test_s12_the_step_end_and_epoch_end_hooks_of_evaluation_get_what_steps_return(tmp_path, stage, word):
    seen = []

    class Collecting(Net):
        def _step(self, batch, batch_idx):
            return {"index": batch_idx, "rows": len(batch[0])}

        def _step_end(self, outputs):
            self.log("rows", float(outputs["rows"]), reduce_fx="sum")
            return {**outputs, "ended": True}

        def _epoch_end(self, outputs):
            seen.extend(outputs)
            self.log("last", float(outputs[-1]["index"]))

    for end in ("step", "step_end", "epoch_end"):
        setattr(Collecting, f"{word}_{end}", getattr(Collecting, f"_{end}"))
    (metrics,) = getattr(quiet(tmp_path), stage)(Collecting(), loaders(samples=20, batch_size=8)[1])
    assert seen == [{"index": index, "rows": rows, "ended": True} for index, rows in enumerate((8, 8, 4))]
    assert metrics == {"rows": 20.0, "last": 2.0}


def test_s12_epoch_end_hooks_get_a_list_for_each_of_several_loaders(tmp_path):
    seen = []

    class Collecting(Net):
        def validation_step(self, batch, batch_idx, dataloader_idx):
            return (dataloader_idx, batch_idx)

        def validation_epoch_end(self, outputs):
            seen.append(outputs)

    quiet(tmp_path).validate(Collecting(), [loaders(samples=16)[1], loaders(samples=8)[1]])
    assert seen == [[[(0, 0), (0, 1)], [(1, 0)]]]


def trained(tmp_path, name, module_class, **options):
    """The weights after two epochs."""
    torch.manual_seed(0)
    module = module_class()
    quiet(tmp_path, output_dir=tmp_path / name, max_epochs=2, seed=3, **options).fit(module, *loaders())
    return digest(module)


def test_s14_a_training_step_may_return_the_loss_or_a_dictionary_with_it(tmp_path):
    class WithDictionary(Net):
        def training_step(self, batch, batch_idx):
            return {"outputs": None, "loss": super().training_step(batch, batch_idx), "n": batch_idx}

    assert trained(tmp_path, "a", Net) == trained(tmp_path, "b", WithDictionary)


@pytest.mark.parametrize("returned", [{"los": 1}, 1.0, "loss"])
def test_s14_what_holds_no_loss_is_refused(tmp_path, returned):
    class Wrong(Net):
        def training_step(self, batch, batch_idx):
            return returned

    with pytest.raises(UsageError, match="without a loss") as caught:
        quiet(tmp_path).fit(Wrong(), loaders()[0])
    assert '{"loss": loss' in caught.value.fix


@pytest.mark.parametrize("precision", ["32", "16-mixed"])
def test_s14_none_skips_the_batch(tmp_path, precision):
    class Skipping(Least):
        weights, steps = (), ()

        def training_step(self, batch, batch_idx):
            self.weights += (digest(self),)
            return None if batch_idx == 2 else super().training_step(batch, batch_idx)

        def on_before_optimizer_step(self, optimizer):
            self.steps += (len(self.weights) - 1,)

    module = Skipping()
    quiet(tmp_path, max_epochs=1, precision=precision).fit(module, loaders(samples=40)[0])
    assert module.steps == (0, 1, 3, 4)
    assert module.weights[1] != module.weights[2] == module.weights[3] != module.weights[4]


def test_s15_training_step_end_gets_the_output_of_its_step_and_may_make_the_loss(tmp_path):
    seen = []

    class InTwoParts(Net):
        def training_step(self, batch, batch_idx):
            return {"outputs": self(batch[0]), "targets": batch[1], "index": batch_idx}

        def training_step_end(self, parts):
            seen.append((parts["index"], self.training, torch.is_grad_enabled()))
            loss = torch.nn.functional.cross_entropy(parts["outputs"], parts["targets"])
            self.log("train_loss", loss, on_step=False, on_epoch=True)
            return loss

    assert trained(tmp_path, "a", Net) == trained(tmp_path, "b", InTwoParts)
    assert seen == [(index, True, True) for index in (*range(7), *range(7))]


def test_s16_training_epoch_end_gets_the_outputs_of_all_steps_of_its_epoch(tmp_path):
    seen = []

    class Collecting(Net):
        def training_step(self, batch, batch_idx):
            return {"loss": super().training_step(batch, batch_idx), "index": batch_idx}

        def training_epoch_end(self, outputs):
            assert not any(output["loss"].requires_grad for output in outputs)
            seen.append([output["index"] for output in outputs])
            self.log("mean", torch.stack([output["loss"] for output in outputs]).mean())

    trainer = quiet(tmp_path, max_epochs=2)
    trainer.fit(Collecting(), loaders(samples=32)[0])
    assert seen == [[0, 1, 2, 3]] * 2
    assert [row["mean"] for row in trainer.fit_run.history] == pytest.approx(
        [row["train_loss"] for row in trainer.fit_run.history]
    )


def test_s16_outputs_are_let_go_where_no_hook_asks_for_them(tmp_path):
    alive = []

    class Kept:
        pass

    class Watching(Net):
        def training_step(self, batch, batch_idx):
            kept = Kept()
            alive.append(weakref.ref(kept))
            return {"loss": super().training_step(batch, batch_idx), "kept": kept}

    class Watch(Callback):
        def on_train_epoch_end(self, trainer, module):
            gc.collect()
            self.left = sum(one() is not None for one in alive)

    watch = Watch()
    quiet(tmp_path, max_epochs=1, callbacks=watch).fit(Watching(), loaders()[0])
    assert len(alive) == 7
    assert watch.left <= 1  # the last one may still be in a frame


def test_s17_end_hooks_need_not_return_anything(tmp_path):
    class Silent(Net):
        def training_step_end(self, outputs):
            self.log("step_end", 1.0)

        def training_epoch_end(self, outputs):
            self.log("epoch_end", 1.0)

        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            return batch_idx

        def validation_step_end(self, outputs):
            self.log("index", float(outputs), reduce_fx="max")

        def validation_epoch_end(self, outputs):
            assert outputs == list(range(len(outputs)))

    assert trained(tmp_path, "a", Net) == trained(tmp_path, "b", Silent)


def test_s18_fit_validates_where_the_module_and_the_data_can(tmp_path):
    class NoStep(Net):
        validation_step = Module.validation_step

    def columns(name, module, *data):
        trainer = quiet(tmp_path, output_dir=tmp_path / name, max_epochs=1)
        trainer.fit(module, *data)
        return trainer.fit_run.history[0]

    assert "val_loss" in columns("both", net(), *loaders())
    assert "val_loss" not in columns("no_data", net(), loaders()[0])
    assert "val_loss" not in columns("no_step", NoStep(), *loaders())


def test_s19_a_validation_step_need_not_return_anything_and_may_return_anything(tmp_path):
    class Returning(Net):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            return object()

    results = [quiet(tmp_path).validate(kind().eval(), loaders()[1]) for kind in (seeded(Net), seeded(Returning))]
    assert results[0] == results[1] != [{}]


def seeded(kind):
    def make():
        torch.manual_seed(0)
        return kind()

    return make


def test_s20_validate_alone_goes_over_all_validation_data_and_changes_nothing(tmp_path):
    module = net().train()
    before = digest(module)
    _, val = loaders(samples=50)
    (metrics,) = quiet(tmp_path).validate(module, val)
    assert digest(module) == before
    module.eval()
    with torch.no_grad():
        assert metrics == {"val_loss": pytest.approx(float(cross_entropy(module, val.dataset.tensors)))}
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("stage", "step"), [("validate", "validation_step"), ("test", "test_step")])
def test_s25_a_stage_without_its_step_is_refused_before_any_data_is_touched(tmp_path, stage, step):
    class Watched(Data):
        def prepare_data(self):
            raise AssertionError("data was prepared")

    with pytest.raises(UsageError, match=f"Least has no {step}") as caught:
        getattr(quiet(tmp_path), stage)(Least(), Watched())
    assert f"def {step}(self, batch, batch_idx)" in caught.value.fix


def test_s26_forward_in_eval_mode_without_gradients_is_what_predict_gives(tmp_path):
    module, inputs = net().train(), loaders(samples=24)[1].dataset.tensors[0]
    predicted = torch.cat(quiet(tmp_path).predict(module, DataLoader(inputs, batch_size=8)))
    module.eval()
    with torch.no_grad():
        torch.testing.assert_close(module(inputs), predicted, rtol=0, atol=1e-6)
    assert not predicted.requires_grad


def test_s27_predict_step_is_forward_unless_one_is_written(tmp_path):
    class Labelling(Net):
        def predict_step(self, batch, batch_idx):
            return batch_idx, self(batch[0]).argmax(1)

    _, val = loaders(samples=20, batch_size=8)
    inputs = [inputs for inputs, _ in val]
    default = quiet(tmp_path).predict(seeded(Net)(), inputs)
    labels = quiet(tmp_path).predict(seeded(Labelling)(), val)
    assert [index for index, _ in labels] == [0, 1, 2]
    assert all(torch.equal(row.argmax(1), label) for row, (_, label) in zip(default, labels, strict=True))


def test_s27_predictions_come_in_a_list_for_each_of_several_loaders(tmp_path):
    class Numbered(Net):
        def predict_step(self, batch, batch_idx, dataloader_idx):
            return (dataloader_idx, batch_idx)

    several = [loaders(samples=16)[1], loaders(samples=8)[1]]
    assert quiet(tmp_path).predict(Numbered(), several) == [[(0, 0), (0, 1)], [(1, 0)]]
    assert quiet(tmp_path).predict(Numbered(), several, return_predictions=False) is None


class Modes(Net):
    """Notes the mode and whether gradients are computed, in each step."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def note(self, step):
        modes = {part.training for part in self.modules()}
        self.seen.setdefault(step, set()).add((*modes, torch.is_grad_enabled()))

    def training_step(self, batch, batch_idx):
        self.note("training")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.note("validation")

    def test_step(self, batch, batch_idx):
        self.note("test")

    def predict_step(self, batch, batch_idx):
        self.note("predict")


def test_s113_the_trainer_sets_modes_and_gradients_for_each_step(tmp_path):
    module, trainer = Modes().eval(), quiet(tmp_path, max_epochs=2)
    trainer.fit(module, *loaders())
    assert module.seen == {"training": {(True, True)}, "validation": {(False, False)}}
    module.train()
    trainer.test(module, loaders()[1])
    trainer.predict(module, loaders()[1])
    assert (module.seen["test"], module.seen["predict"]) == ({(False, False)}, {(False, False)})
    assert module.training
    assert torch.is_grad_enabled()


def test_s113_validation_puts_the_mode_of_every_part_back(tmp_path):
    class Mixed(Net):
        def on_train_epoch_start(self):
            self.backbone.eval()

        def on_train_epoch_end(self):
            self.after = (self.training, self.backbone.training, self.head.training)

    module = Mixed()
    quiet(tmp_path, max_epochs=1).fit(module, *loaders())
    assert module.after == (True, False, True)


def test_s113_a_fit_is_the_loop_that_one_would_write_by_hand(tmp_path):
    """The same bits, with BatchNorm, dropout, a schedule and a validation pass in every epoch."""
    # A generator of its own: an iterator would otherwise draw from the stream that dropout uses.
    plain = DataLoader(loaders()[1].dataset, batch_size=8, generator=torch.Generator())
    fitted = net()
    trainer = quiet(tmp_path, max_epochs=3, seed=5)
    trainer.fit(fitted, plain, plain)

    by_hand, losses = net(), []
    torch.manual_seed(5)
    optimizer = torch.optim.AdamW(by_hand.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
    for _ in range(3):
        by_hand.train()
        for batch in plain:
            optimizer.zero_grad()
            cross_entropy(by_hand, batch).backward()
            optimizer.step()
        by_hand.eval()
        with torch.no_grad():
            losses.append(sum(len(batch[0]) * float(cross_entropy(by_hand, batch)) for batch in plain) / 50)
        schedule.step()
    assert digest(fitted) == digest(by_hand)
    assert [row["val_loss"] for row in trainer.fit_run.history] == pytest.approx(losses)
