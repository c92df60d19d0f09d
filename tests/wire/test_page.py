"""The web page: what is served, how it is fenced in, and that it asks nobody else for anything."""
import re

import pytest

FILES = {"/": "text/html; charset=utf-8", "/index.html": "text/html; charset=utf-8", "/style.css": "text/css; charset=utf-8",
         **{f"/{name}.js": "text/javascript; charset=utf-8" for name in ("app", "draw", "gallery", "common")},
         "/favicon.svg": "image/svg+xml", "/favicon.ico": "image/svg+xml"}


@pytest.mark.parametrize("path", FILES)
def test_files(daemon, path):
    answer = daemon.get(path)
    assert answer.status == 200 and answer.headers["content-type"] == FILES[path] and len(answer.body) > 100
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src 'self'" in policy and "unsafe" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    again = daemon.get(path, **{"If-None-Match": answer.headers["etag"]})
    assert again.status == 304 and again.body == b""
    head = daemon.request("HEAD", path)
    assert head.status == 200 and head.body == b"" and int(head.headers["content-length"]) == len(answer.body)


def test_nothing_comes_from_elsewhere(daemon):
    for path in FILES:
        text = daemon.get(path).body.decode().replace("http://www.w3.org/2000/svg", "")  # a name, not an address
        assert not re.search(r"https?://|@import|//[a-z0-9-]+\.[a-z]", text), path


def test_the_page_refers_to_what_is_there(daemon):
    html = daemon.get("/").body.decode()
    for path in re.findall(r'(?:src|href)="([^"]+)"', html):
        assert daemon.get(path).status == 200, path
    ids = set(re.findall(r'id="([^"]+)"', html))
    for script in ("/app.js", "/gallery.js"):
        text = daemon.get(script).body.decode()
        assert set(re.findall(r'\$\("([^"]+)"\)', text)) <= ids
        for path in re.findall(r'from "([^"]+)"', text):
            assert daemon.get(path).status == 200, path
    # No inline script or style: the policy would block it.
    assert "onclick=" not in html and "style=" not in html and not re.search(r"<script>(?!<)", html)


def test_page_off(start):
    d = start("--page", "no")
    assert d.get("/").status == 404 and d.get("/app.js").status == 404
    assert d.get("/v1/models").status == 200
