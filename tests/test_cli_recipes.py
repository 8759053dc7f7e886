"""The table of options, the recipe it makes, and the page that documents both."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest

from flashtask.cli import bench
from flashtask.cli import run as command_line
from flashtask.cli.chaos import command as chaos
from flashtask.cli.commands import flashtask
from flashtask.cli.kinds import AUTO
from flashtask.cli.options import CONSTRUCTOR, EVALUATE, EVERYWHERE, FINETUNE, GROUPS, OF_TABLES, TABLES, Option
from flashtask.cli.recipe import Recipe, read_recipe
from flashtask.cli.request import fill_in, requested_recipe
from flashtask.cli.resume import FREE_KEYS
from flashtask.cli.switches import SWITCHES
from flashtask.core import errors
from flashtask.core.errors import FlashtaskError, MissingInputError, UsageError
from flashtask.core.preprocessing import Preprocessing
from flashtask.core.worker_threads import _FEW, THREAD_BATCH
from flashtask.data import loaders
from flashtask.data.image_classification import ImageClassificationData
from flashtask.data.layout import DEFAULT_VAL_SPLIT
from flashtask.data.samplers import SAMPLERS
from flashtask.data.transforms import FLIPS
from flashtask.tasks import TASKS, prediction
from flashtask.tasks.head_drawing import building_without_weights
from flashtask.tasks.image_classification import ImageClassifier
from flashtask.tasks.repeats import repeat_runs
from flashtask.tasks.task import Task
from flashtask.trainer.optimizers import weight_decay_of
from flashtask.trainer.trainer import Trainer

PAGE = (Path(__file__).parent.parent / "docs" / "command-line.md").read_text()


def asked(data: str | None, *argv: str) -> Recipe:
    """The recipe that `flashtask finetune DATA ...` asks for."""
    command = flashtask.commands["finetune"]
    with command.make_context("finetune", [*([data] if data else []), *argv]) as context:
        params: dict[str, Any] = dict(context.params)
    return requested_recipe(params.pop("data"), params)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / "data" / part / name).mkdir(parents=True)
    return tmp_path


def test_null_says_nothing(folders):
    Path("r.yaml").write_text("trainer: {max_steps: null, max_epochs: ~, seed: }\nmodel: {learning_rate: null}\n")
    recipe = asked("data", "--config", "r.yaml")
    fill_in(recipe)
    assert recipe.get("trainer") == {}
    assert recipe.get("model") == {}
    assert asked("data", "--set", "trainer.max_steps=null").get("trainer") == {}


def test_null_in_a_recipe_that_was_not_checked_does_not_crash():
    recipe = Recipe({"trainer": {"max_steps": None}})
    fill_in(recipe)
    assert recipe.get("task") == "image_classification"


def documented(option: Option) -> str:
    key = f"{option.key}: {str(option.value).lower()}" if option.key and option.kind is None else option.key
    flag = f"{option.flag} {option.metavar}".strip()
    return f"| `{flag}` | {f'`{key}`' if key else ''} | {option.help} | {option.default} |"


def part_of_the_page(command: str) -> str:
    """The text below the heading of a command, up to the next one."""
    (part,) = [text for text in PAGE.split("\n## ") if re.search(rf"\bflashtask {command}\b", text.split("\n")[0])]
    return part


def rows_of(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("| `--")]


def flags_after(words: str, text: str) -> list[str]:
    """The options that a sentence of the page lists behind these words."""
    (sentence,) = re.findall(rf"{words}:? ((?:[^.\n]|\n(?!\n))*)", text)
    return re.findall(r"`(--[\w-]+)`", sentence)


def test_the_page_has_a_row_for_every_option_of_finetune_under_the_heading_of_its_group():
    page = part_of_the_page("finetune")
    for group in {option.group for option in FINETUNE}:
        below = page.split(f"\n### {group}\n")[1].split("\n### ")[0]
        assert rows_of(below) == [documented(option) for option in FINETUNE if option.group == group]


@pytest.mark.parametrize("name", [name for name in TABLES if name != "finetune"])
def test_the_page_has_every_option_of_the_other_commands_as_a_row_or_as_one_of_finetune(name):
    page, options = part_of_the_page(name), TABLES[name]
    assert rows_of(page) == [documented(option) for option in options if option not in FINETUNE]
    shared = [option.flag for option in options if option in FINETUNE]
    if name in ("tune", "plan"):
        flags = [option.flag for option in options]
        assert flags_after("those of `finetune` except", page) == [o.flag for o in FINETUNE if o.flag not in flags]
    elif shared:
        assert flags_after("As for `finetune`", page) == shared


def test_the_page_has_the_option_of_every_command_before_the_first_of_them():
    assert rows_of(PAGE.split("\n## ")[0]) == [documented(option) for option in EVERYWHERE]


def signature_defaults() -> dict[str, Any]:
    """Recipe key -> the default of the argument that it goes to."""
    takers = {
        f"data.{CONSTRUCTOR}": [ImageClassificationData.from_folders],
        "model": [Task.__init__, ImageClassifier.__init__],
        "trainer": [Trainer.__init__],
    }
    return {
        f"{section}.{name}": parameter.default
        for section, functions in takers.items()
        for function in functions
        for name, parameter in inspect.signature(function).parameters.items()
    }


def test_the_defaults_in_the_help_are_those_of_the_code():
    own = signature_defaults()
    decay, augment = weight_decay_of(own["model.optimizer"], {}), own[f"data.{CONSTRUCTOR}.augment"]
    words = {
        "trainer.max_epochs": f"{ImageClassifier.default_max_epochs}; no limit with --max-steps",
        "finetune.strategy": ImageClassifier.default_strategy,
        "task": "what the data is for",
        "trainer.precision": ImageClassifier.default_precision,
        "trainer.seed": "0",
        "trainer.devices": f"{own['trainer.devices']}: 1",
        "trainer.output_dir": "the next free runs/NNN",
        "model.weight_decay": f"the optimizer's own: {decay:g} for {own['model.optimizer']}",
        "model.backbone_learning_rate": "a tenth of --lr; with --no-pretrained, --lr",
        f"data.{CONSTRUCTOR}.val_split": f"{DEFAULT_VAL_SPLIT:g} if DATA has no validation images",
        f"data.{CONSTRUCTOR}.fold": "none; see --val-split",
        f"data.{CONSTRUCTOR}.group_pattern": "none",
        f"data.{CONSTRUCTOR}.augment": f"{augment}: none while the backbone is frozen, then light",
        f"data.{CONSTRUCTOR}.num_workers": f"0 on a CPU, else up to {loaders._MOST}",
        f"data.{CONSTRUCTOR}.value_range": "the range found in training",
        "zoo": "$FLASHTASK_ZOO",
        **dict.fromkeys(("model.image_size", "model.resize", "model.drop_path_rate"), "the backbone's own"),
        f"data.{CONSTRUCTOR}.flip": "horizontal",
        f"data.{CONSTRUCTOR}.random_erasing": "that of --augment",
        f"data.{CONSTRUCTOR}.sampler": "each image once an epoch",
        "model.loss_fn": "that of the task: cross_entropy, bce or huber",
        "model.class_weights": "all equal",
        "model.metrics": "those of the task",
        "model.monitor": "that of the task: val_accuracy, val_map or val_mae",
        "trainer.gradient_clip_val": "no limit",
        "trainer.ema_decay": "no average",
        "finetune.budget": "none",
        **dict.fromkeys(("licences.weights", "licences.data"), "none"),
        "model.tile_overlap": f"{Preprocessing().tile_overlap:g}",
        f"data.{OF_TABLES}.input_field": "the only one with image paths",
        f"data.{OF_TABLES}.target_fields": "the only other column",
        f"data.{OF_TABLES}.label_separator": "none: a cell holds one label",
        f"data.{OF_TABLES}.images_root": "that of the table",
        f"data.{OF_TABLES}.split_field": "none; see --val-split",
        f"data.{OF_TABLES}.group_field": "none",
        f"data.{OF_TABLES}.weight_field": "none: all count alike",
        f"data.{CONSTRUCTOR}.load_image": "none: image files",
        "repeats": "once",
        "folds": "none; see --val-split",
        "vary": inspect.signature(repeat_runs).parameters["vary"].default,
    }
    # test_one_number.py sees that the first is true.
    of_results = {
        "trainer.precision": "32, or the one that was set for the run",
        f"data.{OF_TABLES}.split_field": "none: all rows count",
    }
    for option, its_words in [*((one, words) for one in FINETUNE), *((one, words | of_results) for one in EVALUATE)]:
        if option.key and option.kind is not None and option.key != "model.from":
            value = own.get(option.key)
            written = f"{value:g}" if isinstance(value, float) else str(value)
            assert option.default == its_words.get(option.key, written), option.flag


def test_every_switch_is_an_argument_in_python_and_none_of_its_defaults_changes_a_run():
    own = signature_defaults()
    for switch in SWITCHES:
        name = switch.key.rpartition(".")[2]
        assert switch.key in own, switch.flag
        if switch.flag != "--loss":
            assert switch.flag == f"--{name.replace('_', '-')}"
        assert all(switch in table for table in (FINETUNE, TABLES["tune"], TABLES["plan"]))
    kinds = {switch.key.rpartition(".")[2]: switch.kind for switch in SWITCHES}
    for name, words in (("flip", FLIPS), ("sampler", SAMPLERS)):
        assert [kinds[name](word) for word in words] == list(words)


def test_the_page_of_training_options_has_a_row_for_every_switch():
    page = (Path(__file__).parent.parent / "docs" / "training-options.md").read_text()
    places = {
        "model": "`ImageClassifier(...)`",
        "data": "`from_folders(...)`, `from_csv(...)`",
        "trainer": "`Trainer(...)`",
    }
    rows = [
        f"| `{switch.key.rpartition('.')[2]}` of {places[switch.key.partition('.')[0]]} | `{switch.key}` "
        f"| `{switch.flag} {switch.metavar}` | {switch.default} | {switch.help} |"
        for switch in SWITCHES
    ]
    assert [line for line in page.splitlines() if line.startswith("| `") and "of `" in line and "| `--" in line] == rows


def test_values_of_switches_become_what_python_takes(folders):
    recipe = asked(
        *("data", "--image-size", "160x224", "--loss", "focal:gamma=3", "--metrics", "f1_macro,mcc"),
        *("--class-weights", "cat=1,dog=2.5", "--flip", "none", "--random-erasing", "0.5"),
    )
    assert recipe.get("model") == {
        "image_size": (160, 224),
        "loss_fn": {"focal": {"gamma": 3.0}},
        "metrics": ["f1_macro", "mcc"],
        "class_weights": {"cat": 1.0, "dog": 2.5},
    }
    assert recipe.get("data.from_folders.flip") == "none"
    assert asked("data", "--class-weights", "effective_number:beta=0.99").get("model.class_weights") == {
        "effective_number": {"beta": 0.99}
    }
    Path("r.yaml").write_text("model: {loss_fn: 'asymmetric:clip=0', image_size: 64}\n")
    assert asked("data", "--config", "r.yaml").get("model") == {
        "loss_fn": {"asymmetric": {"clip": 0.0}},
        "image_size": 64,
    }


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--flip", "horizontl"], "did you mean 'horizontal'"),
        (["--resize", "strech"], "crop, pad, squash"),
        (["--random-erasing", "2"], "must be from 0 to 1"),
        (["--loss", "focal:gamma"], "a name and a number such as gamma=3"),
        (["--loss", "focal:"], "such as focal:gamma=3"),
        (["--class-weights", "cat=much"], "not a number"),
        (["--sampler", "balancd"], "did you mean 'balanced'"),
        (["--mixup-alpa", "1"], "--mixup-alpha"),
        (["--imgsz", "64"], "--image-size N"),
    ],
)
def test_mistakes_in_switches_are_answered_with_the_right_ones(folders, capsys, argv, says):
    assert command_line(["finetune", "data", *argv]) == 2
    assert says in capsys.readouterr().err


def test_the_backbones_rate_is_a_tenth_where_it_is_pretrained_as_the_help_says():
    with building_without_weights():
        pretrained = ImageClassifier("timm/test_resnet", learning_rate=0.5)
    assert pretrained.backbone_learning_rate == pytest.approx(0.05)
    assert ImageClassifier("timm/test_resnet", learning_rate=0.5, pretrained=False).backbone_learning_rate == 0.5


def test_the_defaults_of_options_without_a_recipe_key_are_those_of_the_code():
    shown = {command: {option.flag: option.default for option in options} for command, options in TABLES.items()}
    threaded, few, plain = THREAD_BATCH, _FEW, prediction._BATCH_SIZE
    assert shown["predict"]["--batch-size"] == f"{threaded} on a CPU for {few} images or more, else {plain}"
    assert shown["predict"]["--num-workers"] == f"0 on a CPU, else up to {loaders._MOST}"
    assert shown["bench"]["--batch-size"] == str(bench._BATCH_SIZE)
    assert shown["bench"]["--seconds"] == f"{bench._SECONDS:g}"
    assert shown["chaos"]["--minutes"] == f"{chaos.MINUTES:g}"
    assert (shown["tune"]["--lr"], shown["tune"]["--batch-size"]) == (AUTO, AUTO)


#: Options that do nothing where they are not given.
WITHOUT_DEFAULT = {"--from", "--config", "--recipe", "--set", "--picture", "--draw", "--ignore", "--html"}


@pytest.mark.parametrize("name", TABLES)
def test_the_help_shows_every_default_under_headings_in_80_columns(name, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert command_line([name, "--help"]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    headings = [line.rstrip(":") for line in shown.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert headings == [group for group in GROUPS if group in headings]
    text = " ".join(shown.split())
    for option in (*TABLES[name], *EVERYWHERE):
        assert option.group in headings
        assert " ".join(option.described.split()) in text
        assert bool(option.default) == (option.kind is not None and option.flag not in WITHOUT_DEFAULT)


def test_the_help_loads_no_torch():
    code = "import sys; from flashtask.cli import run; run(['finetune', '--help']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_the_commands_have_the_options_of_the_table():
    for name, options in TABLES.items():
        flags = {p.opts[0] for p in flashtask.commands[name].params if isinstance(p, click.Option)}
        assert flags == {option.flag for option in (*options, *EVERYWHERE)}


def test_the_page_has_every_exit_code():
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, FlashtaskError)]
    for code in {0, 70, 75, 130, 143, *(kind.exit_code for kind in kinds)}:
        assert f"\n| {code} |" in PAGE


def test_the_page_says_what_may_differ_on_resume():
    paragraph = " ".join(PAGE[PAGE.index("Only these may differ") :].split("\n\n")[0].split())
    flags = {option.key: option.flag for option in FINETUNE}
    for key in FREE_KEYS:
        assert f"`{flags.get(key, key)}`" in paragraph or key == "trainer.output_dir"


def test_every_recipe_key_of_the_table_is_an_argument_of_what_it_goes_to():
    """A key that nothing takes would be an option that is ignored."""
    from flashtask.cli.recipe_checks import check_arguments

    takers = {
        "data.from_folders": ImageClassificationData.from_folders,
        "data.from_csv": ImageClassificationData.from_csv,
        "model": TASKS.get("image_classification"),
        "trainer": Trainer,
    }
    recipe = Recipe()
    for option in (*FINETUNE, *EVALUATE):
        if option.key not in ("", "task", "finetune.strategy"):
            recipe.set(option.key, None, option.flag)
    for section, taker in takers.items():
        check_arguments(recipe, section, taker)


def test_flags_win_over_the_recipe_and_set_wins_over_flags(folders):
    Path("r.yaml").write_text(
        "model: {backbone: resnet18, learning_rate: 1e-3, head: mlp}\n"
        "trainer: {max_epochs: 3, seed: 1}\n"
        "data: {from_folders: {train_folder: data/train, batch_size: 8}}\n"
    )
    recipe = asked("r.yaml", "--lr", "0.1", "--seed", "2", "--set", "trainer.seed=4", "--batch-size", "16")
    assert recipe.get("model") == {"backbone": "resnet18", "learning_rate": 0.1, "head": "mlp"}
    assert recipe.get("trainer") == {"max_epochs": 3, "seed": 4}
    assert recipe.get("data.from_folders.batch_size") == 16
    fill_in(recipe)
    assert recipe.get("trainer.max_epochs") == 3


def test_relative_paths_count_from_the_recipe_or_from_where_they_are_typed(folders):
    Path("deep").mkdir()
    Path("deep/r.yaml").write_text("data: {from_folders: {train_folder: ../data/train}}\n")
    recipe = asked(
        None, "--config", "deep/r.yaml", "--set", "data.from_folders.val_folder=data/val", "--output-dir", "R"
    )
    assert recipe.get("data.from_folders.train_folder") == str(folders / "data" / "train")
    assert recipe.get("data.from_folders.val_folder") == str(folders / "data" / "val")
    assert recipe.get("trainer.output_dir") == str(folders / "R")


def test_data_stands_for_all_folders_of_the_recipe(folders):
    Path("r.yaml").write_text("data: {from_folders: {train_folder: x, val_folder: y, test_folder: z, batch_size: 5}}\n")
    recipe = asked("data", "--config", "r.yaml")
    assert recipe.get("data.from_folders") == {
        "train_folder": str(folders / "data" / "train"),
        "val_folder": str(folders / "data" / "val"),
        "batch_size": 5,
    }
    whole = asked("data/train")
    assert whole.get("data.from_folders") == {"train_folder": str(folders / "data" / "train"), "val_split": 0.2}


@pytest.mark.parametrize(
    ("words", "expected"), [("--val-split 0", 0), ("--set data.from_folders.val_split=null", None)]
)
def test_every_image_trains_where_that_is_asked_for(words, expected, folders):
    assert asked("data/train", *words.split()).get("data.from_folders.val_split") == expected


def test_an_option_in_the_place_of_a_constructor_is_answered_with_its_key(folders):
    with pytest.raises(UsageError, match="DATA needs `from_folders`") as caught:
        asked("data", "--set", "data.preprocessing={fit: squash}")
    assert caught.value.fix == "it is data.from_folders.preprocessing"


@pytest.mark.parametrize("text", ["freeze_unfreeze:5", "[freeze_unfreeze, 5]"])
def test_strategies_can_be_written_in_two_ways(text, folders):
    recipe = asked("data", "--set", f"finetune.strategy={text}")
    assert recipe.get("finetune.strategy") in ("freeze_unfreeze:5", ["freeze_unfreeze", 5])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("modle: {}", "r.yaml, line 1, column 1: there is no key 'modle' in a recipe\n  fix: did you mean 'model'?"),
        ("model:\n  backbone: resnt18", "r.yaml, line 2, column 3: no backbone named 'resnt18'"),
        ("model: {head: liner}", "r.yaml, line 1, column 9: no head named 'liner'"),
        ("task: image_clasification", "r.yaml, line 1, column 1: no task named"),
        ("finetune: {strategy: frezze}", "line 1, column 12: no finetuning strategy named 'frezze'"),
        ("trainer: {max_epochs: 0}", "line 1, column 11: trainer.max_epochs: must be at least 1, not 0"),
        ("trainer: {max_epochs: true}", "trainer.max_epochs: cannot be true"),
        ("trainer: 3", "`trainer` must be a mapping of keys"),
        ("data: {from_folders: {}, from_csv: {}}", "names 2 constructors"),
        ("data: {from_folders: x}", "`data.from_folders` must be a mapping of keys"),
        ("- 1", "a recipe must be a mapping of keys"),
        ("1: 2", "a key of a recipe must be a name, not 1"),
        ("model: {backbone: a, backbone: b}", "appears twice"),
        ("model: !!python/object:os.system {}", "tags are not allowed"),
        ("model: {backbone: [", "r.yaml, line"),
    ],
)
def test_what_is_wrong_with_a_recipe_is_told_with_its_place(text, words, folders):
    Path("r.yaml").write_text(text + "\n")
    with pytest.raises(UsageError) as raised:
        asked("r.yaml")
    assert words in str(raised.value)


def test_a_recipe_that_is_not_there_is_missing_input(folders):
    Path("recipe.yaml").write_text("task: image_classification\n")
    with pytest.raises(MissingInputError, match=r"did you mean 'recipe\.yaml'"):
        asked("recpie.yaml")


def test_a_recipe_knows_where_each_value_was_said(folders):
    Path("r.yaml").write_text("model:\n  backbone: resnet18\n")
    recipe = read_recipe(Path("r.yaml"))
    recipe.set("trainer.seed", 1, "--seed")
    assert recipe.source_of("model.backbone") == "r.yaml, line 2, column 3"
    assert recipe.source_of("model.head") == "r.yaml, line 1, column 1"
    assert recipe.source_of("trainer") == recipe.source_of("trainer.seed") == "--seed"
    assert dict(recipe.leaves()) == {"model.backbone": "resnet18", "trainer.seed": 1}


def test_the_words_of_options_are_those_of_the_engine():
    from flashtask.cli.options import _DEVICE, _NUMBER_FORMAT
    from flashtask.trainer.devices.accelerators import ACCELERATORS
    from flashtask.trainer.devices.precision import _NAMES

    for word in ("auto", "gpu", *ACCELERATORS.names()):
        assert _DEVICE(word) == word
    for word in _NAMES:
        assert _NUMBER_FORMAT(word) == word
