"""A zoo file of the user's: merged over the shipped one, never by accident, and asked for where it is needed."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from hub_server import HubServer, use
from huggingface_hub import constants
from small import colour_folders

from flashtask import BACKBONES, HEADS, TASKS, ImageClassifier, build_backbone, build_head, load, use_zoo
from flashtask.cli import run
from flashtask.cli.input_paths import checkpoint_source
from flashtask.core import zoo as core_zoo
from flashtask.core.errors import HubError, IntegrityError, MissingInputError, UsageError

MINE = """
backbones:
  mine:
    description: a small one
    source: timm/test_resnet
    options: {drop_rate: 0.25}
    preprocessing: {input_size: [3, 64, 64], interpolation: nearest}
heads:
  wide:
    description: one large hidden layer
    source: mlp
    options: {hidden_sizes: [48]}
recipes:
  short:
    recipe:
      data: {from_folders: {train_folder: photos, batch_size: 4, num_workers: 0}}
      model: {backbone: mine, head: wide, pretrained: false}
      trainer: {max_epochs: 1, enable_progress_bar: false}
      finetune: {strategy: no_freeze}
"""
OVERRIDE = "backbones: {resnet18: {override: true, source: timm/test_vit}}\n"


@pytest.fixture(autouse=True)
def forget(monkeypatch):
    """Each test begins without zoo files of the user's."""
    monkeypatch.setattr(core_zoo, "_used", [])
    monkeypatch.delenv("FLASHTASK_ZOO", raising=False)


@pytest.fixture
def write(tmp_path):
    """A function that writes a zoo file with a text and gives its path."""

    def write_file(text: str, name: str = "zoo.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return write_file


def test_what_a_file_adds_is_listed_built_and_has_its_own_options_and_preprocessing(write):
    use_zoo(write(MINE))
    assert "mine" in BACKBONES.names()
    assert "wide" in HEADS.names()
    backbone = build_backbone("mine", pretrained=False)
    assert backbone.name == "mine"
    assert backbone.module.drop_rate == 0.25
    assert backbone.preprocessing.input_size == (3, 64, 64)
    assert backbone.preprocessing.interpolation == "nearest"
    head = build_head("wide", 8, 3)
    assert sorted(tuple(p.shape) for p in head.parameters() if p.ndim == 2) == [(3, 48), (48, 8)]
    assert (16, 8) in {tuple(p.shape) for p in build_head("wide", 8, 3, hidden_sizes=[16]).parameters()}
    with pytest.raises(UsageError, match="hidden_size"):
        build_head("wide", 8, 3, hidden_size=3)
    entry = BACKBONES.entry("mine")
    assert entry.metadata["credit"].startswith("PyTorch Image Models")
    assert entry.metadata["zoo_file"].endswith("zoo.yaml")
    assert entry.known()["input_size"] == [3, 64, 64]
    assert [found.name for found in BACKBONES.search("mine", source="zoo", input_size=64)] == ["mine"]


def test_a_file_in_the_working_folder_is_not_read(write, monkeypatch):
    monkeypatch.chdir(write(MINE).parent)
    assert "mine" not in BACKBONES
    assert run(["zoo", "show", "mine"]) == 2


def test_the_same_file_twice_is_merged_once(write, monkeypatch):
    path = write(MINE)
    monkeypatch.chdir(path.parent)
    monkeypatch.setenv("FLASHTASK_ZOO", str(path))
    use_zoo("zoo.yaml")
    use_zoo(str(path))
    assert len(core_zoo.own_zoo_files()) == 1


def test_files_of_the_environment_come_first_and_later_files_need_to_say_that_they_replace(write, monkeypatch, capsys):
    team = write(MINE, "team.yaml")
    other = write("heads: {tall: {description: x, source: mlp}}", "other.yaml")
    monkeypatch.setenv("FLASHTASK_ZOO", f"{team}{os.pathsep}{other}")
    assert {"wide", "tall"} <= set(HEADS.names())
    own = "backbones: {mine: {source: timm/test_vit}}"
    with pytest.raises(UsageError, match=r"own.yaml, line 1, column 13: backbones.mine: there is an entry") as caught:
        use_zoo(write(own, "own.yaml"))
    assert "override: true" in caught.value.fix
    assert BACKBONES.entry("mine").metadata["source"] == "timm/test_resnet", "a refused file changes nothing"
    own = "backbones: {mine: {override: true, source: timm/test_vit}}"
    path = write(own, "again.yaml")
    use_zoo(path)
    assert BACKBONES.entry("mine").metadata["source"] == "timm/test_vit"
    assert f"note: backbones.mine is replaced by {path}\n" in capsys.readouterr().err


def test_a_library_name_is_replaced_only_where_it_is_said_and_that_is_printed(write, capsys):
    with pytest.raises(UsageError, match=r"line 1, column 13: backbones.resnet18: there is a model timm/resnet18"):
        use_zoo(write("backbones: {resnet18: {source: timm/test_vit}}", "first.yaml"))
    path = write(OVERRIDE)
    use_zoo(path)
    assert build_backbone("resnet18", pretrained=False).num_features == 64
    assert build_backbone("timm/resnet18", pretrained=False).num_features == 512
    assert f"note: the backbone 'resnet18' is that of {path}" in capsys.readouterr().err


def test_a_file_that_was_refused_is_not_in_use_and_is_read_anew_when_it_is_right(write):
    with pytest.raises(UsageError):
        use_zoo(write("backbones: {b: {source: timm/nothing}}"))
    assert "b" not in BACKBONES
    use_zoo(write("backbones: {b: {source: timm/test_vit}}"))
    assert BACKBONES.entry("b").metadata["source"] == "timm/test_vit"
    use_zoo(write("backbones: {b: {source: timm/test_resnet}}"))
    assert BACKBONES.entry("b").metadata["source"] == "timm/test_resnet"


def test_a_head_that_is_replaced_after_it_was_used_is_the_new_one(write):
    assert build_head("mlp", 8, 3).state_dict()
    use_zoo(write("heads: {mlp: {override: true, description: x, source: mlp, options: {hidden_sizes: [5]}}}"))
    assert (5, 8) in {tuple(p.shape) for p in build_head("mlp", 8, 3).parameters()}


@pytest.mark.parametrize(
    ("text", "message", "fix"),
    [
        (
            "backbones:\n  b:\n    source: timm/test_resnte\n",
            "line 3, column 5: backbones.b.source: there is no model 'timm/test_resnte'",
            "did you mean 'timm/test_resnet'",
        ),
        ("backbones: {b: {source: 'hf-hub:org/net@main'}}", "backbones.b.source: string should match", "a commit"),
        ("backbones: {b: {source: tim/resnet18}}", "there is no model 'tim/resnet18'", "'timm/resnet18'"),
        (
            "backbones: {b: {source: torchvision/resnet18, weights: {package: p, file: f}}}",
            "backbones.b.weights: weights from a package are for a model of timm",
            "",
        ),
        (
            "backbones: {resnet: {override: true, source: timm/resnet18}}",
            "backbones.resnet: there is nothing of this name to replace",
            "leave `override: true` out",
        ),
        ("heads: {h: {description: x}}", "heads.h.source is missing", "linear, mlp"),
        ("heads:\n  h:\n    description: x\n    source: mpl\n", "line 4, column 5: heads.h.source", "'mlp'"),
        (
            "heads: {mpl: {override: true, description: x, source: mlp}}",
            "heads.mpl: there is nothing of this name to replace",
            "did you mean 'mlp'?",
        ),
        ("tasks: {captioning: {description: x}}", "flashtask has no task named 'captioning'", "choose one of"),
        (
            "tasks:\n  image_classification:\n    override: true\n    description: x\n    defaults: {head: lineer}",
            "line 5, column 16: tasks.image_classification.defaults.head: no head named 'lineer'",
            "'linear'",
        ),
        ("providers: {keras: {credit: x, url: y, licence: z}}", "flashtask builds models of timm and torchvision", ""),
        (
            "recipes:\n  r:\n    recipe:\n      model: {head: lineer}\n",
            "line 4, column 15: recipes.r.recipe.model.head: no head named 'lineer'",
            "'linear'",
        ),
        ("recipes: {r: {recipe: {task: image_clasification}}}", "no task named", "'image_classification'"),
        (
            "checkpoints: {c: {task: t, repository: a/b, revision: " + "0a" * 20 + "}}",
            "checkpoints.c.task: no task named 't'",
            "",
        ),
    ],
)
def test_a_name_that_means_nothing_is_said_with_its_place(text, message, fix, write):
    path = write(text)
    with pytest.raises(UsageError) as caught:
        use_zoo(path)
    assert caught.value.what.startswith(f"{path}, line ")
    assert message in caught.value.what
    assert fix in caught.value.fix


def test_a_file_that_is_not_there_is_said_with_who_named_it(tmp_path, monkeypatch, capsys):
    missing = tmp_path / "none.yaml"
    with pytest.raises(MissingInputError, match=r"none\.yaml"):
        use_zoo(missing)
    assert run(["zoo", "--zoo", str(missing)]) == 66
    assert "--zoo: no file" in capsys.readouterr().err
    monkeypatch.setenv("FLASHTASK_ZOO", str(missing))
    with pytest.raises(MissingInputError) as caught:
        BACKBONES.names()
    assert "FLASHTASK_ZOO" in caught.value.why
    assert run(["zoo"]) == 66
    assert run(["--help"]) == 0


@pytest.mark.long
def test_a_repository_that_the_zoo_names_is_fetched_built_and_then_here(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = timm.create_model("test_vit", img_size=96, num_classes=7).eval()
    timm.models.save_for_hf(model, tmp_path / "folder", safe_serialization=True)
    with HubServer() as hub:
        use(monkeypatch, hub, tmp_path)
        files = {path.name: path.read_bytes() for path in (tmp_path / "folder").iterdir()}
        commit = hub.add("org/vit", files)
        text = f"backbones: {{ours: {{source: 'hf-hub:org/vit@{commit}', preprocessing: {{crop_pct: 1.0}}}}}}"
        (tmp_path / "mine.yaml").write_text(text)
        use_zoo(tmp_path / "mine.yaml")
        assert BACKBONES.search("ours", cached=False)
        backbone = build_backbone("ours")
    images = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        expected = model.forward_head(model.forward_features(images), pre_logits=True)
        assert torch.allclose(backbone.module.eval()(images), expected, atol=1e-6)
    assert (backbone.name, backbone.preprocessing.crop_pct) == ("ours", 1.0)
    assert BACKBONES.search("ours", cached=True)
    assert build_backbone("ours").num_features == backbone.num_features, "the server is gone"


def test_a_backbone_may_be_a_repository_of_the_hub_at_one_commit(write, tmp_path, monkeypatch):
    commit = "0123456789" * 4
    use_zoo(write(f"backbones: {{ours: {{source: 'hf-hub:org/net@{commit}', licence: mit}}}}"))
    entry = BACKBONES.entry("ours")
    assert entry.metadata["credit"] == "who made hf-hub:org/net"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert entry.known()["repository"] == "org/net"
    assert BACKBONES.search("ours", cached=True) == []
    with pytest.raises(HubError, match="org/net"):
        build_backbone("ours")
    snapshot = tmp_path / "models--org--net" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").write_bytes(b"")
    assert [found.name for found in BACKBONES.search("ours", cached=True, licence="mit")] == ["ours"]


def test_a_checkpoint_of_the_zoo_is_asked_for_by_its_name(write):
    commit = "0123456789" * 4
    use_zoo(write(f"checkpoints: {{cells: {{task: image_classification, repository: org/cells, revision: {commit}}}}}"))
    assert checkpoint_source("cells") == f"hf://org/cells@{commit}"
    with pytest.raises(MissingInputError):
        checkpoint_source("cels")


def test_listing_with_a_zoo_file_loads_no_library(write):
    code = (
        "import sys; from flashtask.cli import run; code = run(['zoo', '--zoo', sys.argv[1], 'mine']);"
        "print(code, {'torch', 'timm', 'torchvision'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(write(MINE))], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 set()"
    assert done.stdout.splitlines()[0].split()[:2] == ["mine", "backbone"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run folder of the recipe `short` of a zoo file beside its photos, and the zoo file."""
    root = tmp_path_factory.mktemp("own")
    colour_folders(root / "photos", each=4)
    (root / "zoo.yaml").write_text(MINE)
    core_zoo._used.clear()
    arguments = ["finetune", "--zoo", str(root / "zoo.yaml"), "--recipe", "short", "--output-dir", str(root / "run")]
    assert run(arguments) == 0
    core_zoo._used.clear()
    return root


def test_a_run_writes_down_which_zoo_file_it_used(trained):
    recipe = yaml.safe_load((trained / "run" / "recipe.yaml").read_text())
    assert recipe["zoo"] == [str(trained / "zoo.yaml")]
    assert recipe["model"]["backbone"] == "mine"
    assert recipe["data"]["from_folders"]["train_folder"] == str(trained / "photos"), "counted from the zoo file"


@pytest.mark.long
def test_the_recipe_of_a_run_repeats_it_and_its_zoo_file_may_be_named_anew(trained, tmp_path):
    recipe = trained / "run" / "recipe.yaml"
    assert run(["finetune", str(recipe), "--output-dir", str(tmp_path / "again")]) == 0
    first, second = ((folder / "metrics.csv").read_text() for folder in (trained / "run", tmp_path / "again"))
    assert [line.split(",")[:2] for line in first.splitlines()] == [line.split(",")[:2] for line in second.splitlines()]
    core_zoo._used.clear()
    moved = tmp_path / "moved.yaml"
    moved.write_text(MINE)
    arguments = [str(recipe), "--zoo", str(moved), "--output-dir", str(tmp_path / "third")]
    assert run(["finetune", *arguments]) == 0
    assert yaml.safe_load((tmp_path / "third" / "recipe.yaml").read_text())["zoo"] == [str(moved)]
    assert run(["finetune", "--resume", "--epochs", "2", "--output-dir", str(tmp_path / "third")]) == 0


def test_a_recipe_names_its_zoo_file_from_where_it_stands(trained, tmp_path, capsys):
    recipe = trained / "by_hand.yaml"
    recipe.write_text("zoo: zoo.yaml\nmodel: {backbone: mine}\n")
    assert run(["finetune", str(trained / "photos"), "--config", str(recipe), "--head", "wied"]) == 2
    assert "did you mean 'wide'" in capsys.readouterr().err
    core_zoo._used.clear()
    recipe.write_text("zoo: zo.yaml\nmodel: {backbone: mine}\n")
    assert run(["finetune", str(trained / "photos"), "--config", str(recipe)]) == 66
    error = capsys.readouterr().err
    assert f"{recipe}, line 1, column 1: no file {trained / 'zo.yaml'}" in error
    assert "zoo.yaml" in error
    recipe.write_text("zoo: {a: b}\n")
    assert run(["finetune", str(trained / "photos"), "--config", str(recipe)]) == 2
    assert "`zoo` must be a zoo file, or a list of them" in capsys.readouterr().err


@pytest.mark.long
def test_a_checkpoint_says_which_zoo_file_it_needs(trained, capsys):
    checkpoint, zoo = trained / "run" / "best.ckpt", trained / "zoo.yaml"
    image = next((trained / "photos" / "red").iterdir())
    assert run(["predict", str(checkpoint), str(image)]) == 66
    error = capsys.readouterr().err
    assert "needs the backbone 'mine' from a zoo file that is not loaded" in error
    assert f"--zoo {zoo}" in error
    with pytest.raises(MissingInputError) as caught:
        load(checkpoint)
    assert f"flashtask.use_zoo({str(zoo)!r})" in caught.value.fix
    assert run(["predict", "--zoo", str(zoo), str(checkpoint), str(image)]) == 0
    capsys.readouterr()
    for stage in ("validate", "test"):
        core_zoo._used.clear()
        assert run([stage, str(checkpoint), str(trained / "photos"), "--zoo", str(zoo), "--json", "--quiet"]) == 0
        assert json.loads(capsys.readouterr().out)
    assert load(checkpoint).preprocessing.input_size == (3, 64, 64)
    core_zoo._used.clear()
    given = ImageClassifier.load_from_checkpoint(
        checkpoint, backbone="timm/test_resnet", head="mlp", head_options={"hidden_sizes": [48]}
    )
    assert given.labels == ("blue", "red")


def test_a_name_that_is_also_a_librarys_is_not_taken_for_it(write, tmp_path):
    use_zoo(write(OVERRIDE))
    content = ImageClassifier("resnet18", num_classes=2, pretrained=False).describe()
    assert content["own_zoo"] == {"backbone": {"name": "resnet18", "file": str(tmp_path / "zoo.yaml")}}
    core_zoo._used.clear()
    with pytest.raises(MissingInputError, match="needs the backbone 'resnet18' from a zoo file"):
        ImageClassifier.check_content(content, {}, "some.ckpt")
    assert "own_zoo" not in ImageClassifier("resnet18", num_classes=2, pretrained=False).describe()


@pytest.mark.parametrize("stored", ["x", ["backbone"], {"backbone": "x"}, {"head": {"name": 3, "file": "f"}}])
def test_what_a_damaged_checkpoint_says_of_zoo_files_is_refused(stored):
    with pytest.raises(IntegrityError, match=r"bad\.ckpt: its record of"):
        ImageClassifier.check_content({"own_zoo": stored}, {}, "bad.ckpt")


def test_the_command_that_an_error_shows_is_safe_to_copy():
    stored = {"head": {"name": "wide", "file": "zoo.yaml; rm -rf ~"}}
    with pytest.raises(MissingInputError) as caught:
        ImageClassifier.check_content({"own_zoo": stored}, {}, "bad.ckpt")
    assert "--zoo 'zoo.yaml; rm -rf ~'," in caught.value.fix


def test_defaults_of_a_task_hold_where_nothing_is_said(write, tmp_path):
    colour_folders(tmp_path / "photos", each=4)
    text = MINE + (
        "tasks:\n  image_classification:\n    override: true\n    description: x\n"
        "    defaults: {backbone: mine, pretrained: false}\n"
    )
    options = ["--batch-size", "4", "--num-workers", "0", "--epochs", "1", "--quiet", "--output-dir"]
    assert run(["finetune", str(tmp_path / "photos"), "--zoo", str(write(text)), *options, str(tmp_path / "r")]) == 0
    model = yaml.safe_load((tmp_path / "r" / "recipe.yaml").read_text())["model"]
    assert (model["backbone"], model["pretrained"]) == ("mine", False)
    assert TASKS.entry("image_classification").metadata["zoo_file"] == str(tmp_path / "zoo.yaml")


def test_tune_takes_a_zoo_file(trained, capsys):
    options = ["--zoo", str(trained / "zoo.yaml"), "--backbone", "mine", "--no-pretrained", "--lr", "0.01"]
    assert run(["tune", str(trained / "photos"), *options, "--num-workers", "0", "--quiet", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["batch_size"] >= 1


def test_check_says_that_a_file_is_right_with_its_counts(write, capsys):
    path = write(MINE)
    assert run(["zoo", "check", str(path)]) == 0
    assert capsys.readouterr().out == f"{path} is valid: 1 backbone, 1 head, 1 recipe\n"


@pytest.mark.parametrize(
    ("text", "message", "fix"),
    [
        ("backbones: {b: {source: timm/resnet18.a1_in2k}}", "backbones.b.source: no weights", "'a1_in1k'"),
        (
            "heads: {h: {description: x, source: mlp, options: {hiden_sizes: [3]}}}",
            "heads.h.options.hiden_sizes: no option",
            "'hidden_sizes'",
        ),
        (
            "tasks: {image_classification: {override: true, description: x, defaults: {backbon: resnet18}}}",
            "tasks.image_classification.defaults.backbon: the task has no argument 'backbon'",
            "backbone",
        ),
        ("recipes:\n  r:\n    recipe: {modle: {}}\n", "line 3, column 14: there is no key 'modle'", "'model'"),
        (
            "recipes:\n  r:\n    recipe:\n      model: {bacbone: resnet18}\n",
            "line 4, column 15: there is no key 'bacbone' in `model`",
            "'backbone'",
        ),
        ("recipes:\n  r:\n    recipe: {trainer: {max_epochs: many}}\n", "line 3, column 24: trainer.max_epochs", ""),
        (
            "recipes:\n  r:\n    recipe: {finetune: {strategi: freeze}}\n",
            "line 3, column 25: there is no key",
            "'strategy'",
        ),
        ("recipes:\n  r:\n    recipe: {finetune: {strategy: freez}}\n", "line 3, column 25: no finetuning", "'freeze'"),
        ("recipes:\n  r:\n    recipe: {data: {from_foldrs: {}}}\n", "there is no key 'from_foldrs'", "'from_folders'"),
    ],
)
def test_check_finds_what_only_the_code_itself_knows(text, message, fix, write, capsys):
    path = write(text)
    assert run(["zoo", "check", str(path)]) == 2
    error = capsys.readouterr().err
    assert f"{path}, line " in error
    assert message in error
    assert fix in error


def test_weights_of_a_checkpoint_survive_the_way_through_the_zoo(trained):
    use_zoo(trained / "zoo.yaml")
    task = load(trained / "run" / "best.ckpt")
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert task(images).shape == (2, 2)


# To know which are small, every model that the pattern finds is built.
@pytest.mark.long
@pytest.mark.parametrize("pattern", ["resnet18.*", pytest.param("resnet.*", marks=pytest.mark.long)])
def test_the_page_about_the_zoo_is_true(tmp_path, monkeypatch, capsys, pattern):
    page = (Path(__file__).parent.parent / "docs" / "zoo.md").read_text().replace("resnet.*", pattern)
    (mine,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    (commands,) = re.findall(r"```\n(flashtask zoo.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    Path("my_zoo.yaml").write_text(mine)
    for command in commands.splitlines():
        assert run(shlex.split(command, comments=True)[1:]) == 0, command
    assert "my_zoo.yaml is valid: 2 backbones, 1 head, 1 task, 1 recipe\n" in capsys.readouterr().out
    core_zoo._used.clear()
    for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(code, "zoo.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert "timm/resnet18" in printed[0]
    assert "efficientnet_lite0" in printed[1]
    assert BACKBONES.entry("scanner").metadata["licence"] == "mit"
