"""The audit log of a running server: a record for every picture and refusal, without prompts, that holds what was answered and survives its end."""
import concurrent.futures
import hashlib
import json
import resource
import sqlite3
import subprocess

import pytest

from adapters import Policy, lora
from conftest import BINARY, MODEL, PATIENCE, POLICY, QUICK, until
from test_pictures import open_png


def audit(d, *words):
    return subprocess.run([BINARY, "audit", *words, "--state", str(d.state)], capture_output=True, text=True, timeout=60 * PATIENCE)


def verify(d, *words):
    done = audit(d, "verify", "--json", *words)
    return done.returncode, json.loads(done.stdout)


def records(d, kind=None):
    done = audit(d, "show", "--n", "1000", "--json")
    assert done.returncode == 0, done
    return [r for r in reversed(json.loads(done.stdout)) if kind in (None, r["kind"])]


def test_a_record_for_every_picture(start, tmp_path):
    d = start(policy=Policy(tmp_path / "safety").adapter("shield", lora(1)).profile(required=["shield"]).write().path)
    answer = d.post({**QUICK, "prompt": "a secret wish", "negative_prompt": "another secret", "n": 2, "seed": 5}, x_request_id="traced")
    assert answer.status == 200
    recipe = answer.json["safelight"]
    pictures = [r for r in records(d, "image") if r["request_id"] == "traced"]
    assert [r["seed"] for r in pictures] == [5, 6]
    for r in pictures:
        assert r["generation_id"] == recipe["generation_id"] and r["generation_digest"] == recipe["generation_digest"]
        assert r["model_digest"] == recipe["model_digest"] and r["profile"] == "default" and r["verdict"] == "served"
        assert len(r["prompt_hash"]) == 64 and len(r["negative_prompt_hash"]) == 64 and "secret" not in json.dumps(r)
    assert b"secret" not in (d.state / "audit.db").read_bytes() + (d.state / "audit.db-wal").read_bytes()


def test_the_image_digest_is_of_the_pixels(daemon):
    png = daemon.post({**QUICK, "seed": 77}, Accept="image/png", x_request_id="pixels").body
    found = next(r for r in records(daemon, "image") if r["request_id"] == "pixels")
    assert found["image_digest"] == hashlib.blake2b(open_png(png).tobytes(), digest_size=32).hexdigest()


def test_refusals_and_attempts(daemon):
    """Fields that would weaken the safety are refused, and the attempt is written down with the field's name."""
    for field, value in (("safety", False), ("lora_scale", 0), ("disable_safety", True)):
        assert daemon.post({**QUICK, field: value}, x_request_id=f"try-{field}").status == 400
        until(lambda: any(r["request_id"] == f"try-{field}" and field in r["reason"] for r in records(daemon, "refusal")), f"the record of {field}")


def test_verify_while_it_is_written(daemon):
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        answers = pool.map(lambda i: daemon.post({**QUICK, "seed": i}).status, range(12))
        for _ in range(3):
            status, walk = verify(daemon)
            assert status == 0 and walk["ok"] and walk["head_checked"]
        assert set(answers) == {200}
    assert verify(daemon)[1]["records"] >= 12


def test_prompts_when_wanted(start):
    d = start("--audit-prompts", "yes")
    assert d.post({**QUICK, "prompt": "a red \"apple\"\n🍎"}).status == 200
    assert records(d, "image")[-1]["prompt"] == "a red \"apple\"\n🍎"


def test_restart_and_anchor(start):
    """The chain goes on after a restart; the head in the log is an anchor for what the file alone cannot prove."""
    d = start()
    d.png()
    d.stop()
    head = d.wait_log(r"audit: closed at record (\d+), head ([0-9a-f]{64})").groups()
    status, walk = verify(d, "--head", head[1])
    assert status == 0 and walk["anchor_found"] and walk["head"] == head[1] and walk["records"] == int(head[0])
    again = start(state=d.state)
    again.png()
    again.stop()
    status, walk = verify(d, "--head", head[1])
    assert status == 0 and walk["anchor_found"] and walk["records"] > int(head[0]) and walk["head"] != head[1]
    status, walk = verify(d, "--head", "0" * 64)
    assert status == 1 and not walk["ok"]


def test_recompute_with_b2sum(start):
    """The recipe of docs/operating.md: anybody can compute the chain again."""
    d = start()
    d.png()
    d.stop()
    db = sqlite3.connect(d.state / "audit.db")
    (prev,), rows = db.execute("SELECT value FROM meta WHERE key = 'genesis'").fetchone(), db.execute("SELECT json, hash FROM record ORDER BY seq").fetchall()
    assert len(rows) >= 2
    for text, digest in rows:
        out = subprocess.run(["b2sum", "-l", "256"], input=(prev + text).encode(), capture_output=True, check=True).stdout
        assert out.split()[0].decode() == digest
        prev = digest


def test_tampering_is_found_and_stops_the_start(start):
    d = start()
    d.png()
    d.png(seed=2)
    d.stop()
    db = sqlite3.connect(d.state / "audit.db")
    with pytest.raises(sqlite3.IntegrityError):
        db.execute("DELETE FROM record")
    db.execute("DROP TRIGGER record_no_update")
    db.execute("UPDATE record SET json = replace(json, '\"seed\":2', '\"seed\":3')")
    db.commit()
    (bad,) = db.execute("SELECT max(seq) FROM record WHERE json LIKE '%\"seed\":3%'").fetchone()
    db.close()
    status, walk = verify(d)
    assert status == 1 and walk["bad"] == bad
    done = audit(d, "verify")
    assert done.returncode == 1 and done.stdout.startswith(f"NOT INTACT: record {bad} ") and "not intact" in done.stderr


def test_kill_under_load(start):
    d = start()
    sockets = [d.send({**QUICK, "seed": i}) for i in range(6)]
    until(lambda: records(d, "image"), "a picture")
    d.process.kill()
    d.wait()
    for sock in sockets:
        sock.close()
    assert verify(d)[0] == 0
    again = start(state=d.state)
    assert again.post(QUICK).status == 200 and verify(again)[0] == 0


def test_no_picture_leaves_without_its_record(start):
    """The disk is full (a limit on file size stands in): 503, and pictures again when there is room."""
    d = start()
    assert d.post(QUICK).status == 200
    resource.prlimit(d.process.pid, resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    for _ in range(3):
        answer = d.post(QUICK)
        assert answer.status == 503 and "audit" in answer.error["message"], answer.body
        assert b"iVBOR" not in answer.body
    count = len(records(d, "image"))
    resource.prlimit(d.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert d.post(QUICK).status == 200
    assert len(records(d, "image")) == count + 1 and verify(d)[0] == 0


def test_one_server_a_folder(start, tmp_path):
    d = start()
    done = subprocess.run([BINARY, "serve", "--port", "0", "--threads", "1", "--model", MODEL, "--policy", POLICY, "--state", str(d.state)],
                          cwd=tmp_path, capture_output=True, text=True, timeout=60 * PATIENCE)
    assert done.returncode == 1 and f"in use by process {d.process.pid}" in done.stderr


@pytest.mark.parametrize("words, status, says", [
    (("verify", "--state", "none"), 1, "there is no audit log"), (("show", "--state", "none"), 1, "there is no audit log"), (("dance",), 2, "usage"),
    (("verify", "--head", "abc"), 2, "usage"), (("show", "--n", "0"), 2, "usage"), (("show", "--n"), 2, "usage"),
])
def test_usage(tmp_path, words, status, says):
    done = subprocess.run([BINARY, "audit", *words], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == status and says in done.stderr and not done.stdout
