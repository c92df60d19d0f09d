"""The soak of tests/load/soak.py, two minutes of it: no durable job is lost to kill -9, every picture is its own, nothing grows."""
import json
import os
import subprocess
import sys

from conftest import BINARY, ROOT


def test_two_minutes():
    sanitized = "address" in BINARY or "thread" in BINARY  # their allocators keep what was freed
    more = ["--minutes", "0.5", "--no-growth"] if sanitized else ["--minutes", "2"]
    done = subprocess.run([sys.executable, ROOT / "tests/load/soak.py", *more, "--flags", os.environ.get("SAFELIGHT_ARGS", "")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["ok"] and not report["wrong"] and report["kills"] >= 1 and report["jobs_owed"] == 0
    assert report["pictures"] > 0 and report["swaps"] > 0 and report["jobs"] > 0 and min(report["memory"] + report["files"]) > 0
    assert all(report["counts"].get(kind, 0) > 0 for kind in ("picture", "stream", "job", "events", "swap", "left")), report
