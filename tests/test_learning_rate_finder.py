"""The learning-rate range test: which rates are tried, which is taken, where it goes, and that nothing else changes."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from fingerprints import fingerprint, of_files, of_process
from small import Net, colour_folders, digest, loaders, net
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric

from flashtask import (
    Callback,
    DataModule,
    GradientAccumulationScheduler,
    ImageClassificationData,
    ImageClassifier,
    Loops,
    Module,
    Preprocessing,
    Trainer,
    read_checkpoint,
)
from flashtask.core.errors import OutputError, UsageError
from flashtask.trainer.finetuning.strategies import resolve_finetuning
from flashtask.trainer.run_preparation import data_of
from flashtask.trainer.tuning.learning_rate_curve import smoothed, steepest
from flashtask.trainer.tuning.tune import tune

# A module in place of a name cannot be stored in a checkpoint; that is not what is tested here.
pytestmark = pytest.mark.filterwarnings("ignore:the hyper-parameter backbone")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(1)


def quiet(tmp_path, **options):
    options = {"output_dir": tmp_path / "run", "enable_progress_bar": False, "enable_model_summary": False, **options}
    return Trainer(**options)


def sweep(tmp_path, module, data=None, strategy=None, trainer=None, **options):
    """The curve of a range test."""
    data = data_of(module, data, train=None if data is not None else loaders()[0])
    finetuning = None if strategy is None else resolve_finetuning(strategy)
    trainer = trainer or quiet(tmp_path, max_epochs=3, seed=5)
    found = tune(trainer, module, data, finetuning=finetuning, learning_rate=options or True)
    return found.learning_rate


class Watched(Net):
    """Notes the rates of all parameter groups before each batch; the list is the class's, so a copy's is the same."""

    rates: list[list[float]] = []

    def __init__(self, learning_rate=0.02):
        super().__init__()
        self.learning_rate = learning_rate

    def on_train_batch_start(self, batch, batch_idx):
        assert self.learning_rate == 0.02
        self.rates.append([group["lr"] for group in self.trainer.fit_run.optimizers[0].param_groups])

    def configure_optimizers(self):
        groups = [{"params": self.backbone.parameters()}, {"params": self.head.parameters()}]
        optimizer = torch.optim.SGD(groups, lr=self.learning_rate)
        most = [0.1 * self.learning_rate, self.learning_rate]
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.OneCycleLR(optimizer, most, 50)}


class Following(Net):
    """Its loss is a function of the step, and it learns nothing."""

    def training_step(self, batch, batch_idx):
        return 0 * super().training_step(batch, batch_idx) + self.loss_of_step(self.global_step)


def following(loss_of_step):
    module = Following()
    module.loss_of_step = loss_of_step
    return module


class TinyBackbone(torch.nn.Module):
    num_features = 8

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3, stride=4), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Dropout(0.2)
        )

    def forward(self, images):
        return self.layers(images).mean((2, 3))


def classifier(**options):
    torch.manual_seed(3)
    return ImageClassifier(backbone=TinyBackbone(), pretrained=False, **options)


def image_data(root, **options):
    data = ImageClassificationData.from_folders(
        colour_folders(root / "train"), colour_folders(root / "val", each=2), num_workers=0, batch_size=8, **options
    )
    data.preprocessing = Preprocessing(input_size=(3, 32, 32))
    return data


# ---- which rates are tried


@pytest.mark.parametrize("mode", ["exponential", "linear"])
def test_s33_every_step_has_its_own_rate_from_the_least_to_the_greatest(tmp_path, mode):
    Watched.rates.clear()
    curve = sweep(tmp_path, Watched(), num_training=40, min_lr=1e-5, max_lr=0.5, mode=mode, early_stop_threshold=None)
    spaced = np.geomspace(1e-5, 0.5, 40) if mode == "exponential" else np.linspace(1e-5, 0.5, 40)
    assert curve.rates == pytest.approx(list(spaced))
    assert len(curve.losses) == len(curve.smoothed) == 40
    # The groups of a module move in its own proportion, whatever its schedule does.
    assert [own for _, own in Watched.rates] == pytest.approx(list(spaced))
    assert [tenth for tenth, _ in Watched.rates] == pytest.approx(list(spaced / 10))


def test_s33_a_sweep_has_a_hundred_steps_also_where_an_epoch_has_seven(tmp_path):
    module = net()
    curve = sweep(tmp_path, module, early_stop_threshold=None)
    assert len(curve.rates) == 100
    assert curve.rates[0] == 1e-8
    assert curve.rates[-1] == pytest.approx(1.0)
    assert module.hparams.learning_rate == curve.suggestion in curve.rates


def test_s33_a_group_of_accumulated_batches_is_one_step_with_one_loss(tmp_path):
    class Numbered(Net):
        def training_step(self, batch, batch_idx):
            return 0 * super().training_step(batch, batch_idx) + float(batch_idx) + 100 / (1 + self.global_step)

    Watched.rates.clear()
    trainer = quiet(tmp_path, accumulate_grad_batches=3)
    sweep(tmp_path, Watched(), trainer=trainer, num_training=40, early_stop_threshold=None)
    rates = [own for _, own in Watched.rates]
    assert len(set(rates)) == 40
    assert rates[0] == rates[1] == rates[2] < rates[3]

    curve = sweep(tmp_path, Numbered(), trainer=quiet(tmp_path, accumulate_grad_batches=3), num_training=4)
    # 50 samples in batches of 8: groups of three, three, and the last, of two samples.
    assert curve.losses == pytest.approx([1 + 100, 4 + 50, 6 + 100 / 3, 1 + 25])


def test_s33_schedules_take_no_part(tmp_path):
    """A plateau would ask for a metric of validation, and one cycle has too few steps."""

    class Plateau(Net):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams.learning_rate)
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
            return {"optimizer": optimizer, "lr_scheduler": plateau, "monitor": "val_loss"}

    class OneCycle(Net):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams.learning_rate)
            cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.hparams.learning_rate, 5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}

    class Named(Net):
        def configure_optimizers(self):
            return {"optimizer": "sgd", "lr_scheduler": "cosine"}

    for module in (Plateau(), OneCycle(), Named()):
        assert sweep(tmp_path, module).suggestion == module.hparams.learning_rate


def test_s33_a_rate_that_the_user_fixed_stays_fixed_in_the_sweep(tmp_path):
    class Fixed(Watched):
        rates = []

        def configure_optimizers(self):
            groups = [{"params": self.backbone.parameters(), "lr": 1e-3}, {"params": self.head.parameters()}]
            return torch.optim.SGD(groups, lr=self.learning_rate)

    sweep(tmp_path, Fixed(), num_training=40, early_stop_threshold=None)
    assert {fixed for fixed, _ in Fixed.rates} == {1e-3}
    assert len({own for _, own in Fixed.rates}) == 40


def test_s33_only_the_first_stage_of_a_strategy_is_trained(tmp_path):
    class Frozen(Net):
        trained: list[bool] = []

        def training_step(self, batch, batch_idx):
            self.trained.append(any(p.requires_grad for p in self.backbone.parameters()) or self.backbone[2].training)
            return super().training_step(batch, batch_idx)

    module = Frozen()
    sweep(tmp_path, module, strategy="freeze_unfreeze:1", num_training=30, early_stop_threshold=None)
    assert not any(Frozen.trained)
    assert all(p.requires_grad for p in module.parameters())


# ---- which rate is taken


def test_s33_the_rate_of_the_steepest_fall_is_suggested(tmp_path):
    module = following(lambda step: 2 - math.tanh((step - 31) / 5) + (3 if step > 45 else 0))
    curve = sweep(tmp_path, module, num_training=60, smoothing=0.0, early_stop_threshold=None)
    assert curve.suggestion == curve.rates[31]
    assert curve.is_clear
    assert curve.smoothed == pytest.approx(curve.losses)
    assert module.hparams.learning_rate == curve.suggestion


def test_smoothed_losses_are_exponential_means_corrected_for_their_start():
    assert smoothed([4.0, 2.0, 2.0], 0.5) == pytest.approx([4.0, 8 / 3, 16 / 7])
    assert smoothed([1.0] * 50, 0.9) == pytest.approx([1.0] * 50)


def test_what_falls_behind_the_lowest_point_is_left_out():
    assert steepest([5, 5, 4, 3, 1, 9, 3, 1.5]) == 3
    assert steepest([1, 1, 1, 1]) is None
    assert steepest([1, 2, 3, 4]) is None
    assert steepest([1]) is None


def test_losses_that_only_vary_are_called_unclear(tmp_path):
    noise = np.random.default_rng(0).normal(1, 0.3, 100)
    curve = sweep(tmp_path, following(lambda step: float(noise[step])))
    assert not curve.is_clear
    assert "unclear" in str(curve)
    assert len(str(curve)) <= 80


def test_s33_the_sweep_ends_where_the_loss_has_risen_to_four_times_its_lowest(tmp_path):
    def loss(step):
        return max(0.5, 2 - step / 10) if step < 30 else 10.0

    early, whole = (
        sweep(tmp_path, following(loss), num_training=60, early_stop_threshold=limit) for limit in (4.0, None)
    )
    assert 30 < len(early.rates) < 40
    assert early.smoothed[-1] > 4 * min(early.smoothed) >= max(early.smoothed[20:-1])
    assert "4 times" in early.ended_by
    assert (len(whole.rates), whole.ended_by) == (60, "")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_s33_a_nan_ends_the_sweep_and_is_no_divergence(tmp_path, bad):
    module = following(lambda step: 2 - step / 10 if step < 18 else bad)
    curve = sweep(tmp_path, module, num_training=40)
    assert len(curve.losses) == 18
    assert "the loss became" in curve.ended_by
    assert module.hparams.learning_rate == curve.suggestion


def test_s33_gradients_that_explode_where_they_are_clipped_end_the_sweep_too(tmp_path):
    class Exploding(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if self.global_step < 15:
                return loss - self.global_step
            return loss + (torch.sqrt(self.head.weight * 0)).sum()  # its derivative is infinite times zero

    curve = sweep(tmp_path, Exploding(), trainer=quiet(tmp_path, gradient_clip_val=1.0), num_training=40)
    assert len(curve.losses) == 15
    assert "gradients" in curve.ended_by


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda step: 1.0, "did not fall at any rate"),
        (lambda step: 1.0 + step, "did not fall at any rate"),
        (lambda step: math.nan, "ended after 0 steps"),
    ],
)
def test_s33_without_a_fall_there_is_an_error_and_nothing_changes(tmp_path, loss, message):
    module = following(loss)
    before = fingerprint(module)
    with pytest.raises(UsageError, match=message) as raised:
        sweep(tmp_path, module)
    assert raised.value.fix
    assert fingerprint(module) == before
    assert module.hparams.learning_rate == 0.01


@pytest.mark.long
def test_s33_a_real_sweep_finds_a_rate_that_trains(tmp_path):
    """The rate that is found beats one a hundred times smaller and one that is far too large."""
    train = loaders(samples=400, batch_size=16)[0]
    losses = {}
    for name in ("found", "small", "large"):
        module = net()
        tune(quiet(tmp_path, seed=1), module, data_of(module, None, train=train), learning_rate=True)
        module.hparams.learning_rate *= {"found": 1, "small": 0.01, "large": 1000}[name]
        trainer = quiet(tmp_path, max_epochs=3, seed=1, output_dir=tmp_path / name)
        trainer.fit(module, train)
        losses[name] = trainer.callback_metrics["train_loss"]
    assert losses["found"] < losses["small"]
    assert losses["found"] < losses["large"]


# ---- where it goes


class Both(Net):
    def __init__(self, learning_rate=0.01):
        super().__init__()
        self.save_hyperparameters()
        self.learning_rate = learning_rate

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate)


class Short(Net):
    def __init__(self, lr=0.01):
        super().__init__()
        self._hparams.clear()
        self.lr = lr

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.lr)


class ReadOnly(Net):
    learning_rate = property(lambda self: self.hparams.learning_rate)


class Named(Net):
    def __init__(self, speed=0.01):
        super().__init__()
        self.speed = speed

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.speed)


@pytest.mark.long
def test_s33_the_rate_goes_to_the_attribute_and_the_hyper_parameter_whichever_there_are(tmp_path):
    both, short, read_only, named = Both(), Short(), ReadOnly(), Named()
    found = sweep(tmp_path, both).suggestion
    assert both.learning_rate == both.hparams.learning_rate == found != 0.01
    assert sweep(tmp_path, short).suggestion == short.lr
    assert not dict(short.hparams)
    assert sweep(tmp_path, read_only).suggestion == read_only.learning_rate == read_only.hparams.learning_rate
    assert sweep(tmp_path, named, attribute="speed").suggestion == named.speed


class Nameless(Net):
    def __init__(self):
        super().__init__()
        self._hparams.clear()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Deaf(Both):
    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Several(Both):
    def configure_optimizers(self):
        return [torch.optim.Adam(part.parameters(), lr=self.learning_rate) for part in (self.backbone, self.head)]

    def training_step(self, batch, batch_idx, optimizer_idx):
        return super().training_step(batch, batch_idx)


class ByHand(Both):
    automatic_optimization = False


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Nameless, "no learning rate that could be set"),
        (lambda: Both(learning_rate=None), "learning_rate of Both is None"),
        (lambda: Both(learning_rate=0), "a number above 0 is needed"),
        (Deaf, "the optimizer does not use learning_rate"),
        (Several, "needs one optimizer"),
        (ByHand, "needs one optimizer"),
    ],
)
def test_s33_a_rate_that_cannot_be_set_or_followed_is_an_error_with_a_fix(tmp_path, make, message):
    module = make()
    before = fingerprint(module)
    with pytest.raises(UsageError, match=message) as raised:
        sweep(tmp_path, module)
    assert raised.value.fix
    assert fingerprint(module) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_trainin": 5}, "did you mean 'num_training'"),
        ({"num_training": 2}, "at least 3"),
        ({"min_lr": 0}, "above 0"),
        ({"min_lr": 1.0, "max_lr": 0.1}, "above min_lr"),
        ({"mode": "cubic"}, "exponential"),
        ({"smoothing": 1.0}, "below 1"),
        ({"early_stop_threshold": 0.5}, "above 1"),
        ({"picture": "curve.docx"}, "pictures end in"),
    ],
)
def test_an_option_that_cannot_be_meant_is_refused(tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        sweep(tmp_path, net(), **options)


def test_tuning_must_be_asked_for_something(tmp_path):
    module = net()
    with pytest.raises(UsageError, match="not asked for anything"):
        tune(quiet(tmp_path), module, data_of(module, None, train=loaders()[0]))
    with pytest.raises(UsageError, match="True or a dictionary"):
        tune(quiet(tmp_path), module, data_of(module, None, train=loaders()[0]), learning_rate=0.1)


@pytest.mark.long
def test_s33_a_task_keeps_the_ratio_of_its_rates_unless_the_user_set_one(tmp_path):
    data = image_data(tmp_path)
    pretrained = ImageClassifier(backbone=TinyBackbone(), head="linear", pretrained=True)
    found = sweep(tmp_path, pretrained, data, "no_freeze", num_training=40).suggestion
    assert pretrained.learning_rate == pretrained.hparams.learning_rate == found
    assert pretrained.backbone_learning_rate == pretrained.hparams.backbone_learning_rate == pytest.approx(found / 10)

    own = classifier(backbone_learning_rate=0.001)
    found = sweep(tmp_path, own, data, "no_freeze", num_training=40).suggestion
    assert (own.learning_rate, own.hparams.learning_rate) == (found, found)
    assert own.backbone_learning_rate == own.hparams.backbone_learning_rate == 0.001


@pytest.mark.long
def test_s33_checkpoints_written_afterwards_hold_the_found_rates(tmp_path):
    model, data = classifier(), image_data(tmp_path)
    found = sweep(tmp_path, model, data, "no_freeze", num_training=40).suggestion
    trainer = quiet(tmp_path, max_epochs=1)
    trainer.finetune(model, datamodule=data, strategy="no_freeze")
    assert {group["initial_lr"] for group in trainer.fit_run.optimizers[0].param_groups} == {found}
    stored = read_checkpoint(tmp_path / "run" / "last.ckpt")["hyper_parameters"]
    assert stored["learning_rate"] == stored["backbone_learning_rate"] == found


def test_the_backbone_follows_a_rate_that_is_set_by_hand():
    model = ImageClassifier(backbone=TinyBackbone(), learning_rate=0.1)
    assert model.backbone_learning_rate == pytest.approx(0.01)
    model.learning_rate = 0.5
    assert model.backbone_learning_rate == pytest.approx(0.05)
    model.backbone_learning_rate = 0.2
    model.learning_rate = 1.0
    assert model.backbone_learning_rate == 0.2


@pytest.mark.long
def test_s33_a_picture_of_the_curve_is_written_where_asked(tmp_path):
    before = of_files(tmp_path)
    curve = sweep(tmp_path, net(), picture=tmp_path / "curve.png")
    assert set(of_files(tmp_path)) - set(before) == {str(tmp_path / "curve.png")}
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    curve.plot(tmp_path / "curve.svg")
    assert "learning rate" in (tmp_path / "curve.svg").read_text()


def test_a_picture_that_cannot_be_written_is_refused_before_anything_is_trained(tmp_path):
    module = following(lambda step: pytest.fail("was trained"))
    with pytest.raises(OutputError, match="no such folder"):
        sweep(tmp_path, module, picture=tmp_path / "missing" / "curve.png")


# ---- nothing else changes


class Everything(Both):
    """Has all that a search might disturb: metrics, random numbers, own state, a frozen part, ties, 4-D weights."""

    def __init__(self, fails_at=None, learning_rate=0.01):
        super().__init__(learning_rate=learning_rate)
        self.fails_at = fails_at
        self.seen = MeanMetric()
        self.seen.update(3.0)
        self.history = [1, {"a": torch.ones(2)}]
        self.conv = torch.nn.Conv2d(1, 2, 3, padding=1)
        self.normed = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(3, 3))
        self.tied = self.head
        self.backbone[0].requires_grad_(False)
        self.backbone[2].eval()

    default_memory_format = "channels_last"

    def training_step(self, batch, batch_idx):
        self.history.append(random.random() + np.random.rand())
        self.seen.update(float(batch_idx))
        if self.global_step == self.fails_at:
            raise ZeroDivisionError("in the middle")
        images = self.conv(batch[0].view(-1, 1, 2, 2)).mean()
        return super().training_step(batch, batch_idx) + images**2

    def setup(self, stage):
        self.was_set_up = True


class Loading(DataModule):
    def __init__(self):
        self.generator = np.random.default_rng(1)
        self.set_up = 0

    def setup(self, stage):
        self.set_up += 1
        self.extra = self.generator.normal()

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(50, 4, generator=generator)
        return DataLoader(TensorDataset(inputs, (inputs.sum(1) > 0).long()), batch_size=8, shuffle=True)


@pytest.mark.parametrize("fails_at", [None, 12])
def test_s33_a_search_leaves_no_trace_also_if_it_fails(tmp_path, monkeypatch, fails_at):
    monkeypatch.chdir(tmp_path)
    module, data = Everything(fails_at), Loading()
    trainer = Trainer(default_root_dir=tmp_path / "root", callbacks=[Callback()], enable_progress_bar=False, seed=3)
    (tmp_path / "root").mkdir()

    def state():
        return fingerprint(module, data, trainer), of_process(), of_files(tmp_path)

    torch.rand(3), random.random(), np.random.rand()
    before = state()
    if fails_at is not None:
        with pytest.raises(ZeroDivisionError, match="in the middle"):
            tune(trainer, module, data, learning_rate={"num_training": 30})
        assert state() == before
        return
    found = tune(trainer, module, data, learning_rate={"num_training": 30, "early_stop_threshold": None}).learning_rate
    assert state() != before
    module.learning_rate = module.hparams.learning_rate = 0.01
    assert found.suggestion != 0.01
    assert state() == before
    assert trainer.fit_run is None
    assert trainer.active_run is None


def test_s33_a_search_in_a_hook_of_a_fit_leaves_the_fit_alone(tmp_path):
    class Searching(Callback):
        def on_train_epoch_start(self, trainer, module):
            if trainer.current_epoch == 1:
                run, before = trainer.fit_run, (fingerprint(module.state_dict()), of_process())
                data = data_of(module, None, train=loaders()[0])
                self.found = tune(trainer, module, data, learning_rate=True).learning_rate.suggestion
                assert (fingerprint(module.state_dict()), of_process()) == before
                assert (trainer.fit_run, trainer.active_run, module.trainer) == (run, run, trainer)
                module.hparams.learning_rate = 0.01

    digests = []
    for callbacks in ([], [Searching()]):
        module = net()
        trainer = quiet(tmp_path, max_epochs=3, callbacks=callbacks, output_dir=tmp_path / str(len(digests)))
        trainer.fit(module, loaders()[0])
        digests.append(digest(module))
    assert digests[0] == digests[1]


def fitted_digest(tmp_path, name, rate=None):
    """A fit of a classifier: after a search, or with the given rate and no search. (digest, the rate)."""
    torch.manual_seed(0)
    model, data = classifier(), image_data(tmp_path / name)
    trainer = quiet(tmp_path, max_epochs=2, seed=4, output_dir=tmp_path / name / "run")
    if rate is None:
        sweep(tmp_path, model, data, "no_freeze", trainer, num_training=30)
        assert model.head is None
    else:
        model.learning_rate = rate
    trainer.finetune(model, datamodule=data, strategy="no_freeze")
    return digest(model), model.learning_rate


@pytest.mark.long
def test_s33_a_fit_after_a_search_has_the_bits_of_one_without(tmp_path):
    searched, rate = fitted_digest(tmp_path, "a")
    plain, _ = fitted_digest(tmp_path, "b", rate)
    other, _ = fitted_digest(tmp_path, "c", rate * 2)
    assert searched == plain != other


def test_s33_hooks_that_know_the_module_see_the_copy(tmp_path):
    class Hooked(Net):
        def __init__(self):
            super().__init__()
            kept = self.kept = []
            self.backbone.register_forward_hook(lambda layer, inputs, output: kept.append(output.shape))
            self.penalty = lambda: self.head.weight.square().sum()
            self.scale = lambda loss: 1.0 * loss

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            assert len(self.kept) == self.global_step + 1
            return self.scale(loss) + self.penalty()

    module = Hooked()
    before = fingerprint(module)
    assert sweep(tmp_path, module).suggestion != 0.01
    module.hparams.learning_rate = 0.01
    assert fingerprint(module) == before
    assert module.kept == []


def test_s33_gradient_accumulation_by_a_callback_is_kept(tmp_path):
    Watched.rates.clear()
    trainer = quiet(tmp_path, callbacks=[GradientAccumulationScheduler({0: 2, 1: 4})])
    sweep(tmp_path, Watched(), trainer=trainer, num_training=40, early_stop_threshold=None)
    rates = [own for _, own in Watched.rates]
    # Batches in pairs, the seventh of an epoch alone.
    assert [rates.count(rate) for rate in dict.fromkeys(rates)] == 10 * [2, 2, 2, 1]


def test_s33_a_page_of_ones_own_is_used(tmp_path):
    class Counted(Loops):
        steps = 0

        def step(self, run, group):
            type(self).steps += 1
            yield from super().step(run, group)

    trainer = quiet(tmp_path)
    trainer.loops = Counted()
    sweep(tmp_path, net(), trainer=trainer, num_training=40, early_stop_threshold=None)
    assert Counted.steps == 40


class FromTheNotes(Module):
    """The example of the notes: hyper-parameters hold the rate and the batch size, the module brings its data."""

    def __init__(self, learning_rate=0.01, batch_size=4):
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(4, 2)

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self.layer(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.hparams.learning_rate)

    def train_dataloader(self):
        return loaders(64, self.hparams.batch_size)[0]


@pytest.mark.long
def test_s28_s33_the_flags_of_the_notes_say_what_tune_finds(tmp_path):
    model = FromTheNotes()
    trainer = quiet(tmp_path, max_epochs=1, auto_lr_find=True, auto_scale_batch_size="binsearch")
    result = trainer.tune(model)
    assert (model.hparams.batch_size, model.hparams.learning_rate) == (64, result.learning_rate.suggestion)
    trainer.fit(model)
    assert trainer.fit_run.optimizers[0].param_groups[0]["lr"] == result.learning_rate.suggestion
    assert trainer.global_step == 1

    model = FromTheNotes()
    assert quiet(tmp_path, auto_scale_batch_size=True).tune(model).learning_rate is None
    assert (model.hparams.batch_size, model.hparams.learning_rate) == (64, 0.01)


def test_a_module_that_cannot_be_copied_is_named(tmp_path):
    class Locked(Both):
        def __init__(self):
            super().__init__()
            self.file = open(__file__)  # noqa: SIM115

    module = Locked()
    with pytest.raises(UsageError, match="Locked or its data cannot be copied"), module.file:
        sweep(tmp_path, module)


def test_large_data_is_not_copied(tmp_path):
    class Big(DataModule):
        def __init__(self):
            self.inputs = torch.randn(50, 4)
            self.data = TensorDataset(self.inputs, torch.zeros(50, dtype=torch.long))

        def train_dataloader(self):
            assert self.data.tensors[0].data_ptr() == self.inputs.data_ptr() == pointer
            return DataLoader(self.data, batch_size=8)

    data = Big()
    pointer = data.inputs.data_ptr()
    module = net()
    assert tune(quiet(tmp_path), module, data, learning_rate={"num_training": 10}).learning_rate is not None


def test_a_module_with_old_weight_norm_can_be_searched(tmp_path):
    class Normed(Module):
        def __init__(self, learning_rate=0.01):
            super().__init__()
            self.learning_rate = learning_rate
            with pytest.warns(FutureWarning):
                self.layer = torch.nn.utils.weight_norm(torch.nn.Linear(4, 3))

        def training_step(self, batch, batch_idx):
            return torch.nn.functional.cross_entropy(self.layer(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=self.learning_rate)

    module = Normed()
    assert sweep(tmp_path, module, max_lr=10.0).suggestion == module.learning_rate
