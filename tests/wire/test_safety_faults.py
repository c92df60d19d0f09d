"""Memory that runs out while adapters are loaded, verified, built and published: whatever allocation of the loader fails, what is served is the old
generation or the new one, complete, and the next reload works."""
import struct
import subprocess

import pytest

import conftest
from adapters import Policy, lora, write_safetensors
from conftest import QUICK, ROOT
from test_safety_swap import under

POINTS = 28  # allocations that fail, spread over those of one reload, the first ones each


class Faults:
    """Allocations of one of the daemon's threads, by its name."""

    def __init__(self, folder):
        self.path = folder / "countdown"
        self.path.write_bytes(struct.pack("=q", 0))
        self.library = folder / "thread_alloc.so"
        subprocess.run(["cc", "-D_GNU_SOURCE", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", str(ROOT / "tests/fault/thread_alloc.c"),
                        "-o", str(self.library)], check=True)

    def arm(self, n):
        with open(self.path, "r+b") as f:  # in place: the daemon has it mapped
            f.write(struct.pack("=q", n))

    def left(self):
        return struct.unpack("=q", self.path.read_bytes())[0]


@pytest.fixture
def faults(tmp_path, monkeypatch):
    if "address" in conftest.BINARY or "thread" in conftest.BINARY:
        pytest.skip("a sanitizer has an allocator of its own")
    f = Faults(tmp_path)
    monkeypatch.setitem(conftest.ENV, "LD_PRELOAD", str(f.library))
    monkeypatch.setitem(conftest.ENV, "FAULT_COUNTDOWN", str(f.path))
    return f


def outcome(d, policy):
    """Writes the policy, asks for a reload and waits for it to end: whether it was taken."""
    policy.write()
    done = subprocess.run([conftest.BINARY, "reload", "--state", str(d.state)], cwd=ROOT, capture_output=True, text=True,
                          timeout=120 * conftest.PATIENCE)
    assert d.process.poll() is None, d.log()[-2000:]
    return done.returncode == 0


def test_no_allocation_of_the_loader_matters(start, faults, tmp_path):
    files = {name: lora(seed, strength=1.5, modules=("mid_block",)) for seed, name in enumerate("ab")}
    policy = Policy(tmp_path / "policy").profile(required=["safe"])

    def give(name):  # another file at the same place: read, verified and built anew
        write_safetensors(policy.folder / "safe.safetensors", files[name])
        return outcome(d, policy)

    policy.adapter("safe", files["a"])
    d = start(policy=policy.write().path)
    drawn = {"a": under(d.post(QUICK, Accept="image/png"))}
    faults.arm(10**9)
    assert give("b")
    total = 10**9 - faults.left()
    faults.arm(0)
    drawn["b"] = under(d.post(QUICK, Accept="image/png"))
    assert drawn["a"] != drawn["b"] and total > 100
    points = sorted({*range(1, 9), *(1 + total * i // (POINTS - 8) for i in range(POINTS - 8))})
    live, refused = "b", 0
    for n in points:
        wanted = "a" if live == "b" else "b"
        faults.arm(n)
        taken = give(wanted)
        faults.arm(0)
        refused += not taken
        now = under(d.post(QUICK, Accept="image/png"))
        assert now in drawn.values(), f"allocation {n} of {total}: neither the old nor the new generation"
        assert now == drawn[wanted if taken else live], f"allocation {n} of {total}"
        live = wanted if taken else live
    print(f"{len(points)} of {total} allocations failed one by one; {refused} reloads were refused")
    assert refused > len(points) // 2
    assert give("a") and under(d.post(QUICK, Accept="image/png")) == drawn["a"]
    assert d.get("/readyz").status == 200
