"""The page in Chromium: its tasks, ways of drawing, keys and widths. Needs the extra `browser` and
a Chromium, and is skipped where one of them is absent. XSAM_SCREENSHOTS names a folder for pictures
of what it looked like.

pytest tests/test_page.py
"""

import io
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from pages import SAID, StubEngine, picture_with_box, serve
from PIL import Image
from pycocotools import mask as coco_mask

from xsam.demo.server import DemoServer
from xsam.tasks import TASKS, requested_task, requests

playwright_api = pytest.importorskip(
    "playwright.sync_api", reason="the extra `browser` is not installed"
)
expect = playwright_api.expect

SIZE = 120, 80  # of the picture that is asked about
BOX = 30, 20, 40, 30  # what is bright in it

ANSWERED = "text=Answered in"


@pytest.fixture(scope="module")
def browser() -> Iterator:
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    with playwright_api.sync_playwright() as playwright:
        try:
            running = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except playwright_api.Error as error:
            pytest.skip(f"no Chromium: {str(error).splitlines()[0]}")
        yield running
        running.close()


@pytest.fixture(scope="module")
def server() -> Iterator[DemoServer]:
    with serve(StubEngine()) as running:
        yield running


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "a picture.png"
    picture_with_box(BOX, SIZE).save(path)
    return path


class Visitor:
    """Somebody with the page open."""

    def __init__(self, page, server: DemoServer):
        self.page, self.server = page, server
        self.errors, self.outside = [], []
        own = f"http://127.0.0.1:{server.server_port}/"
        page.set_default_timeout(10_000)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", lambda message: self.errors.append(message.text))
        page.on("dialog", lambda dialog: self.errors.append(dialog.message) or dialog.dismiss())
        page.on("request", lambda request: self.note(request.url, own))
        page.goto(own)

    def note(self, url: str, own: str) -> None:
        if not url.startswith((own, "data:", "blob:")):
            self.outside.append(url)

    def open(self, path: Path) -> None:
        self.page.set_input_files("#file", path)
        self.page.wait_for_selector("#main:not([hidden])")

    def choose(self, name: str, value: str) -> None:
        self.page.locator(f"label:has(input[name={name}][value={value}])").click()

    def ask(self) -> None:
        self.page.click("#ask")  # the status says at once that it is sent
        self.page.wait_for_selector(ANSWERED)

    def masks(self) -> list[str]:
        return self.page.locator("#masks .name").all_inner_texts()

    def drag(self, points: list[tuple[float, float]], canvas: str = "#main canvas") -> None:
        """Points in pixels of the picture."""
        self.page.locator(canvas).scroll_into_view_if_needed()
        box, mouse = self.page.locator(canvas).bounding_box(), self.page.mouse
        size = self.page.locator(canvas).evaluate(
            "(canvas) => canvas.getAttribute('aria-label').match(/(\\d+) × (\\d+)/).slice(1)"
        )
        width, height = map(int, size)
        spots = [
            (box["x"] + x / width * box["width"], box["y"] + y / height * box["height"])
            for x, y in points
        ]
        mouse.move(*spots[0])
        mouse.down()
        for spot in spots[1:]:
            mouse.move(*spot, steps=3)
        mouse.up()

    def coco(self) -> dict:
        """What the button saves."""
        with self.page.expect_download() as download:
            self.page.click("#save-coco")
        return json.loads(Path(download.value.path()).read_text())

    def shoot(self, name: str) -> None:
        if folder := os.environ.get("XSAM_SCREENSHOTS"):
            self.page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


@pytest.fixture
def visit(browser, server) -> Iterator:
    """Opens the page; afterwards nothing may have gone wrong in it or asked other machines."""
    visitors = []

    def open_page(**options) -> Visitor:
        options = {"viewport": {"width": 1000, "height": 700}} | options
        visitors.append(Visitor(browser.new_page(**options), server))
        return visitors[-1]

    yield open_page
    for visitor in visitors:
        visitor.page.close()
        assert not visitor.errors and not visitor.outside


@pytest.fixture
def visitor(visit, picture) -> Visitor:
    visitor = visit()
    visitor.open(picture)
    return visitor


def test_the_page_loads_and_says_what_is_missing(visit):
    visitor = visit()
    page = visitor.page
    expect(page.locator("#model")).to_have_text("a <b>model</b>")
    expect(page.locator("#empty")).to_be_visible()
    page.click("#ask")
    expect(page.locator("#error")).to_have_text("Open a picture first.")
    visitor.shoot("empty")
    page.click("#examples button")
    expect(page.locator("#main figcaption")).to_contain_text("</script><b>example.png, 60 × 40")
    for task, words in (("refer", "Type a phrase"), ("vgd", "Mark an object")):
        visitor.choose("task", task)
        page.click("#ask")
        expect(page.locator("#error")).to_contain_text(words)


def test_each_task_is_asked_and_answered(visitor, server):
    for task in requests():
        ask_and_check(visitor, server, task)


COUNTS = {"chat": 0, "panoptic": 1, "instance": 1, "vgd": 1, "interactive": 1}  # others: 2


def ask_and_check(visitor: Visitor, server: DemoServer, task: str) -> None:
    page, needs = visitor.page, TASKS[requested_task(task)].needs
    visitor.choose("task", task)
    assert len(page.inner_text("#task-help")) > 20
    if needs == "text":
        page.fill("#question", "the bright one")
    elif needs == "categories":
        page.fill("#things", "ring, red star,\nring two")
    elif needs == "regions":
        visitor.drag([(50, 40)])
    visitor.ask()
    question = server.engine.questions[-1]
    assert question.task == task and bool(question.text) == (needs == "text")
    names = ["ring", "red star", "ring two"]
    assert question.things == (names if needs == "categories" else [])
    assert len(question.drawings) == (needs == "regions")
    assert len(visitor.masks()) == COUNTS.get(task, 2)
    expect(page.locator("#text")).to_have_text(SAID if task in ("gcg", "chat") else "")
    visitor.shoot(f"task_{task}")


def test_phrases_have_the_colours_of_their_masks(visitor):
    visitor.choose("task", "gcg")
    visitor.ask()
    page = visitor.page
    marks = page.locator("#text mark")
    assert marks.all_inner_texts() == ["an <i>ugly</i> disc", "𝒂 square"]
    chips = page.locator("#masks .chip")
    for number in range(2):
        border = "element => getComputedStyle(element).borderBottomColor"
        background = "element => getComputedStyle(element).backgroundColor"
        assert marks.nth(number).evaluate(border) == chips.nth(number).evaluate(background)
    marks.nth(1).hover()
    expect(page.locator("#masks li").nth(1).locator("label")).to_have_class("over")


def test_masks_lie_where_they_are_and_are_told_apart(visitor):
    """Their colours on the canvas; hovering, the list, the slider."""
    visitor.choose("task", "semantic")
    visitor.ask()
    page = visitor.page

    def tinted() -> np.ndarray:
        """Which pixels of the picture are no longer as it was, bool [H, W]."""
        content = page.locator("#main canvas").screenshot()
        shown = Image.open(io.BytesIO(content)).convert("RGB").resize(SIZE, Image.Resampling.BOX)
        plain = picture_with_box(BOX, SIZE)
        return np.abs(np.asarray(shown, int) - np.asarray(plain, int)).max(-1) > 40

    left, top, width, height = BOX
    bright, rest = np.zeros((2, *SIZE[::-1]), bool)
    bright[top : top + height, left : left + width] = True
    rest[:, SIZE[0] // 2 :] = True
    rest &= ~bright
    inside = np.zeros_like(bright)
    inside[2:-2, 2:-2] = True

    def is_shown(mask: np.ndarray) -> bool:
        shares = tinted()[mask & inside].mean()
        assert shares < 0.1 or shares > 0.8, shares
        return shares > 0.5

    page.mouse.move(0, 0)
    assert is_shown(bright) and is_shown(rest) and not is_shown(~bright & ~rest)
    page.locator("#masks input").nth(0).uncheck()
    page.mouse.move(0, 0)
    page.locator("#masks input").nth(0).blur()
    assert not is_shown(bright) and is_shown(rest)
    page.click("#show-all")
    page.fill("#threshold", "0.5")
    expect(page.locator("#count")).to_have_text("1 of 2 masks")
    assert is_shown(bright) and not is_shown(rest)
    page.fill("#threshold", "0.95")
    expect(page.locator("#count")).to_have_text("0 of 2 masks")
    page.fill("#threshold", "0")
    page.click("#show-none")
    assert not is_shown(bright) and not is_shown(rest)
    page.click("#show-all")
    visitor.drag([(50, 35)])  # hovers
    expect(page.locator("#masks li").nth(0).locator("label")).to_have_class("over")
    assert is_shown(bright) and not is_shown(rest)
    visitor.shoot("hover")


def test_panoptic_masks_below_the_threshold_are_asked_for(visitor, server):
    visitor.ask()
    page = visitor.page
    expect(page.locator("#count")).to_have_text("1 of 1 mask")
    count = len(server.engine.questions)
    page.fill("#threshold", "0.7")
    visitor.choose("task", "refer")  # the result's own request is asked again
    page.focus("#threshold")
    for value in ("0.4", "0.1"):
        page.fill("#threshold", value)
    expect(page.locator("#count")).to_have_text("2 of 2 masks")
    expect(page.locator("#threshold")).to_be_focused()
    assert len(server.engine.questions) == count + 1
    assert server.engine.questions[-1].score_threshold == 0.1


DRAWINGS = {
    "point": [(50, 40)],
    "scribble": [(20, 20), (60, 30), (90, 60)],
    "box": [(90, 60), (30, 20)],
    "lasso": [(30, 20), (70, 20), (70, 60), (30, 60)],
}


def test_what_is_drawn_with_the_mouse_is_asked_about(visitor, server):
    visitor.choose("task", "interactive")
    for kind in DRAWINGS:
        draw_and_check(visitor, server, kind)


def draw_and_check(visitor: Visitor, server: DemoServer, kind: str) -> None:
    visitor.choose("tool", kind)
    visitor.drag(DRAWINGS[kind])
    expect(visitor.page.locator("#regions")).to_have_text(f"Regions: 1: {kind}.")
    visitor.ask()
    ((drawn, points),) = server.engine.questions[-1].drawings
    expected, found = np.array(DRAWINGS[kind]), np.array(points)
    assert drawn == kind
    for corner in expected:
        assert np.abs(found - corner).max(axis=1).min() < 1.5
    annotation = visitor.coco()["annotations"][0]
    assert coco_mask.area(annotation["segmentation"]) == annotation["area"] > 0
    visitor.shoot(f"draw_{kind}")
    visitor.page.get_by_role("button", name="Remove the last region").click()


def test_several_regions_can_be_drawn_and_removed(visitor, server):
    page = visitor.page
    visitor.choose("task", "vgd")
    for kind, points in DRAWINGS.items():
        visitor.choose("tool", kind)
        visitor.drag(points)
    expect(page.locator("#regions")).to_have_text(
        "Regions: 1: point, 2: scribble, 3: box, 4: lasso."
    )
    page.click("#undo")
    visitor.choose("tool", "box")
    visitor.drag([(20, 20)])  # no box
    expect(page.locator("#error")).to_contain_text("too short for a box")
    visitor.ask()
    assert [kind for kind, _ in server.engine.questions[-1].drawings] == [
        "point",
        "scribble",
        "box",
    ]
    visitor.choose("task", "refer")
    visitor.choose("task", "vgd")
    expect(page.locator("#regions")).to_have_text("No region yet.")


def test_regions_may_be_in_a_second_picture(visitor, server):
    page = visitor.page
    visitor.choose("task", "vgd")
    visitor.drag([(50, 40)])
    visitor.choose("target", "other")
    page.click("#examples button")
    page.wait_for_selector("#other:not([hidden])")
    expect(page.locator("#regions")).to_have_text("No region yet.")
    visitor.drag([(50, 40)])  # on the first, where nothing is drawn now
    expect(page.locator("#regions")).to_have_text("No region yet.")
    visitor.drag([(20, 30)], "#other canvas")
    visitor.ask()
    question = server.engine.questions[-1]
    assert question.region_image == (60, 40) and question.drawings[0][0] == "point"
    assert np.allclose(question.drawings[0][1], [[20, 30]], atol=0.5)
    visitor.shoot("second")
    page.click("#remove-other")
    expect(page.locator("#other")).to_be_hidden()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("refuse", "no such phrase: <img src=x onerror=alert(1)>"),
        ("break", "The model stopped with an error"),
    ],
)
def test_errors_are_said_in_words(visitor, text, words):
    visitor.choose("task", "refer")
    visitor.page.fill("#question", text)
    visitor.page.click("#ask")
    expect(visitor.page.locator("#error")).to_contain_text(words)
    expect(visitor.page.locator("#cancel")).to_be_disabled()
    visitor.shoot(f"error_{text}")


def test_a_file_that_is_no_picture_is_refused(visitor, tmp_path):
    (tmp_path / "picture.png").write_text("no picture")
    visitor.page.set_input_files("#file", tmp_path / "picture.png")
    expect(visitor.page.locator("#error")).to_contain_text("no picture that can be read")
    assert visitor.errors.pop().startswith("Failed to load resource")  # the browser's own words


def test_script_in_texts_is_text(visitor):
    words = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    visitor.choose("task", "refer")
    visitor.page.fill("#question", words)
    visitor.ask()
    assert words in visitor.masks()
    assert visitor.page.locator("img").count() == 0


def test_the_queue_shows_the_place_and_an_answer_in_progress_can_be_cancelled(visit, picture):
    first, second = visit(), visit()
    for visitor in (first, second):
        visitor.open(picture)
        visitor.choose("task", "chat")
        visitor.page.fill("#question", "wait")
        visitor.page.click("#ask")
        visitor.page.wait_for_selector("#status:not(:empty)")
    expect(first.page.locator("#text")).to_contain_text("so far so far")
    expect(second.page.locator("#status")).to_have_text("Waiting: 1 request is before yours.")
    second.shoot("queue")
    first.page.click("#cancel")
    expect(first.page.locator("#status")).to_have_text("Cancelled.")
    expect(second.page.locator("#text")).to_contain_text("so far so far")
    first.choose("task", "semantic")
    first.page.click("#ask")
    expect(first.page.locator("#status")).to_contain_text("1 request is before")
    second.page.close()  # nobody waits for its answer any more
    first.page.wait_for_selector(ANSWERED)


def test_a_picture_that_the_server_let_go_is_sent_again(visitor, server):
    server.pictures.kept.clear()
    visitor.choose("task", "semantic")
    visitor.ask()
    assert len(visitor.masks()) == 2
    assert visitor.errors.pop().startswith("Failed to load resource")


@pytest.mark.parametrize("way", ["paste", "drop"])
def test_a_picture_is_pasted_or_dropped(visit, picture, way):
    visitor = visit()
    body = {"bytes": list(picture.read_bytes()), "way": way}
    visitor.page.evaluate(
        """({ bytes, way }) => {
          const data = new DataTransfer();
          data.items.add(new File([new Uint8Array(bytes)], "given.png", { type: "image/png" }));
          document.dispatchEvent(way === "drop"
            ? new DragEvent("drop", { dataTransfer: data, cancelable: true })
            : new ClipboardEvent("paste", { clipboardData: data }));
        }""",
        body,
    )
    expect(visitor.page.locator("#main figcaption")).to_contain_text("given.png, 120 × 80")


def test_what_is_shown_is_saved(visitor):
    visitor.choose("task", "semantic")
    visitor.ask()
    page = visitor.page
    document = visitor.coco()
    assert document["images"][0] | {"id": 1} == {
        "id": 1,
        "file_name": "a picture.png",
        "width": SIZE[0],
        "height": SIZE[1],
    }
    names = {each["id"]: each["name"] for each in document["categories"]}
    found = {names[each["category_id"]]: each for each in document["annotations"]}
    assert set(found) == {"bright <b>one</b>", "the rest"}
    mask = coco_mask.decode(found["bright <b>one</b>"]["segmentation"]).astype(bool)
    bright = np.asarray(picture_with_box(BOX, SIZE).convert("L")) > 127
    assert np.array_equal(mask, bright) and found["bright <b>one</b>"]["bbox"] == list(BOX)
    page.locator("#masks input").nth(1).uncheck()
    assert len(visitor.coco()["annotations"]) == 1
    with page.expect_download() as download:
        page.click("#save-picture")
    assert download.value.suggested_filename == "a_picture_semantic.png"
    saved = Image.open(download.value.path())
    assert saved.width == 640 and saved.height > 427
    if folder := os.environ.get("XSAM_SCREENSHOTS"):
        saved.save(Path(folder) / "saved.png")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone(visit, picture, scheme):
    phone = {"width": 360, "height": 740}
    visitor = visit(viewport=phone, is_mobile=True, has_touch=True, color_scheme=scheme)
    visitor.open(picture)
    page = visitor.page
    for task in requests():
        page.locator(f"label:has(input[value={task}])").tap()
        widths = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert widths == [360, 360], task
    page.locator("label:has(input[value=interactive])").tap()
    page.locator("#main canvas").tap()
    expect(page.locator("#regions")).to_have_text("Regions: 1: point.")
    page.locator("#ask").tap()
    page.wait_for_selector(ANSWERED)
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background[4:-1].split(","))) < 200) == (scheme == "dark")
    small = page.evaluate(
        """[...document.querySelectorAll("button, .choice span, .button")]
          .filter((each) => each.offsetParent && !each.matches(".example"))
          .filter((each) => each.getBoundingClientRect().height < 40).map((each) => each.id)"""
    )
    assert not small, "too small for a finger"
    visitor.shoot(f"phone_{scheme}")


def test_the_keyboard_is_enough(visit, server):
    visitor = visit()
    page = visitor.page
    press = page.keyboard.press

    def tab_to(selector: str) -> None:
        for _ in range(40):
            press("Tab")
            if page.locator(selector).evaluate("each => each === document.activeElement"):
                return
        raise AssertionError(f"{selector} is out of reach")

    page.wait_for_selector("#examples button")
    tab_to("#examples button")
    press("Enter")
    page.wait_for_selector("#main:not([hidden])")
    tab_to("input[name=task]:checked")
    while page.locator("input[name=task]:checked").get_attribute("value") != "vgd":
        press("ArrowRight")
    drawn = {"point": 0, "scribble": 2, "box": 1, "lasso": 3}
    for kind, corners in drawn.items():
        page.keyboard.press("Control+Home")
        tab_to("input[name=tool]:checked")
        while page.locator("input[name=tool]:checked").get_attribute("value") != kind:
            press("ArrowRight")
        tab_to("#main canvas")
        press("Enter")
        for number in range(corners):
            for _ in range(3):
                press(("ArrowRight", "ArrowDown", "Shift+ArrowLeft")[number])
            press("Enter")
        if kind in ("scribble", "lasso"):
            press("f")
    visitor.shoot("keyboard")
    expect(page.locator("#cursor")).to_contain_text("The cross is at")
    press("Backspace")
    press("Enter")
    press("Escape")
    expect(page.locator("#regions")).to_have_text("Regions: 1: point, 2: scribble, 3: box.")
    tab_to("#ask")
    press("Enter")
    page.wait_for_selector(ANSWERED)
    drawings = server.engine.questions[-1].drawings
    assert [(kind, len(points)) for kind, points in drawings] == [
        ("point", 1),
        ("scribble", 3),
        ("box", 2),
    ]
    tab_to("#masks li:first-child input")
    expect(page.locator("#masks li").nth(0).locator("label")).to_have_class("over")
    press("Space")
    assert not page.locator("#masks input").nth(0).is_checked()
    tab_to("#save-coco")


def test_everything_has_a_name_for_readers_of_the_screen(visitor):
    page = visitor.page
    visitor.choose("task", "vgd")
    nameless = page.evaluate(
        """[...document.querySelectorAll("button, input, textarea, canvas[tabindex]")]
          .filter((each) => !(each.labels?.length || each.ariaLabel || each.textContent.trim()))
          .map((each) => each.outerHTML)"""
    )
    assert not nameless
