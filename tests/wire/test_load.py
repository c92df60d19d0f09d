"""The load generator runs: everything it asks for is answered, and its report is whole. How fast, it says for people; no test depends on that."""
import json
import os
import subprocess
import sys

from conftest import BINARY, ROOT


def test_short_variant():
    done = subprocess.run([sys.executable, ROOT / "tests/load/load.py", "--short", "--binary", BINARY, "--flags", os.environ.get("SAFELIGHT_ARGS", "") + " --threads 1"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["ok"] and report["short"]
    throughput, idle, mixed = report["throughput"], report["idle"], report["mixed"]
    assert throughput["pictures"] >= throughput["clients"] and throughput["errors"] == 0 and throughput["ratio"] > 0
    assert throughput["healthz_ms"]["n"] > 0 and throughput["metrics_ms"]["n"] > 0
    assert idle["still_open"] == idle["connections"] == 100
    assert idle["bytes_each"] < 64 << 10  # memory does not depend on the machine's speed: 16 kB is the header's buffer
    assert mixed["errors"] == 0 and mixed["slowdown"]["n"] == mixed["slowdown_first_come"]["n"] == mixed["slowdown_imagined"]["n"] == mixed["jobs"] == 8
    assert all(mixed[f"{figure}_ratio{server}"] > 0 for figure in ("mean", "p99") for server in ("", "_imagined"))
    assert mixed["capacity_first_come_per_s"] > 0 and mixed["longest_alone_s"] > 0 and mixed["longest_wait_s"] >= 0
