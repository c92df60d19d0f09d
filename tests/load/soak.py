"""The soak: mixed clients, swaps of the safety and kill -9 restarts against one state folder. Prints a JSON report; its status is 0 only when

    - no durable job is lost: each that was accepted is finished, cancelled because somebody asked for that, or reported as crashed after three kills
    - every picture, of a request, a stream or a job, is the one that its generation draws alone
    - nothing unexpected is answered, and in the half without kills memory and open files do not grow

    .venv/bin/python tests/load/soak.py --minutes 15
    .venv/bin/python tests/load/soak.py --minutes 2    # in the tests

Clients are threads of this process: closed loops, each request on a connection of its own. Nothing depends on how fast the machine is: what is not
finished when time is over is waited for. Called by people, and by tests/wire/test_soak.py.
"""
import argparse
import base64
import collections
import http.client
import io
import json
import pathlib
import random
import re
import socket
import sys
import tempfile
import threading
import time
import traceback

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/wire"))

from PIL import Image  # noqa: E402

GONE = (ConnectionError, http.client.HTTPException, socket.timeout, OSError)  # what a kill does to a client
BUSY = (429, 503, 507)
ENDED = ("succeeded", "failed", "cancelled")
GROWTH, GROWTH_BYTES, GROWTH_FILES = 1.15, 24 << 20, 8


def make_requests(n):
    rng = random.Random(1)
    return [{"prompt": rng.choice(["a red apple", "a (blue:1.2) car", "a cat", ""]), "seed": i, "steps": rng.choice([1, 2, 4, 8, 16]),
             "sampler": rng.choice(["ddim", "euler", "euler_a", "dpmpp_2m"]), "size": rng.choice(["64x64", "64x64", "96x64", "128x128"]),
             "guidance_scale": rng.choice([1, 3])} for i in range(n)]


REQUESTS = make_requests(16)


class Wrong(Exception):
    """What the soak is there to find."""


class Soak:
    def __init__(self, folder, options):
        from adapters import Policy, lora
        self.folder, self.options = folder, options
        self.policy = Policy(folder / "policy")
        for seed, name in enumerate("ab"):
            self.policy.adapter(name, lora(seed, strength=1.5, modules=("mid_block",)))
        self.alone = {}                        # (digest of the generation, number of the request): pixels
        self.counts, self.lock = collections.Counter(), threading.Lock()
        self.wrong = []
        self.owed = {}                         # id of a job: what is known of it
        self.over, self.quiet, self.no_kills = threading.Event(), threading.Event(), threading.Event()
        self.kills, self.daemon = 0, None

    # ---- the daemon ----

    def start(self):
        from conftest import Daemon
        self.daemon = Daemon(self.folder, "--queue", "48", "--running", "4", "--alive_s", "1", *self.options.flags.split(),
                             state=self.folder / "state", policy=self.policy.path)

    def activate(self, name):
        """The next set of the safety, through the operator's socket."""
        self.policy.profile(required=[name]).write()
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(300)
        sock.connect(str(self.folder / "state/admin.sock"))
        c = http.client.HTTPConnection("admin")
        c.sock = sock
        c.request("POST", "/v1/admin/reload")
        answer = c.getresponse()
        body = answer.read()
        c.close()
        if answer.status != 200:
            raise Wrong(f"reload: {answer.status} {body[:300]}")

    def ask(self, method, path, fields=None, **headers):
        c = http.client.HTTPConnection("127.0.0.1", self.daemon.port, timeout=300)
        try:
            c.request(method, path, None if fields is None else json.dumps(fields),
                      {**({} if fields is None else {"Content-Type": "application/json"}), **{k.replace("_", "-"): v for k, v in headers.items()}})
            r = c.getresponse()
            return r.status, r.read()
        finally:
            c.close()

    # ---- pictures ----

    def check(self, png, i, what):
        image = Image.open(io.BytesIO(png))
        image.load()
        digest = re.search(r"Generation digest: (\w+)", image.text["parameters"]).group(1)
        if self.alone.get((digest, i)) != image.tobytes():
            raise Wrong(f"{what}: request {i} under {digest[:8]} is not the picture that it is alone")
        self.count(what)

    def draw_alone(self):
        for name in "ab":
            self.activate(name)
            for i, fields in enumerate(REQUESTS):
                status, png = self.ask("POST", "/v1/images/generations", fields, Accept="image/png")
                if status != 200:
                    raise Wrong(f"alone: {status} {png[:300]}")
                image = Image.open(io.BytesIO(png))
                image.load()
                self.alone[re.search(r"Generation digest: (\w+)", image.text["parameters"]).group(1), i] = image.tobytes()
        if len(self.alone) != 2 * len(REQUESTS):
            raise Wrong("two sets of adapters draw under one generation")

    def count(self, what):
        with self.lock:
            self.counts[what] += 1

    def busy(self, status, body, what):
        if status not in BUSY:
            raise Wrong(f"{what}: {status} {body[:300]}")
        self.count(f"{what} busy")
        time.sleep(0.2)

    # ---- clients: one round each ----

    def sync(self, rng):
        i = rng.randrange(len(REQUESTS))
        status, body = self.ask("POST", "/v1/images/generations", REQUESTS[i], Accept="image/png")
        self.check(body, i, "picture") if status == 200 else self.busy(status, body, "picture")

    def stream(self, rng):
        i = rng.randrange(len(REQUESTS))
        status, body = self.ask("POST", "/v1/images/generations", {**REQUESTS[i], "stream": True, "partial_images": 2})
        if status != 200:
            return self.busy(status, body, "stream")
        last = re.findall(rb"^data: (.*)$", body, re.M)[-1:]
        last = json.loads(last[0]) if last else {}
        if last.get("type") == "image_generation.completed":
            self.check(base64.b64decode(last["b64_json"]), i, "stream")
        elif not self.daemon_was_killed():
            raise Wrong(f"stream: ended with {str(last)[:300]}")

    def leave(self, rng):
        """Asks for a picture or its events, and hangs up."""
        body = json.dumps({**rng.choice(REQUESTS), "steps": 100, "stream": rng.random() < 0.5}).encode()
        with socket.create_connection(("127.0.0.1", self.daemon.port), timeout=60) as s:
            s.sendall(b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            s.settimeout(rng.random())
            try:
                s.recv(1000)
            except socket.timeout:
                pass
        self.count("left")

    def job(self, rng):
        """Submits until it is accepted: with the same key, so that one that was accepted when the process died is the same job."""
        i, key = rng.randrange(len(REQUESTS)), f"{rng.getrandbits(64):x}"
        kills = self.kills
        while True:
            try:
                status, body = self.ask("POST", "/v1/jobs", {**REQUESTS[i], "metadata": {"request": i}}, Idempotency_Key=key)
            except GONE:
                time.sleep(0.2)
                continue
            if status in (200, 202):
                break
            self.busy(status, body, "job")
            if self.over.is_set() or self.quiet.is_set():
                return
        known = {"i": i, "kills": kills, "cancelled": rng.random() < 0.15}
        name = json.loads(body)["id"]
        with self.lock:
            if name in self.owed:
                raise Wrong(f"job {name} was accepted twice")
            self.owed[name] = known
        self.count("job accepted")
        if known["cancelled"]:
            self.ask("DELETE", f"/v1/jobs/{name}")
        if rng.random() < 0.5:
            self.follow(name, leaves=rng.random() < 0.3)
        with self.lock:
            ahead = len(self.owed)
        time.sleep(min(5, 0.1 * ahead))  # what is accepted is to be finished in the end

    def follow(self, name, leaves):
        c = http.client.HTTPConnection("127.0.0.1", self.daemon.port, timeout=300)
        try:
            c.request("GET", f"/v1/jobs/{name}/events")
            r = c.getresponse()
            if r.status != 200:
                raise Wrong(f"events: {r.status}") if r.status not in BUSY else ConnectionError
            if leaves:
                r.readline()
            elif not re.findall(rb"^event: (result|error|status)$", r.read(), re.M):
                raise ConnectionError
            self.count("events")
        finally:
            c.close()

    def collect(self, _):
        """Looks after what is owed: each job once, when it has ended."""
        with self.lock:
            names = list(self.owed)
        for name in names:
            status, body = self.ask("GET", f"/v1/jobs/{name}")
            if status in BUSY:
                break
            if status != 200:
                raise Wrong(f"job {name} is lost: {status} {body[:200]}")
            found = json.loads(body)
            if found["status"] in ENDED:
                self.settle(name, found)
        time.sleep(0.2)

    def settle(self, name, found):
        known = self.owed[name]
        code = (found["error"] or {}).get("code")
        if found["metadata"] != {"request": known["i"]}:
            raise Wrong(f"job {name} has lost its metadata: {found['metadata']}")
        if found["status"] == "succeeded":
            status, png = self.ask("GET", found["result"]["data"][0]["url"])
            if status in BUSY:
                return
            if status != 200:
                raise Wrong(f"the picture of job {name}: {status}")
            self.check(png, known["i"], "job")
        elif not (code == "cancelled" and known["cancelled"]) and not (code == "crashed" and self.kills - known["kills"] >= 3):
            raise Wrong(f"job {name}: {found['status']} {found['error']}")
        else:
            self.count(f"job {code}")
        with self.lock:
            del self.owed[name]

    def swap(self, rng):
        self.activate(rng.choice("ab"))
        self.count("swap")
        time.sleep(rng.random() * 2)

    # ---- the run ----

    def daemon_was_killed(self):
        return self.daemon.process.poll() is not None

    def loop(self, client, seed):
        rng = random.Random(seed)
        while not self.over.is_set() and not self.wrong:
            if self.quiet.is_set() and client != self.collect:
                time.sleep(0.05)
                continue
            try:
                self.active(1)
                client(rng)
            except GONE:
                time.sleep(0.2)  # killed, or not up again yet; a daemon that died by itself is found by its status
            except Exception:
                self.wrong.append(f"{client.__name__}: {traceback.format_exc(limit=3)}")
            finally:
                self.active(-1)

    def active(self, by):
        with self.lock:
            self.counts["active"] += by

    def wait(self, seconds):
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self.wrong:
            if self.daemon.process.poll() is not None:
                raise Wrong(f"the daemon ended by itself: {self.daemon.process.poll()} {self.daemon.log()[-2000:]}")
            time.sleep(0.05)

    def until_settled(self, what):
        """Everything that was accepted is finished; nobody comes meanwhile."""
        self.quiet.set()
        for _ in range(12000):
            with self.lock:
                if not self.owed and self.counts["active"] <= 1:
                    return
            self.wait(0.05)
            if self.wrong:
                return
        raise Wrong(f"{what}: {len(self.owed)} jobs are not finished: {list(self.owed)[:5]}")

    def measure(self):
        """Memory and open files of the idle daemon."""
        from conftest import until
        until(lambda: b"\nsafelight_requests_in_flight 1\n" in self.ask("GET", "/metrics")[1], "no request in flight", 60)
        time.sleep(1)
        return self.daemon.resident(), self.daemon.files()

    def with_kills(self, seconds):
        rng, end = random.Random(99), time.monotonic() + seconds
        while time.monotonic() < end and not self.wrong:
            self.wait(rng.uniform(0.2, 1) * min(30, seconds / 3))
            self.daemon.process.kill()
            self.daemon.process.wait()
            self.daemon.process.stdout.close()
            self.kills += 1
            self.start()

    def give_up(self):
        """The end of all patience: with the daemon gone nobody waits for it any more."""
        self.wrong.append(f"not done in time: {len(self.owed)} jobs are owed")
        self.daemon.process.kill()

    def run(self):
        seconds = self.options.minutes * 60
        watchdog = threading.Timer(2 * seconds + 1200, self.give_up)
        watchdog.daemon = True
        watchdog.start()
        self.policy.profile(required=["a"]).write()
        self.start()
        self.draw_alone()
        clients = [self.sync] * 3 + [self.stream] * 2 + [self.leave] * 2 + [self.job] * 3 + [self.swap, self.collect]
        threads = [threading.Thread(target=self.loop, args=(c, i), daemon=True) for i, c in enumerate(clients)]
        for t in threads:
            t.start()
        self.with_kills(seconds / 2)
        self.wait(seconds / 6)  # warm again after the last start
        self.until_settled("after the kills")
        before = self.measure()
        self.quiet.clear()
        self.wait(seconds / 3)
        self.until_settled("at the end")
        after = self.measure() if not self.wrong else before
        self.over.set()
        for t in threads:
            t.join(60)
        watchdog.cancel()
        if not self.wrong:
            self.daemon.stop()
        if (after[0] > before[0] * GROWTH + GROWTH_BYTES and not self.options.no_growth) or after[1] > before[1] + GROWTH_FILES:
            self.wrong.append(f"memory and open files grew from {before} to {after}")
        return before, after


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--minutes", type=float, default=15)
    p.add_argument("--flags", default="", help="more flags for the daemon")
    p.add_argument("--no-growth", action="store_true", help="do not judge memory: a sanitizer's allocator keeps what was freed")
    options = p.parse_args()
    before = after = None
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(pathlib.Path(folder), options)
        try:
            before, after = soak.run()
        except Exception:
            soak.wrong.append(traceback.format_exc(limit=4))
        finally:
            soak.over.set()
            if soak.wrong and soak.daemon:
                sys.stderr.write(soak.daemon.log()[-3000:])
            if soak.daemon:
                soak.daemon.kill()
    del soak.counts["active"]
    compared = sum(soak.counts[what] for what in ("picture", "stream", "job"))  # each with the one drawn alone
    print(json.dumps({"ok": not soak.wrong, "minutes": options.minutes, "seconds": round(time.monotonic() - start), "kills": soak.kills, "swaps": soak.counts["swap"],
                      "jobs": soak.counts["job accepted"], "jobs_owed": len(soak.owed), "pictures": compared, "counts": dict(sorted(soak.counts.items())),
                      "memory": [before and before[0], after and after[0]], "files": [before and before[1], after and after[1]], "wrong": soak.wrong[:5]}, indent=1))
    return 1 if soak.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
