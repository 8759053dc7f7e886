"""Every example runs, and README and docs speak of what is there."""

from __future__ import annotations

import ast
import re
import runpy
from pathlib import Path

import pytest
from small import colour_folders

import flashtask

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_the_three_lines_write_a_checkpoint(tmp_path, monkeypatch):
    colour_folders(tmp_path / "data" / "train")
    colour_folders(tmp_path / "data" / "val", each=3)
    monkeypatch.chdir(tmp_path)
    example = runpy.run_path(str(ROOT / "examples" / "three_lines.py"))
    example["main"](str(tmp_path / "data"), "timm/test_resnet", epochs=1, pretrained=False)
    assert flashtask.load("classifier.ckpt").labels == ("blue", "red")


@pytest.mark.long
def test_a_task_of_ones_own_learns(tmp_path):
    example = runpy.run_path(str(ROOT / "examples" / "own_task.py"))
    assert example["main"](tmp_path) < 0.15


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_in_the_pages_parses_and_imports_public_names(page):
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    for block in blocks:
        compile(block, str(page), "exec")
        for line in re.findall(r"^from flashtask import (.+)$", block, re.MULTILINE):
            assert set(line.replace(" ", "").split(",")) <= set(flashtask.__all__), line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_fit_in_the_pages_says_how_long_it_trains(page):
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        calls = [node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)]
        fits = any(isinstance(call.func, ast.Attribute) and call.func.attr == "fit" for call in calls)
        for call in calls if fits else ():
            if ast.unparse(call.func).endswith("Trainer"):
                given = {keyword.arg for keyword in call.keywords}
                assert given & {"max_epochs", "max_steps", "max_time", "fast_dev_run"}, ast.unparse(call)


def test_what_the_readme_trains_or_plans_needs_no_hub():
    lines = re.findall(r"^flashtask (?:finetune|plan|tune) .*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(lines) >= 3
    for line in lines:
        assert "--backbone efficientnet_lite0" in line or "recipe.yaml" in line, line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_in_the_pages_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_logger_of_ones_own_is_sent_values_of_steps_and_epochs(tmp_path):
    example = runpy.run_path(str(ROOT / "examples" / "own_logger.py"))
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    sent = example["main"](output_dir=tmp_path / "run", **quiet)
    assert [step for name, _, step in sent if name == "train_loss_step"] == [4, 8, 12, 16, 20, 24]
    losses = [value for name, value, _ in sent if name == "train_loss_epoch"]
    assert losses == sorted(losses, reverse=True)
    assert ("hyper_parameters/learning_rate", 0.1, 0) in sent


@pytest.mark.long
def test_the_notebook_runs_and_shows_what_it_stores(tmp_path):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    stored = nbformat.read(ROOT / "examples" / "finished_run.ipynb", as_version=4)
    made = nbformat.read(ROOT / "examples" / "finished_run.ipynb", as_version=4)
    nbclient.NotebookClient(
        made, timeout=240, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()
    for cell, again in zip(stored.cells, made.cells, strict=True):
        kinds = [sorted(one["data"]) for one in cell.get("outputs", ()) if "data" in one]
        assert [sorted(one["data"]) for one in again.get("outputs", ()) if "data" in one] == kinds
    shown = [one for cell in made.cells for one in cell.get("outputs", ()) if "data" in one]
    assert any("image/png" in one["data"] for one in shown)
    assert sum("<table>" in one["data"].get("text/html", "") for one in shown) == 3
