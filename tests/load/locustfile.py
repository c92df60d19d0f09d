"""What users do with a server, for locust: pictures in OpenAI's words, streams, A1111's clients that watch the progress, durable jobs with their events, probes.

    .venv/bin/locust -f tests/load/locustfile.py --headless --users 16 --run-time 60s --host http://127.0.0.1:8080
    .venv/bin/locust -f tests/load/locustfile.py --host http://127.0.0.1:8080    # the same with locust's own page

An answer that is not what its client needs is a failure: a picture that is none, a stream without its end, a job that is not finished. A queue that is full
(429) is one too, so give the server fewer users than its queue holds. Called by people, and by tests/wire/test_locust.py.
"""
import base64
import json
import random

import gevent
from locust import HttpUser, between, task

PROMPTS = ["a red apple", "a (blue:1.2) car", "a cat", ""]
PNG = b"\x89PNG\r\n\x1a\n"


def small():
    return {"prompt": random.choice(PROMPTS), "size": random.choice(["64x64", "96x64"]), "steps": random.choice([1, 2, 4, 8]), "seed": random.randrange(1 << 31)}


class Wrong(Exception):
    """An answer that is not what its client needs."""


def need(condition, what):
    if not condition:
        raise Wrong(what)


class Client(HttpUser):
    """What the kinds of users have in common."""
    abstract = True
    wait_time = between(0, 0.2)

    def ask(self, method, path, name, check, fields=None, status=(200,), **more):
        """What check() makes of the answer; None when that is a failure, which locust counts."""
        with self.client.request(method, path, name=name, json=fields, catch_response=True, **more) as answer:
            try:
                if answer.status_code not in status:
                    raise Wrong(f"status {answer.status_code}: {answer.text[:200]}")
                return check(answer)
            except (Wrong, ValueError, KeyError, IndexError) as why:
                answer.failure(f"{type(why).__name__}: {why}")
                return None

    def events(self, method, path, name, last, fields=None):
        """Reads server-sent events to their end; the data of the last one, whose name must be last."""
        def check(answer):
            lines = [line for line in answer.iter_lines() if line]
            names, data = ([line.split(b": ", 1)[1] for line in lines if line.startswith(kind)] for kind in (b"event: ", b"data: "))
            need(names and names[-1].decode() == last, f"the stream ended with {names[-1:]}")
            return json.loads(data[-1])
        return self.ask(method, path, name, check, fields, stream=True)


class OpenAI(Client):
    """Draws, as JSON and as a file, and streams."""
    weight = 4

    @task(3)
    def generate(self):
        def check(answer):
            need(all(base64.b64decode(p["b64_json"]).startswith(PNG) for p in answer.json()["data"]), "no PNG file")
        self.ask("POST", "/v1/images/generations", "generate", check, {**small(), "n": random.choice([1, 1, 2])})

    @task(1)
    def file(self):
        self.ask("POST", "/v1/images/generations", "file", lambda answer: need(answer.content.startswith(b"RIFF"), "no WebP file"), small(),
                 headers={"Accept": "image/webp"})

    @task(2)
    def stream(self):
        self.events("POST", "/v1/images/generations", "stream", "image_generation.completed", {**small(), "steps": 8, "stream": True, "partial_images": 2})

    @task(1)
    def models(self):
        self.ask("GET", "/v1/models", "models", lambda answer: need(answer.json()["data"], "no model"))


class A1111(Client):
    """Draws, and asks how far it is meanwhile."""
    weight = 2

    @task
    def txt2img(self):
        fields = {"prompt": random.choice(PROMPTS), "width": 64, "height": 64, "steps": 20, "sampler_name": "Euler a"}
        drawing = gevent.spawn(self.ask, "POST", "/sdapi/v1/txt2img", "txt2img", lambda answer: need(len(answer.json()["images"]) == 1, "no picture"), fields)
        while not drawing.ready():
            self.ask("GET", "/sdapi/v1/progress", "progress", lambda answer: need(0 <= answer.json()["progress"] <= 1, "no share"))
            gevent.sleep(0.05)
        drawing.get()


class Durable(Client):
    """Submits, follows the events, fetches the picture; sometimes it thinks better of it."""
    weight = 2

    @task
    def job(self):
        job = self.ask("POST", "/v1/jobs", "job", lambda answer: answer.json()["id"], {**small(), "partial_images": 1}, status=(202,))
        if not job:
            return
        if random.random() < 0.2:
            self.ask("POST", f"/v1/jobs/{job}/cancel", "cancel", lambda answer: answer.json()["status"], status=(200, 202))
            return
        done = self.events("GET", f"/v1/jobs/{job}/events", "events", "result")
        if done:
            self.ask("GET", done["result"]["data"][0]["url"], "picture", lambda answer: need(answer.content.startswith(PNG), "no PNG file"))


class Probe(Client):
    """What stands beside a server: a balancer and Prometheus."""
    weight = 1
    wait_time = between(0.05, 0.1)

    @task(2)
    def health(self):
        self.ask("GET", "/healthz", "health", lambda answer: need(answer.json()["status"] == "ok", "not well"))

    @task(1)
    def metrics(self):
        self.ask("GET", "/metrics", "metrics", lambda answer: need("safelight_requests_in_flight" in answer.text, "no metrics"))
