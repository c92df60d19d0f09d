"""Several devices, which on a processor are engines beside each other: one queue, one safety, the same bytes, and one end for all."""
import base64
import re
import time
from concurrent.futures import ThreadPoolExecutor

import conftest
from adapters import Policy, lora, write_safetensors
from conftest import LONG, QUICK, Daemon, read_answer, until
from test_metrics import scrape, value
from test_safety_faults import faults, outcome  # noqa: F401 (a fixture)
from test_safety_swap import draw_alone, reload, swap_under_load, three, under  # noqa: F401 (a fixture)

TWO = ("--devices", "0,1")
KINDS = [{**QUICK, "seed": 10 + i, **more} for i, more in enumerate((
    {}, {"sampler": "euler_a", "steps": 5}, {"sampler": "ddim", "negative_prompt": "blue"}, {"size": "64x128", "steps": 3}, {"guidance_scale": 1, "steps": 4},
    {"n": 3, "sampler": "euler"}, {"prompt": "a (blue:1.3) cat BREAK on a chair"}, {"n": 2, "size": "128x128"}))]


def beside(d, requests, **headers):
    """The answers to requests that are sent at once, in their order."""
    with ThreadPoolExecutor(len(requests)) as pool:
        return list(pool.map(lambda r: d.post(r, **headers), requests))


def steps(d):
    """How many steps each device has made, by its number."""
    return {s.labels["device"]: s.value for s in scrape(d)["safelight_steps"].samples}


def drawn(answer):
    assert answer.status == 200, answer.body
    return [(base64.b64decode(picture["b64_json"]), picture["seed"]) for picture in answer.json["data"]]


def on_both(d, request, count=6):
    """The picture that both devices draw of a request: asked for several times at once, until each has drawn."""
    before, answers = steps(d), []

    def have_both_drawn():
        answers.extend(under(a) for a in beside(d, [request] * count, Accept="image/png"))
        return all(after > before[name] for name, after in steps(d).items())

    until(have_both_drawn, "both devices to draw", 60)
    assert len(set(answers)) == 1, "a generation is not the same on both devices"
    return answers[0]


def test_same_bytes_and_both_draw(start):
    one, two = start(), start(*TWO)
    want = [drawn(one.post(r)) for r in KINDS]
    assert len({picture for pictures in want for picture, _ in pictures}) == sum(r.get("n", 1) for r in KINDS)
    for turn in range(3):  # another order each time, so that requests meet both devices
        order = KINDS[turn * 3:] + KINDS[:turn * 3]
        got = [drawn(a) for a in beside(two, order)]
        assert got == want[turn * 3:] + want[:turn * 3]
    made = steps(two)
    assert set(made) == {"0", "1"} and min(made.values()) >= 10, made
    assert sum(made.values()) == 3 * next(iter(steps(one).values()))
    families = scrape(two)
    for device in "01":
        for what in ("weights", "activations"):
            same = value(scrape(one), "safelight_device_memory_planned_bytes", what=what, device="0")
            assert value(families, "safelight_device_memory_planned_bytes", what=what, device=device) == same > 1 << 20
        assert value(families, "safelight_batch_size", "safelight_batch_size_count", device=device) > 0
        assert re.search(rf"device {device}: [0-9.]+ MB of weights and [0-9.]+ MB for activations set aside", two.log())
    assert "2 devices, each" in families["safelight_model_info"].samples[0].labels["backend"]


def test_numbers_are_names(start):
    """On a processor the numbers of the list are names, in metrics and log; of one device too."""
    d = start("--devices", " 7, 3 ")
    assert set(steps(d)) == {"7", "3"}
    d.wait_log("device 7: ")
    alone = start("--devices", "5")
    assert drawn(alone.post(QUICK)) == drawn(d.post(QUICK)) and set(steps(alone)) == {"5"}


def test_an_idle_device_takes_the_next(start):
    """Behind a long picture on one device, short ones do not wait for it: the other one draws all of them."""
    d = start(*TWO, "--running", "1")
    long = d.send({**LONG, "size": "128x128", "steps": 100})
    long.settimeout(120 * conftest.PATIENCE)
    until(lambda: sum(steps(d).values()) > 0, "the long picture's first step", 30)
    busy = max(steps(d).items(), key=lambda s: s[1])[0]
    idle = "1" if busy == "0" else "0"
    for seed in range(4):
        drawn(d.post({**QUICK, "seed": seed}))
    made = steps(d)
    assert made[idle] == 4 * QUICK["steps"] and made[busy] < 100, made
    assert value(scrape(d), "safelight_pictures_running", device=busy) == 1
    assert read_answer(long).status == 200
    assert steps(d)[busy] == 100
    long.close()


def test_ready_when_both_are(tmp_path):
    d = Daemon(tmp_path, *TWO, ready=False)
    try:
        seen = until(lambda: d.get("/readyz").status == 200 and d.log(), "ready", 60)
        assert re.search("device 0: ", seen) and re.search("device 1: ", seen) and re.search("profile default: generation .* is live", seen)
        d.stop()
    finally:
        d.kill()


def test_a_device_that_does_not_load_stops_the_start(faults, monkeypatch, tmp_path):  # noqa: F811
    monkeypatch.setitem(conftest.ENV, "FAULT_THREAD", "device 1")
    for n in (1, 40, 400):
        faults.arm(n)
        d = Daemon(tmp_path, *TWO, ready=False)
        try:
            assert d.wait() == 1
            assert faults.left() == 0 and re.search(r"safelight: device 1: .*memory", d.log()), d.log()
            assert "is live" not in d.log()
        finally:
            d.kill()


def test_swaps_under_load(start, three):  # noqa: F811
    d = start(*TWO, "--running", "2", policy=three.path)
    alone = draw_alone(d, three, "abc")
    before = steps(d)
    swap_under_load(d, three, alone, 30, 4, 3)
    assert all(after > before[name] for name, after in steps(d).items()), "one device drew nothing"
    for i, name in enumerate("abc"):
        reload(d, three.profile(required=[name]))
        digest, rgb = on_both(d, {**QUICK, "steps": 4, "seed": 1})
        assert alone[digest][0] == rgb


def test_styles_on_both(start, tmp_path):
    """A client's style is composed on both devices, over what is live, and anew after a swap."""
    policy = Policy(tmp_path / "policy")
    for seed, name in enumerate("ab"):
        policy.adapter(name, lora(seed, strength=1.5, modules=("mid_block", "up_blocks")))
    policy.adapter("ink", lora(9, strength=0.1), pin=True).profile(required=["a"], styles=["ink"], max_style_norm_ratio=50).write()
    one, two = start(policy=policy.path), start(*TWO, policy=policy.path)
    request = {**QUICK, "loras": [{"name": "ink", "scale": 0.7}]}
    seen = set()
    for name in "ab":
        for d in (one, two):
            reload(d, policy.profile(required=[name], styles=["ink"], max_style_norm_ratio=50))
        want = under(one.post(request, Accept="image/png"))
        assert on_both(two, request) == want
        seen.add(want)
    assert len(seen) == 2


def test_a_generation_is_on_both_or_on_none(start, faults, tmp_path):  # noqa: F811
    """Allocations that fail while an adapter is proven and built, on either device: both go on with the old generation, or both have the new one."""
    files = {name: lora(seed, strength=1.5, modules=("mid_block",)) for seed, name in enumerate("ab")}
    policy = Policy(tmp_path / "policy").profile(required=["safe"])

    def give(name):
        write_safetensors(policy.folder / "safe.safetensors", files[name])
        return outcome(d, policy)

    policy.adapter("safe", files["a"])
    d = start(*TWO, policy=policy.write().path)
    drew = {"a": on_both(d, QUICK)}
    faults.arm(10**9)
    assert give("b")
    total = 10**9 - faults.left()
    faults.arm(0)
    drew["b"] = on_both(d, QUICK)
    assert drew["a"] != drew["b"]
    live = "b"
    for n in range(total * 38 // 100, total * 60 // 100, total // 80):  # before that the file is read, after it the history written
        wanted = "a" if live == "b" else "b"
        faults.arm(n)
        taken = give(wanted)
        faults.arm(0)
        live = wanted if taken else live
        assert on_both(d, QUICK, 3) == drew[live], f"allocation {n} of {total}"
        assert d.get("/readyz").status == 200
    reasons = {f"{what} on device {i}": len(re.findall(rf'reload (?:400|503) .*error="profile default: {text}device {i}: ', d.log()))
               for what, text in (("proven", "adapter safe: "), ("built", "")) for i in (0, 1)}
    print(f"{total} allocations; refused while {reasons}")
    assert min(reasons.values()) >= 1, d.log()
    assert give("a" if live == "b" else "b")


def test_drain_with_both_busy(start):
    d = start(*TWO, "--running", "2", "--drain_s", "60")
    sockets = [d.send({**LONG, "size": "128x128", "steps": 20, "seed": seed}) for seed in range(6)]
    for sock in sockets:
        sock.settimeout(60 * conftest.PATIENCE)
    until(lambda: min(steps(d).values(), default=0) > 0, "both devices to draw", 30)
    d.terminate()
    d.wait_log("stopping: ")
    answers = [read_answer(sock) for sock in sockets]
    assert [a.status for a in answers] == [200] * 6
    assert d.wait() == 0
    for sock in sockets:
        sock.close()


def test_stop_and_deadline_reach_both(start):
    """Clients that leave, and the deadline, end pictures on whichever device has them."""
    d = start(*TWO, "--running", "1")
    gone = [d.send(LONG) for _ in range(2)]
    until(lambda: min(steps(d).values()) > 0, "both devices to draw", 30)
    for sock in gone:
        sock.close()
    until(lambda: sum(s.value for s in scrape(d)["safelight_pictures_running"].samples) == 0, "both to be stopped", 30)
    assert value(scrape(d), "safelight_jobs_cancelled", "safelight_jobs_cancelled_total", by="disconnect") == 2
    d = start(*TWO, "--running", "1", "--deadline_s", "2")
    begun = time.monotonic()
    late = [d.send({**LONG, "steps": 150, "seed": seed}) for seed in range(3)]
    for sock in late:
        assert read_answer(sock).status == 504
        sock.close()
    assert time.monotonic() - begun < 30 * conftest.PATIENCE
    assert len(on_both(d, QUICK)) == 2
