"""The load generator: many clients against a real daemon, from a process of its own. Prints one JSON object of numbers and ratios.

    .venv/bin/python tests/load/load.py            # minutes; every figure of docs/performance.md, "Under load"
    .venv/bin/python tests/load/load.py --short    # seconds; for tests: the same paths, numbers without meaning

What it measures, all in one run on one machine, so that ratios mean something where times do not:

    throughput  CLIENTS closed-loop clients against the engine's own rate (`safelight bench`, before and after), and meanwhile how long /healthz and
                /metrics take another connection
    idle        the resident memory of open connections that have been answered once and say nothing
    mixed       jobs of 4 to 50 steps that arrive as a Poisson process at 70 % of what a server draws that is first come first served: slowdown is latency over the
                time that the job takes alone on the idle daemon. The same arrivals go, in turns of the same run, to a second daemon that draws one picture at a time
                in the order of arrival. The daemon's own queue is never that (with --running 1 it still lets short pictures pass long ones), so that order is kept
                in front of it: one connection sends the next job when the one before is answered. A harsher line beside it is an engine that there is not: one
                at a time, in order of arrival, as fast as ours is together (computed: with one server that is a sum and needs no run)

Called by people, and by tests/wire/test_load.py with --short.
"""
import argparse
import asyncio
import json
import os
import pathlib
import random
import re
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
STEPS = [4, 8, 12, 20, 30, 50]


class Client:
    """One keep-alive connection."""

    def __init__(self, port):
        self.port, self.reader, self.writer, self.waited_ms = port, None, None, None

    async def request(self, method, path, fields=None):
        """The status and the length of the body; waited_ms is how long a picture waited for its start."""
        if not self.writer:
            self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        body = json.dumps(fields).encode() if fields is not None else b""
        kind = "Content-Type: application/json\r\nAccept: image/png\r\n" if fields is not None else ""
        self.writer.write(f"{method} {path} HTTP/1.1\r\nHost: x\r\n{kind}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        await self.writer.drain()
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        length = int(re.search(r"(?i)^content-length: (\d+)", head, re.M).group(1))
        await self.reader.readexactly(length)
        waited = re.search(r"(?i)^server-timing: queue;dur=([0-9.]+)", head, re.M)
        self.waited_ms = float(waited.group(1)) if waited else None
        return int(head.split(" ", 2)[1]), length

    def close(self):
        if self.writer:
            self.writer.close()
            self.writer = None


def picture(size, steps, seed):
    return {"prompt": "a red apple", "size": f"{size}x{size}", "steps": steps, "seed": seed}


def quantile(values, q):
    values = sorted(values)
    return values[min(len(values) - 1, int(q * len(values)))]


def figures(values):
    return {"n": len(values), "mean": round(statistics.fmean(values), 3), "p50": round(quantile(values, 0.5), 3), "p99": round(quantile(values, 0.99), 3),
            "max": round(max(values), 3)}


class Daemon:
    def __init__(self, options, folder, *flags):
        command = [options.binary, "serve", "--port", "0", "--state", folder, "--queue", "1024", "--deadline_s", "3600", "--client_s", "600",
                   "--policy", str(ROOT / "tests/policies/evaluation.json"), "--model", str(ROOT / "weights/emoji"), *flags, *options.flags.split()]
        self.log = open(pathlib.Path(folder) / "log", "wb")
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self.log, cwd=ROOT)
        self.port, text = None, ""
        while "\nready:" not in text:  # its lines of greeting
            if not select.select([self.process.stdout], [], [], 120)[0] or not (more := os.read(self.process.stdout.fileno(), 4096)):
                sys.exit(f"load: the daemon did not get ready: {text}{pathlib.Path(self.log.name).read_text()}")
            text += more.decode()
        self.port = int(re.search(r"listens at http://[^ ]*:(\d+)$", text, re.M).group(1))

    def resident(self):
        status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+) kB", status).group(1)) * 1024

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(120)
        self.process.stdout.close()
        self.log.close()


# ---- throughput ----

def bench(options, steps):
    """Pictures a second that the engine draws without a server: one at a time, or in the batches that it can do."""
    command = [options.binary, "bench", "--arch", "emoji", "--size", str(options.size), "--steps", str(steps), "--pictures", str(options.bench_pictures), "--json"]
    if options.bench_batch:
        command += ["--batch", str(options.bench_batch)]
    out = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return max(out["images_per_s"], out.get("batch_images_per_s", 0))


async def probe(port, path, period, over, times):
    """Asks one path on a connection of its own until it is over: in ms, from the moment when the request was due."""
    client, due = Client(port), time.monotonic()
    while not over.is_set():
        status, _ = await client.request("GET", path)
        assert status == 200, (path, status)
        times.append(1e3 * (time.monotonic() - due))
        due += period
        await asyncio.sleep(max(0, due - time.monotonic()))
        due = max(due, time.monotonic() - period)
    client.close()


async def closed_loop(port, clients, seconds, fields):
    """Pictures a second between the first and last completion, and how many requests were not answered with 200."""
    done, bad, end = [], 0, time.monotonic() + seconds

    async def one(i):
        nonlocal bad
        client, n = Client(port), 0
        while time.monotonic() < end:
            status, _ = await client.request("POST", "/v1/images/generations", fields(i * 100000 + n))
            n += 1
            if status == 200:
                done.append(time.monotonic())
            else:
                bad += 1
        client.close()

    await asyncio.gather(*(one(i) for i in range(clients)))
    # Clients that started together make the first round special, and the last: only full ones count.
    done = sorted(done)[clients:-clients] if len(done) > 4 * clients else sorted(done)
    return (len(done) - 1) / max(1e-9, done[-1] - done[0]), bad, len(done)


async def throughput(options, port):
    health, metrics, over = [], [], asyncio.Event()
    probes = [asyncio.create_task(probe(port, path, options.probe_s, over, times)) for path, times in (("/healthz", health), ("/metrics", metrics))]
    rate, bad, n = await closed_loop(port, options.clients, options.seconds, lambda seed: picture(options.size, options.steps, seed))
    over.set()
    await asyncio.gather(*probes)
    return {"clients": options.clients, "pictures_per_s": round(rate, 3), "pictures": n, "errors": bad, "healthz_ms": figures(health), "metrics_ms": figures(metrics)}


# ---- idle connections ----

async def idle(options, daemon):
    first = Client(daemon.port)
    await first.request("GET", "/healthz")
    before, clients = daemon.resident(), [Client(daemon.port) for _ in range(options.idle)]
    for at in range(0, len(clients), 100):
        got = await asyncio.gather(*(c.request("GET", "/healthz") for c in clients[at:at + 100]))
        assert all(status == 200 for status, _ in got)
    after = daemon.resident()
    again = await asyncio.gather(*(c.request("GET", "/healthz") for c in clients))  # they are all still there
    for c in [first, *clients]:
        c.close()
    return {"connections": options.idle, "still_open": sum(status == 200 for status, _ in again), "resident_mb": round((after - before) / 1e6, 2),
            "bytes_each": round((after - before) / options.idle)}


# ---- mixed jobs ----

async def alone(options, port):
    """Seconds that a job of each number of steps takes on an idle daemon: the least of a few."""
    client, least = Client(port), {}
    for steps in STEPS:
        for k in range(options.alone):
            start = time.monotonic()
            status, _ = await client.request("POST", "/v1/images/generations", picture(options.size, steps, k))
            assert status == 200, status
            least[steps] = min(least.get(steps, 1e9), time.monotonic() - start)
    client.close()
    return least


def first_come(arrivals, jobs, service, own):
    """Slowdowns of the same jobs one at a time in order of arrival, each taking service(steps)."""
    free, out = 0.0, []
    for at, steps in zip(arrivals, jobs):
        free = max(free, at) + service(steps)
        out.append((free - at) / own[steps])
    return out


class Turns:
    """What a server made of the jobs: slowdowns and waits in ms, over all of its turns."""

    def __init__(self, port, own):
        self.port, self.own, self.slowdown, self.waited, self.errors = port, own, [], [], 0

    async def ask(self, client, size, steps, seed, due):
        status, _ = await client.request("POST", "/v1/images/generations", picture(size, steps, seed))
        self.errors += status != 200
        self.slowdown.append((time.monotonic() - due) / self.own[steps])
        self.waited.append(client.waited_ms or 0)

    async def at_once(self, size, arrivals, jobs):
        """Each job is sent when it arrives, on a connection of its own."""
        start = time.monotonic()

        async def one(i):
            await asyncio.sleep(max(0, start + arrivals[i] - time.monotonic()))
            client = Client(self.port)
            await self.ask(client, size, jobs[i], i, start + arrivals[i])
            client.close()

        await asyncio.gather(*(one(i) for i in range(len(jobs))))

    async def in_order(self, size, arrivals, jobs):
        """Each job is sent when the one before is answered, and not before it arrives."""
        client, start = Client(self.port), time.monotonic()
        for i, (at, steps) in enumerate(zip(arrivals, jobs)):
            await asyncio.sleep(max(0, start + at - time.monotonic()))
            await self.ask(client, size, steps, i, start + at)
        client.close()


async def mixed(options, port, fifo_port, seed):
    alones = [await alone(options, p) for p in (port, fifo_port)]
    own = {steps: min(a[steps] for a in alones) for steps in STEPS}
    draw, bad, rates = random.Random(seed), 0, []
    for p, clients in ((port, options.mixed_clients), (fifo_port, 1)):
        rate, wrong, _ = await closed_loop(p, clients, options.seconds, lambda seed: picture(options.size, random.Random(seed).choice(STEPS), seed))
        rates.append(rate)
        bad += wrong
    ours, fifo, imagined = Turns(port, own), Turns(fifo_port, own), []
    same = 1 / (rates[0] * statistics.fmean(own[s] for s in STEPS))  # the factor by which the imagined server's times make it as fast as ours
    for turn in range(options.turns):
        jobs, arrivals, at = [draw.choice(STEPS) for _ in range(options.jobs // options.turns)], [], 0.0
        for _ in jobs:
            at += draw.expovariate(options.load * rates[1])
            arrivals.append(at)
        for run in ((ours.at_once, fifo.in_order) if turn % 2 else (fifo.in_order, ours.at_once)):
            await run(options.size, arrivals, jobs)
        imagined += first_come(arrivals, jobs, lambda steps: own[steps] * same, own)
    got, queue, harsh = figures(ours.slowdown), figures(fifo.slowdown), figures(imagined)
    return {"jobs": len(ours.slowdown), "load": options.load, "errors": ours.errors + fifo.errors + bad, "capacity_per_s": round(rates[0], 3),
            "capacity_first_come_per_s": round(rates[1], 3), "alone_s": {str(k): round(v, 4) for k, v in own.items()}, "slowdown": got, "slowdown_first_come": queue,
            "slowdown_imagined": harsh, "mean_ratio": round(got["mean"] / queue["mean"], 3), "p99_ratio": round(got["p99"] / queue["p99"], 3),
            "mean_ratio_imagined": round(got["mean"] / harsh["mean"], 3), "p99_ratio_imagined": round(got["p99"] / harsh["p99"], 3),
            "longest_wait_s": round(max(ours.waited) / 1e3, 4), "longest_alone_s": round(max(own.values()), 4)}


# ---- all ----

def parse():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--binary", default=os.environ.get("SAFELIGHT", str(ROOT / "build/release/safelight")))
    p.add_argument("--flags", default=os.environ.get("SAFELIGHT_ARGS", ""), help="more flags for `safelight serve`")
    p.add_argument("--only", default="throughput,idle,mixed")
    p.add_argument("--short", action="store_true")
    p.add_argument("--size", type=int, default=128)
    p.add_argument("--steps", type=int, default=20)
    p.add_argument("--clients", type=int, default=64)
    p.add_argument("--mixed_clients", type=int, default=16)
    p.add_argument("--seconds", type=float, default=40)
    p.add_argument("--bench_pictures", type=int, default=30)
    p.add_argument("--bench_batch", type=int, default=0, help="let `safelight bench` draw this many together")
    p.add_argument("--probe_s", type=float, default=0.02)
    p.add_argument("--idle", type=int, default=2000)
    p.add_argument("--alone", type=int, default=3)
    p.add_argument("--jobs", type=int, default=400)
    p.add_argument("--turns", type=int, default=4, help="how often the two servers of mixed take turns")
    p.add_argument("--load", type=float, default=0.7)
    p.add_argument("--seed", type=int, default=1)
    o = p.parse_args()
    if o.short:
        o.size, o.steps, o.clients, o.mixed_clients, o.seconds, o.bench_pictures, o.idle, o.alone, o.jobs, o.turns = 64, 2, 6, 3, 0.5, 2, 100, 1, 8, 2
        STEPS[:] = [2, 4]
    return o


def main():
    o = parse()
    out = {"short": o.short}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("load: ended by a signal"))  # the daemon ends with it
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as second:
        if "throughput" in o.only:
            rates = [bench(o, o.steps)]
        d, fifo = Daemon(o, folder, "--max_connections", str(o.idle + 500)), None
        try:
            if "throughput" in o.only:
                out["throughput"] = asyncio.run(throughput(o, d.port))
            if "idle" in o.only:
                out["idle"] = asyncio.run(idle(o, d))
            if "mixed" in o.only:
                fifo = Daemon(o, second, "--running", "1")
                out["mixed"] = asyncio.run(mixed(o, d.port, fifo.port, o.seed))
        finally:
            d.stop()
            if fifo:
                fifo.stop()
        if "throughput" in o.only:
            rates.append(bench(o, o.steps))
            out["throughput"]["engine_per_s"] = [round(r, 3) for r in rates]
            out["throughput"]["ratio"] = round(out["throughput"]["pictures_per_s"] / statistics.fmean(rates), 3)
    out["ok"] = not any(x.process.returncode for x in (d, fifo) if x) and not out.get("throughput", {}).get("errors") and not out.get("mixed", {}).get("errors")
    print(json.dumps(out, indent=1))
    return 0 if out["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
