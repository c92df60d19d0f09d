"""locust with the users of tests/load/locustfile.py: each of them does everything, and nothing fails."""
import json
import subprocess

from conftest import BINARY, PATIENCE, ROOT, until

KINDS = {"generate", "file", "stream", "models", "txt2img", "progress", "job", "cancel", "events", "picture", "health", "metrics"}


def locust(url, folder, *more):
    """Its exit status, and requests and failures by name."""
    done = subprocess.run([ROOT / ".venv/bin/locust", "-f", ROOT / "tests/load/locustfile.py", "--headless", "--host", url, "--json", "--skip-log", *more],
                          cwd=folder, capture_output=True, text=True, timeout=300 * PATIENCE)
    assert done.stdout, done.stderr
    stats = json.loads(done.stdout)
    return done.returncode, {s["name"]: (s["num_requests"], s["num_failures"]) for s in stats}, done.stdout


def test_users(start, tmp_path):
    """Nine users, fewer than the queue holds; --stop-timeout lets each finish what it has begun."""
    d = start("--size", "64", "--max_size", "128")
    seconds = 30 if "address" in BINARY or "thread" in BINARY else 15
    status, counts, says = locust(d.url, tmp_path, "--users", "9", "--spawn-rate", "9", "--run-time", f"{seconds}s", "--stop-timeout", str(int(120 * PATIENCE)))
    assert status == 0, says[-5000:]
    assert set(counts) == KINDS, counts
    assert all(n > 0 and not failed for n, failed in counts.values()), counts
    until(lambda: b"\nsafelight_requests_in_flight 1\n" in d.get("/metrics").body, "no request in flight")


def test_it_notices(start, tmp_path):
    """A server that answers something else fails: here one whose queue holds one request, with many users."""
    d = start("--size", "64", "--max_size", "128", "--queue", "1", "--running", "1")
    status, counts, _ = locust(d.url, tmp_path, "OpenAI", "--users", "12", "--spawn-rate", "12", "--run-time", "4s", "--stop-timeout", str(int(60 * PATIENCE)))
    assert status == 1 and counts["generate"][1] > 0, counts
