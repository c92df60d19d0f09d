"""What stands between a client and the queue: tenants' limits, addresses behind proxies, pages of other origins, trace context, JSON log lines."""
import hashlib
import json
import re
import signal
import subprocess

import pytest

from conftest import BINARY, LONG, QUICK, until

KEYS = {"alice": "key-of-alice", "bob": "key-of-bob"}
TRACE = "0af7651916cd43dd8448eb211c80319c"


def write_policy(path, keyless=None, **limits):
    tenants = {name: {"key_hash": hashlib.blake2b(key.encode(), digest_size=32).hexdigest(), "profile": "default"} for name, key in KEYS.items()}
    for name, these in limits.items():
        tenants[name]["limits"] = these
    policy = {"profiles": {"default": {"requires_nothing": True}}, "tenants": tenants}
    if keyless:
        policy["keyless"] = {"limits": keyless}
    path.write_text(json.dumps(policy))
    return path


def key(name):
    return {"Authorization": f"Bearer {KEYS[name]}"}


def is_refused(answer, words):
    assert answer.status == 429, answer.body
    assert words in answer.error["message"], answer.error
    assert 1 <= int(answer.headers["retry-after"]) <= 60
    assert 0 < int(answer.headers["retry-after-ms"]) <= 1000 * int(answer.headers["retry-after"])


def test_rates_count_by_tenant_and_survive_a_reload(start, tmp_path):
    path = write_policy(tmp_path / "policy.json", alice={"per_minute": 2}, keyless={"pictures_per_minute": 3})
    d = start(policy=path)
    for _ in range(2):
        assert d.post(QUICK, **key("alice")).status == 200
    is_refused(d.post(QUICK, **key("alice")), "more than 2 requests in a minute")
    assert d.post(QUICK, **key("bob")).status == 200
    assert d.post({**QUICK, "n": 3}).status == 200
    is_refused(d.post({**QUICK, "n": 2}), "more than 3 pictures in a minute")
    never = d.post({**QUICK, "n": 4})
    assert never.status == 400 and never.error["param"] == "n"
    assert re.search(r'safelight_refusals_total\{reason="rate_limit"\} 2\n', d.get("/metrics").body.decode())
    write_policy(path, alice={"per_minute": 600})
    d.process.send_signal(signal.SIGHUP)
    until(lambda: d.post(QUICK, **key("alice")).status == 200, "the new limit", 30)


def test_one_tenant_at_a_time(start, tmp_path):
    d = start("--running", "1", policy=write_policy(tmp_path / "policy.json", alice={"concurrency": 1}))
    body = json.dumps(LONG).encode()
    first = d.socket()
    head = f"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEYS['alice']}\r\nContent-Type: application/json\r\n"
    first.sendall(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
    until(lambda: b'safelight_pictures_running{device="0"} 1\n' in d.get("/metrics").body, "the first picture to be drawn", 30)
    is_refused(d.post(QUICK, **key("alice")), "1 of your requests are accepted already")
    assert d.post({**QUICK, "steps": 1}, **key("bob")).status == 200
    first.close()  # who goes away gives his place back
    until(lambda: d.post(QUICK, **key("alice")).status == 200, "the place of the one that went away", 30)


def test_addresses_behind_a_proxy(start, tmp_path):
    d = start("--trusted_proxies", "127.0.0.1", policy=write_policy(tmp_path / "policy.json", keyless={"per_minute": 1}))
    assert d.post(QUICK, X_Forwarded_For="192.0.2.1").status == 200
    assert d.post(QUICK, X_Forwarded_For="192.0.2.2").status == 200
    is_refused(d.post(QUICK, X_Forwarded_For="6.6.6.6, 192.0.2.1"), "more than 1 requests")
    stranger = start(policy=tmp_path / "policy.json")
    assert stranger.post(QUICK, X_Forwarded_For="192.0.2.1").status == 200
    is_refused(stranger.post(QUICK, X_Forwarded_For="192.0.2.2"), "more than 1 requests")  # nobody said that this peer is a proxy


def preflight(daemon, origin, headers="authorization,content-type,x-evil"):
    return daemon.request("OPTIONS", "/v1/images/generations", headers={
        "Origin": origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": headers})


def test_origins(start):
    d = start("--cors_origins", "https://app.example http://localhost:3000")
    allowed = preflight(d, "https://app.example")
    assert allowed.status == 204 and allowed.body == b""
    assert allowed.headers["access-control-allow-origin"] == "https://app.example"
    assert allowed.headers["access-control-allow-headers"] == "authorization, content-type"
    assert "POST" in allowed.headers["access-control-allow-methods"] and allowed.headers["vary"] == "Origin"
    denied = preflight(d, "https://evil.example")
    assert not [h for h in denied.headers if h.startswith("access-control")] and denied.headers["vary"] == "Origin"
    answer = d.get("/v1/models", Origin="http://localhost:3000")
    assert answer.headers["access-control-allow-origin"] == "http://localhost:3000"
    assert "x-request-id" in answer.headers["access-control-expose-headers"]
    error = d.request("POST", "/v1/images/generations", b"{", {"Origin": "http://localhost:3000", "Content-Type": "application/json"})
    assert error.status == 400 and error.headers["access-control-allow-origin"] == "http://localhost:3000"  # a page may read what is wrong
    assert "access-control-allow-credentials" not in {**allowed.headers, **answer.headers}
    assert d.request("OPTIONS", "/nowhere", headers={"Origin": "https://app.example"}).status == 404


def test_no_origin_is_allowed_unless_it_is_named(daemon):
    answer = preflight(daemon, "https://app.example")
    assert answer.status == 405
    for a in (answer, daemon.get("/v1/models", Origin="https://app.example")):
        assert not [h for h in a.headers if h.startswith("access-control")] and "vary" not in a.headers


def test_every_origin(start):
    answer = start("--cors_origins", "*").get("/v1/models", Origin="https://any.example")
    assert answer.headers["access-control-allow-origin"] == "*" and "vary" not in answer.headers


@pytest.mark.parametrize("option, value", [("cors_origins", "app.example"), ("trusted_proxies", "localhost")])
def test_lists_are_checked_at_the_start(option, value):
    done = subprocess.run([BINARY, "serve", f"--{option}", value, "--check"], capture_output=True, text=True)
    assert done.returncode == 2 and option in done.stderr and value in done.stderr


def test_trace_and_log(start):
    d = start("--log_json", "yes")
    answer = d.post(QUICK, traceparent=f"00-{TRACE}-b7ad6b7169203331-01", x_request_id="traced-1")
    version, trace, span, flags = answer.headers["traceparent"].split("-")
    assert (version, trace, flags) == ("00", TRACE, "01") and re.fullmatch("[0-9a-f]{16}", span) and span != "b7ad6b7169203331"
    line = json.loads(d.wait_log(r'(?m)^\{.*"traced-1".*$').group(0))
    assert line["trace_id"] == TRACE and line["span_id"] == span and line["parent_id"] == "b7ad6b7169203331"
    assert line["status"] == 200 and all(line[f"{stage}_ms"] >= 0 for stage in ("queue", "text", "unet", "vae", "png", "total"))
    fresh = [d.get("/healthz", traceparent=bad).headers["traceparent"] for bad in ("", f"00-{TRACE}-b7ad6b7169203331-01-x", f"00-{TRACE.upper()}-b7ad6b7169203331-01")]
    for header in fresh:
        assert re.fullmatch(r"00-[0-9a-f]{32}-[0-9a-f]{16}-00", header) and TRACE not in header
    assert len({h.split("-")[1] for h in fresh}) == 3


@pytest.mark.parametrize("as_json", ["yes", "no"])
def test_log_is_text(start, as_json):
    """Whatever bytes a client puts into a path, the log stays UTF-8, and its lines stay JSON."""
    d = start("--log_json", as_json)
    for name in (b"\xff\x86", b"a\xed\xa0\x80b", "\u00e9\U0001f600".encode(), b"\xf0\x9f\x98", b"\"\\"):
        with d.socket() as sock:
            sock.sendall(b"GET /v1/jobs/" + name + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\nx-request-id: odd\r\n\r\n")
            assert sock.recv(65536).startswith(b"HTTP/1.1 404 ")
    until(lambda: d.log_path.read_bytes().count(b"odd") == 5, "five lines")
    lines = [line for line in d.log_path.read_bytes().decode().splitlines() if "odd" in line]
    said = [json.loads(line)["error"] if as_json == "yes" else line for line in lines]
    assert len(said) == 5 and sum("there is no job a???b" in s for s in said) == 1 and sum("\u00e9\U0001f600" in s for s in said) == 1, said
