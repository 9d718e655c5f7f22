"""The server of the page: what it answers, what it refuses, its queue, and many senders at once.

pytest tests/test_demo.py
"""

import copy
import http.client
import io
import json
import random
import resource
import socket
import struct
import sys
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from pages import StubEngine, picture_with_box, serve
from PIL import Image
from pycocotools import mask as coco_mask

from xsam.checkpoints import save_checkpoint
from xsam.demo import __main__ as command
from xsam.demo import server as demo
from xsam.demo.server import DemoServer, Engine
from xsam.inference import predict
from xsam.tasks import TASKS, requested_task, requests

EXAMPLE = f"{0:032x}"  # the key of the first example


OVERSIZED = bytes(demo.MAX_BYTES + 1)


class Client:
    """Sends requests as the page does, or with other headers."""

    def __init__(self, server: DemoServer):
        self.port, self.token = server.server_port, server.token

    def send(self, method: str, path: str, body=None, **headers) -> tuple[int, bytes]:
        """Status and body of a reply. A header that is None is left out."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        headers = {"Host": f"127.0.0.1:{self.port}", "X-Token": self.token} | headers
        try:
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            if body is not None:
                headers = {"Content-Length": str(len(body))} | headers
            for name, value in headers.items():
                if value is not None:
                    connection.putheader(name, value)
            connection.endheaders(body)
            reply = connection.getresponse()
            return reply.status, reply.read()
        finally:
            connection.close()

    def call(self, method: str, path: str, body=None, expected: int = 200) -> dict:
        status, content = self.send(method, path, body)
        document = json.loads(content)
        assert status == expected, document
        return document

    def upload(self, image: Image.Image, kind: str = "PNG") -> str:
        return self.call("POST", "/pictures", encoded(image, kind))["id"]

    def submit(self, expected: int = 200, **request) -> str:
        body = json.dumps({"task": "refer", "picture": EXAMPLE} | request).encode()
        return self.call("POST", "/jobs", body, expected).get("id", "")

    def finish(self, key: str) -> dict:
        update = {"state": "waiting", "stamp": ""}
        while update["state"] in ("waiting", "running"):
            update = self.call("GET", f"/jobs/{key}?seen={update['stamp']}")
        return update

    def ask(self, **request) -> dict:
        return self.finish(self.submit(**request))


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    content = io.BytesIO()
    image.save(content, kind)
    return content.getvalue()


def huge_png(width: int, height: int) -> bytes:
    """A PNG whose header says so much, with hardly a byte in it."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100)))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


@pytest.fixture
def engine() -> StubEngine:
    return StubEngine()


@pytest.fixture
def server(engine):
    with serve(engine) as running:
        yield running


@pytest.fixture
def client(server) -> Client:
    return Client(server)


def until(is_so, seconds: float = 5) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.01)


# ---- the model -----------------------------------------------------------------------------------


@pytest.mark.parametrize("task", requests())
def test_a_task_is_answered_as_from_python(speaking_model, world, task):
    path = sorted((world / "data/img_genseg/coco2017/val2017").glob("*.jpg"))[0]
    image = Image.open(path).convert("RGB")
    needs = TASKS[requested_task(task)].needs
    request, options = {}, {}
    if needs == "text":
        request["text"] = options["text"] = "the red circle"
    elif needs == "regions":
        drawing = ("box", [[10, 20], [40.5, 60]])
        request["regions"] = [{"kind": drawing[0], "points": drawing[1]}]
        options["regions"] = [drawing]
    elif needs == "categories":
        request["things"] = options["things"] = ["ring", "star"]
    expected = predict(speaking_model, image, task, **options)
    with serve(Engine(speaking_model), []) as server:
        client = Client(server)
        key = client.upload(Image.open(path), "PNG")
        update = client.ask(task=task, picture=key, **request)
    result = update["result"]
    assert update["state"] == "done" and len(result["masks"]) == len(expected.masks)
    assert (task in ("gcg", "chat")) == (not result["masks"])
    for found, mask, label, score in zip(
        result["masks"], expected.masks, expected.labels, expected.scores, strict=True
    ):
        assert np.array_equal(coco_mask.decode(found["segmentation"]), mask)
        assert found["label"] == label and abs(found["score"] - score) < 1e-3
        assert found["area"] == mask.sum()


def test_the_threshold_of_panoptic_masks_is_the_page_s(speaking_model):
    image = picture_with_box((10, 10, 20, 16))
    with serve(Engine(speaking_model), [("x", image)]) as server:
        client = Client(server)
        for threshold, own in ((None, speaking_model.config.score_threshold), (1, 1), (0.2, 0.2)):
            result = client.ask(task="panoptic", score_threshold=threshold)["result"]
            assert result["threshold"] == own
            assert all(mask["score"] >= own for mask in result["masks"])
            assert bool(result["masks"]) == (threshold != 1)


def test_a_phrase_of_any_score_is_answered_with_the_presence_to_show_it_from(speaking_model):
    speaking_model = copy.copy(speaking_model)
    speaking_model.config = speaking_model.config.resolve(presence=1.0)
    with serve(Engine(speaking_model)) as server:
        result = Client(server).ask(task="refer", text="the ring")["result"]
    assert len(result["masks"]) == 1 and result["threshold"] == 1


def test_an_answer_ends_when_it_is_cancelled(speaking_model):
    heard = []

    def on_text(text: str) -> None:
        heard.append(text)
        if len(heard) == 2:  # the first comes before the answer
            raise demo.CancelledError

    engine = Engine(speaking_model)
    question = demo.Question("chat", "key", picture_with_box((10, 10, 20, 16)), text="what is it?")
    with pytest.raises(demo.CancelledError):
        engine.answer(question, on_text)
    assert engine.answer(question, heard.append)["text"] is not None


def test_a_second_picture_shows_the_regions(speaking_model):
    image, other = picture_with_box((10, 10, 20, 16)), picture_with_box((5, 5, 9, 9), (90, 70))
    region = ("scribble", [[5, 5], [80, 60]])
    expected = predict(speaking_model, image, "vgd", regions=[region], region_image=other)
    with serve(Engine(speaking_model), []) as server:
        client = Client(server)
        keys = {"picture": client.upload(image), "region_picture": client.upload(other)}
        regions = [{"kind": region[0], "points": region[1]}]
        found = client.ask(task="vgd", regions=regions, **keys)["result"]["masks"]
    areas = [mask["area"] for mask in found]
    assert areas and areas == expected.masks.sum(axis=(1, 2)).tolist()


def test_a_stage_1_checkpoint_says_which_tasks_it_has(segmentor):
    tasks = Engine(segmentor).describe()["tasks"]
    available = {name for name, about in tasks.items() if about["is_available"]}
    assert available == {"panoptic", "instance", "semantic"}
    with serve(Engine(segmentor)) as server:
        client = Client(server)
        assert client.ask(task="semantic", text="")["result"]["masks"]
        refused = client.ask(task="refer", text="the ring")
    assert refused["state"] == "failed" and "stage-1 checkpoint" in refused["error"]


def test_what_the_model_refuses_is_said_in_words(speaking_model):
    cases = {
        "needs a text": {"text": ""},
        "contains <SEG>": {"text": "the <SEG>"},
        "named twice": {"task": "semantic", "things": ["ring", "ring"]},
        "needs regions": {"task": "vgd"},
        "is outside": {
            "task": "interactive",
            "regions": [{"kind": "point", "points": [[900, 9]]}],
        },
    }
    with serve(Engine(speaking_model)) as server:
        client = Client(server)
        for words, request in cases.items():
            update = client.ask(**request)
            assert update["state"] == "failed" and words in update["error"], update
        assert client.ask(text="the ring")["state"] == "done"


def test_nothing_that_a_request_names_is_opened(speaking_model, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("ring\nstar\n")
    opened, is_on = [], [True]

    def audit(event: str, arguments: tuple) -> None:
        if is_on[0] and event == "open" and "secret" in str(arguments[0]):
            opened.append(arguments[0])

    sys.addaudithook(audit)
    try:
        with serve(Engine(speaking_model)) as server:
            client = Client(server)
            for request in ({"task": "semantic", "things": [str(secret)]}, {"text": str(secret)}):
                client.ask(**request)
            client.submit(410, picture=str(secret))
            for path in (str(secret), f"/pictures/{secret}", "/pictures/..%2f..%2fsecret.txt"):
                assert client.send("GET", path)[0] in (404, 410)
    finally:
        is_on[0] = False
    assert not opened


# ---- the page and its senders --------------------------------------------------------------------


def test_the_page_loads_nothing_else_and_holds_no_foreign_markup(server, client):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port)
    connection.request("GET", "/")
    reply = connection.getresponse()
    page, policy = reply.read().decode(), reply.headers["Content-Security-Policy"]
    connection.close()
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    nonce = policy.partition("script-src 'nonce-")[2].partition("'")[0]
    assert len(nonce) > 20 and page.count(f'nonce="{nonce}"') == page.count("nonce=") == 3
    assert "http:" not in page and "https:" not in page and "{{" not in page
    assert "<b>" not in page and page.count("</script>") == 2
    assert "innerHTML" not in page and "outerHTML" not in page and "insertAdjacent" not in page
    assert nonce not in client.send("GET", "/")[1].decode()
    facts = page.partition('id="facts"')[2].partition(">")[2].partition("</script>")[0]
    facts = json.loads(facts)
    assert facts["title"] == "a <b>model</b>" and facts["token"] == server.token
    for task in requests():
        assert f"\n  {task}: [" in page
    for kind in demo.KINDS:
        assert f'name="tool" value="{kind}"' in page


@pytest.mark.parametrize("path", ["/", f"/pictures/{EXAMPLE}"])
@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "127.0.0.1.evil.example:{port}"},
        {"Host": "10.0.0.7:{port}"},
        {"Host": "[::1"},
        {"Host": None},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
    ],
    ids=str,
)
def test_requests_of_other_sites_are_refused(client, path, headers):
    headers = {name: value and value.format(port=client.port) for name, value in headers.items()}
    status, content = client.send("GET", path, **headers)
    assert status == 403 and json.loads(content)["error"]


@pytest.mark.parametrize("token", [None, "", "x", "é".encode().decode("latin-1")])
def test_without_the_page_s_token_nothing_is_done(server, client, token):
    for method, path in (("GET", f"/pictures/{EXAMPLE}"), ("POST", "/jobs"), ("DELETE", "/jobs/x")):
        assert client.send(method, path, b"{}", X_Token=token)[0] == 403
    assert not server.queue.jobs


def test_own_names_are_served_and_those_of_a_public_address_are_its_numbers(engine, client):
    for host in ("localhost:8080", "127.0.0.1", "[::1]:9", "LOCALHOST"):
        origin = f"http://{host}"
        assert client.send("GET", f"/pictures/{EXAMPLE}", Host=host, Origin=origin)[0] == 200
    public = DemoServer(("0.0.0.0", 0), engine)
    hosts = {"192.168.1.7:80": True, socket.gethostname(): True, "evil.example": False, "": False}
    assert {host: public.is_own(host) for host in hosts} == hosts
    public.server_close()


@pytest.mark.parametrize(
    ("content", "status", "words"),
    [
        (b"", 415, "no picture"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 415, "no picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", 415, "no picture"),
        (OVERSIZED, 413, "larger than 24 MB"),
        (encoded(Image.effect_noise((64, 64), 90), "JPEG")[:-900], 415, "damaged or cut short"),
        (encoded(Image.effect_noise((64, 64), 90))[:900], 415, "damaged or cut short"),
        (huge_png(10_000, 10_000), 413, "50 million pixels"),
        (huge_png(2**30, 2**30), 413, "50 million pixels"),
        (huge_png(0, 0), 415, "picture"),
    ],
    ids=["empty", "svg", "eps", "bytes", "jpeg", "png", "pixels", "bomb", "nothing"],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_uploads_that_are_no_pictures_are_refused_in_words(client, content, status, words):
    document = client.call("POST", "/pictures", content, status)
    assert words in document["error"] and "object at" not in document["error"]


def test_an_upload_says_how_long_it_is(client):
    for headers in (
        {"Content_Length": None},
        {"Content_Length": "-1"},
        {"Content_Length": "9" * 30},
        {"Transfer_Encoding": "chunked"},
    ):
        assert client.send("POST", "/pictures", b"0", **headers)[0] == 411


def test_pictures_come_upright_in_any_format_and_large_ones_smaller(client):
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"):
        image = picture_with_box((5, 5, 9, 9), (60, 40))
        document = client.call("POST", "/pictures", encoded(image, kind))
        assert (document["width"], document["height"]) == (60, 40)
    exif = Image.Exif()
    exif[274] = 6
    content = io.BytesIO()
    Image.new("RGB", (4000, 2000)).save(content, "JPEG", exif=exif)
    document = client.call("POST", "/pictures", content.getvalue())
    assert (document["width"], document["height"]) == (800, 1600)
    status, content = client.send("GET", f"/pictures/{document['id']}")
    assert status == 200 and Image.open(io.BytesIO(content)).size == (800, 1600)


def test_old_pictures_are_let_go_and_examples_stay(server, client):
    keys = [client.upload(Image.new("RGB", (8, 8), (n, 0, 0))) for n in range(30)]
    assert len(server.pictures.kept) == demo.KEPT_PICTURES
    assert client.send("GET", f"/pictures/{keys[0]}")[0] == 410
    assert client.send("GET", f"/pictures/{EXAMPLE}")[0] == 200


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "/../../etc/passwd",
        "//etc/passwd",
        "/pictures/../../etc/passwd",
        "/pictures/%2e%2e%2fetc%2fpasswd",
        "/pictures/" + "x" * 5000,
        "/page.html",
        "/jobs/",
        "http://evil.example/",
        "/favicon.ico",
        "/jobs/nothing",
    ],
)
def test_there_is_nothing_at_other_addresses(client, path):
    for method in ("GET", "POST", "DELETE"):
        status, content = client.send(method, path, b"" if method == "POST" else None)
        assert status in (404, 410) and json.loads(content)["error"]
    assert client.send("PUT", path)[0] == 501


REGION = {"kind": "point", "points": [[1, 1]]}


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"[1]",
        b"{" * 100_000,
        b"[" * 100_000,
        b"\xff\xfe",
        b'{"task": ' + b"9" * 5000 + b"}",
        {"task": "everything"},
        {"task": ["refer"]},
        {"text": 5},
        {"text": {"a": 1}},
        {"text": "x" * 4001},
        {"things": "ring"},
        {"things": [["ring"]]},
        {"things": ["x"] * 1001},
        {"score_threshold": 2},
        {"score_threshold": "0.5"},
        {"regions": [1]},
        {"regions": [{}]},
        {"regions": [REGION] * 11},
        {"regions": [REGION | {"kind": "star"}]},
        {"regions": [REGION | {"kind": ["point"]}]},
        {"regions": [REGION | {"points": "ab"}]},
        {"regions": [REGION | {"points": [[1]]}]},
        {"regions": [REGION | {"points": [["1", "2"]]}]},
        {"regions": [REGION | {"points": [[True, False]]}]},
        {"regions": [REGION | {"points": [[1, float("nan")]]}]},
        {"regions": [REGION | {"points": [[1, float("inf")]]}]},
        {"regions": [REGION | {"points": [[1, 1]] * 5001}]},
    ],
    ids=lambda document: str(document)[:50],
)
def test_requests_of_another_form_are_refused(engine, client, document):
    if isinstance(document, dict):
        document = {"task": "refer", "picture": EXAMPLE, "text": "x"} | document
        document = json.dumps(document).encode()
    status, content = client.send("POST", "/jobs", document)
    assert status == 400 and json.loads(content)["error"].endswith(".")
    assert not engine.questions


@pytest.mark.parametrize("picture", [None, 5, ["a"], "0" * 32 + "1", "../x", {}])
def test_a_picture_that_is_not_there_is_asked_for_again(client, picture):
    client.submit(410, picture=picture, text="x")


def test_the_json_of_a_request_is_limited(client):
    body = b'{"text": "' + b"x" * demo.MAX_REQUEST_BYTES + b'"}'
    assert client.send("POST", "/jobs", body)[0] == 413


# ---- the queue -----------------------------------------------------------------------------------


def test_places_are_shown_and_a_request_can_be_cancelled_while_it_is_answered(client, engine):
    first, second, third = (client.submit(text=text) for text in ("wait", "wait", "last"))
    until(lambda: engine.questions)
    update = client.call("GET", f"/jobs/{first}?seen=running.0.0")
    assert update["state"] == "running" and update["text"].startswith("so far")
    assert client.call("GET", f"/jobs/{third}")["place"] == 2
    client.call("DELETE", f"/jobs/{second}")
    assert client.call("GET", f"/jobs/{third}?seen=waiting.2.0")["place"] == 1
    started = time.monotonic()
    client.call("DELETE", f"/jobs/{first}")
    assert client.finish(third)["result"]["masks"][0]["label"] == "last"
    assert time.monotonic() - started < 3
    assert [client.finish(key)["state"] for key in (first, second)] == ["cancelled"] * 2
    assert [question.text for question in engine.questions] == ["wait", "last"]


def test_a_request_that_nobody_waits_for_is_dropped(client, engine, monkeypatch):
    monkeypatch.setattr(demo, "ABANDONED_SECONDS", 0.3)
    abandoned = [client.submit(text=text) for text in ("wait", "unheard")]
    until(lambda: engine.questions)
    time.sleep(0.4)
    assert client.ask(text="next")["state"] == "done"
    assert [question.text for question in engine.questions] == ["wait", "next"]
    assert {client.finish(key)["state"] for key in abandoned} == {"cancelled"}


def test_errors_are_in_words_and_the_next_request_is_answered(client, capsys):
    assert "no such phrase" in client.ask(text="refuse")["error"]
    broken = client.ask(text="break")
    assert broken["state"] == "failed" and "the server's terminal" in broken["error"]
    assert "RuntimeError: broken" in capsys.readouterr().err
    assert client.ask(text="note")["result"]["notes"] == ["a note"]


def test_the_queue_is_no_longer_than_it_may_be(client, engine, monkeypatch):
    monkeypatch.setattr(demo, "MAX_WAITING", 2)
    running = client.submit(text="wait")
    until(lambda: engine.questions)
    waiting = [client.submit(text="x") for _ in range(2)]
    client.submit(503, text="x")
    client.call("DELETE", f"/jobs/{running}")
    assert {client.finish(key)["state"] for key in waiting} == {"done"}


def test_answers_are_let_go(client, server, monkeypatch):
    monkeypatch.setattr(demo, "KEPT_ANSWERS", 3)
    keys = [client.submit(text="x") for _ in range(8)]
    client.finish(keys[-1])
    until(lambda: len(server.queue.jobs) <= 3)
    assert client.send("GET", f"/jobs/{keys[0]}")[0] == 404


# ---- many senders, and bad ones ------------------------------------------------------------------


def test_slow_senders_are_cut_off_and_nobody_waits_for_them(client, monkeypatch):
    monkeypatch.setattr(demo, "RECEIVE_SECONDS", 0.6)
    address = ("127.0.0.1", client.port)
    head = f"POST /pictures HTTP/1.1\r\nHost: localhost\r\nX-Token: {client.token}\r\n"
    starts = ["", "GET", head, f"{head}Content-Length: 1000\r\n\r\nabc"]
    senders = [socket.create_connection(address) for _ in starts]
    for sender, start in zip(senders, starts, strict=True):
        sender.sendall(start.encode())
    assert client.ask(text="x")["state"] == "done"
    started = time.monotonic()
    while time.monotonic() - started < 0.8:  # a byte now and then does not help
        senders[3].send(b"x")
        time.sleep(0.1)
    replies = []
    for sender in senders:
        sender.settimeout(5)
        reply = b""
        while received := sender.recv(4096):
            reply += received
        replies.append(reply)
        sender.close()
    assert replies[:3] == [b""] * 3 and b"408" in replies[3] and b"too long" in replies[3]


def test_connections_are_limited(client, server, monkeypatch):
    server.connections = threading.BoundedSemaphore(3)
    idle = [socket.create_connection(("127.0.0.1", client.port)) for _ in range(3)]
    time.sleep(0.2)
    with pytest.raises(OSError):
        client.send("GET", "/")
    for connection in idle:
        connection.close()
    until(lambda: client_answers(client))


def client_answers(client: Client) -> bool:
    try:
        return client.send("GET", "/")[0] == 200
    except OSError:
        return False


SCRIPT = "<script>alert('x')</script>"


def good_request(client: Client, rng: random.Random) -> None:
    """A picture of its own and a question of its own: the answer is of them."""
    box = [rng.randrange(1, 20), rng.randrange(1, 12), rng.randrange(2, 30), rng.randrange(2, 20)]
    text = f"{SCRIPT} {rng.random()}"
    key = client.upload(picture_with_box(box), rng.choice(["PNG", "BMP"]))
    mask = client.ask(picture=key, text=text)["result"]["masks"][0]
    assert mask["bbox"] == box and mask["label"] == text
    assert coco_mask.decode(mask["segmentation"]).sum() == mask["area"] == box[2] * box[3]


def bad_request(client: Client, rng: random.Random) -> None:
    """One of many kinds, which gets a refusal in words or an end."""
    truncated = encoded(Image.effect_noise((64, 64), 90))[: rng.randrange(9, 4000)]
    path, body, headers, statuses = rng.choice(
        [
            ("/pictures", OVERSIZED, {}, (413,)),
            ("/pictures", truncated, {}, (415,)),
            ("/pictures", huge_png(10_000, 10_000), {}, (413,)),
            ("/pictures", b"GIF89a" + rng.randbytes(40), {}, (413, 415)),
            ("/pictures", SCRIPT.encode(), {"Content_Type": "image/png"}, (415,)),
            ("/pictures", b"short", {"Content_Length": "500"}, (400,)),
            ("/pictures/../../etc/passwd", b"", {}, (404,)),
            ("/jobs", b"[" * 50_000, {}, (400,)),
            ("/jobs", b"{}", {"Origin": "http://evil.example"}, (403,)),
            ("/jobs", b"{}", {"Host": "evil.example"}, (403,)),
            ("/jobs", b"{}", {"X_Token": SCRIPT}, (403,)),
            ("slow", b"", {}, ()),
        ]
    )
    if path == "slow":
        with socket.create_connection(("127.0.0.1", client.port)) as sender:
            sender.sendall(b"POST /pictures HTTP/1.1\r\nHost:")
            time.sleep(0.2)
        return
    if "Content_Length" in headers:
        with socket.create_connection(("127.0.0.1", client.port)) as sender:
            head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nX-Token: {client.token}\r\n"
            sender.sendall(f"{head}Content-Length: 500\r\n\r\n".encode() + body)
            sender.shutdown(socket.SHUT_WR)
            assert b"400" in sender.recv(4096)
        return
    status, content = client.send("POST", path, body, **headers)
    assert status in statuses and json.loads(content)["error"]


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def load(server: DemoServer, num_requests: int, num_clients: int = 8) -> None:
    """Requests of several clients at once, a third of them bad."""
    failures, numbers = [], iter(range(num_requests))

    def work() -> None:
        client = Client(server)
        for number in numbers:
            rng = random.Random(number)
            try:
                (bad_request if number % 3 == 0 else good_request)(client, rng)
            except Exception as error:
                failures.append((number, repr(error)))

    threads = [threading.Thread(target=work) for _ in range(num_clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=300)
    assert not any(thread.is_alive() for thread in threads) and not failures, failures[:5]


@pytest.mark.parametrize("num_requests", [96, pytest.param(400, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_many_senders_of_whom_a_third_are_bad(num_requests, capsys):
    with serve(StubEngine()) as server:
        load(server, 48)  # what is kept is full then
        before, num_threads = resident_bytes(), threading.active_count()
        load(server, num_requests)
        until(lambda: threading.active_count() <= num_threads)
        grown = (resident_bytes() - before) / 2**20
        jobs = server.queue.jobs.values()
        assert all(job.state not in ("waiting", "running") for job in jobs)
        assert len(jobs) <= demo.KEPT_ANSWERS + 1
        assert client_answers(Client(server))
    assert grown < 30, f"{grown:.0f} MB more than before"
    assert "Traceback" not in capsys.readouterr().err


# ---- the command ---------------------------------------------------------------------------------


def run(monkeypatch, *arguments) -> int:
    def stop(server, *_):
        raise KeyboardInterrupt

    monkeypatch.setattr(DemoServer, "serve_forever", stop)
    return command.main([str(argument) for argument in arguments])


def test_the_command_says_where_the_page_is(segmentor, tmp_path, monkeypatch, capsys):
    checkpoint = save_checkpoint(tmp_path / "run", segmentor, segmentor.config, None, 1, 5, {})
    for host, is_public in (("127.0.0.1", False), ("0.0.0.0", True)):
        arguments = ["--checkpoint", checkpoint, "--port", 0, "--host", host]
        assert run(monkeypatch, *arguments) == 0
        written = capsys.readouterr()
        assert written.out.startswith(f"http://{host}:")
        assert ("no password" in written.err) == is_public


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--port", "{taken}"], "in use"),
        (["--port", "99999999"], "port"),
        (["--host", "203.0.113.9"], "assign"),
        (["--examples", "{empty}"], "no pictures in it"),
        (["--examples", "{empty}/absent"], "absent"),
        (["--checkpoint", "{empty}"], "no weights"),
    ],
)
def test_a_command_that_cannot_be_says_why(
    segmentor, server, tmp_path, monkeypatch, capsys, flags, words
):
    checkpoint = save_checkpoint(tmp_path / "run", segmentor, segmentor.config, None, 1, 5, {})
    (tmp_path / "empty").mkdir()
    names = {"taken": server.server_port, "empty": tmp_path / "empty"}
    flags = [flag.format(**names) for flag in flags]
    if "--checkpoint" not in flags:
        flags += ["--checkpoint", checkpoint]
    assert run(monkeypatch, *flags) == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


def test_examples_are_a_folder_s_pictures_or_drawings(tmp_path, capsys):
    assert len(command.read_examples(None)) == command.NUM_SCENES
    Image.new("RGB", (5, 4)).save(tmp_path / "b.PNG")
    Image.new("L", (3, 2)).save(tmp_path / "a.jpg")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "bad.png").write_text("x")
    examples = command.read_examples(tmp_path)
    assert [(name, image.size) for name, image in examples] == [
        ("a.jpg", (3, 2)),
        ("b.PNG", (5, 4)),
    ]
    assert "bad.png: cannot be read as an image" in capsys.readouterr().err
