"""Whether exported files give the labels of their checkpoint: each file in its own runtime, on every image of a folder.

    python benchmarks/agreement.py CHECKPOINT IMAGE_FOLDER [--output FILE.md]

The folder has one folder a class. Files are written by `flashtask export`, read from disk by ONNX Runtime, OpenVINO and
torch, and given pictures that Pillow has decoded, one at a time. The checkpoint is asked by `load(...).predict`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Scores = Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]

#: What is written: name, options of `flashtask export`, ending, and how the file is read.
FILES: tuple[tuple[str, list[str], str], ...] = (
    ("ONNX Runtime", [], "onnx"),
    ("OpenVINO, in float32", [], "xml"),
    ("OpenVINO, as it is set", [], "xml"),
    (".pt2 (torch.export)", [], "pt2"),
    ("ONNX Runtime, int8", ["--quantize", "int8"], "int8.onnx"),
    ("OpenVINO, int8", ["--quantize", "int8"], "int8.xml"),
)


def runtime(path: Path, name: str) -> Scores:
    """A function from a picture (1, H, W, 3) of uint8 to scores (1, classes), by the runtime of a file."""
    if path.suffix == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        return lambda pixels: session.run(["scores"], {"images": pixels})[0]  # type: ignore[no-any-return]
    if path.suffix == ".xml":
        import openvino

        core = openvino.Core()
        settings = {} if "as it is set" in name else {"INFERENCE_PRECISION_HINT": "f32"}
        model = core.compile_model(core.read_model(path), "CPU", settings)
        return lambda pixels: model({"images": pixels})["scores"]  # type: ignore[no-any-return]
    import torch

    module = torch.export.load(path).module()

    def scores(pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        with torch.no_grad():
            found = module(torch.from_numpy(pixels))
        found = found[0] if isinstance(found, (tuple, list)) else found
        return np.asarray(found)

    return scores


def main() -> None:
    """Print and write the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint")
    parser.add_argument("images")
    parser.add_argument("--output")
    options = parser.parse_args()
    from flashtask import load

    task = load(options.checkpoint)
    paths = sorted(Path(options.images).rglob("*.png"))
    true = np.array([task.labels.index(path.parent.name) for path in paths])
    said = task.predict([str(path) for path in paths])
    ours = np.array([[one.probabilities[label] for label in task.labels] for one in said])
    lines = [
        "| runtime | labels that differ | largest difference of a score | accuracy | MB |",
        "| --- | ---: | ---: | ---: | ---: |",
        f"| checkpoint | | | {(ours.argmax(1) == true).mean():.4f} | {os.path.getsize(options.checkpoint) / 1e6:.1f} |",
    ]
    print(lines[-1], flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name, more, ending in FILES:
            path = Path(folder, f"model.{ending}")
            command = ["-m", "flashtask", "export", options.checkpoint, "--output", str(path), *more]
            given = [*command, "--data", options.images] if more else command
            if not path.exists():
                subprocess.run([sys.executable, *given], check=True, stdout=subprocess.DEVNULL)
            scores = runtime(path, name)
            found = np.concatenate([scores(np.array(Image.open(one).convert("RGB"))[None]) for one in paths])
            differing = int((found.argmax(1) != ours.argmax(1)).sum())
            parts = [path, path.with_suffix(".bin")] if path.suffix == ".xml" else [path]
            size = sum(one.stat().st_size for one in parts) / 1e6
            right = (found.argmax(1) == true).mean()
            lines.append(f"| {name} | {differing} | {np.abs(found - ours).max():.2g} | {right:.4f} | {size:.1f} |")
            print(lines[-1], flush=True)
    names = ("torch", "onnxruntime", "openvino", "pillow")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    cores = len(os.sched_getaffinity(0))
    about = (
        f"{len(paths):,} images; {cores} cores, {platform.machine()}, Python {platform.python_version()}, {versions}"
    )
    text = "\n".join([*lines, "", f"`python benchmarks/agreement.py`, {about}."])
    print(text)
    if options.output:
        Path(options.output).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
