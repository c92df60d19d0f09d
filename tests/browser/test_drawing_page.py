"""The public page in a browser: a picture forms, is cancelled, is drawn again; by keyboard alone, in the dark, on a phone, over a broken connection."""
import io
import pathlib
import re

import pytest
from PIL import Image

from conftest import DESKTOP, KEY, PHONE, until

# What is told to the page's user, in the order in which it is: recorded from inside, since a test outside may look too late. And how many object URLs,
# whose pictures the browser keeps, are there.
RECORD = """() => {
  window.urls = 0;
  const make = URL.createObjectURL, revoke = URL.revokeObjectURL;
  URL.createObjectURL = (blob) => (urls++, make.call(URL, blob));
  URL.revokeObjectURL = (url) => (urls--, revoke.call(URL, url));
  window.seen = [];
  new MutationObserver((changes) => {
    for (const c of changes) {
      if (c.target.id === "picture") seen.push("picture");
      else if (c.target.closest && c.target.closest("#way")) seen.push("preview");
    }
  }).observe(document, { subtree: true, attributes: true, attributeFilter: ["src"] });
}
"""


@pytest.fixture
def page(visit, served, idle):
    p = visit(served.url + "/")
    p.locator("#draw:enabled").wait_for()
    return p


def describe(page, prompt, size=64, steps=4, **fields):
    """Fills the form."""
    page.locator("#more").evaluate("(e) => { e.open = true; }")
    page.fill("#prompt", prompt)
    for name, value in {"width": size, "height": size, "steps": steps, **fields}.items():
        page.fill("#" + name, str(value))


def picture(page):
    """The bytes of the picture that is shown, as the user gets them."""
    with page.expect_download() as download:
        page.locator("#save").evaluate("(a) => a.click()")
    return pathlib.Path(download.value.path()).read_bytes()


def finished(page, n):
    """Waits until n pictures stand in the gallery and nothing is on its way."""
    page.locator("#history li").nth(n - 1).wait_for()
    page.locator("#way li").first.wait_for(state="detached")


def recipe(page):
    return dict(zip(page.locator("#recipe dt").all_inner_texts(), page.locator("#recipe dd").all_inner_texts()))


def test_a_picture_forms(page, served):
    page.evaluate(RECORD)
    describe(page, "a red apple", size=128, steps=100, seed=5, negative_prompt="blurry")
    page.click("#draw")
    page.locator("#way progress").wait_for()
    finished(page, 1)
    seen = page.evaluate("seen")
    assert seen[0] == "preview" and seen[-1] == "picture", seen
    assert page.evaluate("urls") == 1
    png = picture(page)
    assert png == served.daemon.post({"prompt": "a red apple", "negative_prompt": "blurry", "size": "128x128", "steps": 100, "seed": 5},
                                     Accept="image/png").body
    assert Image.open(io.BytesIO(png)).size == (128, 128)
    live, told = served.current(), recipe(page)
    assert page.inner_text("#safety") == f"Safety generation {live['id']}"
    assert (told["Seed"], told["Steps"], told["Size"], told["Without"]) == ("5", "100", "128 × 128", "blurry")
    assert (told["Profile"], told["Generation"], told["Digest"]) == ("default", live["id"], live["digest"])
    assert page.inner_text("#history .under") == live["id"]
    assert page.inner_text("#status").startswith("done: a red apple")


def test_the_same_again(page):
    page.evaluate(RECORD)
    describe(page, "a blue car")  # the server draws the seed
    page.click("#draw")
    finished(page, 1)
    first, seed = picture(page), recipe(page)["Seed"]
    assert re.fullmatch(r"\d+", seed)
    page.click("#again")
    finished(page, 2)
    assert picture(page) == first and recipe(page)["Seed"] == seed
    page.click("#vary")
    finished(page, 3)
    assert picture(page) != first and recipe(page)["Seed"] == str(int(seed) + 1)
    with page.expect_download() as download:
        page.click("#save")
    assert download.value.suggested_filename == f"safelight-{int(seed) + 1}.png"
    page.click("#use")
    assert page.input_value("#seed") == str(int(seed) + 1) and page.input_value("#prompt") == "a blue car"
    page.click("#remove")
    assert page.locator("#history li").count() == 2 and page.evaluate("urls") == 2


def test_several_pictures_of_one_request(page):
    describe(page, "a cat", n=3, seed=7)
    page.click("#draw")
    finished(page, 3)
    assert sorted(a.rsplit(" ", 1)[1] for a in page.locator("#history img").evaluate_all("(l) => l.map((i) => i.alt)")) == ["7", "8", "9"]


def test_queue_and_cancel(page, served):
    """A second one waits for the first and says so; both are cancelled, one by its button and one by Escape, and the server stops."""
    describe(page, "a long one", size=256, steps=150, n=4)
    page.click("#draw")
    page.locator("#way img[src^='blob:']").wait_for()
    page.fill("#prompt", "another one")
    page.click("#draw")
    page.locator("#way li", has_text="waiting, next to start").wait_for()
    assert [j["state"] for j in served.jobs()] == ["running", "queued"]
    page.keyboard.press("Escape")
    until(lambda: page.locator("#way li").count() == 1, "the second to be gone")
    assert page.inner_text("#status") == "cancelled"
    page.get_by_role("button", name="Cancel a long one").click()
    page.locator("#way li").first.wait_for(state="detached")
    assert page.locator("#history li").count() == 0 and page.locator("#error").is_hidden()
    until(lambda: not served.jobs(), "the server to stop drawing")


def test_leaving_stops_what_was_asked_for(page, served):
    describe(page, "a long one", size=256, steps=150, n=4)
    page.click("#draw")
    page.locator("#way img[src^='blob:']").wait_for()
    page.goto(served.url + "/healthz")
    until(lambda: not served.jobs(), "the server to stop drawing")


def test_by_keyboard_alone(page):
    """Everything has a name and shows where the focus is; a picture is drawn, chosen and drawn again without a pointer."""
    page.keyboard.type("a tree")
    assert page.input_value("#prompt") == "a tree"  # the focus is there from the start
    for name, value in (("width", "64"), ("height", "64"), ("steps", "3"), ("seed", "1")):
        tab_to(page, name)
        page.keyboard.press("Control+A")
        page.keyboard.type(value)
    page.keyboard.press("Enter")
    finished(page, 1)
    first = picture(page)
    for n in (2, 3):
        tab_to(page, "vary" if n == 2 else "again")
        page.keyboard.press("Enter")
        finished(page, n)
    second = picture(page)
    assert second != first
    page.locator("#history [aria-current=true]").focus()
    page.keyboard.press("End")
    assert picture(page) == first
    page.keyboard.press("ArrowLeft")
    assert picture(page) == second


def tab_to(page, name, stops=60):
    """Presses Tab until the control has the focus. On the way each stop has an accessible name and a visible outline."""
    for _ in range(stops):
        page.keyboard.press("Tab")
        at = page.evaluate("""() => {
          const e = document.activeElement, s = getComputedStyle(e);
          const label = e.labels?.[0]?.textContent || e.getAttribute("aria-label") || e.textContent || e.querySelector?.("img")?.alt || "";
          return { id: e.id, tag: e.tagName, name: label.trim(), outline: s.outlineStyle !== "none" && parseFloat(s.outlineWidth) >= 2 };
        }""")
        assert at["tag"] == "BODY" or (at["name"] and at["outline"]), at
        if at["id"] == name:
            return
    raise AssertionError(f"Tab does not reach {name}")


def test_the_server_says_what_is_wrong(page):
    page.watch.expected.append("status of 400")
    describe(page, "a tree", steps=0)
    page.click("#draw")
    page.locator("#error:visible").wait_for()
    assert "steps" in page.inner_text("#error")
    assert page.evaluate("document.activeElement.id") == "steps" and page.get_attribute("#steps", "aria-invalid") == "true"
    page.fill("#steps", "2")
    page.click("#draw")
    finished(page, 1)
    assert page.locator("#error").is_hidden() and page.get_attribute("#steps", "aria-invalid") is None
    page.fill("#seed", "9007199254740993")  # would arrive as another number
    page.click("#draw")
    page.locator("#error", has_text="more than a browser can count").wait_for()


def test_with_a_key(page, served):
    """Of an asker with a key everything is asked with it: the job, its events, its pictures."""
    page.watch.expected.append("status of 401")
    describe(page, "a tree")
    page.fill("#key", KEY + "x")
    page.click("#draw")
    page.locator("#error:visible").wait_for()
    page.fill("#key", KEY)
    page.click("#draw")
    finished(page, 1)
    newest = next(r for r in served.admin("GET", "/v1/admin/audit?n=20")["records"] if r["kind"] == "image")
    assert newest["tenant"] == "school" and newest["verdict"] != "preview"


def test_a_broken_connection_is_taken_up_again(page):
    """The job goes on while its reader is away."""
    page.watch.expected.append("ERR_CONNECTION_RESET")
    broken = []

    def break_once(route):
        broken.append(route.request.url)
        if len(broken) == 1:
            route.abort("connectionreset")
        else:
            route.continue_()

    page.route("**/events", break_once)
    describe(page, "a tree", steps=10)
    page.click("#draw")
    finished(page, 1)
    assert len(broken) >= 2


def test_without_jobs_it_reads_a_stream(page):
    page.watch.expected.append("status of 404")
    page.route("**/v1/jobs", lambda route: route.fulfill(status=404, content_type="application/json", body='{"error": {"message": "nothing", "code": "not_found"}}'))
    page.evaluate(RECORD)
    describe(page, "a tree", size=128, steps=60, seed=2, n=2)
    page.click("#draw")
    finished(page, 2)
    seen = page.evaluate("seen")
    assert seen[0] == "preview" and seen[-1] == "picture", seen
    assert sorted(a.rsplit(" ", 1)[1] for a in page.locator("#history img").evaluate_all("(l) => l.map((i) => i.alt)")) == ["2", "3"]


LUMINANCE = """(name) => {
  const probe = document.body.appendChild(document.createElement("i"));
  probe.style.color = "var(" + name + ")";
  const [r, g, b] = getComputedStyle(probe).color.match(/[0-9.]+/g).map((x) => { x /= 255; return x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4; });
  probe.remove();
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark(visit, served, scheme):
    """The page follows the system, and its texts can be read: WCAG's contrast of 4.5 for texts and 3 for the edges of fields."""
    page = visit(served.url + "/", color_scheme=scheme)
    light = {name: page.evaluate(LUMINANCE, "--" + name) for name in ("paper", "card", "ink", "soft", "lamp", "lamp-ink", "bad", "bad-bg", "good", "field")}
    assert (light["paper"] > 0.5) == (scheme == "light")
    for text, ground, least in (("ink", "paper", 4.5), ("ink", "card", 4.5), ("soft", "paper", 4.5), ("soft", "card", 4.5), ("lamp-ink", "lamp", 4.5),
                                ("bad", "bad-bg", 4.5), ("bad", "card", 4.5), ("good", "card", 4.5), ("field", "card", 3), ("lamp", "paper", 3)):
        low, high = sorted((light[text], light[ground]))
        assert (high + 0.05) / (low + 0.05) >= least, (text, ground, (high + 0.05) / (low + 0.05))


def test_on_a_phone(visit, served, idle):
    """No sideways scrolling, whatever is shown."""
    page = visit(served.url + "/", viewport=PHONE, has_touch=True, is_mobile=True)
    page.locator("#draw:enabled").wait_for()

    def fits():
        assert page.evaluate("document.scrollingElement.scrollWidth") <= PHONE["width"]

    fits()
    describe(page, "a very long word like " + "Donaudampfschifffahrt" * 8, size=128, steps=30)
    fits()
    page.tap("#draw")
    page.locator("#way progress").wait_for()
    fits()
    finished(page, 1)
    page.set_viewport_size({"width": PHONE["width"], "height": 2000})
    fits()
    small = page.evaluate("""[...document.querySelectorAll("button, a.button, input, select")].filter((e) => e.offsetParent && e.offsetHeight < 40).map((e) => e.id)""")
    assert not small  # a finger finds them
    page.set_viewport_size(DESKTOP)
    fits_desktop = page.evaluate("document.scrollingElement.scrollWidth")
    assert fits_desktop <= DESKTOP["width"]
