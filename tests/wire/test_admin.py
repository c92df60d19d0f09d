"""The operator's listener: who may come in, what it does, what it refuses, and that every change is in the audit log."""
import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import threading
import time

import pytest

from adapters import Policy, digest, lora, write_safetensors
from conftest import BINARY, LONG, MODEL, PATIENCE, QUICK, ROOT, Answer, until

OPENAPI = ROOT / "proto/openapi.yaml"
TOKEN = "0123456789abcdef-a-token"
EXPERTS = ROOT / "weights/safety/experts"


@contextlib.contextmanager
def short(path):
    """A Unix socket's path under a name of at most 107 bytes."""
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


class Local(http.client.HTTPConnection):
    def __init__(self, path):
        super().__init__("safelight", timeout=60 * PATIENCE)
        self.path = path

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        with short(self.path) as name:
            self.sock.connect(name)


class Admin:
    """Requests to a daemon's admin listener; where: its port, or None for the socket in its state folder."""

    def __init__(self, daemon, port=None, token=None):
        self.daemon, self.port, self.token = daemon, port, token

    def request(self, method, path, body=None, headers=None):
        headers = dict(headers or {})
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        if isinstance(body, dict):
            body = json.dumps(body)
            headers["Content-Type"] = "application/json"
        c = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60) if self.port else Local(self.daemon.state / "admin.sock")
        try:
            c.request(method, path, body, headers)
            return Answer(c.getresponse())
        finally:
            c.close()

    def get(self, path):
        return self.request("GET", path)

    def post(self, path, body=None, **headers):
        return self.request("POST", path, body, {k.replace("_", "-"): v for k, v in headers.items()})

    def status(self):
        answer = self.get("/v1/admin/status")
        assert answer.status == 200, answer.body
        return answer.json

    def current(self, profile="default"):
        return next(g for g in self.status()["generations"] if g["profile"] == profile and g["current"])

    def records(self, kind=None, n=200):
        answer = self.get(f"/v1/admin/audit?n={n}")
        assert answer.status == 200, answer.body
        return [r for r in answer.json["records"] if kind in (None, r["kind"])]


@pytest.fixture
def policy(tmp_path):
    """Profile default requires shield; ink is a style adapter; other files lie beside them."""
    p = Policy(tmp_path / "safety")
    p.adapter("shield", lora(1)).adapter("ink", lora(2, strength=0.2), pin=True)
    write_safetensors(p.folder / "shield2.safetensors", lora(3))
    return p.profile(required=["shield"], styles=["ink"]).write()


@pytest.fixture(scope="module")
def operated(daemon):
    """The listener of the daemon that all share, for what changes nothing."""
    return Admin(daemon)


@pytest.fixture
def admin(start, policy):
    return Admin(start(policy=policy.path))


def test_status(admin, policy):
    s = admin.status()
    assert s["status"] == "ready" and s["why"] is None
    assert s["profiles"] == [{"name": "default", "live": True, "generation": admin.current()["id"], "why": None}]
    shield = next(a for a in s["adapters"] if a["name"] == "shield")
    assert shield["state"] == "live" and shield["digest"] == digest(policy.folder / "shield.safetensors")
    assert shield["required_by"] == 1 and shield["sites"] > 10 and shield["max_rank"] == 4
    g = admin.current()
    recipe = admin.daemon.post(QUICK).json["safelight"]
    assert (recipe["generation_id"], recipe["generation_digest"], recipe["profile"]) == (g["id"], g["digest"], "default")
    assert g in admin.get("/v1/admin/generations").json["generations"] or admin.current()["id"] == g["id"]
    assert s["audit"]["records"] >= 2 and re.fullmatch("[0-9a-f]{64}", s["audit"]["head"]) and s["audit"]["lost"] == 0


def test_nothing_of_it_on_the_public_port(admin):
    for path in ("/v1/admin/status", "/v1/admin/reload", "/v1/load_lora_adapter", "/v1/admin/audit", "/v1/admin/activity", "/operator.html", "/operator.js"):
        assert admin.daemon.get(path).status == 404
        assert admin.daemon.request("POST", path, b"{}", {"Content-Type": "application/json"}).status == 404


def test_load_activate_rollback(admin):
    """A picture changes when a generation is activated, not when its file is loaded; rolling back gives the old bytes of pixels."""
    first = admin.current()
    before = admin.daemon.post(QUICK).json
    loaded = admin.post("/v1/admin/adapters/shield", {"path": "shield2.safetensors"})
    assert loaded.status == 200, loaded.body
    assert loaded.json["adapter"]["state"] == "verified" and admin.current()["id"] == first["id"]
    done = admin.post("/v1/admin/profiles/default/activate")
    assert done.status == 200, done.body
    second = done.json["generation"]
    assert second["current"] and second["id"] != first["id"] and second["digest"] != first["digest"]
    after = admin.daemon.post(QUICK).json
    assert after["safelight"]["generation_id"] == second["id"]
    assert after["data"] != before["data"]
    assert admin.status()["swaps"] >= 1
    back = admin.post("/v1/admin/profiles/default/rollback")
    assert back.status == 200 and back.json["generation"]["digest"] == first["digest"], back.body
    assert admin.daemon.post(QUICK).json["safelight"]["generation_digest"] == first["digest"]
    asked = [(r["verdict"], r["reason"]) for r in admin.records("admin")]
    for path in ("adapters/shield", "profiles/default/activate", "profiles/default/rollback"):
        assert ("asked", f"POST /v1/admin/{path} by uid {os.getuid()}") in asked and ("done", f"POST /v1/admin/{path} by uid {os.getuid()}") in asked


@pytest.mark.parametrize("form", [False, True])
def test_upload(admin, policy, form):
    first, data = admin.current(), (policy.folder / "shield2.safetensors").read_bytes()
    if form:
        body = b'--XYZ\r\nContent-Disposition: form-data; name="adapter"; filename="a"\r\n\r\n' + data + b"\r\n--XYZ--\r\n"
        answer = admin.post("/v1/admin/adapters/shield", body, Content_Type="multipart/form-data; boundary=XYZ")
    else:
        answer = admin.post("/v1/admin/adapters/shield", data, Content_Type="application/octet-stream")
    assert answer.status == 200 and answer.json["adapter"]["digest"] == digest(policy.folder / "shield2.safetensors"), answer.body
    assert admin.post("/v1/admin/profiles/default/activate").json["generation"]["digest"] != first["digest"]
    bad = admin.post("/v1/admin/adapters/shield", data[:-1], Content_Type="application/octet-stream")
    assert bad.status == 400 and admin.status()["status"] == "ready"
    assert any(r["verdict"] == "failed" and "adapters/shield" in r["reason"] for r in admin.records("admin"))


@pytest.mark.parametrize("path, status, says", [
    ("../outside.safetensors", 400, "adapter_dir"), ("/etc/passwd", 404, "etc/passwd"), ("nothing.safetensors", 404, "nothing.safetensors"), ("policy.json", 400, ""),
])
def test_paths_that_are_refused(admin, policy, tmp_path, path, status, says):
    shutil.copy(policy.folder / "shield2.safetensors", tmp_path / "outside.safetensors")
    first = admin.current()
    answer = admin.post("/v1/admin/adapters/shield", {"path": path})
    assert answer.status == status and says in answer.error["message"], answer.body
    assert admin.current()["id"] == first["id"] and admin.daemon.post(QUICK).status == 200
    assert admin.post("/v1/admin/adapters/unknown", {"path": "shield2.safetensors"}).status == 404


def test_link_out_of_the_folder(admin, policy, tmp_path):
    shutil.copy(policy.folder / "shield2.safetensors", tmp_path / "outside.safetensors")
    (policy.folder / "link.safetensors").symlink_to(tmp_path / "outside.safetensors")
    answer = admin.post("/v1/admin/adapters/shield", {"path": "link.safetensors"})
    assert answer.status == 400 and "adapter_dir" in answer.error["message"]


@pytest.mark.parametrize("method, path, body, headers, status", [
    ("GET", "/v1/admin/nothing", None, {}, 404), ("GET", "/index.html", None, {}, 404), ("POST", "/", None, {}, 404), ("PUT", "/v1/admin/status", None, {}, 405),
    ("GET", "/v1/admin/reload", None, {}, 405), ("POST", "/v1/admin/adapters/a/b", b"{}", {}, 404), ("POST", "/v1/admin/adapters/", b"{}", {}, 404),
    ("POST", "/v1/admin/adapters/" + "a" * 64, b"{}", {}, 404), ("POST", "/v1/admin/adapters/%2e%2e", b"{}", {}, 404),
    ("POST", "/v1/admin/profiles/nobody/activate", None, {}, 404), ("POST", "/v1/admin/profiles/default/rollback", None, {}, 404),
    ("GET", "/v1/admin/audit?n=0", None, {}, 400), ("GET", "/v1/admin/audit?n=x", None, {}, 400), ("GET", "/v1/admin/audit?n=10001", None, {}, 400),
    ("POST", "/v1/admin/adapters/shield", b"{}", {"Content-Type": "application/json"}, 400),
    ("POST", "/v1/admin/adapters/shield", b'{"path":1}', {"Content-Type": "application/json"}, 400),
    ("POST", "/v1/admin/adapters/shield", b'{"path":"a","scale":0}', {"Content-Type": "application/json"}, 400),
    ("POST", "/v1/admin/adapters/shield", b'{"path":', {"Content-Type": "application/json"}, 400),
    ("POST", "/v1/admin/adapters/shield", b"[]", {"Content-Type": "application/json"}, 400),
    ("POST", "/v1/admin/adapters/shield", b"x", {"Content-Type": "text/plain"}, 415),
    ("POST", "/v1/admin/adapters/shield", b"x", {"Content-Type": "application/octet-stream", "Content-Encoding": "gzip"}, 415),
    ("POST", "/v1/admin/adapters/shield", b"", {"Content-Type": "application/octet-stream"}, 400),
    ("POST", "/v1/admin/adapters/shield", b"x", {"Content-Type": "multipart/form-data"}, 400),
    ("POST", "/v1/admin/adapters/shield", b'--XYZ\r\nContent-Disposition: form-data; name="adapter"\r\n\r\nabc',
     {"Content-Type": "multipart/form-data; boundary=XYZ"}, 400),
    ("POST", "/v1/admin/adapters/shield", b'--XYZ\r\nContent-Disposition: form-data; name="scale"\r\n\r\n0\r\n--XYZ--\r\n',
     {"Content-Type": "multipart/form-data; boundary=XYZ"}, 400),
    ("POST", "/v1/admin/adapters/shield", b'{"path":"' + b"a" * 70000 + b'"}', {"Content-Type": "application/json"}, 413),
    ("POST", "/v1/admin/reload", b'{"force":true}', {"Content-Type": "application/json"}, 400),
    ("DELETE", "/v1/admin/adapters/shield", None, {}, 400), ("DELETE", "/v1/admin/adapters/unknown", None, {}, 404),
])
def test_bad_requests(admin, method, path, body, headers, status):
    answer = admin.request(method, path, body, headers)
    assert answer.status == status, answer.body
    assert answer.error["message"] and admin.status()["status"] == "ready"


@pytest.mark.parametrize("path, allow", [("adapters/shield", "POST, DELETE"), ("status", "GET"), ("profiles/default/activate", "POST")])
def test_a_method_that_is_not_taken(admin, path, allow):
    answer = admin.request("PUT", f"/v1/admin/{path}")
    assert answer.status == 405 and answer.headers["allow"] == allow and allow in answer.error["message"]


def test_one_upload_at_a_time(start, policy):
    admin = Admin(start("--admin-upload-mb", "1", policy=policy.path))
    big = admin.post("/v1/admin/adapters/shield", b"x" * (2 << 20), Content_Type="application/octet-stream")
    assert big.status == 413 and "1048576" in big.error["message"]

    def half():
        """An upload that has begun and keeps the second one out; None when the place was not free yet."""
        sock = socket.socket(socket.AF_UNIX)
        with short(admin.daemon.state / "admin.sock") as name:
            sock.connect(name)
        sock.sendall(b"POST /v1/admin/adapters/shield HTTP/1.1\r\nHost: x\r\nContent-Type: application/octet-stream\r\nContent-Length: 1000\r\n\r\nabc")
        if admin.post("/v1/admin/adapters/shield", b"xyz", Content_Type="application/octet-stream").status == 429:
            return sock
        sock.close()
        return None

    sock = until(half, "a second upload's refusal")
    assert admin.status()["status"] == "ready"
    sock.close()
    until(lambda: admin.post("/v1/admin/adapters/shield", b"xyz", Content_Type="application/octet-stream").status == 400, "the place to be free")


def is_ready(admin):
    """Whether it answers; while more connections are open than it takes, it closes those that come."""
    try:
        return admin.status()["status"] == "ready"
    except (ConnectionError, http.client.HTTPException):
        return False


def test_slow_clients_and_many_connections(start, policy):
    admin = Admin(start("--client-s", "1", policy=policy.path))
    slow = []
    for part in (b"", b"GET /v1/admin/sta", b"POST /v1/admin/adapters/shield HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"):
        sock = socket.socket(socket.AF_UNIX)
        with short(admin.daemon.state / "admin.sock") as name:
            sock.connect(name)
        sock.sendall(part)
        slow.append(sock)
    begin = time.monotonic()
    for sock in slow:
        sock.settimeout(10 * PATIENCE)
        while sock.recv(4096):
            pass
    assert time.monotonic() - begin < 5 * PATIENCE
    crowd = []
    for _ in range(160):
        sock = socket.socket(socket.AF_UNIX)
        with short(admin.daemon.state / "admin.sock") as name:
            sock.connect(name)
        crowd.append(sock)
    for sock in crowd:
        sock.close()
    until(lambda: is_ready(admin), "the listener after a crowd")


def test_all_who_come_at_once_are_taken_in(admin):
    """A client that does not block, as curl, is refused at once where the socket has no room for it to wait in."""
    admin.daemon.process.send_signal(signal.SIGSTOP)  # accepts nobody
    try:
        crowd = []
        for _ in range(100):
            sock = socket.socket(socket.AF_UNIX)
            sock.setblocking(False)
            with short(admin.daemon.state / "admin.sock") as name:
                sock.connect(name)
            crowd.append(sock)
    finally:
        admin.daemon.process.send_signal(signal.SIGCONT)
    for sock in crowd:
        sock.close()
    until(lambda: is_ready(admin), "the listener after a crowd")


def test_the_socket_is_private(admin):
    path = admin.daemon.state / "admin.sock"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(admin.daemon.state.stat().st_mode) == 0o700
    admin.daemon.stop()
    assert not path.exists()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be somebody else")
def test_other_users_are_refused(admin):
    """Were the modes wrong, the peer's credentials still tell who it is."""
    path = admin.daemon.state / "admin.sock"
    path.chmod(0o666)
    admin.daemon.state.chmod(0o711)
    code = ("import os, socket, sys\ns = socket.socket(socket.AF_UNIX)\nos.chdir(sys.argv[1])\nos.setresuid(65534, 65534, 65534)\n"
            "s.connect('admin.sock')\ns.sendall(b'POST /v1/admin/reload HTTP/1.1\\r\\nHost: x\\r\\nContent-Length: 0\\r\\n\\r\\n')\nprint(s.recv(4096).decode())\n")
    done = subprocess.run(["/usr/bin/python3", "-c", code, str(admin.daemon.state)], capture_output=True, text=True, timeout=60,
                          preexec_fn=lambda: os.umask(0))
    assert "401" in done.stdout and "uid 65534" in done.stdout, done
    until(lambda: any(r["verdict"] == "refused" and "uid 65534" in r["reason"] for r in admin.records("admin")), "the record of the refusal")


def test_activity(admin):
    """Who waits and runs, how far, in which order; and that what is over is counted."""
    d = admin.daemon
    assert admin.get("/v1/admin/activity").json["jobs"] == []
    held = [d.send({**LONG, "n": 2}, "first")]
    until(lambda: any(j["state"] == "running" and j["steps_done"] for j in admin.get("/v1/admin/activity").json["jobs"]), "the first to run")
    a = admin.get("/v1/admin/activity").json
    job, = a["jobs"]
    assert (job["id"], job["width"], job["height"], job["steps"], job["pictures"], job["profile"]) == ("first", 256, 256, 300, 2, "default")
    assert job["position"] is None and job["caller"].startswith("peer ") and job["age_s"] > 0 and "prompt" not in job
    assert a["active"] == 1 and a["queue"] == {"waiting": 0, "capacity": 64} and 1 <= a["running"]["pictures"] <= a["running"]["capacity"]
    for sock in held:
        sock.close()
    until(lambda: not admin.get("/v1/admin/activity").json["jobs"], "nobody to be there")
    assert d.post(QUICK).status == 200
    a = admin.get("/v1/admin/activity").json
    counts = {(c["name"], c["label"]): c["value"] for c in a["counts"]}
    assert counts["pictures", None] == 1 and counts["steps", None] > QUICK["steps"] and counts["cancelled", "disconnect"] == 1
    for h in a["histograms"]:
        assert len(h["counts"]) == len(h["bounds"]) + 1 and h["bounds"] == sorted(h["bounds"]) and (h["sum"] > 0) <= (sum(h["counts"]) > 0)
    unet = next(h for h in a["histograms"] if (h["name"], h["label"]) == ("stage_seconds", "unet"))
    assert sum(unet["counts"]) >= 1 and unet["sum"] > 0


def test_a_queue_in_order(start, policy):
    admin = Admin(start("--running", "1", policy=policy.path))
    held = [admin.daemon.send({**LONG, "seed": i}, f"job-{i}") for i in range(3)]
    jobs = until(lambda: (lambda j: j if len(j) == 3 and j[0]["state"] == "running" else None)(admin.get("/v1/admin/activity").json["jobs"]), "three jobs")
    assert [j["state"] for j in jobs] == ["running", "queued", "queued"] and [j["position"] for j in jobs] == [None, 1, 2]
    for sock in held:
        sock.close()


def test_profile_that_is_not_live_says_why(start, policy, tmp_path):
    policy.content["adapters"]["lost"] = {"path": "lost.safetensors"}
    policy.profile("school", required=["lost"]).write()
    admin = Admin(start(policy=policy.path, ready=False))
    until(lambda: (admin.daemon.state / "admin.sock").exists(), "the listener")
    profiles = until(lambda: (lambda p: p if len(p) == 2 and p[0]["live"] else None)(admin.status()["profiles"]), "both profiles")
    assert profiles[1]["name"] == "school" and not profiles[1]["live"] and profiles[1]["generation"] is None and "lost" in profiles[1]["why"]


# ---- the operator's page ----

PAGE = {"/": "text/html; charset=utf-8", "/operator.js": "text/javascript; charset=utf-8", "/style.css": "text/css; charset=utf-8",
        "/favicon.svg": "image/svg+xml"}


def test_page(operated):
    for path, kind in PAGE.items():
        answer = operated.get(path)
        assert answer.status == 200 and answer.headers["content-type"] == kind and len(answer.body) > 100
        assert answer.headers["content-security-policy"].startswith("default-src 'none'") and answer.headers["x-content-type-options"] == "nosniff"
        assert "www-authenticate" not in answer.headers
        again = operated.request("GET", path, None, {"If-None-Match": answer.headers["etag"]})
        assert again.status == 304 and again.body == b""
        head = operated.request("HEAD", path)
        assert head.status == 200 and head.body == b"" and int(head.headers["content-length"]) == len(answer.body)


def test_page_needs_no_token_and_asks_for_it(port):
    d, number, _ = port
    answer = Admin(d, number).get("/")
    assert answer.status == 200 and answer.headers["www-authenticate"] == "Bearer"
    assert Admin(d, number).post("/").status == 401 and Admin(d, number).get("/v1/admin/activity").status == 401


@pytest.mark.parametrize("host, origin, status", [
    ("localhost:9000", "http://localhost:9000", 200), ("127.0.0.1:9000", None, 200), ("[::1]:9000", None, 200), ("admin", None, 200),
    ("localhost:9000", "http://evil.example", 401), ("localhost:9000", "null", 401), ("localhost:9000", "http://localhost:9001", 401),
    ("localhost:9000", "https://localhost:9000", 401), ("evil.example:9000", None, 401), ("evil.example:9000", "http://evil.example:9000", 401),
    ("[evil.example]", None, 401),
])
def test_other_sites_do_not_use_the_socket(operated, host, origin, status):
    """Through a tunnel every page of the operator's browser can reach it, and it asks for no token."""
    headers = {"Host": host, **({"Origin": origin} if origin else {})}
    assert operated.request("POST", "/v1/admin/reload", None, headers).status == status
    assert operated.request("GET", "/v1/admin/status", None, headers).status == status


@pytest.fixture
def port(start, policy, tmp_path):
    token = tmp_path / "token"
    token.write_text(TOKEN + "\n")
    token.chmod(0o600)
    d = start("--admin", "127.0.0.1:0", "--admin-token-file", str(token), policy=policy.path)
    line = next(line.decode().strip() for line in d.process.stdout if line.startswith(b"admin "))
    return d, int(line.rsplit(":", 1)[1]), token


def test_port_with_token(port):
    d, number, token = port
    assert Admin(d, number, TOKEN).status()["status"] == "ready"
    for wrong in (None, TOKEN[:-1], TOKEN + "x", "", "x" * 5000):
        answer = Admin(d, number, wrong).get("/v1/admin/status")
        assert answer.status == 401 and answer.headers["www-authenticate"] == "Bearer", wrong
    assert Admin(d, number).post("/v1/admin/reload").status == 401
    assert not (d.state / "admin.sock").exists()
    until(lambda: sum(r["verdict"] == "refused" for r in Admin(d, number, TOKEN).records("admin")) == 6, "the records of six refusals")
    done = subprocess.run([BINARY, "reload", "--admin", f"127.0.0.1:{number}", "--token-file", str(token)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done


@pytest.mark.parametrize("flags, says", [
    (("--admin", "0.0.0.0:8081"), "this machine alone"), (("--admin", "127.0.0.1:8081"), "needs admin_token_file"), (("--admin", "nonsense"), "admin must be"),
    (("--admin", "unix:"), "no path"), (("--admin-token-file", "x"), "is for an admin port"),
    (("--admin", "127.0.0.1:0", "--admin-token-file", "/nothing"), "cannot read"), (("--admin", "127.0.0.1:0", "--admin-token-file", "{open}"), "chmod 600"),
    (("--admin", "127.0.0.1:0", "--admin-token-file", "{short}"), "at least 16"), (("--admin", "unix:{open}"), "no socket"),
])
def test_bad_options(tmp_path, policy, flags, says):
    for name, mode, text in (("open", 0o644, TOKEN), ("short", 0o600, "short")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(mode)
    flags = [f.format(open=tmp_path / "open", short=tmp_path / "short") for f in flags]
    done = subprocess.run([BINARY, "serve", "--port", "0", "--threads", "1", "--model", MODEL,
                           "--policy", str(policy.path), *flags], cwd=tmp_path, capture_output=True, text=True, timeout=60 * PATIENCE)
    assert done.returncode in (1, 2) and says in done.stderr.splitlines()[-1], done


def test_off(start, policy):
    d = start("--admin", "off", policy=policy.path)
    assert not (d.state / "admin.sock").exists() and d.post(QUICK).status == 200


def test_a_dead_socket_is_replaced(start, policy):
    d = start(policy=policy.path)
    d.process.kill()
    d.wait()
    assert (d.state / "admin.sock").exists()
    again = start(policy=policy.path, state=d.state)
    assert Admin(again).status()["status"] == "ready"


# ---- reload ----

def reload_command(d, *more):
    return subprocess.run([BINARY, "reload", "--state", str(d.state), *more], capture_output=True, text=True, timeout=60 * PATIENCE)


def test_a_style_that_is_unloaded_is_no_longer_drawn_with(admin, policy):
    """Not even from the compositions that are kept; and a file that failed beside it does not stand for it."""
    styled = {**QUICK, "loras": [{"name": "ink", "scale": 0.2}]}
    assert admin.daemon.post(styled).status == 200
    assert admin.daemon.post(styled).status == 200  # from what is kept
    assert admin.post("/v1/load_lora_adapter", {"lora_name": "ink", "lora_path": "shield2.safetensors", "load_inplace": True}).status == 400
    assert admin.post("/v1/unload_lora_adapter", {"lora_name": "ink"}).status == 200
    answer = admin.daemon.post(styled)
    assert answer.status == 400 and answer.error["param"] == "loras[0].name", answer.body
    assert admin.post("/v1/load_lora_adapter", {"lora_name": "ink", "lora_path": "ink.safetensors"}).status == 200
    assert admin.daemon.post(styled).status == 200


def test_nothing_is_composed_for_who_has_gone(admin):
    """A style is asked for while the loader is busy, and the client leaves: its turn comes and nothing is built. Tried until it left early enough."""
    d, tries = admin.daemon, iter(range(1, 1000))

    def left_in_time():
        scale, before = next(tries) / 1000, d.log().count("composed in")
        loads = [threading.Thread(target=admin.post, args=("/v1/admin/adapters/shield", {"path": "shield2.safetensors"})) for _ in range(8)]
        for t in loads:
            t.start()
        sock = d.send({**QUICK, "loras": [{"name": "ink", "scale": scale}]}, f"gone-{scale}")
        time.sleep(0.05)
        sock.close()
        for t in loads:
            t.join()
        d.wait_log(f"gone-{scale} ")  # the request is over, whichever way
        return d.log().count("composed in") == before

    until(left_in_time, "a request that is cancelled before its turn", 60)
    assert d.get("/readyz").status == 200


def test_what_is_loaded_after_a_retirement_stays(start, policy, tmp_path):
    """An activation outlives reload and restart whatever was loaded and retired before it."""
    state = tmp_path / "kept"
    admin = Admin(start(policy=policy.path, state=state))
    write_safetensors(policy.folder / "shield3.safetensors", lora(5))
    assert admin.post("/v1/admin/adapters/shield", {"path": "shield2.safetensors"}).status == 200
    assert admin.request("DELETE", "/v1/admin/adapters/shield").status == 200
    assert admin.post("/v1/admin/adapters/shield", {"path": "shield3.safetensors"}).status == 200
    live = admin.post("/v1/admin/profiles/default/activate").json["generation"]
    assert admin.post("/v1/admin/reload").status == 200
    assert admin.current()["digest"] == live["digest"]
    admin.daemon.stop()
    assert Admin(start(policy=policy.path, state=state)).current()["digest"] == live["digest"]


def test_loaded_files_go_when_nothing_needs_them(start, policy, tmp_path):
    """Uploads stay while they are loaded, live or what a rollback would bring back, across restarts while they are live, and go after that."""
    state = tmp_path / "kept"
    data, name = {}, {}
    for seed in range(10, 14):
        path = tmp_path / f"{seed}.safetensors"
        write_safetensors(path, lora(seed))
        data[seed], name[seed] = path.read_bytes(), digest(path)

    def upload(seed):
        assert admin.post("/v1/admin/adapters/shield", data[seed], Content_Type="application/octet-stream").status == 200

    def activate(seed):
        upload(seed)
        assert admin.post("/v1/admin/profiles/default/activate").status == 200

    def kept():
        return {p.name.partition(".")[0] for p in (state / "adapters").iterdir() if not p.name.endswith(".live")}

    def wait_kept(*seeds):
        until(lambda: kept() == {name[s] for s in seeds}, f"{seeds} alone to be kept", more=lambda: f"{kept()} of {name}")

    admin = Admin(start(policy=policy.path, state=state))
    upload(10)
    assert kept() == {name[10]}
    activate(11)  # 10 was never activated
    wait_kept(11)
    activate(12)
    wait_kept(11, 12)  # 11 is what a rollback brings back
    assert admin.post("/v1/admin/profiles/default/rollback").status == 200
    wait_kept(11, 12)
    activate(13)
    wait_kept(11, 13)
    live = admin.current()
    admin.daemon.stop()
    assert kept() == {name[11], name[13]}  # what is kept goes while serving, never at the end
    (state / "adapters" / ("0" * 64 + ".safetensors.new")).write_bytes(b"half")  # a crash in the middle of an upload
    (state / "adapters" / ("1" * 64)).mkdir()
    (state / "adapters" / ("1" * 64) / "adapter_config.json").write_text("{}")
    (state / "adapters" / "nobody.live").write_text(f"{name[11]}\n{name[11]}\n")
    (state / "adapters" / "mine.txt").write_text("not of the server")
    admin = Admin(start(policy=policy.path, state=state))
    assert admin.current()["digest"] == live["digest"]
    files = {f"{name[13]}.safetensors", "shield.live", "mine.txt"}
    until(lambda: {p.name for p in (state / "adapters").iterdir()} == files, files)
    policy.content["adapters"]["shield"]["digest"] = digest(policy.folder / "shield.safetensors")  # the policy has the last word
    policy.write()
    assert admin.post("/v1/admin/reload").status == 200
    assert admin.post("/v1/admin/profiles/default/rollback").status in (400, 404)  # not what the policy pins
    policy.content["adapters"]["shield"].pop("digest")
    policy.profile(required=[{"adapter": "shield", "weight": 0.5}], styles=["ink"]).write()
    assert admin.post("/v1/admin/reload").status == 200
    until(lambda: {p.name for p in (state / "adapters").iterdir()} == {"mine.txt"}, "nothing to be kept")
    assert admin.daemon.post(QUICK).status == 200


def test_rollback_obeys_the_rules_of_now(admin, policy):
    """What was live without a manifest does not come back once the policy requires one."""
    for ending in ("safetensors", "manifest.json"):
        shutil.copy(EXPERTS / f"hate.{ending}", policy.folder / f"shield.{ending}")
    policy.content["require_manifest"] = True
    policy.profile(required=["shield"]).write()
    done = reload_command(admin.daemon)
    assert done.returncode == 0, done.stderr
    live = admin.current()
    back = admin.post("/v1/admin/profiles/default/rollback")
    assert back.status == 404, back.body
    assert admin.current()["id"] == live["id"]


def test_reload(admin, policy):
    first = admin.current()
    policy.content["profiles"]["default"]["required"] = [{"adapter": "shield", "weight": 0.5}]
    policy.write()
    done = reload_command(admin.daemon)
    assert done.returncode == 0 and json.loads(done.stdout) == {"status": "ok"}, done
    second = admin.current()
    assert second["digest"] != first["digest"]
    policy.path.write_text('{"profiles": 1}')
    done = reload_command(admin.daemon)
    assert done.returncode == 1 and "profiles" in done.stderr and not done.stdout
    assert admin.current()["id"] == second["id"] and admin.daemon.post(QUICK).json["safelight"]["generation_id"] == second["id"]
    policy.content["profiles"]["default"]["required"] = ["shield"]
    policy.content["profiles"]["default"]["required"] = [{"adapter": "shield"}]
    policy.write()
    admin.daemon.process.send_signal(signal.SIGHUP)
    until(lambda: admin.current()["digest"] == first["digest"], "SIGHUP to take effect")


def test_commands(admin, policy, tmp_path):
    def run(*words):
        return subprocess.run([BINARY, *words, "--state", str(admin.daemon.state)], capture_output=True, text=True, timeout=60 * PATIENCE)

    assert json.loads(run("admin", "status").stdout)["status"] == "ready"
    assert json.loads(run("admin", "load", "shield", "shield2.safetensors").stdout)["adapter"]["state"] == "verified"
    first = json.loads(run("admin", "activate", "default").stdout)["generation"]
    assert json.loads(run("admin", "upload", "shield", str(policy.folder / "shield.safetensors")).stdout)["adapter"]["state"] in ("verified", "live")
    second = json.loads(run("admin", "activate", "default").stdout)["generation"]
    assert first["digest"] != second["digest"] and len(json.loads(run("admin", "generations").stdout)["generations"]) >= 1
    assert json.loads(run("admin", "rollback", "default").stdout)["generation"]["digest"] == first["digest"]
    assert len(json.loads(run("admin", "audit", "3").stdout)["records"]) == 3
    for words, status, says in [(("load", "shield", "nothing"), 1, "nothing"), (("activate", "nobody"), 1, "nobody"), (("dance",), 2, "usage"), ((), 2, "usage"),
                                (("load", "shield"), 2, "usage"), (("retire", "nobody"), 1, "nobody"), (("activate", "a b"), 1, "names have")]:
        done = run("admin", *words)
        assert done.returncode == status and says in done.stderr and not done.stdout, done
    done = subprocess.run([BINARY, "reload", "--state", str(tmp_path / "none")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "no server answers" in done.stderr


# ---- vLLM's routes ----

def test_vllm_routes(admin):
    unload = admin.post("/v1/unload_lora_adapter", {"lora_name": "ink"})
    if unload.status == 404:
        assert "cannot be found" in unload.error["message"]
    else:
        assert unload.body == b"Success: LoRA adapter 'ink' removed successfully."
    answer = admin.post("/v1/load_lora_adapter", {"lora_name": "ink", "lora_path": "ink.safetensors"})
    assert answer.status == 200 and answer.body == b"Success: LoRA adapter 'ink' added successfully.", answer.body
    assert answer.headers["content-type"].startswith("text/plain")
    again = admin.post("/v1/load_lora_adapter", {"lora_name": "ink", "lora_path": "ink.safetensors"})
    assert again.status == 400 and "has already been loaded" in again.error["message"]
    assert admin.post("/v1/load_lora_adapter", {"lora_name": "ink", "lora_path": "ink.safetensors", "load_inplace": True}).status == 200
    for body in ({"lora_name": "ink"}, {"lora_path": "ink.safetensors"}, {}):
        answer = admin.post("/v1/load_lora_adapter", body)
        assert answer.status == 400 and answer.error["message"] == "Both 'lora_name' and 'lora_path' must be provided."
    assert admin.post("/v1/unload_lora_adapter", {"lora_name": "ink", "lora_int_id": 1}).status == 200
    assert admin.post("/v1/unload_lora_adapter", {"lora_name": "ink"}).status == 404
    assert admin.post("/v1/load_lora_adapter", {"lora_name": "ink", "lora_path": "shield2.safetensors"}).status == 400  # the policy pins the digest


@pytest.mark.parametrize("name", ["shield", "nobody", "../ink", ""])
def test_vllm_routes_are_for_styles(admin, name):
    first = admin.current()
    for path, more in (("load", {"lora_path": "shield2.safetensors"}), ("unload", {})):
        answer = admin.post(f"/v1/{path}_lora_adapter", {"lora_name": name, **more})
        assert answer.status == 400, answer.body
    assert admin.current()["id"] == first["id"]


# ---- openapi.yaml ----

def test_every_admin_path_is_served(admin):
    text = OPENAPI.read_text()
    paths = re.findall(r"^  (/\S*):\n((?:    .*\n)*)", text, re.M)
    ours = {path: re.findall(r"^    (get|post|delete):", block, re.M) for path, block in paths if "x-listener: admin" in block}
    assert len(ours) == 10
    served = 0
    for path, methods in ours.items():
        for method in methods:
            answer = admin.request(method.upper(), path.replace("{name}", "nobody"), b"{}" if method == "post" else None)
            assert answer.status != 405 and not answer.body.startswith(b'{"error":{"message":"there is nothing at'), (path, method)
            served += 1
        assert admin.request("PATCH", path.replace("{name}", "nobody")).status == 405
    assert served == 11
