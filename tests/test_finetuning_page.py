"""Every piece of code and YAML in docs/finetuning.md does what the page says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml
from test_tasks import small_data

from flashtask import FINETUNING, ImageClassifier, Module, Trainer
from flashtask.trainer.finetuning.lora import adapted_layers
from flashtask.trainer.finetuning.strategies import resolve_finetuning

PAGE = (Path(__file__).parent.parent / "docs" / "finetuning.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def names(tmp_path):
    """What the pieces speak of."""
    trainer = Trainer(output_dir=tmp_path / "run", max_epochs=2, enable_progress_bar=False)
    model = ImageClassifier("timm/test_vit", pretrained=False)
    return {"trainer": trainer, "model": model, "data": small_data(tmp_path), "torch": torch}


def test_the_table_of_defaults_is_that_of_the_classes():
    rows = re.findall(r"\| (a task|a plain).* \| `(\w+)` \| (\d+) \|", PAGE)
    found = {kind: (strategy, int(epochs)) for kind, strategy, epochs in rows}
    assert found == {
        "a task": (ImageClassifier.default_strategy, ImageClassifier.default_max_epochs),
        "a plain": (Module.default_strategy, Module.default_max_epochs),
    }


def test_the_first_line_trains(names):
    exec(BLOCKS[0], names)
    assert names["trainer"].fit_run.history[0]["trainable_parameters"] == 130


def test_phases_in_yaml_and_in_python_are_the_same(names):
    exec(BLOCKS[1], names)
    (written,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    said = yaml.safe_load(written)["finetune"]["strategy"]
    assert resolve_finetuning(said).phases == resolve_finetuning(names["strategy"]).phases


def test_an_optimizer_of_ones_own_takes_the_groups(tmp_path):
    from small import Net, loaders

    names = {"torch": torch}
    exec(BLOCKS[2], names)
    kind = type("Own", (Net,), {"configure_optimizers": names["configure_optimizers"]})
    assert issubclass(kind, Module)
    trainer = Trainer(output_dir=tmp_path, max_epochs=1, enable_progress_bar=False)
    trainer.finetune(kind(), *loaders(), strategy="layer_decay:0.5")
    rates = {group["name"]: group["lr"] for group in trainer.optimizers[0].param_groups}
    assert rates == {"head": 1e-3, "backbone_layer1": 1e-4, "backbone_layer2": 5e-5, "backbone_layer3": 2.5e-5}


@pytest.mark.long
def test_lora_and_merging(names):
    exec(BLOCKS[1] + BLOCKS[3], names)
    assert not adapted_layers(names["model"])
    assert names["trainer"].fit_run.finetuning.lora.targets == ("qkv", "proj")


@pytest.mark.long
def test_the_plan(names, capsys):
    exec(BLOCKS[4], names)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["head", "all"]


def test_a_strategy_of_ones_own(names):
    try:
        exec(BLOCKS[5], names)
        assert resolve_finetuning("last_layers:3").phases[0].train.layers == 3
    finally:
        FINETUNING.remove("last_layers")


def test_every_named_strategy_is_on_the_page():
    for name in FINETUNING.names():
        assert f"`{name}" in PAGE
    for column in re.findall(r"^\| `\S.*?\| `(\S+)` \|", PAGE, re.MULTILINE):
        assert resolve_finetuning(column).name == column


def test_there_is_no_piece_that_is_not_tried():
    assert len(BLOCKS) == 6
