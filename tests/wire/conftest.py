"""The real daemon for tests: started on a free port, talked to over sockets, stopped with SIGTERM.

SAFELIGHT names another binary than build/release/safelight (a sanitizer build), SAFELIGHT_ARGS more flags for it, SAFELIGHT_PATIENCE
a factor for all patience. SAFELIGHT_MODEL names another checkpoint than the bundled one, SAFELIGHT_PLANS a folder that all daemons keep compiled plans in.
"""
import http.client
import json
import os
import pathlib
import re
import select
import signal
import socket
import subprocess
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
BINARY = str(pathlib.Path(os.environ.get("SAFELIGHT", ROOT / "build/release/safelight")).resolve())  # some tests run elsewhere
MODEL = os.environ.get("SAFELIGHT_MODEL", str(ROOT / "weights/emoji"))
# Pictures without adapters, as the goldens have them; tests of the safety name policies of their own.
POLICY = str(ROOT / "tests/policies/evaluation.json")
PATIENCE = float(os.environ.get("SAFELIGHT_PATIENCE", "1"))
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}

# Small and fast, for tests that are not about the picture; and one that takes seconds.
QUICK = {"prompt": "a red apple", "size": "64x64", "steps": 2, "seed": 1}
LONG = {"prompt": "a red apple", "size": "256x256", "steps": 150, "seed": 1}


class Answer:
    def __init__(self, response):
        self.status = response.status
        self.headers = {k.lower(): v for k, v in response.getheaders()}
        self.body = response.read()

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def error(self):
        """The error object, which always has its four keys."""
        error = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"}, error
        assert self.headers["content-type"] == "application/json"
        return error


class Daemon:
    def __init__(self, directory, *args, model=MODEL, ready=True, state=None, policy=POLICY):
        """state: its state folder; each daemon gets one of its own unless the test says otherwise."""
        name = str(time.monotonic_ns())
        self.log_path = directory / f"stderr-{name}"
        self.state = pathlib.Path(state or directory / f"state-{name}")
        if plans := os.environ.get("SAFELIGHT_PLANS"):
            self.state.mkdir(mode=0o700, exist_ok=True)
            if not (self.state / "plans").exists():
                (self.state / "plans").symlink_to(plans)
        command = [BINARY, "serve", "--port", "0", "--threads", "1", "--model", str(model), "--state", str(self.state)]
        command += ["--policy", str(policy)]
        command += os.environ.get("SAFELIGHT_ARGS", "").split() + list(args)
        with open(self.log_path, "wb") as log:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=ENV, cwd=ROOT)
        line = self.stdout_line()
        found = re.search(r"listens at http://(?:127\.0\.0\.1|\[::1\]):(\d+)$", line)
        assert found, f"no address in {line!r}; {self.log()}"
        self.port = int(found.group(1))
        self.url = f"http://127.0.0.1:{self.port}"
        if ready:
            self.wait_ready()

    def stdout_line(self, patience=20):
        assert select.select([self.process.stdout], [], [], patience * PATIENCE)[0], "the daemon prints nothing"
        return self.process.stdout.readline().decode().rstrip("\n")

    def wait_ready(self):
        until(lambda: self.get("/readyz").status == 200, "ready", 30)

    def log(self):
        return self.log_path.read_text()

    def wait_log(self, pattern, patience=20):
        """The match of a pattern in the log, as soon as it is there."""
        return until(lambda: re.search(pattern, self.log()), f"{pattern!r} in the log", patience, self.log)

    def connect(self, timeout=120):
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout * PATIENCE)

    def socket(self, timeout=30):
        return socket.create_connection(("127.0.0.1", self.port), timeout=timeout * PATIENCE)

    def request(self, method, path, body=None, headers=None, **more):
        connection = self.connect()
        try:
            connection.request(method, path, body, headers or {}, **more)
            return Answer(connection.getresponse())
        finally:
            connection.close()

    def get(self, path, **headers):
        return self.request("GET", path, headers=headers)

    def post(self, fields, **headers):
        """A picture is asked for; fields may be a dict or the bytes of a body."""
        body = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
        headers = {"Content-Type": "application/json", **{k.replace("_", "-"): v for k, v in headers.items()}}
        return self.request("POST", "/v1/images/generations", body, headers)

    def png(self, **fields):
        answer = self.post({**QUICK, **fields}, Accept="image/png")
        assert answer.status == 200, answer.body
        assert answer.headers["content-type"] == "image/png"
        return answer.body

    def send(self, fields, request_id=None):
        """Sends a request for a picture and returns its socket, with the answer unread."""
        body = json.dumps(fields).encode()
        sock = self.socket()
        head = "POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        if request_id:
            head += f"x-request-id: {request_id}\r\n"
        sock.sendall(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        return sock

    def wait_busy(self):
        """Until the device works on something: it takes processor time while nobody else would."""
        start = self.cpu()
        until(lambda: self.cpu() > start + 0.03, "the device to draw", 20)

    def cpu(self):
        fields = pathlib.Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def resident(self):
        """Bytes of memory."""
        return int(re.search(r"VmRSS:\s+(\d+) kB", pathlib.Path(f"/proc/{self.process.pid}/status").read_text()).group(1)) << 10

    def files(self):
        """How many are open."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def terminate(self):
        self.process.send_signal(signal.SIGTERM)

    def wait(self, patience=30):
        return self.process.wait(patience * PATIENCE)

    def stop(self):
        """SIGTERM ends it in order, and nothing in its log says otherwise."""
        if self.process.poll() is None:
            self.terminate()
        status = self.wait()
        self.process.stdout.close()
        assert status == 0, self.log()
        for word in ("Sanitizer", "assert", "runtime error"):
            assert word not in self.log(), self.log()

    def kill(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


def read_answer(sock):
    """The answer to a request whose socket send() returned."""
    response = http.client.HTTPResponse(sock)
    response.begin()
    return Answer(response)


def until(condition, what, patience=10, more=lambda: ""):
    end = time.monotonic() + patience * PATIENCE
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < end, f"waited in vain for {what}\n{more()}"
        time.sleep(0.01)


@pytest.fixture(scope="session")
def daemon(tmp_path_factory):
    """One daemon with default settings for all tests that leave it as it was."""
    d = Daemon(tmp_path_factory.mktemp("daemon"))
    yield d
    try:
        d.stop()
    finally:
        d.kill()


@pytest.fixture
def start(tmp_path):
    """start(*flags) starts a daemon of the test's own; it must end in order unless the test ended it."""
    started = []

    def begin(*args, **more):
        started.append(Daemon(tmp_path, *args, **more))
        return started[-1]

    yield begin
    try:
        for d in started:
            if d.process.poll() is None:
                d.stop()
    finally:
        for d in started:
            d.kill()
