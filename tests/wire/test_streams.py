"""Streams of a picture on its way, as the openai client reads them; and many pictures at once, each as it is alone."""
import asyncio
import base64
import concurrent.futures
import io
import json
import socket
import sqlite3

import pytest
from openai import AsyncOpenAI, OpenAI
from PIL import Image

from conftest import LONG, PATIENCE, QUICK, until
from test_admin import Admin

PICTURE = {"prompt": "a red apple", "size": "64x64"}


def client(d):
    return OpenAI(base_url=f"{d.url}/v1", api_key="none", max_retries=0)


def events(d, **fields):
    with client(d).images.generate(**PICTURE, stream=True, **fields) as stream:
        return list(stream)


def test_previews_then_the_picture(daemon):
    got = events(daemon, partial_images=2, extra_body={"steps": 40, "seed": 5})
    *partial, last = got
    assert [e.type for e in partial] == ["image_generation.partial_image"] * len(partial) and 1 <= len(partial) <= 2
    assert [e.partial_image_index for e in partial] == list(range(len(partial)))
    assert last.type == "image_generation.completed" and last.usage.output_tokens > 0
    pictures = [base64.b64decode(e.b64_json) for e in got]
    assert pictures[-1] == daemon.png(**PICTURE, steps=40, seed=5)  # a stream changes nothing
    assert len(set(pictures)) == len(pictures)
    for png in pictures:
        image = Image.open(io.BytesIO(png))
        assert image.size == (64, 64) and "trainedAlgorithmicMedia" in str(image.info)


def test_stream_without_previews(daemon):
    got = events(daemon, extra_body={"steps": 3, "seed": 5})
    assert [e.type for e in got] == ["image_generation.completed"]


def test_async_client(daemon):
    async def draw():
        async with AsyncOpenAI(base_url=f"{daemon.url}/v1", api_key="none", max_retries=0) as c:
            stream = await c.images.generate(**PICTURE, stream=True, partial_images=1, extra_body={"steps": 20, "seed": 5})
            return [e.type async for e in stream]

    assert asyncio.run(draw())[-1] == "image_generation.completed"


def test_refusals_come_before_the_stream(daemon):
    answer = daemon.post({**QUICK, "stream": True, "steps": 0})
    assert answer.status == 400 and answer.error["param"] == "steps"
    answer = daemon.post({**QUICK, "stream": True}, Accept="image/png")
    assert answer.status == 400 and answer.error["param"] == "stream"


def test_previews_are_recorded(start):
    """A preview is a picture that leaves: it is in the audit log before anybody sees it."""
    d = start()
    events(d, partial_images=3, extra_body={"steps": 40, "seed": 5})
    d.stop()
    rows = [json.loads(r[0]) for r in sqlite3.connect(d.state / "audit.db").execute("select json from record order by seq")]
    verdicts = [r.get("verdict", "") for r in rows if r["kind"] == "image"]
    assert verdicts[0] == "preview" and len(verdicts) == 2


def open_stream(d, fields, request_id):
    connection = d.connect()
    connection.request("POST", "/v1/images/generations", json.dumps({**fields, "stream": True}),
                       {"Content-Type": "application/json", "x-request-id": request_id})
    return connection, connection.getresponse()


def test_reader_that_leaves_stops_its_picture(start):
    d = start()
    for i in range(3):
        connection, response = open_stream(d, {**LONG, "partial_images": 3}, f"leaves-{i}")
        assert response.status == 200 and response.headers["content-type"] == "text/event-stream"
        if i:
            assert response.readline().startswith(b"event: image_generation.partial_image")
        response.close()
        connection.close()
        found = d.wait_log(rf" leaves-{i} POST /v1/images/generations \d+ .* steps=(\d+) ")
        assert int(found.group(1)) < LONG["steps"]
    until(lambda: d.post(QUICK).status == 200, "the device to be free")


def slow_reader(d, fields, request_id):
    """A stream's socket that takes in little of what is sent, unread."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
    sock.settimeout(60 * PATIENCE)
    sock.connect(("127.0.0.1", d.port))
    body = json.dumps({**fields, "stream": True}).encode()
    sock.sendall(f"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nx-request-id: {request_id}\r\n"
                 f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    return sock


MANY = {"prompt": "a red apple", "size": "256x256", "steps": 1, "n": 10}


def test_slow_readers_hold_no_place(start):
    """Who does not read the end of his stream takes nobody's place in the table, and has all of it when he reads."""
    d = start("--queue", "1", "--running", "10")
    socks = []
    for i in range(2):
        socks.append(slow_reader(d, MANY, f"slow-{i}"))
        until(lambda i=i: f"safelight_pictures_total {10 * (i + 1)}\n" in d.get("/metrics").body.decode(), "the pictures to be drawn", 60)
    until(lambda: Admin(d).get("/v1/admin/activity").json["active"] == 0, "the table to be empty")
    assert "slow-" not in d.log()  # they are being answered
    for sock in socks:
        with sock.makefile("rb") as answer:
            assert answer.read().count(b"event: image_generation.completed") == 10
    d.wait_log("slow-0 POST /v1/images/generations 200 .* n=10 ")


def test_slow_reader_holds_up_no_end(start):
    d = start("--drain-s", "1")
    sock = slow_reader(d, MANY, "slow")
    until(lambda: "safelight_pictures_total 10\n" in d.get("/metrics").body.decode(), "the pictures to be drawn", 60)
    d.terminate()
    assert d.wait(20) == 0  # an answer has two seconds to be read
    sock.close()


def test_stream_ends_with_an_error_event(start):
    """What goes wrong after the first byte is an event that clients raise."""
    d = start("--deadline-s", "1")
    connection, response = open_stream(d, {**LONG, "n": 1}, "late")
    text = response.read().decode()
    assert '"error"' in text and "deadline" in text
    connection.close()


def test_twenty_at_once_as_alone(start):
    """Twenty pictures that differ in prompt, seed, steps, sampler, guidance and size share steps and come out as they do alone."""
    d = start("--threads", "2", "--batch", "8")
    samplers = ["ddim", "euler", "euler_a", "dpmpp_2m"]
    asked = [{"prompt": f"a {c} {t} on a {b} background", "seed": i, "steps": 3 + i % 7, "sampler": samplers[i % 4],
              "guidance_scale": [1, 3, 5.5][i % 3], "size": ["64x64", "96x64"][i % 2], "karras": i % 4 in (1, 3)}
             for i, (c, t, b) in enumerate((c, t, b) for c in ("red", "blue") for t in ("apple", "car", "cat", "tree", "hat") for b in ("green", "white"))]
    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        together = list(pool.map(lambda q: d.png(**q), asked))
    assert together == [d.png(**q) for q in asked]


def test_short_ones_pass_a_long_one(start):
    """Nobody waits behind a whole picture of somebody else."""
    d = start()
    running = d.send({**LONG, "n": 2}, "long")
    d.wait_busy()
    for i in range(3):
        assert d.post({**QUICK, "seed": i}).status == 200
    assert "long POST" not in d.log()  # it still runs
    running.close()
    d.wait_log("long POST")


@pytest.mark.parametrize("flags", [(), ("--running", "2", "--batch", "1")])
def test_many_clients(start, flags):
    d = start(*flags)
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda i: d.post({**QUICK, "n": 1 + i % 3, "seed": 100 * i, "steps": 1 + i % 5}), range(24)))
    assert [a.status for a in answers] == [200] * 24
    assert [len(a.json["data"]) for a in answers] == [1 + i % 3 for i in range(24)]
    page = d.get("/metrics").body.decode()
    assert 'safelight_pictures_running{device="0"} 0' in page and "safelight_jobs_queued 0" in page
    assert f"safelight_pictures_total {sum(1 + i % 3 for i in range(24))}" in page
