"""A browser for the tests of the pages: Debian's Chromium, driven by Playwright, against the real daemon (tests/wire/conftest.py starts it).

Every page is watched while a test has it: an error on its console, an exception, or a request to another host than the daemon's fails the test.
SAFELIGHT_CHROMIUM names another browser than the one that is installed.
"""
import contextlib
import importlib.util
import os
import pathlib
import shutil
import sys
import urllib.parse

import pytest
from playwright.sync_api import sync_playwright

WIRE = pathlib.Path(__file__).resolve().parents[1] / "wire"
spec = importlib.util.spec_from_file_location("wire", WIRE / "conftest.py")
wire = importlib.util.module_from_spec(spec)
spec.loader.exec_module(wire)
Answer, Daemon, LONG, MODEL, PATIENCE, QUICK, ROOT, until = wire.Answer, wire.Daemon, wire.LONG, wire.MODEL, wire.PATIENCE, wire.QUICK, wire.ROOT, wire.until
sys.path.append(str(WIRE))  # for adapters.py, which takes MODEL from here

from adapters import Policy, lora, write_safetensors  # noqa: E402

TOKEN = "0123456789abcdef-a-token"
KEY = "the-key-of-a-school"
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 360, "height": 740}


def chromium():
    """The program, and what it has to be told: root needs --no-sandbox."""
    names = [os.environ.get("SAFELIGHT_CHROMIUM", ""), "chromium-headless-shell", "chromium"]
    found = next(filter(None, map(shutil.which, filter(None, names))), None)
    assert found, "there is no Chromium; `deploy/install-deps test` installs it"
    return {"executable_path": found, "args": ["--no-sandbox"] if os.geteuid() == 0 else []}


class Served:
    """A daemon and its operator's port. Its policy, unless one is given, requires shield; another file for that lies beside it."""

    def __init__(self, folder, *args, policy=None):
        if not policy:
            made = Policy(folder / "safety").adapter("shield", lora(1, strength=0.1))
            write_safetensors(made.folder / "shield2.safetensors", lora(3, strength=0.1))
            policy = made.profile(required=["shield"]).tenant("school", KEY, "default").write().path
        token = folder / "token"
        token.write_text(TOKEN + "\n")
        token.chmod(0o600)
        self.daemon = Daemon(folder, "--admin", "127.0.0.1:0", "--admin-token-file", str(token), *args, policy=policy)
        line = next(line.decode() for line in self.daemon.process.stdout if line.startswith(b"admin "))
        self.admin_port = int(line.rsplit(":", 1)[1])
        self.url, self.admin_url = self.daemon.url, f"http://127.0.0.1:{self.admin_port}"

    def admin(self, method, path, body=None):
        with contextlib.closing(wire.http.client.HTTPConnection("127.0.0.1", self.admin_port, timeout=60 * PATIENCE)) as connection:
            headers = {"Authorization": "Bearer " + TOKEN, **({"Content-Type": "application/json"} if body else {})}
            connection.request(method, path, wire.json.dumps(body) if body else None, headers)
            answer = Answer(connection.getresponse())
        assert answer.status == 200, answer.body
        return answer.json

    def current(self):
        return next(g for g in self.admin("GET", "/v1/admin/status")["generations"] if g["current"])

    def jobs(self):
        return self.admin("GET", "/v1/admin/activity")["jobs"]


@pytest.fixture(scope="session")
def served(tmp_path_factory):
    """One daemon for all tests. It draws one picture at a time, so that a second one waits."""
    s = Served(tmp_path_factory.mktemp("served"), "--running", "1")
    yield s
    try:
        s.daemon.stop()
    finally:
        s.daemon.kill()


@pytest.fixture(scope="session")
def browser():
    with sync_playwright() as p:
        b = p.chromium.launch(**chromium())
        yield b
        b.close()


class Watch:
    """What went wrong on a page. expected: parts of console errors that the test brings about."""

    def __init__(self, page, url):
        self.wrong, self.expected, self.host = [], [], urllib.parse.urlsplit(url).netloc
        page.on("pageerror", lambda e: self.wrong.append(f"exception: {e}"))
        page.on("console", lambda m: m.type in ("error", "warning") and self.wrong.append(f"{m.type} on the console: {m.text}"))
        page.on("request", lambda r: self.check(r.url))

    def check(self, url):
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("blob", "data") and parts.netloc != self.host:
            self.wrong.append(f"asked another host: {url}")

    def close(self):
        wrong = [w for w in self.wrong if not any(e in w for e in self.expected)]
        assert not wrong, wrong


@pytest.fixture
def visit(browser):
    """visit(url, **context) opens a page in a context of its own, watched; the page has a .watch."""
    opened = []

    def begin(url, **options):
        context = browser.new_context(**{"viewport": DESKTOP, **options})
        page = context.new_page()
        page.set_default_timeout(60000 * PATIENCE)
        page.watch = Watch(page, url)
        opened.append((context, page))
        page.goto(url)
        return page

    yield begin
    for context, _ in opened:
        context.close()
    for _, page in opened:
        page.watch.close()


@pytest.fixture
def idle(served):
    """Nobody's picture is drawn when a test begins, and when it has ended."""
    until(lambda: not served.jobs(), "no job", 30)
    yield
    until(lambda: not served.jobs(), "no job", 30)
