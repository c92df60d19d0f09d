"""proto/examples are replayed, and proto/openapi.yaml is held to the daemon: its paths, methods and fields are the real ones."""
import json
import pathlib
import re

import pytest

from conftest import ROOT

EXAMPLES = sorted((ROOT / "proto/examples").glob("*.json"))
OPENAPI = (ROOT / "proto/openapi.yaml").read_text()


def holds(expected, got, where=""):
    """Every value of expected is in got; lists have the same length."""
    if isinstance(expected, dict):
        for key, value in expected.items():
            assert key in got, f"{where}.{key}"
            holds(value, got[key], f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(got) == len(expected), where
        for i, value in enumerate(expected):
            holds(value, got[i], f"{where}[{i}]")
    else:
        assert got == expected, where


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_example(daemon, path):
    example = json.loads(pathlib.Path(path).read_text())
    request, expected = example["request"], example["answer"]
    headers = dict(request.get("headers", {}))
    body = None
    if "body" in request:
        body = json.dumps(request["body"])
        headers["Content-Type"] = "application/json"
    answer = daemon.request(request["method"], request["path"], body, headers)
    assert answer.status == expected["status"], answer.body
    holds(expected.get("headers", {}), answer.headers)
    if "body" in expected:
        holds(expected["body"], answer.json)


def test_examples_are_there():
    assert len(EXAMPLES) >= 9


def section(text, key, indent):
    """The lines below `key:` at this depth."""
    match = re.search(rf"^{' ' * indent}{re.escape(key)}:\n((?:{' ' * (indent + 1)}.*\n|\n)*)", text, re.M)
    assert match, key
    return match.group(1)


def test_every_path_is_served(daemon):
    paths = re.findall(r"^  (/\S*):\n    (get|post):", OPENAPI, re.M)
    assert len(paths) == 5
    for path, method in paths:
        assert daemon.request(method.upper(), path).status not in (404, 405), path
        assert daemon.request("PATCH", path).headers["allow"].split(",")[0] == method.upper()


def test_every_field_is_known(daemon):
    """The fields in the file are those of the decoder: each one with a wrong value is refused for its value, not its name."""
    fields = set(re.findall(r"^        (\w+): ", section(section(OPENAPI, "ImageRequest", 4), "properties", 6), re.M))
    source = (ROOT / "proto/openai.c").read_text()
    table = re.search(r"const struct field fields\[\] = \{(.*?)\n\};", source, re.S).group(1)
    assert fields == set(re.findall(r'\{"(\w+)",', table))
    for field in fields:
        wrong = [] if field not in ("metadata", "loras") else 1
        error = daemon.post({"prompt": "a red apple", field: wrong}).error
        assert error["param"] in (field, "width", "height") and "unknown" not in error["message"], field
