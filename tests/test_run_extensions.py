"""What takes part in a run goes through its methods and extensions; nobody outside assigns to a run's attributes."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from small import Net, loaders, net

from flashtask import Callback, Trainer
from flashtask.trainer.run_extension import RunExtension

ROOT = Path(__file__).resolve().parents[1]
OWNERS = {ROOT / "trainer" / name for name in ("run.py", "fit_run.py")}
SOURCES = [path for room in ("trainer", "tasks", "data", "cli") for path in sorted((ROOT / room).rglob("*.py"))]

_RUN_CLASSES = ("Run", "FitRun", "EvaluationRun")
#: attributes that hold a run, whatever they belong to
_HOLDS_A_RUN = ("run", "_run", "fit_run", "active_run", "validation", "sanity", "parent")


def is_run(node: ast.expr | None, names: set[str]) -> bool:
    """Whether an expression is a run, by its name, the attribute it comes from, or the class that it is made of."""
    if isinstance(node, ast.Name):
        return node.id in names
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in _RUN_CLASSES
    return isinstance(node, ast.Attribute) and node.attr in _HOLDS_A_RUN


def names_of_runs(tree: ast.AST) -> set[str]:
    """Names in a file that stand for runs: the usual ones, those annotated as one, and those assigned from one."""
    names = {"run", "fit_run"}
    for node in ast.walk(tree):
        if isinstance(node, (ast.arg, ast.AnnAssign)) and node.annotation is not None:
            words = set(ast.unparse(node.annotation).replace('"', "").replace("|", " ").split())
            if words & set(_RUN_CLASSES):
                names.add(node.arg if isinstance(node, ast.arg) else ast.unparse(node.target))
        if isinstance(node, ast.Assign) and is_run(node.value, names):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        if isinstance(node, ast.NamedExpr) and is_run(node.value, names):
            names.add(node.target.id)
    return names


def assignments(tree: ast.AST) -> Iterator[str]:
    """Every place in a file that sets an attribute of a run."""
    names = names_of_runs(tree)
    for node in ast.walk(tree):
        is_set = isinstance(node, ast.Attribute) and isinstance(node.ctx, (ast.Store, ast.Del))
        if is_set and is_run(node.value, names):
            yield f"line {node.lineno}: {ast.unparse(node)} is set"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
            changes = node.func.id in ("setattr", "delattr", "vars")
            if changes and is_run(node.args[0], names):
                yield f"line {node.lineno}: {ast.unparse(node)}"
        if isinstance(node, ast.Attribute) and node.attr == "__dict__" and is_run(node.value, names):
            yield f"line {node.lineno}: {ast.unparse(node)}"


@pytest.mark.quick_cases(38)
@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nobody_outside_sets_an_attribute_of_a_run(path):
    if path not in OWNERS:
        assert list(assignments(ast.parse(path.read_text(encoding="utf-8")))) == []


@pytest.mark.parametrize(
    ("code", "is_clean"),
    [
        ("run.max_steps = 3", False),
        ("run.max_steps, other = 3, 4", False),
        ("trainer.fit_run.stop_reason = ''", False),
        ("self.run.limit += 1", False),
        ("active = trainer.active_run\nactive.current_hook = 'x'", False),
        ("def f(of: FitRun | None):\n    of.loader = None", False),
        ("if (nested := run.validation) is not None:\n    nested.loaders = []", False),
        ("made = EvaluationRun(trainer, module, data, 'test')\nmade.loaders = []", False),
        ("setattr(run, name, 3)", False),
        ("vars(run).update(before)", False),
        ("run.__dict__['epoch'] = 3", False),
        ("del run.loader", False),
        ("for run.epoch in range(3): ...", False),
        ("run.stop('enough')", True),
        ("self.run = run", True),
        ("trainer.fit_run = run", True),
        ("run.ordered.drop_last = False", True),
        ("steps = run.max_steps", True),
    ],
)
def test_the_check_sees_every_form(code, is_clean):
    assert (list(assignments(ast.parse(code))) == []) == is_clean


class Doubling(Callback, RunExtension):
    """Doubles the loss of every step, counts what it was asked to wrap, and reads every batch twice."""

    def __init__(self):
        self.parts: list[tuple[str, str]] = []
        self.hooks: set[str] = set()
        self.batches = 0

    def wrap_call(self, run, name, call):
        self.parts.append((run.stage, name))
        return (lambda *arguments: 2 * call(*arguments)) if name == "training_step" else call

    def wrap_listener(self, run, hook, call):
        self.hooks.add(hook)
        return call

    def wrap_loader(self, run, loader):
        return [batch for batch in loader for _ in range(2)] if run.stage == "fit" else loader

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.batches += 1


def trained(tmp_path, module, callbacks, **settings):
    options = {"max_epochs": 1, "enable_checkpointing": False, "logger": False, "enable_progress_bar": False}
    trainer = Trainer(callbacks=callbacks, default_root_dir=tmp_path, seed=1, **{**options, **settings})
    trainer.fit(module, *loaders())
    return trainer


class Descending(Net):
    """With plain gradient descent, so that a loss twice as large makes a step twice as long."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def descending():
    module = Descending()
    module.load_state_dict(net().state_dict())
    return module


def test_a_callback_that_is_an_extension_wraps_steps_loaders_and_hooks(tmp_path):
    plain, doubled = descending(), descending()
    trained(tmp_path, plain, [], max_steps=1)
    extension = Doubling()
    trained(tmp_path, doubled, [extension], max_steps=1)
    start = dict(net().named_parameters())
    for name, parameter in doubled.named_parameters():
        step = dict(plain.named_parameters())[name] - start[name]
        torch.testing.assert_close(parameter - start[name], 2 * step)
    asked = {name for stage, name in extension.parts if stage == "fit"}
    assert asked == {
        *("training_step", "to_device", "backward", "unscale", "clip_gradients", "optimizer_step", "scale_update"),
        *("zero_grad", "count_step", "scheduler_step", "finish_pass", "close_epoch"),
    }
    assert ("validate", "validation_step") in extension.parts
    assert "train_batch_end" in extension.hooks


def test_an_extension_may_change_what_batches_come_from(tmp_path):
    extension = Doubling()
    trained(tmp_path, net(), [extension])
    assert extension.batches == 2 * len(loaders()[0])


def test_an_evaluation_is_extended_too(tmp_path):
    extension = Doubling()
    trainer = Trainer(callbacks=[extension], logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    trainer.validate(net(), loaders()[1])
    assert extension.parts == [("validate", "to_device"), ("validate", "validation_step")]


def test_of_several_reasons_to_stop_the_first_one_counts_and_may_be_withdrawn(tmp_path):
    class Stops(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if trainer.current_epoch == 0:
                trainer.fit_run.stop("early")
                trainer.fit_run.go_on()
            else:
                trainer.fit_run.stop("first")
                trainer.fit_run.stop("second")

    trainer = trained(tmp_path, net(), [Stops()], max_epochs=5)
    assert (trainer.current_epoch, trainer.fit_run.batch_idx, trainer.fit_run.stop_reason) == (1, 1, "first")


def test_what_is_logged_inside_logging_nothing_is_dropped(tmp_path):
    class Silent(Callback):
        def on_train_epoch_end(self, trainer, module):
            with trainer.fit_run.logging_nothing():
                module.log("unseen", 1.0)
            module.log("seen", 2.0)

    trainer = trained(tmp_path, Net(), [Silent()])
    assert trainer.callback_metrics["seen"] == 2.0
    assert "unseen" not in trainer.callback_metrics
