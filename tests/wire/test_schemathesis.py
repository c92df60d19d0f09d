"""schemathesis against proto/openapi.yaml: every route of both listeners, with valid and invalid requests made from the file alone.

Statuses, content types, headers and schemas of answers are the documented ones; what the file forbids is refused; nothing answers 500. What is drawn is small, so
that thousands of requests take seconds; the choice of requests is fixed. schemathesis runs as a process of its own, in a folder of its own.
"""
import base64
import collections
import http.client
import json
import os
import subprocess

import pytest
import yaml

from adapters import Policy, lora, write_safetensors
from conftest import BINARY, PATIENCE, QUICK, ROOT, Answer, Daemon, until
from pictures import png
from test_examples import OPENAPI

TOOL = ROOT / ".venv/bin/schemathesis"
KEY, TOKEN = "north-key-0123456789", "0123456789abcdef-a-token"
SHORT = "address" in BINARY or "thread" in BINARY  # sanitizers take their time
PICTURES = ["--size", "64", "--max_size", "64", "--steps", "2", "--max_steps", "2", "--max_n", "2", "--alive_s", "1"]
# Checks that do not apply. Valid by the file and refused for what a schema cannot say (a prompt too long for the text encoder, a sampler without Karras levels) is 400 and right; that
# every route also takes something is checked below. A job that was ended is kept, not deleted.
OPERATORS = "^/v1/(admin/|(un)?load_lora_adapter)"
EXCLUDED = "positive_data_acceptance,use_after_free"


def narrowed(text):
    """The file with the bounds of this daemon, which are the operator's to set, and with values that it knows for what no schema can say: a request that breaks
    one rule is then refused for that rule, and not for a model or a size that is not served."""
    spec = yaml.safe_load(text)
    picture = base64.b64encode(png((200, 30, 30, 255))).decode()
    known = {"size": {"enum": ["64x64", "auto", None]}, "model": {"enum": ["emoji", None]}, "sampler": {"enum": ["euler_a", "dpmpp_2m", None]},
             "loras": {"enum": [[{"name": "ink"}], None]}, "sampler_name": {"enum": ["DPM++ 2M", None]}, "scheduler": {"enum": ["automatic", None]}}
    sides = {"width": {"enum": [64, None]}, "height": {"enum": [64, None]}}
    pictures = {"image": {"enum": [picture]}, "mask": {"enum": [picture, None]}, "init_images": {"enum": [[picture]]}}
    for name in ("ImageRequest", "EditRequest", "JobRequest", "Txt2ImgRequest", "Img2ImgRequest"):
        fields = spec["components"]["schemas"][name]["properties"]
        fields["steps"].update(maximum=2, default=2)
        fields["clip_skip"]["maximum"] = 3
        for share in {"strength", "denoising_strength"} & fields.keys():
            if fields[share].pop("exclusiveMinimum", None) == 0:  # a step is left to do
                fields[share]["minimum"] = 0.5
        for number in {"n", "batch_size", "n_iter"} & fields.keys():
            fields[number]["maximum"] = 2
        if "size" in fields:  # which excludes them
            del fields["width"], fields["height"]
        values = {**known, **sides, **pictures}
        if name == "EditRequest":  # a form has no null, and its pictures are no text
            values = {field: {"enum": [v for v in known[field]["enum"] if v is not None]} for field in known}
        fields.update({field: value for field, value in values.items() if field in fields})
    spec["paths"]["/sdapi/v1/png-info"]["post"]["requestBody"]["content"]["application/json"]["schema"]["properties"]["image"] = {"enum": [picture]}
    return json.dumps(spec)


class Listeners:
    """A daemon with a tenant, a style and an operator's port, and a file that a url was given for. is_safe: with the adapter that its policy requires."""

    def __init__(self, folder, is_safe=True):
        policy = Policy(folder / "policy").adapter("safe", lora(1)).adapter("ink", lora(9, strength=0.1), pin=True)
        self.env = {**os.environ, "SCHEMATHESIS_HOOKS": "schemathesis_hooks", "PYTHONPATH": str(ROOT / "tests/wire"), "SAFELIGHT_FILE": "none"}
        policy.profile(required=["safe"], styles=["ink"], max_style_norm_ratio=50).tenant("north", KEY, "default").write()
        if not is_safe:
            (policy.folder / "safe.safetensors").unlink()
        token = folder / "token"
        token.write_text(TOKEN + "\n")
        token.chmod(0o600)
        self.daemon = Daemon(folder, "--admin", "127.0.0.1:0", "--admin-token-file", str(token), *PICTURES, policy=policy.path, ready=is_safe)
        if not is_safe:  # it tells the operator's address when it is ready
            return
        line = next(line.decode().strip() for line in self.daemon.process.stdout if line.startswith(b"admin "))
        self.admin = "http://" + line.rsplit("http://", 1)[1]
        write_safetensors(policy.folder / "newer.safetensors", lora(2))
        self.manage("/v1/admin/adapters/safe", {"path": "newer.safetensors"})  # so that there is something to roll back to
        self.manage("/v1/admin/profiles/default/activate")
        url = self.daemon.post({**QUICK, "response_format": "url"}).json["data"][0]["url"]
        self.env["SAFELIGHT_FILE"] = url.rsplit("/", 1)[1]

    def close(self):
        try:
            self.daemon.stop()
        finally:
            self.daemon.kill()

    def manage(self, path, fields=None):
        connection = http.client.HTTPConnection(self.admin.removeprefix("http://"), timeout=60 * PATIENCE)
        connection.request("POST", path, json.dumps(fields or {}), {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"})
        answer = Answer(connection.getresponse())
        connection.close()
        assert answer.status == 200, answer.body

    def run(self, folder, text, listener, *more):
        """The tool's status, what it says, and how often each route gave each status: {route: {(status, valid or invalid): n}}."""
        calls, file = folder / "calls", folder / "openapi.yaml"
        is_admin = listener == "operator"
        url, secret = (self.admin, TOKEN) if is_admin else (self.daemon.url, KEY)
        calls.touch()
        file.write_text(narrowed(text))
        only = [] if any(m.startswith("--include") for m in more) else ["--include-path-regex" if is_admin else "--exclude-path-regex", OPERATORS]
        done = subprocess.run([TOOL, "run", file, *only, "--url", url, "--header", f"Authorization: Bearer {secret}", "--generation-deterministic",
                               "--checks", "all", "--workers", "1", "--request-timeout", str(60 * PATIENCE), "--continue-on-failure", "--no-color", *more],
                              env={**self.env, "SAFELIGHT_CALLS": str(calls)}, cwd=folder, capture_output=True, text=True, timeout=600 * PATIENCE)
        counts = collections.defaultdict(collections.Counter)
        for line in calls.read_text().splitlines():
            route, status, kind = line.split("\t")
            counts[route][int(status), kind] += 1
        return done.returncode, done.stdout + done.stderr, counts


@pytest.fixture(scope="module")
def listeners(tmp_path_factory):
    made = Listeners(tmp_path_factory.mktemp("listeners"))
    yield made
    made.close()


def routes(is_admin):
    """Method and path of what the file describes for a listener."""
    return {f"{method.upper()} {path}" for path, item in yaml.safe_load(OPENAPI)["paths"].items() if (item.get("x-listener") == "admin") == is_admin
            for method in ("get", "post", "delete") if method in item}


def absent():
    """The routes of what this server cannot do: the file has no success for them."""
    return {f"POST {path}" for path, item in yaml.safe_load(OPENAPI)["paths"].items() if "501" in item.get("post", {}).get("responses", {})}


@pytest.mark.parametrize("name", ["clients", "operator"])
def test_every_route(listeners, tmp_path, name):
    status, says, counts = listeners.run(tmp_path, OPENAPI, name, "--exclude-checks", EXCLUDED, "--max-examples", "5" if SHORT else "20",
                                         "--phases", "examples,fuzzing" if SHORT else "examples,coverage,fuzzing,stateful")
    assert status == 0, says[-20000:]
    assert set(counts) == routes(name == "operator")
    for route in absent() & set(counts):
        answers = counts.pop(route)
        assert {s for s, _ in answers if s < 400 or s >= 500} == {501}, (route, answers)
    never = [route for route, n in counts.items() if not any(200 <= s < 300 and kind == "valid" for s, kind in n)]
    assert not never, (never, dict(counts))
    assert all(s < 500 for n in counts.values() for s, _ in n), dict(counts)
    assert listeners.daemon.get("/readyz").status == 200


def test_without_safety(tmp_path):
    """What draws nothing answers as ever, and what would draw says so, as documented."""
    bare = Listeners(tmp_path, is_safe=False)
    try:
        until(lambda: b"not live" in bare.daemon.get("/readyz").body, "the profile to be found without its adapter", more=lambda: str(bare.daemon.get("/readyz").body))
        status, says, counts = bare.run(tmp_path, OPENAPI, "clients", "--exclude-checks", EXCLUDED + ",not_a_server_error", "--max-examples", "2",
                                        "--phases", "examples,fuzzing")
        assert status == 0, says[-20000:]
        assert set(counts) == routes(is_admin=False)
        assert {s for route, n in counts.items() for s, _ in n if s >= 500 and route not in absent()} == {503}, dict(counts)
    finally:
        bare.close()


MODELS, JOBS = "--include-operation-id=listModels", "--include-operation-id=listJobs"


@pytest.mark.parametrize("find, replace, only, says", [
    ("        '400': {$ref: '#/components/responses/Error'}\n", "", JOBS, "Undocumented status code"),
    ("required: [id, object, created, owned_by, safelight]", "required: [id, object, created, owned_by, safelight, planted]", MODELS, "planted"),
    ("            application/json:\n              schema: {$ref: '#/components/schemas/ModelList'}", "            text/plain:\n              schema: {type: string}", MODELS,
     "Undocumented Content-Type"),
    ("schema: {type: integer, minimum: 1, maximum: 100, default: 20}", "schema: {type: integer, minimum: 1, maximum: 50, default: 20}", JOBS, "Schema-violating request accepted"),
], ids=["status", "schema", "type", "bound"])
def test_notices(listeners, tmp_path, find, replace, only, says):
    """A file that says something else than the daemon does fails, for that reason."""
    assert find in OPENAPI
    status, text, _ = listeners.run(tmp_path, OPENAPI.replace(find, replace), "clients", only, "--exclude-checks", EXCLUDED, "--phases", "coverage")
    assert status == 1 and says in text, text[-5000:]
