"""Runs conformance cases: what a client of the OpenAI HTTP API relies on, as data.

    python -m tests.serve.http.conformance CASES.jsonl [--model demo | --url http://127.0.0.1:8000 [--api-key KEY]]

starts `wager serve MODEL` (or asks a server that runs), prints one line for each case, and exits 1 when one failed.
"""

import argparse
import json
import re
import sys
from contextlib import nullcontext
from pathlib import Path

import httpx
import jsonschema


class Runner:
    """`http` is an httpx.Client of the server. Placeholders are worked out by asking the server first."""

    def __init__(self, http, model):
        self.http = http
        messages = [{"role": "user", "content": "Count from one to ten."}]
        greedy = {"model": model, "messages": messages, "max_tokens": 64, "temperature": 0}
        answer = http.post("/v1/chat/completions", json=greedy).json()["choices"][0]["message"]["content"]
        tokens = http.post("/tokenize", json={"prompt": answer, "add_special_tokens": False}).json()["tokens"]
        limit = http.get("/v1/models").json()["data"][0]["max_model_len"]
        first = {"model": model, "prompt": "Once", "max_tokens": 1, "temperature": 0, "logprobs": 1}
        text = {**first, "max_tokens": 8, "logprobs": None}
        self.unbiased = http.post("/v1/completions", json=text).json()["choices"][0]["text"]
        greedy["logprobs"], greedy["max_tokens"] = True, 12
        listed = http.post("/v1/chat/completions", json=greedy).json()["choices"][0]["logprobs"]["content"]
        self.values = {
            "$MODEL": model,
            "$STOP": answer[3:6],
            "$TOK": self._token_in(listed, tokens),
            "$TOP1": self._first_token(first),
            "$LONG": "word " * (2 * limit),
            "$LONGISH": "alpha beta gamma delta " * 6,
        }

    def _token_in(self, listed, fallback):
        """An id of a token the greedy answer really has: one that spells the same bytes."""
        for entry in listed:
            ids = self.http.post("/tokenize", json={"prompt": entry["token"], "add_special_tokens": False}).json()[
                "tokens"
            ]
            if len(ids) == 1 and not entry["token"].startswith("bytes:"):
                return ids[0]
        return fallback[0]

    def _first_token(self, body):
        name = self.http.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]["tokens"][0]
        ids = self.http.post("/tokenize", json={"prompt": name, "add_special_tokens": False}).json()["tokens"]
        return str(ids[0])

    def fill(self, value):
        if isinstance(value, str):
            if value in self.values:
                return self.values[value]
            return re.sub(r"\$[A-Z0-9]+", lambda m: str(self.values.get(m[0], m[0])), value)
        if isinstance(value, list):
            return [self.fill(v) for v in value]
        if isinstance(value, dict):
            return {self.fill(k): self.fill(v) for k, v in value.items()}
        return value

    def send(self, case):
        body = case.get("body")
        content = body if isinstance(body, str) else None if body is None else json.dumps(self.fill(body))
        headers = {
            "Content-Type": "application/json",
            **{k: v for k, v in (case.get("headers") or {}).items() if v is not None},
        }
        request = self.http.build_request(case["method"], self.fill(case["path"]), content=content, headers=headers)
        for name, value in (case.get("headers") or {}).items():
            if value is None:
                request.headers.pop(name, None)
        return self.http.send(request)

    def run(self, case):
        expect, response = case["expect"], self.send(case)
        self.check("status", response.status_code, expect["status"])
        if response.status_code >= 400:
            error = response.json()["error"]
            assert set(error) == {"message", "type", "param", "code"} and error["message"]
            for key, value in expect.get("error", {}).items():
                assert error[key] == value, (key, error)
            return
        for text in expect.get("text_contains", ()):
            assert text in response.text, text
        if "stream" in expect:
            self.check_stream(case, response, expect["stream"])
        if "json" in expect:
            value = response.json()
            for path, wanted in expect["json"].items():
                self.check(path, value, wanted, path)
        if "repeat_equal" in expect:
            again = self.send(case).json()
            for path in expect["repeat_equal"]:
                assert at(response.json(), path) == at(again, path)
        if "second_call_json" in expect:
            again = self.send(case).json()
            for path, wanted in expect["second_call_json"].items():
                self.check(path, again, wanted, path)

    def check(self, name, whole, wanted, path=None):
        value = whole if path is None else at(whole, path)
        if not isinstance(wanted, dict):
            assert value == self.fill(wanted), (name, value, wanted)
            return
        for kind, operand in wanted.items():
            operand = self.fill(operand)
            assert self.holds(kind, value, operand, whole), (name, kind, operand, value)

    def holds(self, kind, value, operand, whole):
        types = {"string": str, "array": list, "integer": int, "object": dict, "number": (int, float)}
        if kind == "validates_schema_unless":
            if whole["choices"][0]["finish_reason"] == operand.split("=")[1]:
                return True
            schema = {
                "type": "object",
                "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}},
                "required": ["a", "b"],
                "additionalProperties": False,
            }
            jsonschema.validate(json.loads(value), schema)
            return True
        checks = {
            "type": lambda: isinstance(value, types[operand]),
            "in": lambda: value in operand,
            "le": lambda: value <= operand,
            "gt": lambda: value > operand,
            "contains": lambda: operand in value,
            "not_contains": lambda: operand not in value,
            "not_startswith": lambda: not value.startswith(operand),
            "parses_as_json": lambda: json.loads(value) is not None,
            "sum_of": lambda: value == sum(at(whole, p) for p in operand),
            "differs_from": lambda: value != self.unbiased,
            "note": lambda: True,
        }
        return checks[kind]()

    def check_stream(self, case, response, wanted):
        events = [line[6:] for line in response.text.split("\n") if line.startswith("data: ")]
        chunks = [json.loads(e) for e in events if e != "[DONE]"]
        chat = chunks[0]["object"] == "chat.completion.chunk"
        texts = [
            c["choices"][0]["delta"].get("content") or "" if chat else c["choices"][0]["text"]
            for c in chunks
            if c["choices"]
        ]
        checks = {
            "content_type": lambda v: response.headers["content-type"].startswith(v),
            "first_delta": lambda v: v.items() <= chunks[0]["choices"][0]["delta"].items(),
            "same_id": lambda v: len({(c["id"], c["created"]) for c in chunks}) == 1,
            "last_chunk_delta_empty": lambda v: chunks[-1]["choices"][0]["delta"] == {},
            "finish_reason_once": lambda v: sum(c["choices"][0]["finish_reason"] is not None for c in chunks) == 1,
            "done": lambda v: events[-1] == "[DONE]",
            "usage_absent_or_null": lambda v: all(c.get("usage") is None for c in chunks),
            "object": lambda v: all(c["object"] == v for c in chunks),
            "concat_equals_nonstream": lambda v: "".join(texts) == self.whole(case),
            "no_replacement_char_midstream": lambda v: (
                "".join(texts).count("\ufffd") == self.whole(case).count("\ufffd")
            ),
        }
        for name, value in wanted.items():
            assert checks[name](value), (name, chunks[-2:], texts)

    def whole(self, case):
        body = {**case["body"], "stream": False}
        choice = self.send({**case, "body": body}).json()["choices"][0]
        return choice["message"]["content"] if "message" in choice else choice["text"]


def at(value, path):
    """`a.b[0].c` and `len(a.b)` into parsed JSON."""
    if path.startswith("len("):
        return len(at(value, path[4:-1]))
    for part in re.findall(r"[^.\[\]]+|\[\d+\]", path):
        value = value[int(part[1:-1])] if part.startswith("[") else value[part]
    return value


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", type=Path)
    parser.add_argument("--model", default="demo", help="what to serve when there is no --url")
    parser.add_argument("--url", help="a server that runs already, without /v1")
    parser.add_argument("--api-key", default="conformance-key")
    args = parser.parse_args()
    from benchmarks.serve.server import Server

    with nullcontext() if args.url else Server(args.model, ["--api-key", args.api_key]) as server:
        headers = {"Authorization": f"Bearer {args.api_key}"}
        with httpx.Client(base_url=args.url or server.url, headers=headers, timeout=600) as http:
            failed = run_all(http, [json.loads(line) for line in args.cases.read_text().splitlines()])
    sys.exit(1 if failed else 0)


def run_all(http, cases):
    """Print how each case went; the ids of those that failed."""
    runner = Runner(http, http.get("/v1/models").json()["data"][0]["id"])
    failed = []
    for case in cases:
        try:
            runner.run(case)
        except Exception as problem:
            failed.append(case["id"])
            print(f"FAILED  {case['id']}: {type(problem).__name__}: {str(problem)[:300]}")
        else:
            print(f"ok      {case['id']}")
    print(f"{len(cases) - len(failed)} of {len(cases)} cases passed")
    return failed


if __name__ == "__main__":
    main()
