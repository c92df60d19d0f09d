"""The operator's page in a browser: the token, the queue as it is, a change of the safety and back, and the record of both."""
import re

import pytest

from conftest import LONG, PHONE, QUICK, TOKEN, until


@pytest.fixture
def page(visit, served, idle):
    p = visit(served.admin_url + "/")
    enter(p, TOKEN)
    p.locator("#board").wait_for()
    return p


def enter(page, token):
    page.locator("#token").fill(token)
    page.keyboard.press("Enter")


def refusals(served):
    return sum(r["kind"] == "admin" and r["verdict"] == "refused" for r in served.admin("GET", "/v1/admin/audit?n=1000")["records"])


def test_token(visit, served):
    """The page asks for it before it asks the server, says when it is wrong, and keeps it nowhere."""
    before = refusals(served)
    page = visit(served.admin_url + "/")
    page.watch.expected.append("status of 401")
    page.locator("#token").wait_for()
    assert page.locator("#board").is_hidden() and page.evaluate("document.activeElement.id") == "token"
    assert refusals(served) == before
    enter(page, TOKEN + "x")
    page.locator("#error:visible").wait_for()
    assert "not the token" in page.inner_text("#error") and page.locator("#board").is_hidden()
    enter(page, TOKEN)
    page.locator("#board").wait_for()
    assert page.locator("#login").is_hidden() and page.locator("#error").is_hidden()
    assert page.evaluate("localStorage.length + sessionStorage.length") == 0 and not page.context.cookies()
    page.reload()
    page.locator("#token").wait_for()


def test_queue(page, served):
    """What runs and what waits is seen, and that it is gone when its clients are."""
    page.get_by_text("nobody waits").wait_for()
    held = [served.daemon.send({**LONG, "n": 4, "seed": i}, f"job-{i}") for i in range(3)]
    try:
        running = page.locator("#jobs tr", has_text="job-0")
        running.get_by_text("running").wait_for()
        until(lambda: float(running.locator("progress").get_attribute("value") or 0) > 0, "progress")
        page.locator("#jobs tr", has_text="job-1").get_by_text("queued, place 1").wait_for()
        page.locator("#jobs tr", has_text="job-2").get_by_text("queued, place 2").wait_for()
        assert "256×256" in running.inner_text() and "peer 127.0.0.1" in running.inner_text()
        page.locator("#tiles").get_by_text(re.compile(r"^2 of \d+$")).wait_for()
    finally:
        for sock in held:
            sock.close()
    page.get_by_text("nobody waits").wait_for()
    assert served.daemon.post(QUICK).status == 200
    page.locator("#latency tr", has_text="stage, unet").wait_for()
    page.locator("#counts").get_by_text("disconnect").wait_for()


def test_activate_and_roll_back(page, served):
    first = served.current()
    row = page.locator("#profiles tr", has_text="default")
    row.get_by_text(first["id"]).wait_for()
    page.locator("#adapters tr", has_text="shield").get_by_text("live").wait_for()
    served.admin("POST", "/v1/admin/adapters/shield", {"path": "shield2.safetensors"})
    page.once("dialog", lambda d: d.dismiss())
    row.get_by_role("button", name="Activate default").click()
    assert served.current()["id"] == first["id"]  # nobody confirmed it
    page.on("dialog", lambda d: d.accept())
    row.get_by_role("button", name="Activate default").click()
    page.locator("#status", has_text="activated: generation").wait_for()
    second = served.current()
    assert second["digest"] != first["digest"] and second["id"] in page.inner_text("#status")
    row.get_by_text(second["id"]).wait_for()
    row.get_by_role("button", name="Roll back default").click()
    page.locator("#status", has_text="rolled back: generation").wait_for()
    assert served.current()["digest"] == first["digest"]
    for path in ("activate", "rollback"):
        page.locator("#audit tr", has_text=f"POST /v1/admin/profiles/default/{path} by token").first.wait_for()
    page.get_by_role("button", name="Read the policy again").click()
    page.locator("#status", has_text="the policy was read again").wait_for()


def test_a_refused_change_is_told(page, served):
    page.watch.expected.append("status of 400")
    page.watch.expected.append("status of 404")
    page.on("dialog", lambda d: d.accept())
    page.evaluate("""document.getElementById("rollback-default").id = "rollback-nobody" """)
    page.locator("#rollback-nobody").click()
    page.locator("#error:visible").wait_for()
    assert "nobody" in page.inner_text("#error")


def test_a_server_that_is_away_is_told(page):
    page.watch.expected.append("ERR_CONNECTION_REFUSED")
    page.route("**/v1/admin/**", lambda route: route.abort("connectionrefused"))
    page.locator("#error", has_text="the server does not answer").wait_for()
    page.unroute("**/v1/admin/**")
    page.locator("#error").wait_for(state="hidden")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone(visit, served, idle, scheme):
    page = visit(served.admin_url + "/", viewport=PHONE, color_scheme=scheme, is_mobile=True, has_touch=True)
    assert page.evaluate("document.scrollingElement.scrollWidth") <= PHONE["width"]
    enter(page, TOKEN)
    page.locator("#audit tr").first.wait_for()
    sock = served.daemon.send({**LONG, "n": 4}, "a-job-with-a-long-id-" + "x" * 40)
    page.locator("#jobs tr", has_text="a-job-with-a-long-id").wait_for()
    assert page.evaluate("document.scrollingElement.scrollWidth") <= PHONE["width"]
    sock.close()
