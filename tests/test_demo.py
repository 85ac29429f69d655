"""finetune/demo.py: its texts against finetune/generate.py, its messages, who stops it, and the page in a browser."""

import json
import re
import select
import shlex
import signal
import socket
import subprocess
import sys
import time
import unicodedata
from contextlib import suppress
from dataclasses import replace

import httpx
import psutil
import pytest
import torch
from gradio_client import Client

from finetune import comparison as comparing
from finetune import demo, generate, guard
from finetune.arguments import ModelArguments
from finetune.comparison import Comparison, filled
from finetune.decoding import DecodingArguments
from finetune.paused import PausedGenerator
from finetune.setup import load_model
from finetune.writing import Written
from kozero import distributed
from kozero.errors import UserError
from kozero.pause import InferencePauseArguments
from tests.browser import CHROMIUM, Browser
from tests.helpers import ROOT, export_paused, interruptible

SECONDS = 180  # that a server may take to start, or a page to answer, on a busy machine
SHORT = DecodingArguments(max_new_tokens=8)
LONG = DecodingArguments(max_new_tokens=8000, temperature=0)  # half a minute of a tiny model


@pytest.fixture(scope="module")
def long_model(tmp_path_factory):
    """A paused model that writes for long."""
    folder = tmp_path_factory.mktemp("long")
    config = json.loads((ROOT / "models/tiny_config.json").read_text()) | {"n_positions": 8192}
    (folder / "config.json").write_text(json.dumps(config))
    return export_paused(folder / "model", folder / "config.json")


def comparison_of(name: str, arguments: InferencePauseArguments | None = None) -> Comparison:
    arguments = arguments or InferencePauseArguments()
    distributed.setup()
    model = load_model(ModelArguments(model_name_or_path=name), arguments, with_pauses=False, seed=0)
    distributed.shutdown()
    return Comparison(model, arguments)


@pytest.fixture(scope="module")
def comparison(paused_model):
    return comparison_of(paused_model)


@pytest.fixture(scope="module")
def long_comparison(long_model):
    return comparison_of(long_model)


def asked(decoding: DecodingArguments, num: float | None = -1, **more: float | None) -> dict[str, float | None]:
    """The numbers of the page."""
    names = [name for row in demo.ROWS for name in row if name != demo.PAUSES]
    return {demo.PAUSES: num} | {name: getattr(decoding, name) for name in names} | more


def last(comparison, prompt, decoding, num=-1):
    """What the page shows in the end."""
    *_, found = demo.answers(comparison, SHORT, prompt, asked(decoding, num))
    return found


def is_idle(comparison, seconds=10.0):
    """Whether its thread is free, or is soon."""
    return comparison.thread.submit(lambda: True).result(seconds)


# The texts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num", [-1, 5])
@pytest.mark.parametrize(
    "decoding",
    [
        DecodingArguments(max_new_tokens=12, seed=7),
        DecodingArguments(max_new_tokens=12, seed=7, top_k=0, top_p=0.8, temperature=1.5, repetition_penalty=1.3),
        DecodingArguments(max_new_tokens=12, temperature=0, no_repeat_ngram_size=2),
    ],
    ids=["defaults", "all settings", "greedy"],
)
def test_both_texts_are_those_of_generate(comparison, paused_model, monkeypatch, capsys, decoding, num):
    flags = [f"--{name}={value}" for name, value in asked(decoding).items() if name != demo.PAUSES]
    wanted = []
    for number in (0, num):
        argv = ["generate.py", "--model", paused_model, "--prompt", "긍정", f"--num_inference_pauses={number}", *flags]
        monkeypatch.setattr(sys, "argv", argv)
        generate.main()
        wanted.append(capsys.readouterr().out.removeprefix("긍정").strip())
    for _ in range(2):  # nothing is left of the first time
        assert last(comparison, " 긍정\n", decoding, num) == (*wanted, demo.DONE)
    assert wanted[0] != wanted[1] and all(wanted)


def test_texts_grow_as_they_are_written(comparison, paused_model, monkeypatch):
    """And end as those of PausedGenerator.generate."""
    seen = []
    put = comparing.Stream.put
    monkeypatch.setattr(comparing, "REFRESH_SECONDS", 0.001)
    monkeypatch.setattr(comparing.Stream, "put", lambda self, ids: (put(self, ids), time.sleep(0.02)))  # time to read
    for plain, paused in comparison.write("긍정", InferencePauseArguments(), replace(SHORT, max_new_tokens=16)):
        seen.append((plain, paused))
    for k, number in enumerate((0, 3)):
        distributed.seed_everything(SHORT.seed)
        generator = PausedGenerator.from_pretrained(paused_model, num_pauses=number)
        (wanted,) = generator.generate(["긍정"], **(SHORT.settings() | {"max_new_tokens": 16}))
        texts = [texts[k] for texts in seen]
        assert texts[-1] == wanted.strip() and all(wanted.strip().startswith(text) for text in texts)
        assert len(set(texts)) > 5
    plain = [plain for plain, paused in seen if paused]
    assert len(set(plain)) == 1  # the second text begins when the first is there


def test_without_pauses_there_is_one_text(comparison):
    plain, paused, message = last(comparison, "긍정", SHORT, 0)
    assert plain and not paused and message == demo.DONE


def test_a_model_without_a_pause_token_writes_plainly(paused_model):
    comparison = comparison_of(paused_model)
    comparison.model.module.pause_id, comparison.model.pause_settings = None, {}
    plain_model = Comparison(comparison.model, InferencePauseArguments())
    assert not plain_model.can_pause and plain_model.num_pauses == 0
    assert last(plain_model, "긍정", SHORT)[1:] == ("", demo.DONE)
    assert "vocabulary has no pause token; use 0" in last(plain_model, "긍정", SHORT, 3)[2]
    shown = json.dumps(demo.page(plain_model, SHORT, "model").get_config_file(), ensure_ascii=False)
    assert demo.ONCE in shown and demo.TWICE not in shown


def test_the_page_begins_with_what_the_command_line_says(paused_model):
    comparison = comparison_of(paused_model, InferencePauseArguments(num_inference_pauses=4))
    config = demo.page(comparison, replace(SHORT, top_k=11), "model").get_config_file()
    values = {c["props"].get("label"): c["props"].get("value") for c in config["components"]}
    assert (values["num_inference_pauses"], values["top_k"], values["max_new_tokens"]) == (4, 11, 8)


# Mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompt, numbers, message",
    [
        (" \n", {}, "--prompt: empty; give at least a word"),
        ("영화 " * 600, {}, "--prompt: .* tokens; at most 501 leave room for the answer"),  # of 512: 3 pauses, 8 new
        ("영화 " * 10**6, {}, "--prompt: more than 20,000 characters; shorten it"),
        ("영화\ud83d", {}, "--prompt: holds half a character"),
        ("긍정", {"max_new_tokens": 0}, "--max_new_tokens 0: must be 1 or more"),
        ("긍정", {"max_new_tokens": 9999}, "--max_new_tokens 9999: the model has 512 positions"),
        ("긍정", {"num_inference_pauses": 10**9}, "--max_new_tokens 8: the model has 512 positions, 1000000000 for"),
        ("긍정", {"num_inference_pauses": -2}, "--num_inference_pauses -2: must be -1 or more"),
        ("긍정", {"temperature": -1}, "--temperature -1.0: must be 0, or from 0.01 to 100"),
        ("긍정", {"repetition_penalty": 1e-300}, "--repetition_penalty 1e-300: must be from 0.01 to 100"),
        ("긍정", {"temperature": float("inf")}, "--temperature inf: must be 0, or from 0.01 to 100"),
        ("긍정", {"top_k": 2.5}, "--top_k 2.5: must be a whole number"),
        ("긍정", {"top_p": None}, "--top_p: is empty; give a number"),
        ("긍정", {"seed": 1e30}, "--seed 10{3,}.*: must be from 0 to"),
    ],
)
def test_a_mistake_is_one_line_on_the_page(comparison, prompt, numbers, message):
    ((plain, paused, told),) = demo.answers(comparison, SHORT, prompt, asked(SHORT, **numbers))
    assert re.match(f"⚠ {message}", told) and "\n" not in told and not plain + paused


def test_a_prompt_is_read_as_generate_reads_it():
    class Recorder:
        pause_arguments = InferencePauseArguments()

        def write(self, prompt, *_):
            self.prompt = prompt
            return iter([("글", "")])

    recorder, copied = Recorder(), " " + unicodedata.normalize("NFD", "긍정의 글") + "\n"
    list(demo.answers(recorder, SHORT, copied, asked(SHORT)))
    ((_, typed),) = generate.prompts_of(generate.GenerationArguments(prompt=copied))
    assert recorder.prompt == typed == "긍정의 글"


def test_an_error_of_pytorch_is_one_line_on_the_page(comparison, monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("out of memory\nwith much to say about it")

    monkeypatch.setattr(generate.Writer, "write", fail)
    assert last(comparison, "긍정", SHORT) == ("", "", "⚠ OutOfMemoryError: out of memory")


def test_a_text_that_ends_at_once_is_told(comparison, monkeypatch):
    monkeypatch.setattr(generate.Writer, "write", lambda *_, **__: [Written("")])
    assert last(comparison, "긍정", SHORT) == ("", "", demo.NOTHING)


def test_numbers_are_of_their_arguments_kind():
    decoding = filled(SHORT, {"top_k": 3.0, "temperature": 1})
    assert (decoding.top_k, type(decoding.top_k), decoding.max_new_tokens) == (3, int, 8)


def test_a_port_that_is_taken_or_none_is_named():
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = server.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {taken}: Address already in use; choose another"):
            demo.checked_port("127.0.0.1", taken)
    assert demo.checked_port("127.0.0.1", taken) == taken and demo.checked_port("127.0.0.1", 0) > 0
    with pytest.raises(UserError, match=r"--host nowhere\.invalid --port 0: "):
        demo.checked_port("nowhere.invalid", 0)
    with pytest.raises(UserError, match="--port 65536: must be from 0 to 65535"):
        demo.DemoArguments(port=65536)


# Who stops it -----------------------------------------------------------------------------------------------------


def test_writing_ends_with_its_reader(long_comparison, monkeypatch):
    streams = []
    start = comparing.Stream.__init__
    monkeypatch.setattr(comparing.Stream, "__init__", lambda self: (start(self), streams.append(self))[0])
    reading = demo.answers(long_comparison, SHORT, "긍정", asked(LONG))
    assert [next(reading)[2] for _ in range(3)] == [demo.WRITING] * 3
    reading.close()
    assert is_idle(long_comparison)
    (stream,) = streams  # the second text was never begun
    assert stream.stopped.is_set() and len(stream.ids) < 4000


def test_writing_ends_when_its_time_is_over(long_comparison):
    *_, (plain, paused, told) = demo.answers(long_comparison, SHORT, "긍정", asked(LONG), max_seconds=1.0)
    assert plain and not paused and told == "⚠ --max_seconds 1: the texts end here; ask for fewer tokens"
    assert is_idle(long_comparison)


class Address(str):
    """Of a page, with its server's `app`."""


@pytest.fixture(scope="module")
def address(long_comparison):
    """The page of the long model, served by this process."""
    blocks = demo.page(long_comparison, SHORT, "model")
    found = Address(demo.launch(blocks, "127.0.0.1", demo.checked_port("127.0.0.1", 0)))
    found.app = blocks.app
    yield found
    blocks.close(verbose=False)


def numbers_of(decoding, num=-1, **more):
    return list(asked(decoding, num, **more).values())


def test_an_address_of_ipv6_is_one(long_comparison):
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    try:
        port = demo.checked_port("::1", 0)
    except UserError:
        pytest.skip("no IPv6 address here")
    blocks = demo.page(long_comparison, SHORT, "model")
    address = demo.launch(blocks, "::1", port)
    assert address == f"http://[::1]:{port}/" and "KoZeRO" in httpx.get(address).text
    blocks.close(verbose=False)


def test_two_at_once_get_what_each_would_get_alone(address, long_comparison):
    first, second = (Client(address, verbose=False, analytics_enabled=False) for _ in range(2))
    asked_for = [replace(SHORT, max_new_tokens=30, seed=seed) for seed in (1, 2)]
    jobs = [
        client.submit("긍정", *numbers_of(decoding), api_name="/write")
        for client, decoding in zip((first, second), asked_for, strict=True)
    ]
    found = [job.result(SECONDS) for job in jobs]
    assert found == [last(long_comparison, "긍정", decoding) for decoding in asked_for] and found[0] != found[1]
    message = first.predict("긍정", *numbers_of(SHORT, top_k=-1), api_name="/write")[2]
    assert message == "⚠ --top_k -1: must be 0 or more"


def test_a_reader_who_goes_away_stops_the_writing(address, long_comparison):
    with httpx.Client(base_url=f"{address}gradio_api", timeout=SECONDS) as client:
        number = next(d["id"] for d in client.get("/../config").json()["dependencies"] if d["api_name"] == "write")
        data = ["긍정", *numbers_of(LONG)]
        client.post("/queue/join", json={"data": data, "fn_index": number, "session_hash": "gone"}).raise_for_status()
        with client.stream("GET", "/queue/data", params={"session_hash": "gone"}) as answer:
            next(line for line in answer.iter_lines() if "process_generating" in line)
    assert is_idle(long_comparison)


def test_the_page_names_no_other_host(address):
    """Its head has addresses for those who share links to a page, which a browser does not ask for."""
    page = re.sub(r"<meta[^>]*>", "", httpx.get(address).text)
    assert "KoZeRO" in page and set(re.findall(r"https?://([\w.-]+)", page)) <= {"127.0.0.1"}


# Who may ask, and for what ----------------------------------------------------------------------------------------


def answer(address, head, body=b"", host=None):
    """The status of a request as it is spelled here, and the answer's text."""
    where = httpx.URL(address)
    host = f"Host: {host or where.netloc.decode()}\r\n" if host != "" else ""
    with socket.create_connection((where.host, where.port), timeout=20) as client:
        head = head.replace("\n", "\r\n") + f"\r\n{host}Connection: close\r\n\r\n"
        try:
            client.sendall(head.encode() + body)
            found = b"".join(iter(lambda: client.recv(1 << 16), b""))
        except (BrokenPipeError, ConnectionResetError):  # refused before all of it was sent
            return 413, ""
    return int(found.split()[1]), found.decode("utf-8", "replace").partition("\r\n\r\n")[2]


def posted(address, path, said, head=""):
    """The answer to a JSON body."""
    body = said if isinstance(said, bytes) else json.dumps(said).encode()
    head = f"POST /gradio_api/{path} HTTP/1.1\nContent-Type: application/json\nContent-Length: {len(body)}{head}"
    return answer(address, head, body)


def joining(**more):
    return {"data": ["긍정", *numbers_of(SHORT)], "fn_index": 0, "session_hash": "hostile"} | more


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:7860", "127.0.0.1.evil.example", "localhost@evil", "", "8.8.8.8"]
)
def test_another_host_is_refused_as_a_rebound_name_is(address, host):
    assert answer(address, "GET /config HTTP/1.1", host=host)[0] in (400, 403)
    assert answer(address, "GET /config HTTP/1.0", host=host)[0] in (400, 403)


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:9000", "[::1]:80"])
def test_the_names_of_this_machine_are_answered_at_any_forwarded_port(address, host):
    assert answer(address, "GET /config HTTP/1.1", host=host)[0] == 200
    assert answer(address, f"GET /config HTTP/1.1\nOrigin: http://{host}", host=host)[0] == 200


@pytest.mark.parametrize(
    "listens, own, foreign",
    [
        ("0.0.0.0", ["10.1.2.3:7860", "[fe80::1]:7860", socket.gethostname(), "localhost"], ["evil.example", "1.evil"]),
        ("::", ["10.1.2.3", "[::1]:1"], ["evil.example", "::1", "10.1.2.3.evil.example"]),
        ("GPU1.lab", ["gpu1.lab:7860", "localhost:9000"], ["gpu1.lab.evil.example", "10.1.2.3", "gpu2.lab"]),
        ("[::1]", ["[::1]:7860"], ["[::2]:7860", "a b", "localhost:x", "user@localhost", "\u0661.0.0.1"]),
    ],
)
def test_which_names_are_this_machines(listens, own, foreign):
    found = guard.Guard(None, listens, 0)
    assert all(map(found.is_own, own)) and not any(map(found.is_own, foreign))


def test_a_request_with_two_names_of_its_host_is_refused():
    """Whatever the server in front of it takes for the one that counts."""
    allowed = guard.Guard(None, "localhost", 0)
    scope = {"type": "http", "method": "GET", "path": "/config"}
    allowed.check(scope | {"headers": [(b"host", b"localhost:7860")]})
    for hosts in ([], [b"localhost", b"localhost"], [b"localhost", b"evil.example"]):
        with pytest.raises(guard.Refused):
            allowed.check(scope | {"headers": [(b"host", host) for host in hosts]})


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost:1", "", "file://", "http://["])
def test_a_page_of_another_origin_is_refused(address, origin):
    status, told = posted(address, "queue/join", joining(), f"\nOrigin: {origin}")
    assert status == 403 and "event_id" not in told
    assert answer(address, f"GET /config HTTP/1.1\nOrigin: {origin}")[0] == 403


def test_what_another_page_embeds_is_refused_and_a_link_to_the_page_is_not(address):
    assert answer(address, "GET /config HTTP/1.1\nSec-Fetch-Site: cross-site")[0] == 403
    assert answer(address, "GET / HTTP/1.1\nSec-Fetch-Site: cross-site\nSec-Fetch-Mode: navigate")[0] == 200


def test_only_what_the_page_needs_is_served(address, long_comparison):
    """Every route of the server that runs, by the names that it gives them."""
    needed = {
        "/", "/config", "/theme.css", "/manifest.json", "/favicon.ico", "/gradio_api/app_id", "/gradio_api/info",
        "/gradio_api/startup-events", "/gradio_api/queue/data", "/gradio_api/heartbeat/{session_hash}",
        "/gradio_api/queue/join", "/gradio_api/cancel", "/assets/{path:path}", "/static/{path:path}",
        "/svelte/{path:path}", "/gradio_api/theme.css",
    }  # fmt: skip
    refused, routers = 0, [getattr(route, "original_router", None) for route in address.app.routes]
    for route in [*address.app.routes, *(route for router in routers if router for route in router.routes)]:
        path = getattr(route, "path", "")
        for method in getattr(route, "methods", None) or ():
            if path not in needed or method not in ("GET", "HEAD", "POST"):
                head = f"{method} {re.sub('{.*?}', 'x', path)} HTTP/1.1\nContent-Length: 0"
                assert answer(address, head)[0] in (403, 404, 405), (method, path)
                refused += 1
    assert refused > 40
    for path in ("upload", "file=/etc/passwd", "proxy=http://127.0.0.1/", "run/write", "call/write", "api/write"):
        for method in ("GET", "POST", "PUT", "DELETE"):
            assert answer(address, f"{method} /gradio_api/{path} HTTP/1.1\nContent-Length: 0")[0] in (403, 404, 405)


@pytest.mark.parametrize(
    "path",
    ["/assets/../../routes.py", "/assets/%2e%2e/%2e%2e/routes.py", "/static/..%2f..%2fserver.py", "/assets/a%00b",
     "/svelte/%2Fetc/passwd", "/assets//etc/passwd", "//gradio_api/upload", "/gradio_api/x/../file=/etc/passwd"],
)  # fmt: skip
def test_no_path_leaves_the_folders_of_the_page(address, path):
    status, told = answer(address, f"GET {path} HTTP/1.1")
    assert status in (400, 403, 404) and "root:" not in told and "import" not in told


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_is_bounded(address, chunked):
    size, head = 3_000_000, "POST /gradio_api/queue/join HTTP/1.1\nContent-Type: application/json\n"
    body = json.dumps(joining(data=["가" * size])).encode()
    if chunked:
        pieces = [body[k : k + 60_000] for k in range(0, len(body), 60_000)]
        body = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
    head += "Transfer-Encoding: chunked" if chunked else f"Content-Length: {len(body)}"
    assert answer(address, head, body)[0] == 413


def test_a_body_that_does_not_come_is_not_waited_for(address, monkeypatch):
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.2)
    head = "POST /gradio_api/queue/join HTTP/1.1\nContent-Type: application/json\nContent-Length: 99"
    assert answer(address, head, b"{")[0] == 408


@pytest.mark.parametrize(
    "asked", [b"", b"GET / HTTP/1.1\r\nHost: a\r\n", b"GET / HTTP/1.1\r\nHost: {}\r\n\r\nGET / HT"]
)
def test_a_head_that_does_not_come_is_not_waited_for(address, monkeypatch, asked):
    """Nor one that goes on coming, a header at a time, also after a request that was answered."""
    monkeypatch.setattr(guard, "HEAD_SECONDS", 0.3)
    where = httpx.URL(address)
    with socket.create_connection((where.host, where.port), timeout=20) as client:
        client.sendall(asked.replace(b"{}", where.netloc))
        started = time.monotonic()
        with suppress(BrokenPipeError, ConnectionResetError):
            while not select.select([client], [], [], 0.1)[0] or client.recv(1 << 20):
                client.sendall(b"X-A: b\r\n")
                assert time.monotonic() < started + 15


WRONG = [
    b"", b"{", b"[" * 100_000, b'{"data":' * 20_000, b"null", b"[]", b"\xff\xfe", b'{"data": [1e999]}',
    joining(data=None), joining(data=[]), joining(data=["긍정"]), joining(data={"a": 1}), joining(fn_index=2),
    joining(fn_index=10**9), joining(fn_index="write"), joining(fn_index=None), joining(session_hash={"a": 1}),
    joining(session_hash=None), joining(data=[{"path": "/etc/passwd"}, *numbers_of(SHORT)]),
    joining(data=["긍정", *["abc"] * 9]), joining(data=["긍정", *[[]] * 9]), joining(data=["긍정", *[10**400] * 9]),
    *(joining(data=["긍정", *[value] * len(numbers_of(SHORT))]) for value in (True, False, "1")),
    joining(session_hash=["x"]), joining(session_hash="x" * 1000), joining(session_hash=""),
]  # fmt: skip


@pytest.mark.parametrize("said", WRONG, ids=range(len(WRONG)))
def test_a_request_that_is_none_of_the_page_is_told_without_pythons_words(address, said, capfd):
    for path in ("queue/join", "cancel"):
        status, told = posted(address, path, said)
        assert 400 <= status < 500 or (path == "cancel" and status == 200)
        assert len(told) < 80 and not re.search(r"Error|Traceback|pydantic|input", told)
    assert "Traceback" not in capfd.readouterr().err


def test_numbers_too_large_for_anything_are_one_line(address, long_comparison):
    """What comes through is checked as a command line is."""
    for name in asked(SHORT):
        for value in (1e300, -1e300):
            *_, (*_, told) = demo.answers(long_comparison, SHORT, "긍정", asked(SHORT, **{name: value}))
            assert told.startswith("⚠ --") or told == demo.DONE


def test_cancel_stops_the_writing(address, long_comparison):
    """As the page's button does it."""
    with httpx.Client(base_url=f"{address}gradio_api", timeout=SECONDS) as client:
        said = {"data": ["긍정", *numbers_of(LONG)], "fn_index": 0, "session_hash": "cancels"}
        event = client.post("/queue/join", json=said).raise_for_status().json()["event_id"]
        with client.stream("GET", "/queue/data", params={"session_hash": "cancels"}) as answer:
            lines = answer.iter_lines()
            next(line for line in lines if "process_generating" in line)
            said = {"session_hash": "cancels", "fn_index": 0, "event_id": event}
            assert client.post("/cancel", json=said).json() == {"success": True}
            assert any("process_completed" in line for line in lines)
            assert is_idle(long_comparison)


# As a person runs it ----------------------------------------------------------------------------------------------


class Server:
    """finetune/demo.py in a process of its own."""

    def __init__(self, command):
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8",
            preexec_fn=interruptible,
        )  # fmt: skip
        assert select.select([self.process.stdout], [], [], SECONDS)[0], "nothing was said"
        self.said = self.process.stdout.readline()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()

    @property
    def address(self):
        return re.match(r"(http://127\.0\.0\.1:\d+/)  \(Ctrl-C ends\)\n", self.said)[1]

    def is_idle(self, seconds=10.0):
        """Whether the process soon uses little of a processor."""
        end, process = time.monotonic() + seconds, psutil.Process(self.process.pid)
        while time.monotonic() < end:
            before = sum(process.cpu_times()[:2])
            time.sleep(0.5)
            if sum(process.cpu_times()[:2]) - before < 0.1:
                return True
        return False


@pytest.mark.slow
def test_the_command_of_the_readme_serves_until_ctrl_c(paused_model):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    command = shlex.split(re.search(r"^python (finetune/demo\.py .*)$", text, re.MULTILINE)[1], comments=True)
    command[command.index("runs/run/model")] = paused_model
    with Server([sys.executable, *command, "--port", "0"]) as server:
        assert httpx.get(server.address).status_code == 200
        port = server.address.rstrip("/").rpartition(":")[2]
        taken = subprocess.run(
            [sys.executable, *command, "--port", port], cwd=ROOT, capture_output=True, text=True, timeout=SECONDS
        )
        assert taken.returncode == 2 and taken.stderr.startswith(f"error: --host 127.0.0.1 --port {port}: Address al")
        server.process.send_signal(signal.SIGINT)
        assert server.process.communicate(timeout=SECONDS) == ("", "interrupted\n")
        assert server.process.returncode == 130


MESSAGE = "document.querySelector('#message textarea, #message input').value"


def shown(browser):
    return browser.evaluate(
        "['plain', 'paused'].map(id => document.querySelector(`#${id} textarea`).value)"
        f".concat({MESSAGE})"
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_in_a_browser(long_model, long_comparison, tmp_path):
    command = [sys.executable, "finetune/demo.py", "--model", long_model, "--port", "0", "--max_new_tokens", "20"]
    with Server(command) as server, Browser(tmp_path, SECONDS) as browser:
        page = browser.open(server.address)
        browser.fill("#prompt textarea", "긍정")
        browser.click("#go")
        browser.wait(f"{MESSAGE} === {demo.DONE!r}")
        found = shown(browser)
        assert tuple(found) == last(long_comparison, "긍정", DecodingArguments(max_new_tokens=20)) and all(found)

        browser.fill("#temperature input", "-3")
        browser.click("#go")
        browser.wait(f"{MESSAGE}.includes('--temperature -3.0: must be 0')")

        browser.fill("#temperature input", "0")
        browser.fill("#max_new_tokens input", "8000")
        browser.click("#go")
        browser.wait("document.querySelector('#plain textarea').value.length > 300")
        browser.click("#cancel")
        browser.wait(f"{MESSAGE} === {demo.STOPPED!r}")
        assert server.is_idle() and browser.evaluate(MESSAGE) == demo.STOPPED

        browser.click("#go")
        browser.wait(f"{MESSAGE} === {demo.WRITING!r}")
        browser.close(page)
        assert server.is_idle()
        hosts = {address.split("/")[2] for address in browser.requests if address.startswith("http")}
        assert hosts == {server.address.split("/")[2]}
