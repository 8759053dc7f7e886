"""Loops as objects: the same bits and hooks as the page, and every part of them can be replaced."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest
import torch
from small import Net, digest, loaders, net
from test_resume import SignalAt, state_digest, undisturbed  # noqa: F401 - a fixture

from flashtask import Callback, EarlyStopping, Loops, Trainer, read_checkpoint
from flashtask.core.errors import UnknownNameError, UsageError
from flashtask.core.seeding import seed_generators
from flashtask.trainer.hooks import HOOKS
from flashtask.trainer.lightning1.loops import (
    EvaluationEpochLoop,
    EvaluationLoop,
    FitLoop,
    Loop,
    ManualOptimization,
    OptimizerLoop,
    PredictionLoop,
    TrainingBatchLoop,
    TrainingEpochLoop,
)

ROOT = Path(__file__).parent.parent


def trainer(folder, **options):
    options = {"max_epochs": 4, "seed": 3, **options}
    return Trainer(output_dir=folder, enable_progress_bar=False, enable_model_summary=False, **options)


class MyFitLoop(FitLoop):
    """The engine's own, except that it counts its epochs."""

    def __init__(self):
        super().__init__()
        self.turns = 0

    def advance(self):
        super().advance()
        self.turns += 1


def with_loops(folder, **options):
    made = trainer(folder, **options)
    made.fit_loop = MyFitLoop()
    return made


class Told(Callback):
    """Every hook with the whole numbers it came with, the step and the epoch."""

    def __init__(self):
        self.hooks = []
        for hook in HOOKS:
            setattr(self, f"on_{hook}", self._noting(hook))

    def _noting(self, hook):
        def note(trainer, module, *arguments):
            numbers = tuple(one for one in arguments if isinstance(one, int))
            state = (module.training, torch.is_grad_enabled())
            self.hooks.append((hook, *numbers, trainer.global_step, trainer.current_epoch, *state))

        return note


# ---- what is trained, told and written is what the page has


class Two(Net):
    """Two optimizers that take turns."""

    def training_step(self, batch, batch_idx, optimizer_idx):
        loss = super().training_step(batch, batch_idx)
        self.log(f"loss_{optimizer_idx}", loss)
        return loss * (1 + optimizer_idx)

    def configure_optimizers(self):
        heads = torch.optim.SGD(self.head.parameters(), lr=0.1)
        return [heads, torch.optim.Adam(self.backbone.parameters(), lr=0.01)]


class ByItself(Net):
    """Steps its optimizer itself, every second batch."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss)
        if batch_idx % 2:
            self.optimizers().step()
            self.optimizers().zero_grad()


class Collecting(Net):
    """Looks at the outputs of epochs, and skips the rest of one."""

    def on_train_batch_start(self, batch, batch_idx):
        return -1 if (self.current_epoch, batch_idx) == (1, 3) else None

    def training_epoch_end(self, outputs):
        self.log("outputs", float(len(outputs)))

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        super().validation_step(batch, batch_idx)
        return batch_idx

    def validation_epoch_end(self, outputs):
        self.log("val_outputs", float(len(outputs)))


CASES = {
    "validation": (Net, {}),
    "validation every second epoch": (Net, {"check_val_every_n_epoch": 2}),
    "a whole sanity check": (Net, {"num_sanity_val_steps": -1}),
    "accumulation": (Net, {"accumulate_grad_batches": {0: 3, 2: 2}}),
    "clipping": (Net, {"gradient_clip_val": 0.1, "track_grad_norm": 2, "log_every_n_steps": 2}),
    "several optimizers": (Two, {}),
    "manual optimization": (ByItself, {}),
    "outputs and a skipped rest": (Collecting, {}),
    "early stopping": (Net, {"max_epochs": 9, "callbacks": [EarlyStopping("val_loss", min_delta=0.5, patience=1)]}),
    "max_steps": (Net, {"max_epochs": None, "max_steps": 10}),
    "few batches": (Net, {"limit_train_batches": 3, "limit_val_batches": 1, "max_epochs": 2}),
    "overfitting": (Net, {"overfit_batches": 2}),
    "half precision": (Net, {"precision": "bf16-mixed"}),
}


def outcome(run, kind):
    """Weights, everything else that a checkpoint holds, rows without times, and the hooks."""
    told = Told()
    run.callbacks = [*run.callbacks, told]
    torch.manual_seed(1)
    module = kind()
    run.fit(module, *loaders())
    rows = [{n: v for n, v in row.items() if "second" not in n} for row in run.fit_run.history]
    return digest(module), state_digest(run.output_dir / "last.ckpt"), rows, run.fit_run.stop_reason, told.hooks


@pytest.mark.quick_cases(3)
@pytest.mark.parametrize(("kind", "options"), CASES.values(), ids=CASES)
def test_s109_a_fit_loop_trains_the_same_bits_and_tells_the_same_moments(tmp_path, kind, options):
    by_page = outcome(trainer(tmp_path / "page", **options), kind)
    by_loops = outcome(with_loops(tmp_path / "loops", **options), kind)
    for what, expected, found in zip(("weights", "checkpoint", "rows", "stop"), by_page, by_loops, strict=False):
        assert found == expected, what
    assert by_loops[-1] == by_page[-1]
    assert len(by_page[-1]) > 30


def test_s109_a_fit_loop_goes_through_every_epoch_itself(tmp_path):
    run = with_loops(tmp_path)
    run.fit(net(), *loaders())
    assert run.fit_loop.turns == 4


def test_s109_several_validation_loaders_are_gone_through_one_by_one(tmp_path):
    class Numbered(Net):
        def validation_step(self, batch, batch_idx, dataloader_idx):
            super().validation_step(batch, batch_idx)

    rows = []
    for made in (trainer(tmp_path / "page", max_epochs=1), with_loops(tmp_path / "loops", max_epochs=1)):
        torch.manual_seed(1)
        train, val = loaders()
        made.fit(Numbered(), train, [val, loaders(samples=20)[1]])
        rows.append({n: v for n, v in made.fit_run.history[0].items() if n.startswith("val_")})
    assert rows[0] == rows[1]
    assert set(rows[0]) == {"val_loss/dataloader_idx_0", "val_loss/dataloader_idx_1"}


def test_s109_one_loop_serves_several_fits_and_trainers(tmp_path):
    loop, digests = MyFitLoop(), set()
    runs = [trainer(tmp_path / str(number)) for number in range(2)]
    for run in runs:
        run.fit_loop = loop
    for run, module in ((runs[0], net()), (runs[1], net())):
        run.fit(module, *loaders())
        digests.add(digest(module))
    trainer(tmp_path / "page").fit(module := net(), *loaders())
    assert digests == {digest(module)}
    assert loop.turns == 8


def test_s109_an_evaluation_inside_a_hook_leaves_the_fit_alone(tmp_path):
    found = []

    class Validating(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if batch_idx == 3:
                found.append(trainer.validate(module, loaders()[1])[0]["val_loss"])

    nested, plain = net(), net()
    with_loops(tmp_path / "a", callbacks=Validating()).fit(nested, *loaders())
    trainer(tmp_path / "b").fit(plain, *loaders())
    assert len(found) == 4
    assert digest(nested) == digest(plain)


def test_s109_finetuning_in_stages_goes_through_a_fit_loop_too(tmp_path):
    digests = []
    for made in (trainer(tmp_path / "page"), with_loops(tmp_path / "loops")):
        made.finetune(net(), *loaders(), strategy=("freeze_unfreeze", 2))
        digests.append(state_digest(made.output_dir / "last.ckpt"))
    assert digests[0] == digests[1]


class Inputs(Net):
    """Predicts from the inputs of a batch."""

    def predict_step(self, batch, batch_idx):
        return self(batch[0])


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_s107_every_stage_has_its_loop_with_the_same_outcome(tmp_path, stage):
    module, found = Inputs(), []
    for made in (trainer(tmp_path / "page"), trainer(tmp_path / "loops")):
        told = Told()
        made.callbacks = [told]
        if found:
            assert isinstance(getattr(made, f"{stage}_loop"), EvaluationLoop)
        values = getattr(made, stage)(module, loaders()[1])
        found.append(([value.tolist() for value in values] if stage == "predict" else values, told.hooks))
    assert found[0] == found[1]
    assert len(found[0][1]) > 10


# ---- stopping and going on


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    ("hook", "count"),
    [
        ("train_batch_start", 3),
        ("train_batch_end", 10),
        ("before_optimizer_step", 7),
        ("validation_batch_end", 4),
        ("train_epoch_end", 2),
        ("epoch_end", 2),
    ],
)
@pytest.mark.parametrize("first", ["loops", "page"])
def test_s109_a_fit_stopped_in_an_epoch_goes_on_with_the_same_bits(
    tmp_path,
    undisturbed,  # noqa: F811
    first,
    hook,
    count,
):
    """Loops and page continue each other's runs."""
    stop, go_on = (with_loops, trainer) if first == "loops" else (trainer, with_loops)
    with pytest.raises(SystemExit) as stopped:
        stop(tmp_path, callbacks=SignalAt(hook, count, signal.SIGTERM)).fit(net(), *loaders())
    assert stopped.value.code == 143
    go_on(tmp_path).fit(net(seed=9), *loaders(), ckpt_path="last")
    assert state_digest(tmp_path / "last.ckpt") == undisturbed


def test_s109_ctrl_c_in_a_fit_loop_saves_the_place(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        with_loops(tmp_path, callbacks=SignalAt("train_batch_end", 9, signal.SIGINT)).fit(net(), *loaders())
    saved = read_checkpoint(tmp_path / "last.ckpt")
    assert (saved["epoch"], saved["progress"]["samples"], saved["global_step"]) == (1, 16, 9)


def test_other_stages_work_after_a_fit_that_was_interrupted(tmp_path):
    for name, make in (("page", trainer), ("loops", with_loops)):
        run, module = make(tmp_path / name, callbacks=SignalAt("train_batch_end", 9, signal.SIGINT)), net()
        with pytest.raises(KeyboardInterrupt):
            run.fit(module, *loaders())
        assert run.validate(module, loaders()[1])[0]["val_loss"] > 0


def test_s108_ctrl_c_in_a_loop_of_ones_own_ends_it_after_its_turn(tmp_path):
    class Interrupted(ByHand):
        def advance(self):
            super().advance()
            if self.turns == 2:
                os.kill(os.getpid(), signal.SIGINT)

    run, module = trainer(tmp_path), net()
    run.fit_loop = Interrupted(turns=5)
    with pytest.raises(KeyboardInterrupt):
        run.fit(module, *loaders())
    assert run.fit_loop.turns == 2
    weights = read_checkpoint(tmp_path / "last.ckpt")["state_dict"]
    assert all(torch.equal(weights[name], value) for name, value in module.state_dict().items())


def test_an_error_in_a_loop_reaches_the_callbacks_and_the_user(tmp_path):
    class Broken(FitLoop):
        def advance(self):
            raise RuntimeError("no epoch today")

    told = Told()
    run = trainer(tmp_path, callbacks=told)
    run.fit_loop = Broken()
    with pytest.raises(RuntimeError, match="no epoch today"):
        run.fit(net(), *loaders())
    assert told.hooks[-1][0] == "exception"


@pytest.mark.parametrize("where", ["validation_step", "on_validation_batch_start", "training_step"])
def test_an_exhausted_iterator_of_the_module_is_an_error_and_no_end(tmp_path, where):
    """StopIteration ends a loop, but only that of the loader does."""

    class Reading(Net):
        def read(self, *arguments):
            return next(iter(()))

    setattr(Reading, where, Reading.read)
    with pytest.raises(RuntimeError, match="StopIteration"):
        with_loops(tmp_path, num_sanity_val_steps=0).fit(Reading(), *loaders())


@pytest.mark.parametrize("make", [trainer, with_loops])
@pytest.mark.parametrize("where", ["training_step", "validation_step"])
def test_a_fit_that_fails_lets_its_loader_go(tmp_path, make, where):
    """Else the loader's processes would live as long as the trainer."""
    ended = []

    class Stream:
        def __iter__(self):
            try:
                yield from loaders()[1]
            finally:
                ended.append(True)

    class Failing(Net):
        def fail(self, batch, batch_idx):
            raise RuntimeError("this batch is bad")

    setattr(Failing, where, Failing.fail)
    run = make(tmp_path, num_sanity_val_steps=0)
    with pytest.raises(RuntimeError, match="this batch is bad"):
        run.fit(Failing(), Stream(), Stream())
    assert ended == [True] * (1 if where == "training_step" else 2)


# ---- a loop of one's own


class ByHand(Loop):
    """Plain PyTorch in place of the engine, for a number of epochs."""

    def __init__(self, turns=2):
        self.most, self.turns = turns, 0

    @property
    def done(self):
        return self.turns >= self.most

    def advance(self):
        model, (optimizer,) = self.trainer.model, self.trainer.optimizers
        model.train()
        for inputs, targets in self.trainer.train_dataloader:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
        self.turns += 1


def test_s108_a_loop_that_trains_by_hand_does_what_plain_torch_does(tmp_path):
    loader = loaders()[1]
    run, by_hand = trainer(tmp_path), net()
    run.fit_loop = ByHand()
    run.fit(by_hand, loader)
    assert run.fit_loop.turns == 2

    plain = net()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=plain.hparams.learning_rate)
    loader.generator = torch.Generator()  # as in the engine: a new iterator draws nothing from dropout's stream
    seed_generators(3)
    for _ in range(2):
        for inputs, targets in loader:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(plain(inputs), targets).backward()
            optimizer.step()
    assert digest(by_hand) == digest(plain) != digest(net())


def test_s108_what_a_loop_of_ones_own_trained_can_be_saved(tmp_path):
    run, module = trainer(tmp_path / "run"), net()
    run.fit_loop = ByHand()
    run.fit(module, loaders()[1])
    run.save_checkpoint(tmp_path / "by_hand.ckpt")
    assert digest(Net.load_from_checkpoint(tmp_path / "by_hand.ckpt")) == digest(module)


def test_s108_a_loop_of_ones_own_may_serve_another_verb(tmp_path):
    class Largest(Loop):
        """The largest output of anything, instead of an evaluation."""

        def on_run_start(self, run):
            self.batches = run.batches(0)
            self.found = -float("inf")

        @property
        def done(self):
            return False

        def advance(self, run):
            batch, _ = next(self.batches)
            with torch.no_grad():
                self.found = max(self.found, float(run.module(batch[0]).max()))

    run, module = trainer(tmp_path), net().eval()
    run.validate_loop = Largest()
    run.validate(module, loaders()[1])
    assert run.validate_loop.found == module(loaders()[1].dataset.tensors[0]).max().item()


# ---- the base


def test_s106_run_calls_the_hooks_in_order_and_gives_what_the_last_returns():
    calls = []

    class Counting(Loop):
        turns = 0

        @property
        def done(self):
            return self.turns == 2

        def on_run_start(self):
            calls.append("on_run_start")

        def on_advance_start(self):
            calls.append("on_advance_start")

        def advance(self):
            calls.append("advance")
            self.turns += 1

        def on_advance_end(self):
            calls.append("on_advance_end")

        def on_run_end(self):
            calls.append("on_run_end")
            return self.turns

    assert Counting().run() == 2
    turn = ["on_advance_start", "advance", "on_advance_end"]
    assert calls == ["on_run_start", *turn, *turn, "on_run_end"]


def test_s106_stop_iteration_in_advance_ends_the_run():
    class Reading(Loop):
        done = False

        def on_run_start(self, values):
            self.values, self.sum = iter(values), 0

        def advance(self, values):
            self.sum += next(self.values)

        def on_run_end(self):
            return self.sum

    assert Reading().run([1, 2, 3]) == 6


def test_s106_a_loop_that_is_done_takes_no_turn():
    class Over(Loop):
        done = True

        def on_run_end(self):
            return "nothing to do"

    assert Over().run() == "nothing to do"


@pytest.mark.parametrize(("missing", "words"), [("done", "has no `done`"), ("advance", "has no `advance`")])
def test_s106_a_loop_without_its_two_methods_says_which_to_write(tmp_path, missing, words):
    class Half(Loop):
        if missing == "advance":
            done = False

    run = trainer(tmp_path)
    run.fit_loop = Half()
    with pytest.raises(UsageError, match=words):
        run.fit(net(), *loaders())


# ---- the tree, and putting others into it


def test_s107_the_tree_holds_the_loops_by_their_names(tmp_path):
    fit = trainer(tmp_path).fit_loop
    assert type(fit) is FitLoop
    assert {name: type(child) for name, child in fit.children().items()} == {"epoch_loop": TrainingEpochLoop}
    below = {"batch_loop": TrainingBatchLoop, "val_loop": EvaluationLoop}
    assert {name: type(child) for name, child in fit.epoch_loop.children().items()} == below
    below = {"optimizer_loop": OptimizerLoop, "manual_loop": ManualOptimization}
    assert {name: type(child) for name, child in fit.epoch_loop.batch_loop.children().items()} == below
    assert type(fit.epoch_loop.val_loop.epoch_loop) is EvaluationEpochLoop


def test_s107_every_loop_of_the_tree_knows_the_trainer(tmp_path):
    run = trainer(tmp_path)
    run.fit_loop.epoch_loop = TrainingEpochLoop()
    run.fit_loop.epoch_loop.batch_loop.replace(optimizer_loop=OptimizerLoop)

    def below(loop):
        return [loop, *(found for child in loop.children().values() for found in below(child))]

    for loop in (run.fit_loop, run.validate_loop, run.test_loop, run.predict_loop):
        assert [one.trainer is run for one in below(loop)] == [True] * len(below(loop))
    assert type(run.predict_loop) is PredictionLoop


class MyEpochLoop(TrainingEpochLoop):
    """The engine's own, except that it notes its first batches."""

    def __init__(self):
        super().__init__()
        self.groups = 0

    def advance(self):
        super().advance()
        self.groups += 1


def test_s110_replace_takes_a_class_or_a_loop_and_keeps_what_is_below(tmp_path):
    for number, given in enumerate((MyEpochLoop, MyEpochLoop())):
        run = trainer(tmp_path / str(number), max_epochs=1)
        before = run.fit_loop.epoch_loop
        before.batch_loop.optimizer_loop = mine = OptimizerLoop()
        run.fit_loop.replace(epoch_loop=given)
        assert run.fit_loop.epoch_loop.batch_loop.optimizer_loop is mine
        assert run.fit_loop.epoch_loop.val_loop is before.val_loop
        run.fit(net(), *loaders())
        assert run.fit_loop.epoch_loop.groups == 7


def test_s111_connect_replaces_an_intermediate_loop_and_nothing_below_it(tmp_path):
    run = trainer(tmp_path, max_epochs=1)
    before = run.fit_loop.epoch_loop
    epoch_loop = MyEpochLoop()
    epoch_loop.connect(before.batch_loop, before.val_loop)
    run.fit_loop.connect(epoch_loop=epoch_loop)
    assert (epoch_loop.batch_loop, epoch_loop.val_loop) == (before.batch_loop, before.val_loop)
    module, by_page = net(), net()
    run.fit(module, *loaders())
    assert epoch_loop.groups == 7
    trainer(tmp_path / "page", max_epochs=1).fit(by_page, *loaders())
    assert digest(module) == digest(by_page)


def test_s111_a_child_of_another_name_gets_near_matches(tmp_path):
    fit = trainer(tmp_path).fit_loop
    with pytest.raises(UnknownNameError, match="did you mean 'epoch_loop'"):
        fit.connect(epoch_lop=MyEpochLoop())
    with pytest.raises(UnknownNameError, match="did you mean 'epoch_loop'"):
        fit.replace(epochs_loop=MyEpochLoop)
    with pytest.raises(UnknownNameError, match="did you mean 'val_loop'"):
        fit.epoch_loop.connect(value_loop=EvaluationLoop())
    assert type(fit.epoch_loop) is TrainingEpochLoop


def test_s108_a_class_in_place_of_a_loop_is_told(tmp_path):
    run = trainer(tmp_path)
    with pytest.raises(UsageError, match=r"trainer\.fit_loop takes a Loop"):
        run.fit_loop = FitLoop
    with pytest.raises(UsageError, match=r"replace\(epoch_loop=MyEpochLoop\)"):
        run.fit_loop.connect(epoch_loop=MyEpochLoop)
    with pytest.raises(UsageError, match="takes a loop, not int"):
        run.fit_loop.replace(epoch_loop=3)
    run.fit(net(), *loaders())
    assert run.current_epoch == 4


# ---- the page


def test_the_page_is_what_runs_until_somebody_asks_for_a_loop(tmp_path):
    run = trainer(tmp_path / "a")
    run.fit(Inputs(), *loaders())
    run.validate(dataloaders=loaders()[1])
    run.test(dataloaders=loaders()[1])
    run.predict(dataloaders=loaders()[1])
    assert run._loop_tree is None


def test_a_function_of_the_page_can_be_replaced(tmp_path):
    class Noting(Loops):
        def __init__(self):
            self.steps = []

        def step(self, run, group):
            yield from super().step(run, group)
            self.steps.append(run.global_step)

    run, module, by_page = trainer(tmp_path / "a", max_epochs=1), net(), net()
    run.loops = Noting()
    run.fit(module, *loaders())
    assert run.loops.steps == [1, 2, 3, 4, 5, 6, 7]
    trainer(tmp_path / "b", max_epochs=1).fit(by_page, *loaders())
    assert digest(module) == digest(by_page)


def test_loops_take_their_steps_from_the_page_that_was_set(tmp_path):
    """The two ways meet in `step`: the innermost loop goes through the trainer's own page."""

    class Noting(Loops):
        steps = 0

        def step(self, run, group):
            yield from super().step(run, group)
            self.steps += 1

    run = with_loops(tmp_path, max_epochs=1)
    run.loops = Noting()
    run.fit(net(), *loaders())
    assert run.loops.steps == 7


def test_the_examples_of_the_guide_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    often, until, by_hand = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "loops.md").read_text(), re.DOTALL)
    names = {"__name__": "guide"}
    exec(often, names)
    run = names["trainer"].fit_run
    assert (run.global_step, len(run.history)) == (64, 2)
    told = Told()
    again = Trainer(max_epochs=2, callbacks=told)
    again.loops = names["OftenValidated"]()
    again.fit(names["Net"](), names["data"], names["data"])
    # the sanity check, six times ten steps, and two ends of epochs
    assert [hook[0] for hook in told.hooks].count("validation_start") == 1 + 6 + 2
    exec(until, names)
    losses = [row["train_loss"] for row in names["trainer"].fit_run.history]
    assert 1 < len(losses) < 50
    assert losses[-1] < 0.01 <= min(losses[:-1])
    exec(by_hand, names)
    weights = read_checkpoint("by_hand.ckpt")["state_dict"]
    assert torch.allclose(weights["layer.weight"], torch.ones(1, 4), atol=0.1)


def test_s108_reading_a_loop_does_not_switch_off_ones_own_page(tmp_path):
    class Counted(Loops):
        steps = 0

        def step(self, run, group):
            type(self).steps += 1
            yield from super().step(run, group)

    looked = trainer(tmp_path / "run", max_epochs=1)
    looked.loops = Counted()
    assert isinstance(looked.fit_loop.epoch_loop, TrainingEpochLoop)
    assert hasattr(looked, "predict_loop")
    looked.fit(net(), *loaders())
    assert Counted.steps == 7


@pytest.mark.parametrize(
    "change",
    [
        lambda tree: setattr(tree, "fit_loop", MyFitLoop()),
        lambda tree: setattr(tree.fit_loop, "epoch_loop", type("Own", (TrainingEpochLoop,), {})()),
        lambda tree: tree.fit_loop.epoch_loop.connect(batch_loop=type("Own", (TrainingBatchLoop,), {})()),
        lambda tree: tree.fit_loop.replace(epoch_loop=type("Own", (TrainingEpochLoop,), {})),
        lambda tree: setattr(tree.fit_loop, "on_advance_end", lambda: None),
    ],
)
def test_s109_any_change_in_the_tree_puts_it_in_the_place_of_the_page(tmp_path, change):
    made = trainer(tmp_path / "run", max_epochs=1)
    tree = made.loop_tree
    assert made._path is made.loops
    change(tree)
    assert made._path is tree
