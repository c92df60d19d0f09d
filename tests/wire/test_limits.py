"""What one client can do to others: nothing. Full queue, clients that leave or dawdle, deadlines, drain, busy port."""
import concurrent.futures
import http.client
import json
import os
import re
import resource
import signal
import socket
import subprocess
import time

import pytest

from conftest import BINARY, ENV, LONG, MODEL, PATIENCE, POLICY, QUICK, ROOT, read_answer, until


def test_full_queue(start):
    d = start("--queue", "2")
    running = d.send(LONG, "running")
    d.wait_busy()
    waiting = [d.send(LONG, f"waiting-{i}") for i in range(2)]
    until(lambda: d.post(QUICK).status == 429, "the queue to be full")
    answer = d.post(QUICK)
    assert answer.status == 429 and answer.error["code"] == "queue_full" and answer.error["type"] == "rate_limit_error"
    assert 1 <= int(answer.headers["retry-after"]) <= 60
    assert d.get("/healthz").status == 200 and d.get("/readyz").status == 200  # nothing else is held up
    for sock in waiting + [running]:
        sock.close()
    until(lambda: d.post(QUICK).status == 200, "the queue to be free again")


def steps_done(d, request_id):
    """Status and steps of a finished request, from its log line."""
    found = d.wait_log(rf" {request_id} POST /v1/images/generations (\d+) .* steps=(\d+) ")
    return int(found.group(1)), int(found.group(2))


def test_client_that_leaves_stops_its_work(start):
    d = start()
    running = d.send(LONG, "leaves-running")
    d.wait_busy()
    waiting = d.send(LONG, "leaves-waiting")
    time.sleep(0.1)
    waiting.close()
    assert steps_done(d, "leaves-waiting") == (499, 0)  # while the other one still runs
    running.close()
    status, steps = steps_done(d, "leaves-running")
    assert status == 499 and steps < LONG["steps"]
    assert d.post(QUICK).json["safelight"]["times"]["queue_ms"] < 2000


def test_client_that_resets_or_half_closes(start):
    d = start()
    for i, leave in enumerate((lambda s: s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0") or s.close(),
                               lambda s: s.shutdown(socket.SHUT_WR))):
        sock = d.send(LONG, f"gone-{i}")
        d.wait_busy()
        leave(sock)
        status, steps = steps_done(d, f"gone-{i}")
        assert status == 499 and steps < LONG["steps"]
        sock.close()


def test_one_of_many_leaves(start):
    """A disconnect touches nobody else: the others get the pictures they would get alone."""
    d = start("--running", "3")
    alone = [d.png(seed=s, steps=8) for s in range(4)]
    leaving = d.send(LONG)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        drawn = pool.map(lambda s: d.png(seed=s, steps=8), range(4))
        time.sleep(0.1)
        leaving.close()
        assert list(drawn) == alone


def test_deadline(start):
    d = start("--deadline-s", "1")
    socks = [d.send(LONG, f"late-{i}") for i in range(2)]
    for i, sock in enumerate(socks):
        answer = read_answer(sock)
        assert answer.status == 504 and answer.error["code"] == "deadline_exceeded"
        sock.close()
    assert steps_done(d, "late-0")[1] < LONG["steps"] and steps_done(d, "late-1")[1] < LONG["steps"]
    until(lambda: d.post(QUICK).status == 200, "a picture within its second", 60)


def cut_after(d, first, rest, every):
    """Sends `first`, then `rest` byte by byte; how long until the daemon closes the connection."""
    begun = time.monotonic()
    with d.socket() as sock:
        sock.sendall(first)
        for byte in rest:
            sock.settimeout(every)
            try:
                if sock.recv(4096) == b"":
                    return time.monotonic() - begun
                return None  # it answered
            except TimeoutError:
                pass
            except ConnectionError:
                return time.monotonic() - begun
            try:
                sock.sendall(bytes([byte]))
            except OSError:
                return time.monotonic() - begun
    return None


@pytest.mark.parametrize("first, rest", [
    (b"", b""), (b"GET /heal", b"thz" + b"x" * 200), (b"GET /healthz HTTP/1.1\r\nHost: x\r\nX: ", b"y" * 200),
    (b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 500\r\n\r\n", b" " * 200),
], ids=["silent", "request line", "headers", "body"])
def test_slow_client_is_cut(start, first, rest):
    """A byte now and then does not keep a connection: the whole request has client_s seconds."""
    d = start("--client-s", "1")
    seconds = cut_after(d, first, rest or b"\r" * 200, 0.1) if rest else cut_silent(d)
    assert seconds is not None and 0.8 < seconds < 15
    assert d.get("/healthz").status == 200


def cut_silent(d):
    begun = time.monotonic()
    with d.socket() as sock:
        assert sock.recv(10) == b""
    return time.monotonic() - begun


def test_idle_connection_is_closed_between_requests(start):
    d = start("--client-s", "1")
    with d.socket() as sock:
        for _ in range(3):  # a connection in use lives longer than client_s
            time.sleep(0.6)
            sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            assert sock.recv(4096).startswith(b"HTTP/1.1 200")
        assert sock.recv(10) == b""


def test_waiting_client_is_not_idle(start):
    """A picture that takes longer than client_s is no reason to cut the client that waits for it."""
    d = start("--client-s", "1")
    total_ms = 0
    for size in ({"steps": 20}, {"steps": 50}, {"steps": 150}, {"n": 4}, {"n": 10}):  # a step's time varies threefold from run to run
        answer = d.post({**LONG, **size})
        assert answer.status == 200
        total_ms = answer.json["safelight"]["times"]["total_ms"]
        if total_ms > 1000:
            break
    assert total_ms > 1000


def test_connection_limit(start):
    d = start("--max-connections", "3")
    socks = [d.socket() for _ in range(3)]
    for sock in socks:
        sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert sock.recv(4096).startswith(b"HTTP/1.1 200")
    with d.socket() as fourth:
        fourth.settimeout(1)
        try:
            fourth.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            assert fourth.recv(4096) == b""
        except (TimeoutError, ConnectionError):
            pass  # not accepted until a place is free
    for sock in socks:
        sock.close()
    until(lambda: served(d), "a free place")


def served(d):
    try:
        return d.get("/healthz").status == 200
    except OSError:
        return False


def test_ready_only_when_loaded(start):
    d = start(ready=False)
    first = d.get("/readyz")  # the port listens before the model is there
    picture = d.post(QUICK)
    models = d.get("/v1/models").json
    assert d.get("/healthz").status == 200
    d.wait_ready()
    assert first.status == 503 and "loading" in first.error["message"] and first.error["code"] == "not_ready"
    assert picture.status in (503, 200)  # it may have become ready in between
    if picture.status == 503:
        assert picture.error["code"] == "not_ready" and int(picture.headers["retry-after"]) >= 1
    assert models["object"] == "list"
    assert d.post(QUICK).status == 200


def test_drain_finishes_what_was_accepted(start):
    d = start()
    socks = [d.send({**QUICK, "seed": s, "steps": 20}) for s in range(6)]
    d.wait_busy()
    kept = d.connect()
    kept.request("GET", "/healthz")
    assert kept.getresponse().read()
    d.terminate()
    d.wait_log("stopping: ")
    kept.request("GET", "/readyz")  # connections are still answered, new work is not taken
    response = kept.getresponse()
    assert response.status == 503 and response.getheader("connection").lower() == "close"
    response.read()
    late = d.post(QUICK)
    assert late.status == 503 and late.error["code"] == "not_ready" and "stopping" in late.error["message"]
    answers = [read_answer(s) for s in socks]
    assert [a.status for a in answers] == [200] * 6
    assert [a.json["safelight"]["seed"] for a in answers] == list(range(6))
    assert d.wait() == 0
    for sock in socks:
        sock.close()


def test_drain_ends_at_its_deadline(start):
    d = start("--drain-s", "0")
    socks = [d.send(LONG) for _ in range(3)]
    d.wait_busy()
    begun = time.monotonic()
    d.terminate()
    answers = [read_answer(s) for s in socks]
    assert [a.status for a in answers] == [503] * 3 and all("stopping" in a.error["message"] for a in answers)
    assert d.wait() == 0 and time.monotonic() - begun < 15
    for sock in socks:
        sock.close()


def test_second_signal_is_immediate(start):
    d = start()
    sock = d.send({**LONG, "n": 10})
    d.wait_busy()
    d.terminate()
    d.wait_log("stopping: ")
    d.process.send_signal(signal.SIGINT)
    assert d.wait() == 128 + signal.SIGINT
    sock.close()


def run(*args, timeout=60, cwd=ROOT):
    return subprocess.run([BINARY, *args], cwd=cwd, capture_output=True, text=True, timeout=timeout)


def test_busy_port(start, tmp_path):
    d = start()
    done = run("serve", "--model", MODEL, "--policy", POLICY, "--port", str(d.port), cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert re.search(rf"cannot listen on 127.0.0.1 port {d.port}: Address already in use; .*--port", done.stderr)


@pytest.mark.parametrize("args, says", [
    (("serve", "--host", "localhost", "--policy", POLICY), "numeric address"), (("serve", "--port", "99999"), "between 0 and 65535"),
    (("serve", "--sampler", "plms"), "known are"), (("serve", "--nonsense", "1"), "no option --nonsense"),
    (("dance",), 'no command "dance"'), (("serve", "--config", "no/such/file"), "no/such/file"),
])
def test_wrong_usage(args, says, tmp_path):
    done = run(*args, cwd=tmp_path)
    assert done.returncode in (1, 2) and says in done.stderr and done.stdout == ""


def test_print_config_is_a_config(tmp_path):
    printed = run("serve", "--max-size", "512", "--print-config")
    assert printed.returncode == 0
    path = tmp_path / "safelight.conf"
    path.write_text(printed.stdout)
    again = run("serve", "--config", str(path), "--print-config")
    assert again.stdout == printed.stdout and "\nmax_size = 512\n" in again.stdout
    assert run("serve", "--config", str(path), "--check").returncode == 0
    assert run("help").stdout.count("\n") >= 6 and run("version").stdout.startswith("safelight ")


def test_nobody_reads_the_log(tmp_path):
    """A full pipe at stderr holds nobody up; what was lost is counted when it is read again."""
    process = subprocess.Popen([BINARY, "serve", "--port", "0", "--threads", "1", "--model", MODEL, "--policy", POLICY], cwd=tmp_path, env=ENV,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        port = int(process.stdout.readline().decode().rsplit(":", 1)[1])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30 * PATIENCE)
        for _ in range(1500):  # 80 bytes a line: twice what a pipe holds
            connection.request("GET", "/healthz")
            assert connection.getresponse().read()
        first = os.read(process.stderr.fileno(), 1 << 20)
        assert 30000 < len(first) < 100000
        connection.request("GET", "/healthz")
        assert connection.getresponse().read()
        connection.close()
    finally:
        process.terminate()
        rest = process.communicate(timeout=60 * PATIENCE)[1]
    assert re.search(rb"\d+ log lines were dropped", rest) and process.returncode == 0


def test_too_many_connections_for_the_system(tmp_path):
    done = subprocess.run(["sh", "-c", f"ulimit -n 256 && exec '{BINARY}' serve --port 0 --max-connections 1000 --model '{MODEL}' --policy '{POLICY}'"],
                          cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "max_connections 1000 needs 1192 open files and the system allows 256" in done.stderr


def test_files_beside_connections(start):
    """Whoever reads a picture of the store has two files open; so as many are allowed where the system lets us."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        d = start("--max-connections", "500")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert resource.prlimit(d.process.pid, resource.RLIMIT_NOFILE) == (1192, hard)


def test_log_lines(start):
    d = start("--log-json", "yes")
    answer = d.post({**QUICK, "prompt": "a secret wish"}, x_request_id="logged")
    assert answer.status == 200
    line = d.wait_log(r'.*"id":"logged".*\n').group()
    entry = json.loads(line)
    assert entry["status"] == 200 and entry["steps"] == 2 and entry["width"] == 64 and entry["unet_ms"] > 0
    assert "prompt" not in entry and "secret" not in d.log()
    d.get('/no"thing\\here')
    assert json.loads(d.wait_log(r'.*no\\"thing.*\n').group())["status"] == 404
    loud = start("--log-prompts", "yes", "--log-json", "yes")
    assert loud.post({**QUICK, "prompt": 'a "wish"\n🍎'}).status == 200
    assert json.loads(loud.wait_log(r'.*"prompt".*\n').group())["prompt"] == 'a "wish"\n🍎'
