"""proto/examples are replayed, and proto/openapi.yaml is held to the daemon: its paths, methods and fields are the real ones."""
import json
import pathlib
import re

import pytest
import yaml

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
    assert len(paths) >= 6
    for path, method in paths:
        if "{" not in path:  # nothing has the name in braces
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


def schema_fields(name):
    return set(re.findall(r"^        ([\w]+): ", section(section(OPENAPI, name, 4), "properties", 6), re.M))


def table_fields(path, *tables):
    """The names in a decoder's tables of fields."""
    source = (ROOT / path).read_text()
    found = set()
    for table in tables:
        rows = re.search(rf"\b{table}\[\] = \{{(.*?)\n\}};", source, re.S)
        assert rows, table
        found |= set(re.findall(r'\{"(\w+)",', rows.group(1)))
    return found


def test_every_surface_has_its_fields():
    """The fields of edits, jobs and A1111's routes in the file are those of the decoders' tables."""
    common = table_fields("proto/openai.c", "field fields")
    assert schema_fields("EditRequest") == common | table_fields("proto/openai.c", "edit_fields") | {"image", "mask"}
    assert schema_fields("JobRequest") == common | table_fields("proto/openai.c", "job_fields")
    text = table_fields("proto/sdapi.c", "field fields") | table_fields("proto/sdapi_fields.c", "idle_fields")
    assert schema_fields("Txt2ImgRequest") == text
    assert schema_fields("Img2ImgRequest") == text | table_fields("proto/sdapi.c", "img2img_fields")


def test_every_reference_is_there():
    for kind, name in set(re.findall(r"#/components/(\w+)/(\w+)", OPENAPI)):
        section(section(OPENAPI, kind, 2), name, 4)


def test_every_list_is_described():
    """The lists that sdapi_encode_list knows are the routes of the file."""
    lists = set(re.findall(r'\{"([\w-]+)", \w+_json\}', (ROOT / "proto/sdapi_lists.c").read_text()))
    paths = set(re.findall(r"^  /sdapi/v1/([\w-]+):\n(?:    x-served: false\n)?    get:", OPENAPI, re.M))
    assert lists == paths - {"progress"}


def test_every_route_is_described():
    """The routes in the daemon's tables are those of the file."""
    http, sdapi, admin = ((ROOT / f"server/{name}.c").read_text() for name in ("http", "sdapi", "admin_actions"))
    served = {(method, path) for path, method in re.findall(r'\{\.path = "(\S+)", \.method = "(\w+)"', http)}
    served |= {(method, path) for path, method in re.findall(r'\{\.path = "(/queue\S+)", \.method = "(\w+)"', sdapi)}
    served |= {(method, f"/sdapi/v1/{name}") for method, name in re.findall(r'\bROUTE\("(\w+)", "([\w/-]+)"', sdapi)}
    served |= {("GET", f"/sdapi/v1/{name}") for name in re.findall(r'\bLIST\("([\w-]+)"\)', sdapi)}
    served |= set(re.findall(r'^    \{"(\w+)", "(/v1/\S+)"', admin, re.M))
    described = {(method.upper(), re.sub(r"\{\w+\}", "*", path)) for path, item in yaml.safe_load(OPENAPI)["paths"].items() for method in item
                 if method in ("get", "post", "delete")}
    assert served == described
