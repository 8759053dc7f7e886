"""`flashtask serve`: the scores of `predict` over HTTP, whatever clients send, and an end without a lost request."""

import base64
import csv
import io
import json
import os
import shutil
import signal
import socket
import struct
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx2 as httpx
import numpy as np
import pytest
import squares
import warm
from browser import needs_browser, opened
from image_trees import picture
from PIL import Image
from small import colour_folders

from flashtask import ImageClassificationData, ImageClassifier, ObjectDetectionData, ObjectDetector, Trainer, load
from flashtask.cli import run

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

PROGRAM = """
import sys
from flashtask.cli import run
code = run(sys.argv[1:])
sys.stdout.flush(), sys.stderr.flush()
sys.exit(code)
"""


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextmanager
def serving(*arguments, ready=True):
    """A server in a process of its own: (a client, the process)."""
    port = free_port()
    process = warm.start(PROGRAM, "serve", *arguments, "--port", port)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        try:
            wait_for(lambda: answers(client, "/ready" if ready else "/health") or not process.is_alive())
            assert process.is_alive()
            yield client, process
        finally:
            process.kill()
            process.join()


def wait_for(holds, seconds=60.0):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def answers(client, path):
    try:
        return client.get(path).status_code == 200
    except httpx.TransportError:
        return False


def png(image):
    made = io.BytesIO()
    image.save(made, "PNG")
    return made.getvalue()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    data = ImageClassificationData.from_folders(colour_folders(folder / "data", each=6), batch_size=4)
    model = ImageClassifier("timm/test_resnet", pretrained=False)
    trainer = Trainer(max_epochs=1, logger=False, enable_progress_bar=False, default_root_dir=folder)
    trainer.finetune(model, datamodule=data)
    trainer.save_checkpoint(folder / "colours.ckpt")
    return folder / "colours.ckpt"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(24):
        picture(number, (40 + number, 60 - number)).save(folder / f"{number:02}.png")
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def server(trained, tmp_path_factory):
    corrections = tmp_path_factory.mktemp("corrections")
    limits = ["--max-bytes", "300000", "--max-images", "30", "--max-pixels", "40000", "--max-waiting", "60"]
    with serving(str(trained), "--corrections", str(corrections), *limits) as (client, _):
        client.corrections = corrections
        yield client


@pytest.fixture(scope="module")
def expected(trained, pictures):
    return load(trained).predict([str(path) for path in pictures])


def scores_of(rows):
    return np.array([[row["scores"][label] for label in sorted(row["scores"])] for row in rows])


def known_scores(expected):
    return np.array([[one.probabilities[label] for label in sorted(one.probabilities)] for one in expected])


# ---- the same numbers


def test_many_files_in_one_request_have_the_scores_of_predict_in_the_order_sent(server, pictures, expected):
    files = [("files", (path.name, path.read_bytes())) for path in pictures]
    answer = server.post("/predict", files=files)
    assert answer.status_code == 200
    rows = answer.json()["predictions"]
    assert [row["file"] for row in rows] == [path.name for path in pictures]
    assert [row["label"] for row in rows] == [one.label for one in expected]
    np.testing.assert_allclose(scores_of(rows), known_scores(expected), atol=1e-5)
    assert answer.json()["model"] == "colours"


def test_clients_at_the_same_time_each_get_their_own(server, pictures, expected):
    def ask(path):
        return server.post("/predict", content=path.read_bytes(), headers={"Content-Type": "image/png"}).json()

    with ThreadPoolExecutor(8) as pool:
        rows = [answer["predictions"][0] for answer in pool.map(ask, pictures)]
    np.testing.assert_allclose(scores_of(rows), known_scores(expected), atol=1e-5)


def test_each_form_of_a_request_means_the_same(server, pictures, expected):
    data = pictures[3].read_bytes()
    text = base64.b64encode(data).decode()
    found = [
        server.post("/predict", files={"files": data}),
        server.post("/predict", content=data, headers={"Content-Type": "application/octet-stream"}),
        server.post("/predict", json={"images": [text]}),
        server.post("/predict", json={"image": f"data:image/png;base64,{text}"}),
        server.post("/predict", json={"images": {"b64": text}}),
    ]
    assert [answer.status_code for answer in found] == [200] * 5
    rows = [answer.json()["predictions"][0] for answer in found]
    np.testing.assert_allclose(scores_of(rows), np.repeat(known_scores(expected)[3:4], 5, axis=0), atol=1e-5)


def test_the_open_inference_protocol(server, pictures, expected):
    assert server.get("/v2").json()["name"] == "flashtask"
    assert server.get("/v2/health/live").json() == {"live": True}
    assert server.get("/v2/health/ready").json() == {"ready": True}
    about = server.get("/v2/models/colours").json()
    assert about["outputs"][1] == {"name": "scores", "datatype": "FP32", "shape": [-1, 2]}
    texts = [base64.b64encode(path.read_bytes()).decode() for path in pictures[:2]]
    asked = {"id": "7", "inputs": [{"name": "images", "datatype": "BYTES", "shape": [2], "data": texts}]}
    answer = server.post("/v2/models/colours/infer", json=asked).json()
    label, scores = answer["outputs"]
    assert answer["id"] == "7"
    assert label["data"] == [one.label for one in expected[:2]]
    assert scores["shape"] == [2, 2]
    np.testing.assert_allclose(np.reshape(scores["data"], (2, 2)), known_scores(expected)[:2], atol=1e-5)

    pixels = np.asarray(Image.open(pictures[0]).convert("RGB"))
    tensor = {"name": "images", "datatype": "UINT8", "shape": [1, *pixels.shape], "data": pixels.ravel().tolist()}
    answer = server.post("/v2/models/colours/infer", json={"inputs": [tensor]}).json()
    np.testing.assert_allclose(answer["outputs"][1]["data"], known_scores(expected)[0], atol=1e-5)


def test_binary_tensors_of_the_open_inference_protocol(server, pictures, expected):
    def ask(tensor, rest, length=None):
        head = json.dumps({"inputs": [{"name": "images", "parameters": {"binary_data_size": len(rest)}, **tensor}]})
        headers = {"Inference-Header-Content-Length": str(len(head) if length is None else length), **OCTETS}
        return server.post("/v2/models/colours/infer", content=head.encode() + rest, headers=headers)

    files = [path.read_bytes() for path in pictures[:2]]
    elements = b"".join(struct.pack("<I", len(one)) + one for one in files)
    answer = ask({"datatype": "BYTES", "shape": [2]}, elements).json()
    np.testing.assert_allclose(np.reshape(answer["outputs"][1]["data"], (2, 2)), known_scores(expected)[:2], atol=1e-5)
    pixels = np.asarray(Image.open(pictures[0]).convert("RGB"))
    answer = ask({"datatype": "UINT8", "shape": [1, *pixels.shape]}, pixels.tobytes()).json()
    np.testing.assert_allclose(answer["outputs"][1]["data"], known_scores(expected)[0], atol=1e-5)
    for tensor, rest, length in (
        ({"datatype": "BYTES", "shape": [1]}, elements, None),
        ({"datatype": "BYTES", "shape": [2]}, elements[:-1], None),
        ({"datatype": "BYTES", "shape": [2], "parameters": {"binary_data_size": 7}}, elements, None),
        ({"datatype": "UINT8", "shape": [1, 1, 1, 3]}, b"12", None),
        ({"datatype": "UINT8", "shape": [1, 1, 1, 3]}, b"123", 10**9),
        ({"datatype": "UINT8", "shape": [1, 1, 1, 3]}, b"123", "x"),
    ):
        answer = ask(tensor, rest, length)
        assert answer.status_code == 400
        assert answer.json()["error"] == answer.json()["detail"]


def test_a_drawn_picture_is_the_image_with_words_below_it(server, pictures):
    answer = server.post("/draw", files={"files": pictures[0].read_bytes()})
    assert answer.headers["content-type"] == "image/png"
    drawn, image = Image.open(io.BytesIO(answer.content)), Image.open(pictures[0]).convert("RGB")
    assert drawn.width == image.width
    assert drawn.height > image.height
    np.testing.assert_array_equal(np.asarray(drawn)[: image.height], np.asarray(image))


def test_a_heat_map_lies_on_the_picture_as_it_is_in_the_file(server, pictures):
    assert server.get("/models").json()["models"][0]["heat_maps"] is True
    image = picture(5, (400, 100))  # the centre crop cuts off both sides of it
    answer = server.post("/explain", files={"files": png(image)})
    assert answer.headers["content-type"] == "image/png"
    heated = Image.open(io.BytesIO(answer.content))
    assert heated.size == (400, 100)
    changed = np.abs(np.asarray(heated, int) - np.asarray(image.convert("RGB"), int)).max(axis=(0, 2))
    seen = np.flatnonzero(changed)
    assert 140 <= seen.min() < seen.max() < 260
    assert server.post("/explain", files=[("files", SMALL)] * 2).status_code == 400
    assert server.post("/explain", content=b"hello", headers=OCTETS).status_code == 415


def test_heat_maps_change_no_prediction_beside_them(server, pictures, expected):
    def ask(number):
        path = pictures[number % len(pictures)]
        if number % 3 == 0:
            return server.post("/explain", files={"files": path.read_bytes()}).status_code
        return server.post("/predict", files={"files": path.read_bytes()}).json()["predictions"][0]

    with ThreadPoolExecutor(6) as pool:
        found = dict(enumerate(pool.map(ask, range(len(pictures)))))
    assert {one for number, one in found.items() if number % 3 == 0} == {200}
    rows = [number for number in found if number % 3]
    np.testing.assert_allclose(scores_of([found[row] for row in rows]), known_scores(expected)[rows], atol=1e-5)


# ---- what is wrong with a request


def header_of(width, height):
    """A PNG that claims a size and holds few pixels."""

    def chunk(content):
        return struct.pack(">I", len(content) - 4) + content + struct.pack(">I", zlib.crc32(content))

    head = chunk(b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT" + zlib.compress(bytes(1000))) + chunk(b"IEND")


OCTETS = {"Content-Type": "application/octet-stream"}
SMALL, TINY = png(picture(1)), png(picture(1, (8, 8)))


@pytest.mark.parametrize(
    ("request_of", "status", "said"),
    [
        ({"content": b"x=1", "headers": {"Content-Type": "application/x-www-form-urlencoded"}}, 415, "multipart"),
        ({"content": b"", "headers": OCTETS}, 400, "no image"),
        ({"content": b"hello", "headers": OCTETS}, 415, "cannot be used"),
        ({"content": SMALL[:200], "headers": OCTETS}, 422, "cannot be used"),
        ({"content": header_of(60_000, 60_000), "headers": OCTETS}, 413, "decompression bomb"),
        ({"content": png(Image.new("RGB", (201, 200))), "headers": OCTETS}, 413, "201 x 200"),
        ({"content": bytes(300_001), "headers": OCTETS}, 413, "300,000 bytes"),
        ({"content": (bytes(100_000) for _ in range(4)), "headers": OCTETS}, 413, "300,000 bytes"),
        ({"files": [("files", SMALL)] * 31}, 413, "31 images"),
        ({"files": [("files", TINY)] * 40}, 413, "31"),
        ({"json": {"images": [base64.b64encode(TINY).decode()] * 31}}, 413, "31 images"),
        ({"data": {"files": "text"}, "files": {"other": b"x"}}, 400, "holds text"),
        ({"content": b"--x", "headers": {"Content-Type": "multipart/form-data; boundary=y"}}, 400, ""),
        ({"content": b"--x", "headers": {"Content-Type": "multipart/form-data"}}, 400, "boundary"),
        ({"content": b"{", "headers": {"Content-Type": "application/json"}}, 400, "not JSON"),
        ({"content": b"[" * 100_000, "headers": {"Content-Type": "application/json"}}, 400, "not JSON"),
        ({"json": []}, 400, "an object"),
        ({"json": {}}, 400, "no image"),
        ({"json": {"images": ["###"]}}, 400, "not base64"),
        ({"json": {"images": [5]}}, 400, "neither base64"),
        ({"json": {"url": "http://127.0.0.1/x"}}, 403, "--allow-urls"),
        ({"files": {"files": SMALL}, "params": {"model": "colour"}}, 404, "did you mean 'colours'"),
    ],
)
def test_a_bad_request_is_refused_with_its_reason(server, request_of, status, said):
    answer = server.post("/predict", **request_of)
    assert answer.status_code == status
    assert said in answer.json()["detail"]


@pytest.mark.parametrize(
    "tensor",
    [
        {},
        {"name": "x", "datatype": "BYTES", "shape": [0], "data": []},
        {"name": "images", "datatype": "FP32", "shape": [1], "data": [1.0]},
        {"name": "images", "datatype": "BYTES", "shape": [2], "data": ["eA=="]},
        {"name": "images", "datatype": "UINT8", "shape": [1, 1, 1, 3], "data": [1, 2, 256]},
        {"name": "images", "datatype": "UINT8", "shape": [1, 2, 1, 3], "data": [1, 2, 3]},
        {"name": "images", "datatype": "UINT8", "shape": [1, 1, 1, 3], "data": [1, 2, "a"]},
        {"name": "images", "datatype": "UINT8", "shape": [1, 1, 1, 3], "data": [1, 2, [3]]},
        {"name": "images", "datatype": "UINT8", "shape": [-1, -1, 1, 3], "data": [1, 2, 3]},
    ],
)
def test_a_bad_tensor_is_refused(server, tensor):
    answer = server.post("/v2/models/colours/infer", json={"inputs": [tensor]})
    assert answer.status_code == 400
    assert answer.json()["error"]


def test_of_several_images_each_bad_one_is_named_and_none_is_predicted(server):
    files = [("files", ("good.png", SMALL)), ("files", ("cut.png", SMALL[:300])), ("files", ("../../x", b"no image"))]
    answer = server.post("/predict", files=files)
    assert answer.status_code == 422
    assert "cut.png" in answer.json()["detail"]
    assert "../../x" in answer.json()["detail"]
    assert "good.png" not in answer.json()["detail"]


def damaged_files():
    generator = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF"):
        made = io.BytesIO()
        picture(2).save(made, kind)
        whole = made.getvalue()
        yield whole[: len(whole) // 2]
        for _ in range(4):
            bytes_of = bytearray(whole)
            for place in generator.integers(0, len(whole), 12):
                bytes_of[place] = generator.integers(0, 256)
            yield bytes(bytes_of)
    yield b"\x93NUMPY" + bytes(200)
    yield b"<svg xmlns='http://www.w3.org/2000/svg'/>"
    yield b"PK\x03\x04" + bytes(500)


def test_damaged_files_never_end_in_a_server_error_and_the_server_stays_right(server, pictures, expected):
    statuses = {server.post("/predict", content=each, headers=OCTETS).status_code for each in damaged_files()}
    assert statuses <= {200, 413, 415, 422}
    assert 422 in statuses
    rows = server.post("/predict", files={"files": pictures[0].read_bytes()}).json()["predictions"]
    np.testing.assert_allclose(scores_of(rows), known_scores(expected)[:1], atol=1e-5)


def test_a_request_with_huge_headers_is_refused(server):
    assert server.get("/health", headers={"X": "y" * 40_000}).status_code == 431
    assert server.get("/health", headers={"X": "y" * 1_000}).status_code == 200


def test_too_many_images_at_once_are_asked_to_come_back(server):
    files = [("files", SMALL)] * 30

    def ask(_):
        return server.post("/predict", files=files)

    with ThreadPoolExecutor(12) as pool:
        answers_of = list(pool.map(ask, range(36)))
    statuses = [answer.status_code for answer in answers_of]
    assert set(statuses) == {200, 429}
    refused = next(answer for answer in answers_of if answer.status_code == 429)
    assert refused.headers["retry-after"] == "1"


# ---- the rest of the routes


def test_corrections_are_a_table_that_training_reads(server, pictures):
    for label in ("blue", "red"):
        answer = server.post("/corrections", params={"label": label}, files={"files": pictures[5].read_bytes()})
        assert answer.status_code == 201
    server.post("/corrections", params={"label": "blue"}, files={"files": pictures[6].read_bytes()})
    assert server.post("/corrections", params={"label": "grey"}, files={"files": SMALL}).status_code == 422
    table = server.corrections / "corrections.csv"
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["label"] for row in rows] == ["red", "blue"]
    data = ImageClassificationData.from_csv("path", "label", table, val_split=None)
    data.setup("fit")
    assert (server.corrections / rows[0]["path"]).read_bytes() == pictures[5].read_bytes()
    assert data.sizes()["train"] == 2


def test_metrics_count_by_route_and_the_page_asks_nobody_else(server):
    server.get("/no/such/path")
    assert server.post("/predict", files={"files": SMALL}).status_code == 200
    text = server.get("/metrics").text
    assert 'flashtask_requests_total{route="/predict",status="200"}' in text
    assert 'flashtask_requests_total{route="other",status="404"}' in text
    assert "flashtask_images_waiting 0.0" in text
    page = server.get("/")
    assert "connect-src 'self'" in page.headers["content-security-policy"]
    assert "http" not in page.text
    paths = server.get("/openapi.json").json()["paths"]
    assert {"/predict", "/health", "/ready", "/v2/models/{name}/infer"} <= set(paths)


def test_a_model_is_not_ready_before_it_is_warm_and_a_bad_file_says_why(trained, tmp_path):
    damaged = tmp_path / "damaged.ckpt"
    damaged.write_bytes(trained.read_bytes()[:-100])
    with serving(f"good={trained}", f"bad={damaged}", ready=False) as (client, _):
        wait_for(lambda: "damaged.ckpt" in client.get("/ready").text)
        assert client.get("/ready").status_code == 503
        assert client.get("/health").status_code == 200
        assert client.post("/predict", files={"files": SMALL}, params={"model": "bad"}).status_code == 503
        assert client.post("/predict", files={"files": SMALL}, params={"model": "good"}).status_code == 200


def test_with_a_key_nothing_but_health_and_the_page_is_open(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("FLASHTASK_API_KEY", "secret")
    with serving(str(trained), "--cors", "https://example.org", "--timeout", "8") as (client, _):
        assert client.post("/predict", files={"files": SMALL}).status_code == 401
        assert client.get("/metrics").status_code == 401
        assert client.get("/v2/models/colours").status_code == 401
        assert client.get("/").status_code == client.get("/ready").status_code == 200
        for headers in ({"X-API-Key": "secret"}, {"Authorization": "Bearer secret"}):
            answer = client.post(
                "/predict", files={"files": SMALL}, headers={**headers, "Origin": "https://example.org"}
            )
            assert answer.status_code == 200
            assert answer.headers["access-control-allow-origin"] == "https://example.org"
        assert client.post("/predict", headers={"Authorization": "Bearer wrong"}).status_code == 401

        # A body that never ends is given up, and others are served meanwhile.
        with socket.create_connection((client.base_url.host, client.base_url.port)) as slow:
            slow.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nX-API-Key: secret\r\nContent-Type: image/png\r\n")
            slow.sendall(b"Content-Length: 1000\r\n\r\nabc")
            assert client.get("/models", headers={"X-API-Key": "secret"}).status_code == 200
            assert slow.recv(4096).startswith(b"HTTP/1.1 408")

        # A reload under load loses no request.
        with ThreadPoolExecutor(4) as pool:
            asked = [
                pool.submit(client.post, "/predict", files={"files": SMALL}, headers={"X-API-Key": "secret"})
                for _ in range(60)
            ]
            loaded = client.post("/v2/repository/models/colours/load", headers={"X-API-Key": "secret"})
        assert loaded.status_code == 200
        assert {one.result().status_code for one in asked} == {200}


def test_addresses_are_fetched_only_if_they_are_public(trained):
    with serving(str(trained), "--allow-urls") as (client, _):
        private = f"http://127.0.0.1:{client.base_url.port}/health"
        answer = client.post("/predict", json={"url": private})
        assert answer.status_code == 422
        assert "private address" in answer.json()["detail"]
        assert client.post("/predict", json={"url": "file:///etc/passwd"}).status_code == 400


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_at_the_end_every_accepted_request_is_answered(trained, pictures, number, code):
    with serving(str(trained)) as (client, process):
        files = [("files", path.read_bytes()) for path in pictures] * 2
        with ThreadPoolExecutor(6) as pool:
            asked = [pool.submit(client.post, "/predict", files=files) for _ in range(5)]
            # Each of them has been accepted: a connection that nobody has taken yet may be refused.
            wait_for(lambda: f"flashtask_images_total {5 * len(files)}.0" in client.get("/metrics").text)
            os.kill(process.pid, number)
        assert [one.result().status_code for one in asked] == [200] * 5
        process.join(60)
        assert process.exitcode == code


@pytest.mark.long
def test_a_detector_answers_with_boxes_and_draws_them(tmp_path):
    squares.coco(tmp_path / "train", 8)
    data = ObjectDetectionData.from_folders(tmp_path / "train", batch_size=4, num_workers=0)
    model = ObjectDetector("timm/test_resnet", pretrained=False, head_options={"width": 32, "depth": 1}, image_size=96)
    trainer = Trainer(max_epochs=1, logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    trainer.fit(model, datamodule=data)
    trainer.save_checkpoint(tmp_path / "squares.ckpt")
    image = next((tmp_path / "train").glob("*.png"))
    expected = load(tmp_path / "squares.ckpt").predict(str(image)).to_dict()
    with serving(str(tmp_path / "squares.ckpt")) as (client, _):
        found = client.post("/predict", files={"files": image.read_bytes()}).json()["predictions"][0]
        assert found["labels"] == expected["labels"]
        np.testing.assert_allclose(found["boxes"], expected["boxes"], atol=1e-3)
        drawn = client.post("/draw", files={"files": image.read_bytes()})
        assert Image.open(io.BytesIO(drawn.content)).size == (96, 80)
        tensor = {"name": "images", "datatype": "BYTES", "shape": [1]}
        tensor["data"] = [base64.b64encode(image.read_bytes()).decode()]
        answer = client.post("/v2/models/squares/infer", json={"inputs": [tensor]}).json()
        assert json.loads(answer["outputs"][0]["data"][0])["labels"] == expected["labels"]


# ---- the command


def test_the_command_names_what_is_wrong(trained, tmp_path, capsys):
    assert run(["serve", str(tmp_path / "none.ckpt")]) == 66
    shutil.copy(trained, tmp_path / "colours.ckpt")
    assert run(["serve", str(trained), str(tmp_path / "colours.ckpt")]) == 2
    assert "two models are called 'colours'" in capsys.readouterr().err
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert run(["serve", str(trained), "--port", str(taken.getsockname()[1])]) == 73
    assert "cannot listen on" in capsys.readouterr().err


def test_a_dockerfile_comes_with_the_models_and_a_user_without_rights(trained, tmp_path, capsys):
    assert run(["serve", f"a={trained}", "--write-dockerfile", str(tmp_path / "image")]) == 0
    text = (tmp_path / "image/Dockerfile").read_text()
    assert 'CMD ["flashtask", "serve", "--host", "0.0.0.0", "a=/models/a.ckpt"]' in text
    assert "\nUSER 10001\n" in text
    assert (tmp_path / "image/models/a.ckpt").read_bytes() == trained.read_bytes()
    assert run(["serve", f"a={trained}", "--write-dockerfile", str(tmp_path / "image")]) == 73


@needs_browser
def test_the_page_in_a_browser(server, pictures, expected):
    text = base64.b64encode(pictures[0].read_bytes()).decode()
    address = f"http://127.0.0.1:{server.base_url.port}/"
    with opened() as page:
        page.open(address, width=390)
        page.wait_for("about.models.length === 1")
        page.run(
            f"""(() => {{
              const bytes = Uint8Array.from(atob('{text}'), (one) => one.charCodeAt(0));
              const files = new DataTransfer();
              files.items.add(new File([bytes], 'dropped.png', {{type: 'image/png'}}));
              document.dispatchEvent(new DragEvent('drop', {{dataTransfer: files, bubbles: true, cancelable: true}}));
            }})()"""
        )
        page.wait_for("document.querySelectorAll('article .row').length === 2")
        assert page.run("document.querySelector('article h2').textContent") == expected[0].label
        score = page.run("document.querySelector('article .row span:nth-child(2)').textContent")
        assert float(score) == pytest.approx(expected[0].score, abs=6e-4)
        page.wait_for("document.querySelectorAll('article img').length === 2")
        page.wait_for("document.querySelectorAll('article img')[1].naturalWidth === 40")
        assert page.run("document.documentElement.scrollWidth") <= 390
        page.run("document.querySelector('.correct button').click()")
        page.wait_for("document.querySelector('.done') !== null")
        assert page.errors == []
        assert all(one.startswith((address, "blob:", "data:")) for one in page.requests)
