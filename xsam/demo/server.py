"""The server of the page: pictures in memory, a queue in front of one model, and HTTP around them.

`python -m xsam.demo` starts it (`__main__.py`), `page.html` is what it shows. The page sends a
picture (POST /pictures), then a request about it (POST /jobs), and asks how far that is
(GET /jobs/ID, answered when something has changed) until it has its masks. Only this file and the
page are part of that conversation; nothing of a request names a file on the disk.
"""

import hashlib
import io
import ipaddress
import json
import math
import re
import secrets
import socket
import sys
import threading
import time
import traceback
import warnings
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from typing import Any
from urllib.parse import parse_qs, urlsplit

from PIL import Image

from xsam.images import read_image
from xsam.inference import encode_image, predict
from xsam.model import XSAM, Segmentor
from xsam.regions import KINDS
from xsam.report.colours import PALETTE
from xsam.results import SegmentationResult
from xsam.tasks import TASKS, requests

# What Pillow may open: no format whose decoder runs another program.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")

MAX_BYTES = 24 * 2**20  # of an uploaded picture
MAX_PIXELS = 50_000_000  # of an uploaded picture
WORKING_SIDE = 1600  # pixels; a larger picture is made smaller, for 200 masks of it are held
LOSSLESS_PIXELS = 2**18  # a picture of no more is shown without a loss
KEPT_PICTURES = 24  # the last that were sent
KEPT_ENCODED = 4

MAX_REQUEST_BYTES = 2**20  # of a request's JSON
MAX_LETTERS = 4_000  # of a text
MAX_NAMES = 1_000
MAX_REGIONS = 10
MAX_POINTS = 5_000  # of a region

MAX_WAITING = 24  # requests in the queue
KEPT_ANSWERS = 64
ABANDONED_SECONDS = 150  # without a question from the page; browsers slow hidden pages to a minute
POLL_SECONDS = 15
RECEIVE_SECONDS = 30  # for a whole request to arrive
MAX_CONNECTIONS = 64  # each may hold MAX_BYTES for a while

LOOPBACK = {"localhost", "127.0.0.1", "::1"}


class RefusedError(Exception):
    """A request that is not served, with its HTTP status and the reason in words."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status = status


class CancelledError(Exception):
    """Ends a request that nobody waits for any more."""


# ---- pictures ------------------------------------------------------------------------------------


def decode_picture(content: bytes) -> Image.Image:
    """An uploaded picture as viewers show it, made smaller where a side is above WORKING_SIDE. Its
    size is read from its header first. Raises RefusedError where it is none or too large."""
    Image.init()  # it knows all formats only then
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as header:
            width, height = header.size
    except (OSError, SyntaxError, ValueError) as error:
        kinds = "JPEG, PNG, WebP, GIF, BMP or TIFF"
        raise RefusedError(415, f"This file is no picture that can be read ({kinds}).") from error
    except Image.DecompressionBombError:
        width = height = MAX_PIXELS
    if width * height > MAX_PIXELS:
        most = MAX_PIXELS // 10**6
        raise RefusedError(413, f"The picture has more than {most} million pixels.")
    try:
        image = read_image(io.BytesIO(content))
    except ValueError as error:
        cause = error.__cause__ or error
        raise RefusedError(415, f"The picture is damaged or cut short ({cause}).") from error
    image.thumbnail((WORKING_SIDE, WORKING_SIDE), Image.Resampling.LANCZOS)
    return image


class Pictures:
    """The pictures that were sent last, by the hash of their bytes, and the examples."""

    def __init__(self, examples: list[tuple[str, Image.Image]]):
        self.examples = {f"{number:032x}": each for number, each in enumerate(examples)}
        for _, image in examples:
            image.thumbnail((WORKING_SIDE, WORKING_SIDE), Image.Resampling.LANCZOS)
        self.kept: OrderedDict[str, Image.Image] = OrderedDict()
        self.lock = threading.Lock()
        self.decoding = threading.Lock()  # one at a time: each may take 150 MB

    def add(self, content: bytes) -> tuple[str, Image.Image]:
        """Keeps an uploaded picture; its key, and the picture. Raises as `decode_picture` does."""
        key = hashlib.sha256(content).hexdigest()[:32]
        with self.decoding:
            image = decode_picture(content)
        with self.lock:
            self.kept[key] = image
            self.kept.move_to_end(key)
            while len(self.kept) > KEPT_PICTURES:
                self.kept.popitem(last=False)
        return key, image

    def find(self, key: Any) -> Image.Image:
        """The picture of a key. Raises RefusedError where there is none, or no longer."""
        with self.lock:
            if isinstance(key, str) and key in self.examples:
                return self.examples[key][1]
            if isinstance(key, str) and key in self.kept:
                self.kept.move_to_end(key)
                return self.kept[key]
        raise RefusedError(410, "The server no longer has this picture. Open it again.")


# ---- requests ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """What the page asks of the model."""

    task: str
    picture: str  # the key of `image`
    image: Image.Image
    text: str = ""
    things: list[str] = field(default_factory=list)
    stuff: list[str] = field(default_factory=list)
    drawings: list[tuple[str, list]] = field(default_factory=list)  # kind and points [[x, y], ...]
    region_image: Image.Image | None = None
    score_threshold: float | None = None  # panoptic; None: the checkpoint's


def read_question(document: Any, pictures: Pictures) -> Question:
    """The JSON of a request. Raises RefusedError where it has another form or too much in it."""

    def take(key: str, kind: type, most: int) -> Any:
        value = document.get(key) or kind()
        if not isinstance(value, kind):
            raise RefusedError(400, f"{key} is not of the form that the page sends.")
        if len(value) > most:
            raise RefusedError(400, f"{key} has {len(value)} entries or letters, above {most}.")
        return value

    if not isinstance(document, dict) or document.get("task") not in tuple(requests()):
        raise RefusedError(400, "The request names no task.")
    lists = {key: take(key, list, MAX_NAMES) for key in ("things", "stuff")}
    for names in lists.values():
        if not all(isinstance(name, str) and len(name) <= MAX_LETTERS for name in names):
            raise RefusedError(400, "A name is not of the form that the page sends.")
    drawings = []
    for region in take("regions", list, MAX_REGIONS):
        region = region if isinstance(region, dict) else {}
        kind, points = region.get("kind"), region.get("points")
        if (
            kind not in tuple(KINDS)
            or not isinstance(points, list)
            or not all(map(_is_pair, points))
        ):
            raise RefusedError(400, "A region is not of the form that the page sends.")
        if len(points) > MAX_POINTS:
            raise RefusedError(400, f"A region has more than {MAX_POINTS} points.")
        drawings.append((kind, points))
    threshold = document.get("score_threshold")
    if threshold is not None and not (_is_number(threshold) and 0 <= threshold <= 1):
        raise RefusedError(400, "A threshold is not from 0 to 1.")
    shown = document.get("region_picture")
    return Question(
        task=document["task"],
        picture=document.get("picture"),
        image=pictures.find(document.get("picture")),
        text=take("text", str, MAX_LETTERS).strip(),
        drawings=drawings,
        region_image=pictures.find(shown) if shown else None,
        score_threshold=threshold,
        **lists,
    )


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_pair(point: Any) -> bool:
    return isinstance(point, list) and len(point) == 2 and all(map(_is_number, point))


class Engine:
    """Every call that the server makes of a model. One thread at a time may `answer`."""

    def __init__(self, model: Segmentor | XSAM):
        self.model = model
        self.encoded = OrderedDict()  # of the pictures asked about last

    def describe(self) -> dict:
        """What the page has to know of the model: JSON-ready."""
        tasks = {
            word: {
                "needs": task.needs,
                "is_available": self.model.stage == 3 or task.needs == "categories",
            }
            for task in TASKS.values()
            for word in task.requests
        }
        names = [category["name"] for category in self.model.config.categories]
        return {"tasks": tasks, "categories": names, "stage": self.model.stage}

    def answer(self, question: Question, on_text: Callable[[str], None]) -> dict:
        """The model's answer, JSON-ready (`pack_result`). `on_text` is called with the answer so
        far, and what it raises ends the request. Raises ValueError where the model cannot be asked
        so."""
        image = self._encode(question)
        on_text("")
        options: dict[str, Any] = {"text": question.text, "regions": question.drawings}
        options |= {"things": question.things or None, "stuff": question.stuff or None}
        options["region_image"] = question.region_image
        config, threshold = self.model.config, None  # from which the page shows masks at first
        of_threshold = requests()[question.task].threshold
        if of_threshold == "presence":
            options["presence"], threshold = 0.0, config.presence
        elif of_threshold == "score_threshold":
            threshold = question.score_threshold
            threshold = config.score_threshold if threshold is None else threshold
            options["score_threshold"] = threshold
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            result = predict(self.model, image, question.task, on_text=on_text, **options)
        notes = [str(each.message) for each in caught if each.category is UserWarning]
        return pack_result(result, notes, threshold)

    def _encode(self, question: Question) -> Any:
        if question.picture not in self.encoded:
            self.encoded[question.picture] = encode_image(self.model, question.image)
        self.encoded.move_to_end(question.picture)
        while len(self.encoded) > KEPT_ENCODED:
            self.encoded.popitem(last=False)
        return self.encoded[question.picture]


def pack_result(
    result: SegmentationResult, notes: list[str], threshold: float | None = None
) -> dict:
    """A result as the page takes it: the segments of `to_dict`, each with its span in the text, and
    the score from which a mask is shown at first."""
    if result.num_prompts > 1:
        notes = [*notes, f"The names did not fit one prompt: asked in {result.num_prompts}."]
    segments = zip(result.to_dict()["segments"], result.spans, strict=True)
    masks = [segment | {"span": span} for segment, span in segments]
    threshold = result.threshold if threshold is None else threshold
    return {"text": result.text, "masks": masks, "threshold": threshold, "notes": notes}


# ---- the queue -----------------------------------------------------------------------------------


@dataclass(eq=False)
class Job:
    """A request on its way through the queue."""

    question: Question | None  # None once it has ended: the picture is let go
    key: str = field(default_factory=lambda: secrets.token_urlsafe(16))
    state: str = "waiting"  # running, done, failed, cancelled
    text: str = ""  # the answer so far
    outcome: dict = field(default_factory=dict)  # the result, or an error in words
    asked_at: float = field(default_factory=time.monotonic)  # when the page last asked for it


class Queue:
    """Answers requests one after the other, in a thread of its own."""

    def __init__(self, answer: Callable[[Question, Callable[[str], None]], dict]):
        self.answer = answer
        self.jobs: dict[str, Job] = {}  # in the order in which they came
        self.is_closed = False
        self.changed = threading.Condition()
        self.worker = ThreadPoolExecutor(1)

    def submit(self, question: Question) -> str:
        """The key of a new job. Raises RefusedError where too many are waiting."""
        with self.changed:
            if sum(job.state == "waiting" for job in self.jobs.values()) >= MAX_WAITING:
                raise RefusedError(503, f"{MAX_WAITING} requests are waiting. Try again later.")
            job = Job(question)
            self.jobs[job.key] = job
            self._forget()
        self.worker.submit(self._work, job)
        return job.key

    def follow(self, key: str, seen: str) -> dict:
        """What there is to say of a job, once its stamp is another than `seen` or POLL_SECONDS have
        passed. Raises RefusedError at an unknown job."""
        with self.changed:
            job = self._find(key)
            job.asked_at = time.monotonic()
            self.changed.wait_for(lambda: self._describe(job)["stamp"] != seen, POLL_SECONDS)
            job.asked_at = time.monotonic()
            return self._describe(job)

    def cancel(self, key: str) -> None:
        """Takes a job out of the queue, or ends it as soon as its answer grows. Raises RefusedError
        at an unknown job."""
        with self.changed:
            job = self._find(key)
            if job.state == "waiting":
                job.question = None
            if job.state in ("waiting", "running"):
                job.state = "cancelled"
            self.changed.notify_all()

    def close(self) -> None:
        """Answers nothing any more, and waits until the running job has ended."""
        self.is_closed = True
        self.worker.shutdown(cancel_futures=True)

    def _find(self, key: str) -> Job:
        if key not in self.jobs:
            raise RefusedError(404, "The server knows no such request.")
        return self.jobs[key]

    def _describe(self, job: Job) -> dict:
        before = [other for other in self.jobs.values() if other.question is not None]
        place = before.index(job) if job.state == "waiting" else 0
        stamp = f"{job.state}.{place}.{len(job.text)}"
        about = {"state": job.state, "place": place, "text": job.text, "stamp": stamp}
        return about | job.outcome

    def _forget(self) -> None:
        ended = [job.key for job in self.jobs.values() if job.question is None]
        for key in ended[:-KEPT_ANSWERS]:
            del self.jobs[key]

    def _work(self, job: Job) -> None:
        with self.changed:
            if job.state == "cancelled":
                return
            job.state = "running"
            self.changed.notify_all()
        state, outcome = self._run(job)
        with self.changed:
            if job.state == "running":
                job.state, job.outcome = state, outcome
            job.question = None
            self._forget()
            self.changed.notify_all()

    def _run(self, job: Job) -> tuple[str, dict]:
        def on_text(text: str) -> None:
            with self.changed:
                is_abandoned = time.monotonic() - job.asked_at > ABANDONED_SECONDS
                if job.state == "cancelled" or is_abandoned or self.is_closed:
                    raise CancelledError
                if text != job.text:
                    job.text = text
                    self.changed.notify_all()

        try:
            on_text("")
            return "done", {"result": self.answer(job.question, on_text)}
        except CancelledError:
            return "cancelled", {}
        except ValueError as error:
            return "failed", {"error": str(error)}
        except Exception:  # the next request may well succeed
            traceback.print_exc()
            reason = "The model stopped with an error, which the server's terminal shows."
            return "failed", {"error": reason}


# ---- HTTP ----------------------------------------------------------------------------------------


class DeadlineReader(io.RawIOBase):
    """Reads from a socket until a moment; TimeoutError afterwards, however little is missing."""

    def __init__(self, connection: socket.socket, seconds: float):
        self.connection, self.end = connection, time.monotonic() + seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        left = self.end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self.connection.settimeout(left)
        return self.connection.recv_into(buffer)


class Handler(BaseHTTPRequestHandler):
    """One request of one connection, as in HTTP/1.0."""

    server: "DemoServer"
    server_version, sys_version = "xsam", ""

    def setup(self) -> None:
        super().setup()
        self.rfile.close()
        self.rfile = io.BufferedReader(DeadlineReader(self.connection, RECEIVE_SECONDS))

    def answer_request(self) -> None:
        """Replies to a request, or says why not; what is still being sent then is taken."""
        try:
            self.check_sender()
            self.reply(200, *self.route())
        except RefusedError as refusal:
            self.send_error(refusal.status, str(refusal))
            self.drain()

    do_GET = do_POST = do_DELETE = answer_request

    def check_sender(self) -> None:
        """Raises RefusedError at what another site's page may have sent, under our address or under
        a name of its own that it has led to us."""
        hosts, origin = self.headers.get_all("Host", []), self.headers.get("Origin")
        if len(hosts) != 1 or not self.server.is_own(hosts[0]):
            raise RefusedError(403, "Open this page under its own address.")
        if origin is not None and origin.partition("://")[2] != hosts[0]:
            raise RefusedError(403, "Requests of other sites are refused.")
        if self.path != "/":
            token = self.headers.get("X-Token", "").encode()
            if not secrets.compare_digest(token, self.server.token.encode()):
                raise RefusedError(403, "The server has started anew. Load this page again.")

    def route(self) -> tuple[Any, ...]:
        """What `reply` takes after the status."""
        path, _, query = self.path.partition("?")
        server = self.server
        match self.command, *path.split("/"):
            case "GET", "", "":
                return server.page()
            case "POST", "", "pictures":
                key, image = server.pictures.add(self.body(MAX_BYTES))
                return ({"id": key, "width": image.width, "height": image.height},)
            case "GET", "", "pictures", key:
                content, image = io.BytesIO(), server.pictures.find(key)
                kind = "PNG" if image.width * image.height <= LOSSLESS_PIXELS else "JPEG"
                image.save(content, kind, quality=90)
                return content.getvalue(), f"image/{kind.lower()}"
            case "POST", "", "jobs":
                try:
                    document = json.loads(self.body(MAX_REQUEST_BYTES))
                except (ValueError, RecursionError) as error:
                    raise RefusedError(400, "The request is no JSON.") from error
                question = read_question(document, server.pictures)
                return ({"id": server.queue.submit(question)},)
            case "GET", "", "jobs", key:
                return (server.queue.follow(key, parse_qs(query).get("seen", [""])[0]),)
            case "DELETE", "", "jobs", key:
                server.queue.cancel(key)
                return ({},)
        raise RefusedError(404, "There is nothing at this address.")

    def body(self, most: int) -> bytes:
        """What was sent, at most so many bytes, or RefusedError."""
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch(r"\d{1,12}", length, re.ASCII) or "Transfer-Encoding" in self.headers:
            raise RefusedError(411, "The request does not say how long it is.")
        if int(length) > most:
            raise RefusedError(413, f"The upload is larger than {most / 2**20:.0f} MB.")
        try:
            content = self.rfile.read(int(length))
        except TimeoutError as error:
            raise RefusedError(408, "The upload took too long.") from error
        if len(content) < int(length):
            raise RefusedError(400, "The upload ended early.")
        return content

    def reply(
        self,
        status: int,
        content: bytes | dict,
        kind: str = "application/json",
        policy: str = "default-src 'none'",
    ) -> None:
        """Sends bytes of a type, or JSON; `policy` is what a page may load."""
        if isinstance(content, dict):
            content = json.dumps(content).encode()
        self.connection.settimeout(RECEIVE_SECONDS)
        self.send_response(status)
        headers = {
            "Content-Type": kind,
            "Content-Length": str(len(content)),
            "Content-Security-Policy": policy,
            "Cache-Control": "no-store",
            "Cross-Origin-Opener-Policy": "same-origin",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
        }
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Replies with an error as JSON, also where the standard library finds no HTTP."""
        self.reply(code, {"error": message or "The request cannot be read."})

    def drain(self) -> None:
        """Reads what is still being sent, for two seconds: a connection that is closed with unread
        bytes is reset, and the sender would never read the refusal."""
        self.connection.shutdown(socket.SHUT_WR)
        reader, end = DeadlineReader(self.connection, 2), bytearray(2**16)
        while reader.readinto(end):
            pass

    def log_message(self, format: str, *arguments: Any) -> None:
        """Logs nothing: requests are private."""


class DemoServer(ThreadingHTTPServer):
    """Serves the page for one model. `engine` describes and answers as `Engine` does."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(
        self,
        address: tuple[str, int],
        engine: Engine,
        examples: list[tuple[str, Image.Image]] = (),
        title: str = "",
    ):
        """Raises OSError where the address is taken or not ours."""
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.engine, self.title = engine, title
        self.pictures, self.queue = Pictures(list(examples)), Queue(engine.answer)
        self.token = secrets.token_urlsafe(24)
        self.connections = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self.hosts = LOOPBACK | {address[0].lower(), socket.gethostname().lower()} - {""}
        self.is_public = address[0].lower() not in LOOPBACK
        super().__init__(address, Handler)  # closes itself where that fails

    def is_own(self, host: str) -> bool:
        """Whether a Host header is an address of ours: no name that another site could have led
        here. A tunnel may have another port."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
            if not self.is_public:
                return name in LOOPBACK
            return name in self.hosts or bool(ipaddress.ip_address(name))
        except ValueError:
            return False

    def page(self) -> tuple[bytes, str, str]:
        """The page, its type and its policy: it runs and loads nothing but what is in it."""
        nonce = secrets.token_urlsafe(16)
        facts = {
            "token": self.token,
            "title": self.title,
            "limits": {"bytes": MAX_BYTES, "regions": MAX_REGIONS},
            "palette": PALETTE.tolist(),
            "examples": [
                {"id": key, "name": name, "width": image.width, "height": image.height}
                for key, (name, image) in self.pictures.examples.items()
            ],
        }
        content = json.dumps(facts | self.engine.describe()).replace("<", "\\u003c")
        page = resources.files("xsam.demo").joinpath("page.html").read_text(encoding="utf-8")
        page = page.replace("{{nonce}}", nonce).replace("{{facts}}", content)
        policy = (
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; "
            "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
            "frame-ancestors 'none'"
        )
        return page.encode(), "text/html; charset=utf-8", policy

    def process_request(self, request: socket.socket, client_address: Any) -> None:
        if self.connections.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: socket.socket, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.connections.release()

    def handle_error(self, request: socket.socket, client_address: Any) -> None:
        """A sender that has gone away is not an error of the server."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)

    def server_close(self) -> None:
        super().server_close()
        self.queue.close()
