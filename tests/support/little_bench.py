"""A little MT-Bench of the tests' own, in FastChat's layout, and a judge that is a local server."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

QUESTIONS = [
    {"question_id": 1, "category": "writing", "turns": ["Write {a} poem.", "Make it shorter: é."]},
    {"question_id": 2, "category": "math", "turns": ["What is 6 x 7?", "And half of it?"]},
    {"question_id": 3, "category": "stem", "turns": ["Why is the sky blue?", "And at dusk?"]},
]
REFERENCES = [{"question_id": 2, "choices": [{"index": 0, "turns": ["It is 42.", "That is 21."]}]}]
TEMPLATES = {
    "single-v1": "[Question]\n{question}\n\n[Answer]\n{answer}\n[End]",
    "single-math-v1": "[Question]\n{question}\n[Reference]\n{ref_answer_1}\n[Answer]\n{answer}",
    "single-v1-multi-turn": "{question_1}\n{answer_1}\n{question_2}\n{answer_2}",
    "single-math-v1-multi-turn": "{question_1}\n{ref_answer_1}\n{question_2}\n{ref_answer_2}\n"
    "{question_1}\n{answer_1}\n{question_2}\n{answer_2}",
}
PROMPTS = [
    {"name": name, "type": "single", "prompt_template": template, "output_format": "[[rating]]"}
    | {"system_prompt": "You rate the second.\n\n" if "multi" in name else "You help."}
    for name, template in TEMPLATES.items()
]
ANSWERS = {
    1: ("A poem {of} one line.", "A \\n line é."),
    2: ("42", "21"),
    3: ("Light scatters.", "It has farther to go."),
}


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))


def write_bench(folder: Path) -> Path:
    """The folder that is given to the library; the judge's prompts are beside it, as upstream."""
    bench = folder / "mt_bench"
    write_lines(bench / "question.jsonl", QUESTIONS)
    write_lines(bench / "reference_answer" / "gpt-4.jsonl", REFERENCES)
    write_lines(folder / "judge_prompts.jsonl", PROMPTS)
    return bench


@dataclass
class Reply:
    """What the server says to one request."""

    status: int = 200
    body: bytes | None = None
    """None: a message of `says`."""
    says: str | None = "Good. Rating: [[7]]"
    headers: Mapping[str, str] = field(default_factory=dict)
    cut: bool = False
    """End the connection before the answer."""


@dataclass
class Seen:
    """One request, as it came."""

    path: str
    headers: Mapping[str, str]
    body: bytes


@dataclass
class LocalJudge:
    """A server that answers as its test says, and keeps what it was asked."""

    url: str
    seen: list[Seen] = field(default_factory=list)
    reply: Callable[[int, dict[str, Any]], Reply] = lambda number, body: Reply()
    """The number of the request, from 1, and its body, to the reply."""


@contextmanager
def local_judge() -> Iterator[LocalJudge]:
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            with lock:
                judge.seen.append(Seen(self.path, dict(self.headers), body))
                reply = judge.reply(len(judge.seen), json.loads(body))
            if reply.cut:
                self.close_connection = True
                return
            message = {"choices": [{"message": {"role": "assistant", "content": reply.says}}]}
            data = json.dumps(message).encode() if reply.body is None else reply.body
            self.send_response(reply.status)
            for name, value in {"Content-Length": str(len(data)), **reply.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_arguments: object) -> None:
            """Nothing on stderr."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    judge = LocalJudge(f"http://127.0.0.1:{server.server_address[1]}/v1")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield judge
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
