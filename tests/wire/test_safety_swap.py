"""Hot swap: under load from eight clients, no request fails and every picture is the one that its reported generation draws alone."""
import io
import itertools
import signal
import threading
import time

import pytest
from PIL import Image

from adapters import Policy, lora
from conftest import QUICK, until

SWAPS = 500
REQUESTS = [{**QUICK, "steps": 4, "seed": s, "prompt": p, "sampler": sampler} for s, p, sampler in
            ((1, "a red apple", "dpmpp_2m"), (2, "a blue car", "euler_a"), (3, "a cat", "ddim"), (4, "", "dpmpp_2m"))]


def pixels(png):
    image = Image.open(io.BytesIO(png))
    image.load()
    return image.tobytes(), image.text["parameters"]


def under(answer):
    assert answer.status == 200, answer.body
    h = answer.headers
    rgb, text = pixels(answer.body)
    number, _, start = h["x-safelight-generation"].partition("-")
    assert int(number) > 0 and h["x-safelight-generation-digest"].startswith(start)
    assert f"Generation: {h['x-safelight-generation']}, Generation digest: {h['x-safelight-generation-digest']}" in text
    return h["x-safelight-generation-digest"], rgb


def reload(d, policy, expect="was read again"):
    """Writes the policy, sends SIGHUP and waits for the outcome."""
    seen = d.log().count(expect)
    policy.write()
    d.process.send_signal(signal.SIGHUP)
    until(lambda: d.log().count(expect) > seen, expect, 60, d.log)


@pytest.fixture
def three(tmp_path):
    policy = Policy(tmp_path / "policy")
    for seed, name in enumerate("abc"):
        policy.adapter(name, lora(seed, strength=1.5, modules=("mid_block", "up_blocks")))
    return policy.profile(required=["a"]).write()


def draw_alone(d, policy, names):
    """What each generation draws, by its digest: the pictures of REQUESTS."""
    alone = {}
    for name in names:
        reload(d, policy.profile(required=[name]))
        drawn = [under(d.post(r, Accept="image/png")) for r in REQUESTS]
        assert len({digest for digest, _ in drawn}) == 1
        alone[drawn[0][0]] = [rgb for _, rgb in drawn]
    return alone


def swap_under_load(d, three, alone, swaps, clients, least):
    """No request fails, every picture is the one that its generation drew alone, and each generation drew `least` at least."""
    assert len(alone) == 3
    for i in range(len(REQUESTS)):  # visibly different: not a matter of the last bit
        a, b, c = (rgbs[i] for rgbs in alone.values())
        for x, y in ((a, b), (b, c), (a, c)):
            assert sum(abs(p - q) for p, q in zip(x, y)) / len(x) > 2
    over, wrong, drawn = threading.Event(), [], []

    def client(first):
        for i in itertools.count(first):
            if over.is_set() or wrong:
                return
            try:
                digest, rgb = under(d.post(REQUESTS[i % len(REQUESTS)], Accept="image/png"))
                if alone.get(digest) is None or alone[digest][i % len(REQUESTS)] != rgb:
                    wrong.append((i, digest))
                drawn.append(digest)
            except Exception as e:  # a failed request of any kind
                wrong.append((i, repr(e)))

    clients = [threading.Thread(target=client, args=(i,)) for i in range(clients)]
    begun = time.monotonic()
    for c in clients:
        c.start()
    try:
        for i in range(swaps):
            reload(d, three.profile(required=["bca"[i % 3]]))
            if wrong:
                break
    finally:
        over.set()
        for c in clients:
            c.join()
    assert not wrong, wrong[:5]
    counts = [drawn.count(digest) for digest in alone]
    print(f"{swaps} swaps in {time.monotonic() - begun:.0f} s, {len(drawn)} pictures, by generation {counts}")
    assert min(counts) >= least
    assert d.get("/readyz").status == 200


@pytest.mark.parametrize("flags", [("--running", "1"), ("--running", "3")], ids=["one", "three"])
def test_swaps_under_load(start, three, flags):
    d = start(*flags, policy=three.path)
    swap_under_load(d, three, draw_alone(d, three, "abc"), SWAPS // 2, 8, 21)  # both variants together


def test_a_picture_keeps_its_generation(start, three):
    """A swap in the middle of a picture: it is finished under what it began with, and the next one is not."""
    d = start(policy=three.path)
    alone = draw_alone(d, three, "ba")
    long = {**REQUESTS[0], "steps": 150, "size": "256x256"}
    before = under(d.post(long, Accept="image/png"))
    answer = []
    client = threading.Thread(target=lambda: answer.append(d.post(long, Accept="image/png")))
    client.start()
    d.wait_busy()
    reload(d, three.profile(required=["b"]))
    assert not answer, "the picture was finished before the swap: the test shows nothing"
    after = under(d.post(REQUESTS[0], Accept="image/png"))
    client.join()
    assert under(answer[0]) == before
    assert after[0] != before[0] and alone[after[0]][0] == after[1]


def test_numbers_and_digests_survive_a_restart(start, three, tmp_path):
    state = tmp_path / "kept"
    d = start(policy=three.path, state=state)
    reload(d, three.profile(required=["b"]))
    first = d.post(QUICK, Accept="image/png")
    assert first.headers["x-safelight-generation"].startswith("2-")
    d.stop()
    again = start(policy=three.path, state=state).post(QUICK, Accept="image/png")
    assert again.headers["x-safelight-generation"] == first.headers["x-safelight-generation"]
    assert again.body == first.body


def test_forms_and_weights_have_digests_of_their_own(start, three):
    """Another weight or form is another generation; the order of the adapters in the file is none."""
    d = start(policy=three.path)
    seen = {}
    variants = {"a": {"required": ["a"]}, "weight": {"required": [{"adapter": "a", "weight": 1.5}]}, "runtime": {"required": ["a"], "form": "runtime"},
                "ab": {"required": ["a", "b"]}, "ba": {"required": ["b", "a"]}}
    for name, variant in variants.items():
        reload(d, three.profile(**variant))
        seen[name] = under(d.post(QUICK, Accept="image/png"))
    assert seen["ab"] == seen["ba"]
    assert len({digest for digest, _ in seen.values()}) == 4
    # folded and runtime agree to the rounding of the weights
    difference = [abs(p - q) for p, q in zip(seen["a"][1], seen["runtime"][1])]
    assert 0 < sum(difference) / len(difference) < 4, sum(difference) / len(difference)
