"""A process that opens hostile files through the public doors, and tells of each what was seen.

    python watch.py CASES.json RESULTS.json FOLDER

FOLDER is the only place that may be written to. An audit hook notes programs, sockets, imports of what is neither
Python's nor ours, and files that are opened for writing elsewhere.
"""

import contextlib
import io
import json
import os
import resource
import sys
import warnings
from pathlib import Path

PROGRAMS = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "pty.", "subprocess.Popen")
CHILD = "flashtask.core.foreign_weights_child"
OURS = ("flashtask", "torch", "torchvision", "timm", "torchmetrics", "numpy", "yaml", "pydantic", "safetensors")
OURS += ("opt_einsum",)  # which torch looks for when it first multiplies by torch.einsum
seen: set[str] = set()
folder = Path(sys.argv[3]).resolve()


def main() -> None:
    """Open every case; the results are a list of dictionaries."""
    warnings.simplefilter("ignore")
    cases = json.loads(Path(sys.argv[1]).read_text())
    for case in cases["good"]:  # imports what has to be imported, and proves that the doors are open
        assert opened(case)[0] == "loaded", (case, opened(case))
    known = {name.partition(".")[0] for name in sys.modules} | set(sys.stdlib_module_names) | set(OURS)
    sys.addaudithook(lambda event, arguments: note(event, arguments, known))
    results = [watched(case) for case in cases["hostile"]]
    Path(sys.argv[2]).write_text(json.dumps(results))


def note(event: str, arguments: tuple, known: set[str]) -> None:
    """Add what must not happen to `seen`."""
    if event == "import":
        if arguments[0].partition(".")[0] not in known:
            seen.add(f"import {arguments[0]}")
    elif event == "open":
        path, _, flags = arguments
        if isinstance(path, (str, bytes)) and isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            where = Path(os.fsdecode(path)).absolute()
            if folder not in [where, *where.parents] and str(where) != os.devnull:
                seen.add(f"open {where}")
    elif event.startswith((*PROGRAMS, "socket.")):
        if event == "subprocess.Popen" and CHILD in arguments[1] and arguments[0] == sys.executable:
            return
        if event in ("os.posix_spawn", "os.fork") and CHILD in str(arguments):
            return
        seen.add(f"{event} {str(arguments)[:200]}")


def watched(case: dict) -> dict:
    """The outcome of a case, with the seconds of the processor and the megabytes that it took."""
    seen.clear()
    before, start = peak(), seconds()
    outcome, code, message = opened(case)
    return {
        **case,
        "outcome": outcome,
        "code": code,
        "message": message,
        "seconds": seconds() - start,
        "megabytes": max(0, peak() - before),
        "child_megabytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024,
        "seen": sorted(seen),
    }


def opened(case: dict) -> tuple[str, int, str]:
    """What came of opening a file: `loaded`, or the class of the error; the exit code; the message."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            code = DOORS[case["door"]](case["path"], case)
    except Exception as error:
        return type(error).__name__, getattr(error, "exit_code", 70), str(error)
    return ("refused" if code else "loaded"), code or 0, errors.getvalue()


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def seconds() -> float:
    used = [resource.getrusage(who)[:2] for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(map(sum, used))


def load(path, case):
    import flashtask

    flashtask.load(path)


def load_from_checkpoint(path, case):
    import flashtask

    flashtask.ImageClassifier.load_from_checkpoint(path)


def from_pretrained(path, case):
    import flashtask

    flashtask.ImageClassifier.from_pretrained(path)


def backbone(path, case):
    from flashtask.backbones import build_backbone

    build_backbone(path if path.startswith("/") else f"local-dir:{path}")


def weights(path, case):
    from flashtask.backbones import build_backbone

    build_backbone("timm/test_resnet", weights=path)


def fit(path, case):
    import flashtask

    data = flashtask.ImageClassificationData.from_folders(train_folder=case["images"], batch_size=8, num_workers=0)
    model = flashtask.ImageClassifier("timm/test_resnet", pretrained=False)
    trainer = flashtask.Trainer(
        max_epochs=2,
        max_steps=2,
        output_dir=case["output"],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=data, ckpt_path=path)


def zoo(path, case):
    return cli("zoo", "check", path)


def predict(path, case):
    return cli("predict", path, next(Path(case["images"]).rglob("*.png")))


def finetune_from(path, case):
    return cli("finetune", case["images"], "--from", path, "--output-dir", case["output"])


def recipe(path, case):
    return cli("plan", path)


def resume(path, case):
    return cli("finetune", "--resume", "--output-dir", path)


def cli(*arguments) -> int:
    from flashtask.cli import run

    return run([str(argument) for argument in arguments])


DOORS = {
    door.__name__: door
    for door in (
        *(load, load_from_checkpoint, from_pretrained, backbone, weights, fit),
        *(zoo, predict, finetune_from, recipe, resume),
    )
}

if __name__ == "__main__":
    sys.path.insert(0, os.getcwd())  # where a module lies that no file may make anyone import
    main()
