"""Images a second and seconds to an answer of `flashtask serve`, beside FastAPI by hand with the same network.

    python benchmarks/serving.py CHECKPOINT IMAGE_FOLDER [--seconds 60] [--clients 8 64] [--output FILE.md]

Each client sends one image after the other over a connection of its own. Clients and server share the machine. By hand:
a route that decodes with Pillow, preprocesses with torchvision and computes in eager mode, in FastAPI's thread pool.

At last `flashtask serve` gets SIGTERM while the most clients ask, and what became of their requests is counted.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import httpx2 as httpx

if TYPE_CHECKING:
    from collections.abc import Iterator

_BY_HAND = """
import io, sys
import torch, uvicorn
from fastapi import FastAPI, UploadFile
from PIL import Image
from torchvision.transforms import InterpolationMode, v2
from flashtask import load

task = load(sys.argv[1])
wanted = task.preprocessing
side = wanted.input_size[1]
transform = v2.Compose([
    v2.Resize(int(side / wanted.crop_pct), interpolation=InterpolationMode(wanted.interpolation)), v2.CenterCrop(side),
    v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(wanted.mean, wanted.std),
])
network = torch.nn.Sequential(task.backbone, task.head).eval()
app = FastAPI()

@app.get("/ready")
def ready():
    return {}

@app.post("/predict")
def predict(files: list[UploadFile]):
    images = [transform(Image.open(io.BytesIO(one.file.read())).convert("RGB")) for one in files]
    with torch.inference_mode():
        scores = network(torch.stack(images)).softmax(1)
    return {"predictions": [{"label": task.labels[int(row.argmax())], "score": float(row.max())} for row in scores]}

uvicorn.run(app, port=int(sys.argv[2]), log_level="warning")
"""


@contextmanager
def serving(command: list[str], port: int) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A server that is ready: its address and its process."""
    process = subprocess.Popen([sys.executable, *command], stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                if httpx.get(f"{address}/ready").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        yield address, process
    finally:
        process.terminate()
        process.wait()


def load_of(address: str, images: list[bytes], clients: int, seconds: float) -> tuple[list[float], Counter[int]]:
    """Seconds of each answer of status 200, and how often each status came."""
    end = time.perf_counter() + seconds

    def ask(number: int) -> tuple[list[float], Counter[int]]:
        took: list[float] = []
        statuses: Counter[int] = Counter()
        with httpx.Client(base_url=address, timeout=120) as client:
            while time.perf_counter() < end:
                image = images[(number * 37 + len(took)) % len(images)]
                start = time.perf_counter()
                status = client.post("/predict", files={"files": image}).status_code
                statuses[status] += 1
                if status == 200:
                    took.append(time.perf_counter() - start)
        return took, statuses

    with ThreadPoolExecutor(clients) as pool:
        results = list(pool.map(ask, range(clients)))
    return [one for took, _ in results for one in took], sum((statuses for _, statuses in results), Counter())


def ended_under_load(address: str, process: subprocess.Popen[bytes], images: list[bytes], clients: int) -> str:
    """What became of the requests of clients that ask one after the other, when the server gets SIGTERM."""
    seen: list[tuple[float, str]] = []

    def ask(number: int) -> None:
        with httpx.Client(base_url=address, timeout=120) as client:
            while True:
                start = time.perf_counter()
                try:
                    status = client.post("/predict", files={"files": images[number % len(images)]}).status_code
                except httpx.TransportError as error:
                    seen.append((start, type(error).__name__))
                    return
                seen.append((start, str(status)))

    with ThreadPoolExecutor(clients) as pool:
        for number in range(clients):
            pool.submit(ask, number)
        time.sleep(8)
        answered = len(seen)
        ended = time.perf_counter()
        process.send_signal(signal.SIGTERM)
        code = process.wait()
    before = Counter(outcome for start, outcome in seen[answered:] if start < ended)
    after = Counter(outcome for start, outcome in seen if start >= ended)
    said = [", ".join(f"{n} x {one}" for one, n in sorted(part.items())) or "none" for part in (before, after)]
    took = time.perf_counter() - ended
    return (
        f"SIGTERM while {clients} clients ask: of the requests that were in flight {said[0]}; of those that began "
        f"afterwards {said[1]}; all over after {took:.1f} s; exit code {code}."
    )


def main() -> None:
    """Print and write the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint")
    parser.add_argument("images")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--clients", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--output")
    options = parser.parse_args()
    images = [path.read_bytes() for path in sorted(Path(options.images).rglob("*.png"))[:400]]
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    arms = {
        "flashtask serve": ["-m", "flashtask", "serve", options.checkpoint, "--port", str(port)],
        "FastAPI by hand": ["-c", _BY_HAND, options.checkpoint, str(port)],
    }
    lines = [
        "| clients | server | images/s | p50 (ms) | p99 (ms) | answers by status |",
        "| ---: | --- | ---: | ---: | ---: | --- |",
    ]
    for clients in options.clients:
        for name, command in arms.items():
            with serving(command, port) as (address, _):
                load_of(address, images, clients, min(5, options.seconds / 4))
                took, statuses = load_of(address, images, clients, options.seconds)
            cuts = statistics.quantiles(took, n=100)
            answers = ", ".join(f"{count} of {status}" for status, count in sorted(statuses.items()))
            speed = len(took) / options.seconds
            lines.append(
                f"| {clients} | {name} | {speed:.1f} | {cuts[49] * 1e3:.0f} | {cuts[98] * 1e3:.0f} | {answers} |"
            )
            print(lines[-1], flush=True)
    with serving(arms["flashtask serve"], port) as (address, process):
        end = ended_under_load(address, process, images, max(options.clients))
        print(end, flush=True)
    names = ("torch", "fastapi", "uvicorn")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    about = (
        f"{len(os.sched_getaffinity(0))} cores, {platform.machine()}, Python {platform.python_version()}, {versions}"
    )
    text = "\n".join([*lines, "", end, "", f"`python benchmarks/serving.py`, {options.seconds:g} s each; {about}."])
    print(text)
    if options.output:
        Path(options.output).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
