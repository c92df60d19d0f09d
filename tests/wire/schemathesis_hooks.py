"""What schemathesis cannot guess or write: pictures in forms, names that the server knows. Loaded into its process by test_schemathesis.py, by SCHEMATHESIS_HOOKS.

Every second valid request of a route gets known names in place of drawn ones. Each answer becomes a line of the file SAFELIGHT_CALLS: the route, the status, whether
the request was valid. SAFELIGHT_FILE is the name of a file that a url was given for.
"""
import collections
import os

import schemathesis
from schemathesis.core.failures import AcceptedNegativeData, ServerError
from schemathesis.transport.serialization import Binary

from pictures import png

FORM = {"image": Binary(png((200, 30, 30, 255))), "mask": Binary(png((255, 255, 255, 0)))}
BODY = {"POST /v1/admin/adapters/{name}": {"path": "ink.safetensors", "adapter": Binary(b"x"), "manifest": Binary(b"{}")},
        "POST /v1/load_lora_adapter": {"lora_name": "ink", "lora_path": "ink.safetensors", "load_inplace": True},
        "POST /v1/unload_lora_adapter": {"lora_name": "ink"}}
NAME = {"GET /v1/files/{name}": os.environ.get("SAFELIGHT_FILE", "none"), "POST /v1/admin/profiles/{name}/activate": "default",
        "POST /v1/admin/profiles/{name}/rollback": "default", "POST /v1/admin/adapters/{name}": "ink", "DELETE /v1/admin/adapters/{name}": "ink"}
seen = collections.Counter()
valid = set()  # ids of cases; schemathesis itself takes a body with bytes in it for invalid


@schemathesis.hook
def before_call(context, case, **kwargs):
    label = case.operation.label
    is_valid = case.meta is not None and case.meta.generation.mode.is_positive
    if label == "POST /v1/images/edits" and isinstance(case.body, dict):
        case.body = {name: FORM[name] if name in FORM and isinstance(value, str) else value for name, value in case.body.items()}
    if not is_valid:
        return
    valid.add(case.id)
    seen[label] += 1
    if seen[label] % 2 == 0:
        return
    if label == "POST /v1/jobs" and "Idempotency-Key" in (case.headers or {}):  # else most of them are a conflict with the first
        case.headers["Idempotency-Key"] = f"key {seen[label]}"
    if label in NAME:
        case.path_parameters["name"] = NAME[label]
    if label in BODY and isinstance(case.body, dict):
        case.body = {name: BODY[label].get(name, value) for name, value in case.body.items()}
        if "load_inplace" in BODY[label]:  # it may be loaded by now
            case.body["load_inplace"] = True


@schemathesis.hook
def filter_failure(context, failure, case, response):
    """What was valid may be accepted. So may a part of a form that is text: an empty list or object in its place is an empty part. And a route that does
    nothing but say what this server cannot do says 501, where it is described so: another check is there for statuses that are not."""
    if isinstance(failure, ServerError) and response.status_code == 501:
        return False
    empty = case.media_type == "multipart/form-data" and isinstance(case.body, dict) and any(value in ([], {}, [""], None) for value in case.body.values())
    return not (isinstance(failure, AcceptedNegativeData) and (case.id in valid or empty))


@schemathesis.hook
def after_call(context, case, response):
    with open(os.environ["SAFELIGHT_CALLS"], "a") as calls:
        print(case.operation.label, response.status_code, "valid" if case.id in valid else "invalid", sep="\t", file=calls)
