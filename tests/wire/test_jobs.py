"""Durable jobs over HTTP: their life, events, idempotency, cancellation, expiry; and that what was accepted is finished once, with the bytes that it has
alone, whatever happens to the process."""
import contextlib
import http.client
import io
import json
import random
import resource
import socket
import sqlite3
import threading

import pytest
from PIL import Image

from adapters import NOTHING, Policy
from conftest import LONG, QUICK, until
from test_audit import records

ENDED = ("succeeded", "failed", "cancelled")


def submit(d, fields, key=None, **headers):
    headers = {"Content-Type": "application/json", **({"Idempotency-Key": key} if key else {}), **headers}
    return d.request("POST", "/v1/jobs", json.dumps(fields), headers)


def accepted(d, fields, **more):
    answer = submit(d, fields, **more)
    assert answer.status == 202, answer.body
    return answer.json["id"]


def job(d, name, **headers):
    answer = d.get(f"/v1/jobs/{name}", **headers)
    assert answer.status == 200, answer.body
    return answer.json


def ended(d, name, patience=120):
    def look():
        found = job(d, name)
        return found if found["status"] in ENDED else None

    return until(look, f"the end of {name}", patience, d.log)


def pictures(d, found):
    """The files behind a finished job's urls."""
    assert found["status"] == "succeeded", found
    answers = [d.get(p["url"]) for p in found["result"]["data"]]
    assert [a.status for a in answers] == [200] * len(answers)
    return [a.body for a in answers]


def running(d, name):
    until(lambda: job(d, name)["status"] == "running", f"{name} to run", 60, d.log)


def cancel(d, name):
    answer = d.request("DELETE", f"/v1/jobs/{name}")
    assert answer.status in (200, 202), answer.body
    return answer


class Events:
    """The events of a job as they come."""

    def __init__(self, d, name, **headers):
        self.connection = d.connect()
        self.connection.request("GET", f"/v1/jobs/{name}/events", headers=headers)
        self.response = self.connection.getresponse()
        assert self.response.status == 200, self.response.read()
        assert self.response.headers["content-type"] == "text/event-stream"
        self.comments = 0

    def __iter__(self):
        event = {}
        for line in iter(self.response.readline, b""):
            line = line.decode().rstrip("\n")
            if line.startswith(":"):
                self.comments += 1
            elif line:
                field, _, value = line.partition(": ")
                event[field] = value
            elif event:
                yield event["event"], int(event["id"]), json.loads(event["data"])
                event = {}

    def close(self):
        self.response.close()
        self.connection.close()


# ---- the life of a job ----


def test_a_life(daemon):
    fields = {**QUICK, "n": 2, "seed": 77, "metadata": {"order": "17"}}
    answer = submit(daemon, fields, Accept="image/png, */*")  # what Accept says is about pictures: this is JSON in any case
    first = answer.json
    assert answer.status == 202 and answer.headers["location"] == f"/v1/jobs/{first['id']}"
    assert first["object"] == "job" and first["status"] in ("queued", "running") and first["metadata"] == {"order": "17"}
    assert first["request"]["prompt"] == QUICK["prompt"] and "metadata" not in first["request"] and first["result"] is None
    done = ended(daemon, first["id"])
    assert done["created"] <= done["started"] <= done["finished"] and done["error"] is None and done["queue_position"] is None
    assert done["metadata"] == {"order": "17"}
    assert [p["seed"] for p in done["result"]["data"]] == [77, 78]
    files = pictures(daemon, done)
    assert files == [daemon.png(seed=77), daemon.png(seed=78)]  # the same as when somebody waits for them
    assert Image.open(io.BytesIO(files[0])).size == (64, 64)
    daemon.wait_log(rf" {first['id']} JOB /v1/jobs 200 .* n=2 64x64 steps=4 ")


def test_seed_is_drawn_once(daemon):
    name = accepted(daemon, {k: v for k, v in QUICK.items() if k != "seed"})
    done = ended(daemon, name)
    seed = done["result"]["data"][0]["seed"]
    assert pictures(daemon, done) == [daemon.png(seed=seed)]


def test_waiting_and_running(start):
    d = start("--running", "1")
    long = accepted(d, LONG)
    running(d, long)
    waiting = [accepted(d, {**QUICK, "seed": i}) for i in range(2)]
    views = [job(d, w) for w in waiting]
    assert all(v["status"] == "queued" and v["started"] is None for v in views)
    assert sorted(v["queue_position"] for v in views) == [0, 1]
    assert all(v["estimated_wait_s"] >= 0 for v in views)
    now = until(lambda: (v := job(d, long))["progress"]["step"] and v, "a step", 60)
    assert now["queue_position"] is None and now["progress"]["steps"] == LONG["steps"] and now["progress"]["pictures"] == 1
    page = d.get("/metrics").body.decode()
    assert 'safelight_durable_jobs{state="queued"} 2' in page and 'safelight_durable_jobs{state="running"} 1' in page
    # one that waits is over at once, one that runs at its next step; the third knows nothing of it
    assert cancel(d, waiting[0]).json["status"] == "cancelled"
    cancel(d, long)
    found = ended(d, long)
    assert found["status"] == "cancelled" and found["error"]["code"] == "cancelled" and found["result"] is None
    done = ended(d, waiting[1])
    assert pictures(d, done) == [d.png(seed=1)]
    again = d.request("POST", f"/v1/jobs/{waiting[1]}/cancel")
    assert again.status == 200 and again.json["status"] == "succeeded"  # what has ended stays as it is
    assert d.get(f"/v1/jobs/{long}/pictures/0").status == 404
    until(lambda: 'safelight_durable_jobs{state="cancelled"} 2' in d.get("/metrics").body.decode(), "the counts")
    told = d.get("/metrics").body.decode()
    assert 'jobs_cancelled_total{by="client"} 2' in told and 'jobs_cancelled_total{by="disconnect"} 0' in told


def test_refusals(daemon):
    for fields, param in (({**QUICK, "steps": 0}, "steps"), ({**QUICK, "stream": True}, "stream"), ({**QUICK, "colour": 1}, "colour")):
        answer = submit(daemon, fields)
        assert answer.status == 400 and answer.error["param"] == param
    for path in ("/v1/jobs/job_0", "/v1/jobs/job_0/events", "/v1/jobs/job_0/pictures/0", "/v1/files/" + "0" * 32 + ".png", "/v1/files/x"):
        assert daemon.get(path).status == 404, path
    assert daemon.request("DELETE", "/v1/jobs/job_0").status == 404
    name = accepted(daemon, QUICK)
    ended(daemon, name)
    for i in ("1", "-1", "x", "00x"):
        assert daemon.get(f"/v1/jobs/{name}/pictures/{i}").status == 404
    answer = daemon.request("PUT", "/v1/jobs")
    assert answer.status == 405 and answer.headers["allow"] == "POST, GET, HEAD"
    assert daemon.get("/v1/jobs").status == 401  # strangers are not told apart


def test_a_clients_own_id_is_no_job(start):
    """x-request-id may be anything, the id of a job too: what is told of the job is the job's."""
    d = start("--running", "1")
    name = accepted(d, QUICK)
    ended(d, name)
    other = accepted(d, LONG)
    running(d, other)
    sock = d.send(LONG, other)
    d.wait_busy()
    assert cancel(d, other).status in (200, 202)
    assert ended(d, other)["status"] == "cancelled"
    assert f"{other} POST" not in d.log()  # the request of that name goes on
    sock.close()
    d.wait_log(f"{other} POST .* 499 ")


# ---- idempotency ----


def test_idempotency(daemon):
    first = submit(daemon, QUICK, key="k1")
    again = submit(daemon, QUICK, key="k1")
    assert (first.status, again.status) == (202, 200) and again.json["id"] == first.json["id"]
    assert again.headers["idempotent-replayed"] == "true" and "idempotent-replayed" not in first.headers
    ended(daemon, first.json["id"])
    assert submit(daemon, QUICK, key="k1").json["status"] == "succeeded"
    other = submit(daemon, {**QUICK, "steps": 3}, key="k1")
    assert other.status == 422 and other.error["code"] == "idempotency_conflict"
    assert submit(daemon, QUICK, key="k2").json["id"] != first.json["id"]
    for key in ("", "x" * 256):
        answer = daemon.request("POST", "/v1/jobs", json.dumps(QUICK), {"Content-Type": "application/json", "Idempotency-Key": key})
        assert answer.status == 400 and answer.error["param"] == "Idempotency-Key"
    assert submit(daemon, QUICK, key="x" * 255).status == 202


def test_one_key_many_at_once(daemon):
    """All who come with one key at the same time get one job."""
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(submit(daemon, {**QUICK, "seed": 5}, key="at-once"))) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len({a.json["id"] for a in answers}) == 1
    assert sorted(a.status for a in answers) == [200] * 7 + [202]


# ---- tenants ----


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture
def tenants(tmp_path):
    return Policy(tmp_path / "policy").profile(**NOTHING).tenant("north", "key-n", "default").tenant("south", "key-s", "default").write()


def test_tenants(start, tenants):
    d = start(policy=tenants.path)
    ids = [accepted(d, {**QUICK, "seed": i, "metadata": {"i": i}}, **bearer("key-n")) for i in range(5)]
    stranger = accepted(d, QUICK)
    for name, keys in ((ids[0], [{}, bearer("key-s")]), (stranger, [bearer("key-n")])):
        for headers in keys:
            for path in ("", "/events", "/pictures/0"):
                assert d.get(f"/v1/jobs/{name}{path}", **headers).status == 404, (path, headers)
            assert d.request("DELETE", f"/v1/jobs/{name}", headers=headers).status == 404
    assert d.get(f"/v1/jobs/{ids[0]}", **bearer("wrong")).status == 401
    for name in ids:
        until(lambda: job(d, name, **bearer("key-n"))["status"] == "succeeded", name, 60)

    def listed(query="", key="key-n"):
        answer = d.get("/v1/jobs" + query, **bearer(key))
        assert answer.status == 200, answer.body
        assert answer.json["object"] == "list"
        return [j["id"] for j in answer.json["data"]], answer.json["has_more"]

    newest = ids[::-1]
    assert listed() == (newest, False) and listed(key="key-s") == ([], False)
    assert listed("?limit=2") == (newest[:2], True)
    assert listed(f"?limit=2&after={newest[1]}") == (newest[2:4], True)
    assert listed(f"?limit=2&after={newest[3]}") == (newest[4:], False)
    assert listed("?status=succeeded&limit=5") == (newest, False) and listed("?status=failed") == ([], False)
    one = d.get("/v1/jobs?limit=1", **bearer("key-n")).json["data"][0]
    assert one["metadata"] == {"i": 4} and one["result"]["data"][0]["url"] == f"/v1/jobs/{newest[0]}/pictures/0"
    for query, param in (("?limit=0", "limit"), ("?limit=x", "limit"), ("?limit=101", "limit"), ("?status=gone", "status")):
        answer = d.get("/v1/jobs" + query, **bearer("key-n"))
        assert answer.status == 400 and answer.error["param"] == param
    assert d.get(f"/v1/jobs?after={stranger}", **bearer("key-n")).status == 404
    assert d.get("/v1/jobs", **bearer("wrong")).status == 401 and d.get("/v1/jobs").status == 401
    # the same key of two tenants is two keys; and a conflict is on record, with who it was
    a, b = (submit(d, QUICK, key="same", **bearer(k)) for k in ("key-n", "key-s"))
    assert a.status == b.status == 202 and a.json["id"] != b.json["id"]
    assert submit(d, {**QUICK, "seed": 9}, key="same", **bearer("key-n")).status == 422
    d.stop()
    records = [json.loads(r[0]) for r in sqlite3.connect(d.state / "audit.db").execute("select json from record order by seq")]
    assert [r["tenant"] for r in records if r["kind"] == "refusal" and "Idempotency-Key" in r["reason"]] == ["north"]


# ---- events ----


def test_events(daemon):
    name = accepted(daemon, {**QUICK, "size": "128x128", "steps": 60, "metadata": {"a": "b"}})
    got = list(Events(daemon, name))
    kinds = [kind for kind, _, _ in got]
    assert [i for _, i, _ in got] == list(range(1, len(got) + 1))
    assert kinds[0] == "status" and kinds[-1] == "result" and "error" not in kinds
    steps = [data["step"] for kind, _, data in got if kind == "step"]
    assert steps == sorted(set(steps)) and steps[-1] <= 60
    previews = [data for kind, _, data in got if kind == "preview"]
    assert previews and all(0 < p["step"] < 60 and p["output_format"] == "png" for p in previews)
    last = got[-1][2]
    assert last["id"] == name and last["status"] == "succeeded" and last["metadata"] == {"a": "b"}
    assert pictures(daemon, last) == [daemon.png(size="128x128", steps=60)]  # looking changes nothing
    assert [(kind, i) for kind, i, _ in Events(daemon, name)] == [("result", 1)]  # of a finished job
    assert [(kind, i) for kind, i, _ in Events(daemon, name, **{"Last-Event-ID": "41"})] == [("result", 42)]
    assert [(kind, i) for kind, i, _ in Events(daemon, name, **{"Last-Event-ID": "nonsense"})] == [("result", 1)]


def test_events_of_short_jobs(daemon):
    """However short a job is, its events have an end."""
    for i in range(20):
        name = accepted(daemon, {**QUICK, "steps": 1, "seed": i})
        events = Events(daemon, name)
        assert [kind for kind, _, _ in events][-1] == "result"
        events.close()


def test_readers_that_leave(start):
    d = start("--alive_s", "1", "--running", "1")
    long = accepted(d, LONG)
    running(d, long)
    waits = accepted(d, {**QUICK, "seed": 3})
    stays, leaves, half = Events(d, waits), Events(d, waits), Events(d, waits)
    assert next(iter(stays))[2]["status"] == "queued"
    leaves.close()
    half.connection.sock.shutdown(socket.SHUT_WR)  # cut, and no storm of comments
    with pytest.raises(http.client.IncompleteRead) as cut:
        half.response.read()
    assert cut.value.partial.count(b"alive") <= 3
    assert d.get(f"/v1/jobs/{waits}").json["status"] == "queued"
    until(lambda: "safelight_requests_in_flight 2" in d.get("/metrics").body.decode(), "the readers to be gone")  # the one that stays, and this one
    line = stays.response.readline()
    while not line.startswith(b":"):
        line = stays.response.readline()
    assert line == b": alive\n"
    cancel(d, long)
    assert [kind for kind, _, _ in stays][-1] == "result"
    assert pictures(d, ended(d, waits)) == [d.png(seed=3)]


def test_two_readers_and_a_cancellation(start):
    d = start()
    name = accepted(d, LONG)
    readers = [Events(d, name) for _ in range(2)]
    iterators = [iter(r) for r in readers]
    for it in iterators:
        while next(it)[0] != "step":
            pass
    cancel(d, name)
    for it in iterators:
        rest = list(it)
        kind, _, data = rest[-1]
        assert kind == "error" and data["error"]["code"] == "cancelled"
        assert rest[-2][0] == "status" and rest[-2][2]["status"] == "cancelled"


def test_a_job_that_has_ended_is_not_drawn(start):
    """The store's word counts: what is cancelled there while the table is given the job, which takes the backlog's feeder a moment, is drawn for nobody."""
    d = start("--running", "1")
    long, late, after = (accepted(d, fields) for fields in (LONG, {**LONG, "seed": 2}, QUICK))
    running(d, long)
    assert job(d, late)["status"] == "queued"
    with contextlib.closing(sqlite3.connect(d.state / "jobs.db", timeout=30)) as store:
        store.execute("update job set state = 4, finished = created where id = ?", (late,))
        store.commit()
    cancel(d, long)
    assert ended(d, after)["status"] == "succeeded"
    assert job(d, late)["status"] == "cancelled"
    found = d.wait_log(rf" {late} JOB /v1/jobs \d+ .* steps=(\d+) ")
    assert int(found.group(1)) < LONG["steps"]
    assert late not in [r["request_id"] for r in records(d, "image")]


def test_slow_reader(start):
    """Nobody reads: nothing piles up for him, and the job is finished all the same."""
    d = start()
    name = accepted(d, {**QUICK, "size": "128x128", "steps": 60, "n": 2})
    readers = [Events(d, name) for _ in range(20)]
    ended(d, name, 300)
    for r in readers:  # each has what was underway, and then the end
        assert [kind for kind, _, _ in r][-1] == "result"
        r.close()


# ---- what is kept ----


def test_expiry(start):
    d = start("--results_s", "1", "--history_s", "3")
    done = ended(d, accepted(d, QUICK))
    url = done["result"]["data"][0]["url"]
    until(lambda: d.get(url).status == 404, "the picture to be removed")
    until(lambda: not list((d.state / "results").iterdir()), "its file to be removed")
    until(lambda: d.get(f"/v1/jobs/{done['id']}").status == 404, "the job to be forgotten")
    until(lambda: 'safelight_durable_jobs{state="succeeded"} 0' in d.get("/metrics").body.decode(), "the counts")


def test_results_too_large(start):
    """A result that can never be kept fails its job, and nothing hangs on it."""
    d = start("--results_mb", "1", "--max_size", "512")
    name = accepted(d, {**QUICK, "size": "384x384", "steps": 1, "n": 10})
    found = ended(d, name, 300)
    assert found["status"] == "failed" and found["error"]["code"] == "request_too_large" and "results_mb" in found["error"]["message"]
    assert ended(d, accepted(d, QUICK))["status"] == "succeeded"


def test_full_disk(start):
    """What cannot be kept is refused, and says why; what is there is told of; and when there is room again all goes on."""
    d = start()
    first = accepted(d, QUICK, key="first")
    ended(d, first)
    soft, hard = resource.prlimit(d.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(d.process.pid, resource.RLIMIT_FSIZE, (1, hard))
    for i in range(3):
        answer = submit(d, {**QUICK, "seed": i}, key="later")
        assert answer.status == 507 and answer.error["code"] == "disk_full"
    assert d.get("/healthz").status == 200
    assert pictures(d, job(d, first))
    assert submit(d, QUICK, key="first").status == 200
    resource.prlimit(d.process.pid, resource.RLIMIT_FSIZE, (soft, hard))
    assert pictures(d, ended(d, accepted(d, {**QUICK, "seed": 2}, key="later"))) == [d.png(seed=2)]


def test_results_that_cannot_be_written(start, tmp_path):
    """They are tried again, but do not keep the server from stopping; and they are there after the next start."""
    state = tmp_path / "kept"
    d = start("--drain_s", "1", state=state)
    (state / "results").rmdir()
    asked = {accepted(d, f): f for f in [{**QUICK, "seed": i} for i in range(3)]}
    d.wait_log("store: a write failed")
    assert job(d, next(iter(asked)))["status"] == "running"
    d.stop()
    all_finished(start(state=state), asked)


# ---- the end of the process ----


def drawn_alone(d, asked):
    return {name: d.png(**fields) for name, fields in asked.items()}


def all_finished(d, asked, patience=240):
    """Each job is there, succeeded, and has the bytes that it has alone."""
    got = {name: pictures(d, ended(d, name, patience)) for name in asked}
    alone = drawn_alone(d, asked)
    assert {name: [alone[name]] for name in asked} == got
    rows = sqlite3.connect(f"file:{d.state}/jobs.db?mode=ro", uri=True).execute(
        "select job.id, count(file.name) from job left join file on file.job = job.seq group by job.seq").fetchall()
    assert {row for row in rows if row[0] in asked} == {(name, 1) for name in asked}  # once
    files = {f.name for f in (d.state / "results").iterdir()}
    assert len(files) == sum(row[1] for row in rows)  # and nothing half


def test_kill_at_any_moment(start, tmp_path):
    """kill -9 with jobs that wait, run and are being recorded; the second run's queue is shorter than what was left."""
    random.seed(20)
    state = tmp_path / "kept"
    asked, keys = {}, {}
    for run in range(2):
        d = start("--queue", "64", state=state)
        for i in range(10):
            fields = {**QUICK, "seed": 100 * run + i, "steps": random.choice([1, 2, 4, 30]), "sampler": random.choice(["ddim", "euler_a", "dpmpp_2m"])}
            key = f"{run}-{i}"
            name = accepted(d, fields, key=key)
            asked[name], keys[key] = fields, name
        until(lambda: sum(job(d, n)["status"] == "succeeded" for n in asked) >= random.randrange(1, 6), "some to be done", 120)
        d.kill()
    d = start("--queue", "4", state=state)
    for key, name in keys.items():  # keys outlive the process
        answer = submit(d, asked[name], key=key)
        assert (answer.status, answer.json["id"]) == (200, name), answer.body
    assert d.post(QUICK).status == 200  # who comes now is not kept out by the backlog
    all_finished(d, asked)


def test_stop_puts_jobs_back(start, tmp_path):
    state = tmp_path / "kept"
    d = start("--drain_s", "0", "--running", "1", state=state)
    asked = {}
    for i in range(4):
        fields = {**QUICK, "seed": i, "size": "128x128", "steps": 150} if not i else {**QUICK, "seed": i}
        asked[accepted(d, fields)] = fields
        if not i:
            running(d, next(iter(asked)))
            reader = Events(d, next(iter(asked)))  # which does not hold up the end
    d.stop()
    reader.response.read()  # it ended
    again = sqlite3.connect(state / "jobs.db").execute("select state, attempts from job order by seq").fetchall()
    assert again == [(0, 0)] * 4  # queued, and no attempt counts
    d = start(state=state)
    all_finished(d, asked)


def test_kill_while_stopping(start, tmp_path):
    state = tmp_path / "kept"
    d = start("--running", "2", "--drain_s", "60", state=state)
    asked = {accepted(d, f): f for f in [{**QUICK, "seed": i, "steps": 40} for i in range(6)]}
    running(d, next(iter(asked)))
    d.terminate()
    d.wait_log("stopping: ")
    d.kill()
    all_finished(start(state=state), asked)


def test_three_crashes_are_reported(start, tmp_path):
    """A job that is running whenever the process dies is not tried for ever."""
    state = tmp_path / "kept"
    d = start(state=state)
    name = accepted(d, LONG)
    for _ in range(3):
        running(d, name)
        d.kill()
        d = start(state=state)
    found = job(d, name)
    assert found["status"] == "failed" and found["error"]["code"] == "crashed" and "3 attempts" in found["error"]["message"]
    kinds = [(kind, data) for kind, _, data in Events(d, name)]
    assert [k for k, _ in kinds] == ["status", "error"] and kinds[1][1]["error"]["code"] == "crashed"


def test_tenant_that_is_gone(start, tenants, tmp_path):
    """His jobs fail and say so; those of the others are drawn."""
    state = tmp_path / "kept"
    tenants.tenant("east", "key-e", "default").write()
    d = start("--drain_s", "0", "--running", "1", policy=tenants.path, state=state)
    block = accepted(d, LONG, **bearer("key-n"))
    until(lambda: job(d, block, **bearer("key-n"))["status"] == "running", "the first to run", 60)
    gone = accepted(d, QUICK, **bearer("key-e"))
    stays = accepted(d, QUICK, **bearer("key-s"))
    d.stop()
    del tenants.content["tenants"]["east"]
    tenants.write()
    d = start(policy=tenants.path, state=state)
    until(lambda: job(d, stays, **bearer("key-s"))["status"] == "succeeded", "the other tenant's", 60)
    assert d.get(f"/v1/jobs/{gone}", **bearer("key-e")).status == 401  # nobody may ask for it ...
    d.wait_log(f"{gone} cannot be drawn any more: .*east")
    row = sqlite3.connect(f"file:{state}/jobs.db?mode=ro", uri=True).execute("select state, error_code, error_text from job where id = ?", (gone,)).fetchone()
    assert row[:2] == (3, "invalid_api_key") and "east" in row[2]  # ... until the operator lets him in again
    d.request("DELETE", f"/v1/jobs/{block}", headers=bearer("key-n"))
