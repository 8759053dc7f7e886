"""A script's own `argparse` parser: the trainer's arguments as options, and a trainer from what was parsed."""

from __future__ import annotations

import argparse

import pytest
import warm
from small import loaders, net

from flashtask import EarlyStopping, Trainer, read_checkpoint
from flashtask.core.errors import UsageError

SCRIPT = """
import argparse
import torch
from small import loaders
from flashtask import Module, Trainer

class Script(Module):
    def __init__(self, args):
        super().__init__()
        self.save_hyperparameters(args)
        self.layer = torch.nn.Linear(4, 3)

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self.layer(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams.learning_rate)

parser = argparse.ArgumentParser()
parser.add_argument("--learning_rate", type=float, default=0.1)
Trainer.add_argparse_args(parser)
args = parser.parse_args()
trainer = Trainer.from_argparse_args(args)
trainer.fit(Script(args), loaders()[0])
print(trainer.global_step)
"""


def parsed(*words):
    parser = argparse.ArgumentParser()
    parser.add_argument("--learning_rate", type=float, default=0.1)
    return Trainer.add_argparse_args(parser).parse_args(words)


def test_s88_a_script_trains_as_its_command_line_says_and_its_namespace_is_its_hyperparameters(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = warm.run(SCRIPT, "--max_epochs", "2", "--output_dir", "run", "--learning_rate", "0.5")
    assert (done.returncode, done.stdout) == (0, "14\n"), done.stderr
    content = read_checkpoint(tmp_path / "run" / "last.ckpt")
    assert content["hyper_parameters"]["learning_rate"] == 0.5
    assert content["hyper_parameters"]["max_epochs"] == 2
    assert content["hyper_parameters_form"]["kind"] == "namespace"


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--max_epochs", "3"], "max_epochs", 3),
        (["--max-epochs=3"], "max_epochs", 3),
        (["--max_steps", "-1"], "max_steps", -1),
        (["--limit_train_batches", "0.5"], "limit_train_batches", 0.5),
        (["--limit_val_batches", "2"], "limit_val_batches", 2),
        (["--fast_dev_run"], "fast_dev_run", True),
        (["--fast_dev_run", "4"], "fast_dev_run", 4),
        (["--enable_progress_bar", "false"], "enable_progress_bar", False),
        (["--deterministic", "warn"], "deterministic", "warn"),
        (["--gradient_clip_val", "1e-3"], "gradient_clip_val", 1e-3),
        (["--gradient_clip_val", "none"], "gradient_clip_val", None),
        (["--precision", "bf16-mixed"], "precision", "bf16-mixed"),
        (["--max_time", "00:01:30:00"], "max_time", "00:01:30:00"),
        (["--accumulate_grad_batches", "{0: 2, 4: 8}"], "accumulate_grad_batches", {0: 2, 4: 8}),
        (["--track_grad_norm", "inf"], "track_grad_norm", "inf"),
    ],
)
def test_s88_every_argument_is_an_option_with_the_value_that_python_would_have(words, name, value):
    trainer = Trainer.from_argparse_args(parsed(*words))
    assert (getattr(trainer, name), type(getattr(trainer, name))) == (value, type(value))


def test_s88_without_options_it_is_the_trainer_without_arguments():
    assert Trainer.from_argparse_args(parsed()).arguments == Trainer().arguments


def test_s88_older_names_are_options_too():
    trainer = Trainer.from_argparse_args(parsed("--gpus", "0", "--checkpoint_callback", "false"))
    assert (trainer.accelerator, trainer.enable_checkpointing) == ("cpu", False)


def test_s88_changes_win_and_what_is_no_argument_of_the_trainer_is_left_to_the_script():
    namespace = parsed("--max_epochs", "3", "--learning_rate", "0.5")
    stopping = EarlyStopping()
    trainer = Trainer.from_argparse_args(namespace, max_epochs=7, callbacks=[stopping])
    assert trainer.max_epochs == 7
    assert trainer.callbacks == [stopping]
    assert namespace.learning_rate == 0.5
    with pytest.raises(UsageError, match="did you mean 'max_epochs'"):
        Trainer.from_argparse_args(namespace, max_epoch=7)


def test_s88_an_option_that_the_script_has_already_stays_the_scripts(tmp_path):
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=5, help="mine")
    namespace = Trainer.add_argparse_args(parser).parse_args(["--max_epochs", "1"])
    trainer = Trainer.from_argparse_args(namespace, output_dir=tmp_path / "run", enable_progress_bar=False)
    trainer.fit(net(), loaders()[0])
    assert trainer.fit_run.seed == 5


def test_s88_a_value_that_cannot_be_meant_names_the_argument(capsys):
    with pytest.raises(UsageError, match="max_epochs='many'"):
        Trainer.from_argparse_args(parsed("--max_epochs", "many"))
    with pytest.raises(SystemExit):
        parsed("--max_epoks", "3")
    assert "--max_epoks" in capsys.readouterr().err


def test_s88_help_lists_the_arguments_in_a_group_of_their_own(capsys):
    with pytest.raises(SystemExit):
        parsed("--help")
    shown = capsys.readouterr().out
    assert "flashtask.Trainer:" in shown
    assert "--max_epochs" in shown
    assert "--gpus" not in shown
