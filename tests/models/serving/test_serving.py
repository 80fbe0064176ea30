"""The server on a loopback port, asked by the `openai` client and by sockets that behave badly."""

import contextlib
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sapper.models.generate import Generation
from sapper.models.load import Loaded, load_model
from sapper.models.sampling import Sampling
from sapper.models.scheduler import Job, Scheduler

from .. import small

openai = pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")

KEY = "a secret"
SAYS = {"tokenizer.chat_template": small.TEMPLATE + "assistant: "}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    path: Path = tmp_path_factory.mktemp("small") / "small.gguf"
    numbers = {"llama.context_length": 1024, "tokenizer.ggml.eos_token_id": small.VOCABULARY - 1}
    return load_model(small.write_gguf(path, small.random_weights(), numbers=numbers, strings=SAYS), "f32")


@dataclass
class Running:
    server: Any
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, **options) -> Any:
        return openai.OpenAI(base_url=f"{self.url}/v1", max_retries=0, timeout=60, **{"api_key": KEY, **options})

    def get(self, path: str, key: str = KEY) -> tuple[int, str]:
        request = urllib.request.Request(self.url + path, headers={"Authorization": f"Bearer {key}"})
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def post(self, body: bytes, path: str = "/v1/completions", key: str = KEY) -> tuple[int, dict]:
        request = urllib.request.Request(self.url + path, body, {"Authorization": f"Bearer {key}"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def idle(self) -> None:
        """Wait until nothing runs; then all pages are free."""
        scheduler, limit = self.server.engine.scheduler, time.monotonic() + 30
        while not scheduler.idle:
            assert time.monotonic() < limit
            time.sleep(0.02)
        assert scheduler.free_pages == scheduler.batch.pages


@contextlib.contextmanager
def serving(model: Loaded, *, slots: int = 4, queue: int = 8, key: str = KEY, **limits) -> Iterator[Running]:
    from sapper.models.serving import connections
    from sapper.models.serving.application import Limits, Server
    from sapper.models.serving.engine import Engine

    engine = Engine(Scheduler(model, model.batch(slots, 1024)), queue)
    server = Server(model, "small", engine, Limits(**limits), key)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(64)
    settings = connections.settings(server.application(), server.limits.stall_seconds)
    running = connections.Listening(settings, engine.close)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        limit = time.monotonic() + 30
        while not running.started:
            assert time.monotonic() < limit and thread.is_alive()
            time.sleep(0.01)
        yield Running(server, listener.getsockname()[1])
    finally:
        running.should_exit = True
        thread.join(30)
        listener.close()
        assert not thread.is_alive() and not engine.healthy


@pytest.fixture(scope="module")
def running(model: Loaded) -> Iterator[Running]:
    with serving(model, body_bytes=4096, stall_seconds=2.0) as found:
        yield found


def tokens_of(model: Loaded, message: str) -> list[int]:
    from sapper.models.chat import render

    return model.tokenizer.encode(render(model.tokenizer, [{"role": "user", "content": message}]))


def test_models_and_health(running: Running) -> None:
    listed = running.client().models.list().data
    assert [one.id for one in listed] == ["small"] and listed[0].owned_by == "sapper"
    assert running.client().models.retrieve("small").id == "small"
    assert running.get("/health", key="wrong") == (200, '{"status":"ok"}')


def test_a_chat_is_what_the_model_says(running: Running, model: Loaded) -> None:
    prompt = tokens_of(model, "hello")
    wanted = Generation(model, prompt, 12)
    text = "".join(wanted)
    answer = running.client().chat.completions.create(
        model="small", messages=[{"role": "user", "content": "hello"}], temperature=0, max_tokens=12)
    assert answer.choices[0].message.content == text and answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == {"length": "length", "end": "stop"}[wanted.stop]
    assert answer.usage.prompt_tokens == len(prompt) and answer.usage.completion_tokens == len(wanted.tokens)
    assert answer.usage.total_tokens == len(prompt) + len(wanted.tokens)
    parts = running.client().chat.completions.create(
        model="small", messages=[{"role": "user", "content": [{"type": "text", "text": "hello"}]}], temperature=0,
        max_completion_tokens=12, stream=True, stream_options={"include_usage": True})
    seen = list(parts)
    assert "".join(part.choices[0].delta.content or "" for part in seen if part.choices) == text
    assert seen[0].choices[0].delta.role == "assistant" and not seen[-1].choices
    assert seen[-1].usage == answer.usage and seen[-2].choices[0].finish_reason == answer.choices[0].finish_reason


def test_a_completion_goes_on(running: Running, model: Loaded) -> None:
    wanted = Generation(model, [5, 17, 200], 10)
    text = "".join(wanted)
    ask = running.client().completions.create
    for prompt in ([5, 17, 200], [[5, 17, 200]]):
        answer = ask(model="small", prompt=prompt, temperature=0, max_tokens=10)
        assert answer.choices[0].text == text and answer.usage.prompt_tokens == 3
    streamed = ask(model="small", prompt=[5, 17, 200], temperature=0, max_tokens=10, stream=True)
    assert "".join(part.choices[0].text for part in streamed) == text
    stop = text[3:5]
    cut = ask(model="small", prompt=[5, 17, 200], temperature=0, max_tokens=10, stop=[stop, "never"])
    assert cut.choices[0].text == text[: text.find(stop)] and cut.choices[0].finish_reason == "stop"


def test_a_seed_gives_the_same_text(running: Running) -> None:
    def ask(seed: int) -> str:
        return running.client().completions.create(
            model="small", prompt="hello", max_tokens=12, temperature=1.5, top_p=0.95, seed=seed,
            extra_body={"top_k": 60, "min_p": 0.01}).choices[0].text

    assert ask(1) == ask(1) != ask(2)


def test_many_clients_at_once_get_what_each_gets_alone(running: Running, model: Loaded) -> None:
    prompts = [[7 + i, 30 + i, 3] for i in range(10)]

    def ask(prompt: list[int]) -> str:
        return running.client().completions.create(model="small", prompt=prompt, temperature=0, max_tokens=30) \
            .choices[0].text

    with ThreadPoolExecutor(10) as pool:
        texts = list(pool.map(ask, prompts))
    assert texts == ["".join(Generation(model, prompt, 30)) for prompt in prompts]
    running.idle()


@pytest.mark.parametrize("key", ["", "wrong", KEY + "x", KEY[:-1]])
def test_a_wrong_key_is_refused(running: Running, key: str) -> None:
    assert running.get("/v1/models", key)[0] == 401
    assert running.get("/metrics", key)[0] == 401
    status, body = running.post(b"{}", key=key)
    assert status == 401 and body["error"]["code"] == "invalid_api_key"
    with pytest.raises(openai.AuthenticationError):
        running.client(api_key="wrong").models.list()


def test_a_key_beyond_ascii(model: Loaded) -> None:
    with serving(model, key="clé") as found:
        assert found.get("/v1/models", "clé".encode().decode("latin-1"))[0] == 200  # as http.client sends its bytes
        assert found.get("/v1/models", "clé")[0] == found.get("/v1/models", "cle")[0] == 401


@pytest.mark.parametrize(("body", "status", "message"), [
    (b"", 400, "no JSON"), (b"{", 400, "no JSON"), (b"\xff", 400, "no JSON"), (b"[" * 2000, 400, "no JSON"),
    (b"[1]", 400, "a list; expected an object"), (b'{"model": "other", "prompt": "x"}', 404, "found no model"),
    (b'{"prompt": ""}', 400, "not empty"), (b'{"prompt": {}}', 400, "a string, or a list of tokens"),
    (b'{"prompt": [999999]}', 400, "tokens from 0 to"), (b'{"prompt": ["a", "b"]}', 400, "a string, or a list"),
    (b'{"prompt": "x", "max_tokens": 0}', 400, "max_tokens"), (b'{"prompt": "x", "max_tokens": true}', 400, "True"),
    (b'{"prompt": "x", "max_tokens": 1e9}', 400, "max_tokens"),
    (b'{"prompt": "x", "temperature": -1}', 400, "temperature"), (b'{"prompt": "x", "top_p": 0}', 400, "top_p"),
    (b'{"prompt": "x", "temperature": NaN}', 400, "temperature"), (b'{"prompt": "x", "seed": "a"}', 400, "seed"),
    (b'{"prompt": "x", "top_k": 100000}', 400, "top_k"), (b'{"prompt": "x", "stop": [""]}', 400, "stop"),
    (b'{"prompt": "x", "n": 2}', 400, "as this server has nothing else"),
    (b'{"prompt": "x", "logit_bias": {"5": 1}}', 400, "logit_bias"), (b'{"prompt": "x", "foo": 1}', 400, "'foo'"),
    (rb'{"prompt": "x", "\ud800": 1}', 400, "found the field '?'"),
    (b'{"prompt": "x", "stream": 1}', 400, "stream"), (b'{"prompt": "x", "stream_options": []}', 400, "usage"),
    (b'{"prompt": "' + b"x " * 1500 + b'"}', 400, "fewer than 1024"),
    (b'{"prompt": "' + b"x" * 5000 + b'"}', 413, "at most 4096"),
])
def test_wrong_requests_are_told(running: Running, body: bytes, status: int, message: str) -> None:
    found, answer = running.post(body)
    assert found == status and message in answer["error"]["message"], answer
    assert set(answer["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("messages", [
    [], "x", [1], [{"role": "wizard", "content": "x"}], [{"role": "user"}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
])
def test_wrong_messages_are_told(running: Running, messages: Any) -> None:
    status, answer = running.post(json.dumps({"messages": messages}).encode(), "/v1/chat/completions")
    assert status == 400 and answer["error"]["param"] == "messages"


def test_paths_and_methods_that_are_not_there(running: Running) -> None:
    assert running.get("/v1/models/other")[0] == 404
    status, body = running.get("/v1/nothing")
    assert status == 404
    assert "found GET /v1/nothing; expected /v1/models, /v1/completions" in json.loads(body)["error"]["message"]
    status, body = running.get("/v1/completions")
    assert status == 405 and json.loads(body)["error"]["message"] == "found GET /v1/completions; expected POST"


def slowed(scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    """A piece of text at every step, and a thousand in ten seconds: who leaves at once does so long before."""
    monkeypatch.setattr(scheduler.batch, "step", lambda fed, picks=(): (time.sleep(0.01), [5] * len(picks))[1])


@pytest.mark.parametrize("streams", [True, False])
def test_a_client_that_leaves_ends_its_job(model: Loaded, monkeypatch: pytest.MonkeyPatch, streams: bool) -> None:
    with serving(model) as found, socket.socket() as leaving:
        scheduler = found.server.engine.scheduler
        slowed(scheduler, monkeypatch)
        leaving.connect(("127.0.0.1", found.port))
        send(leaving, {"prompt": "hello", "max_tokens": 1000, "temperature": 0, "stream": streams})
        limit = time.monotonic() + 30
        while scheduler.tokens_made < 3:
            assert time.monotonic() < limit
            time.sleep(0.01)
        leaving.close()
        found.idle()
        assert scheduler.tokens_made < 1000 and found.get("/health")[0] == 200


def test_a_stream_that_is_closed_ends_its_job(model: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(model) as found:
        scheduler = found.server.engine.scheduler
        slowed(scheduler, monkeypatch)
        stream = found.client().completions.create(model="small", prompt="hello", max_tokens=1000, stream=True)
        for _, _ in zip(range(3), stream, strict=False):
            pass
        stream.close()
        found.idle()
        assert scheduler.tokens_made < 1000


def send(connection: socket.socket, body: dict, size: int | None = None) -> None:
    data = json.dumps(body).encode()
    connection.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
                       f"Content-Length: {size or len(data)}\r\n\r\n".encode() + data)


def test_a_client_that_stalls_holds_nobody_up(running: Running) -> None:
    """One sends half of its body and no more: it is told so after two seconds; others are answered meanwhile."""
    with socket.create_connection(("127.0.0.1", running.port)) as stalling:
        send(stalling, {"prompt": "x"}, size=500)
        answer = running.client().completions.create(model="small", prompt="hello", max_tokens=3, temperature=0)
        assert answer.choices
        stalling.settimeout(20)
        assert b" 408 " in stalling.recv(4096).split(b"\r\n")[0]


@pytest.mark.parametrize("said", [b"", b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"])
def test_connections_that_ask_nothing_are_cut(model: Loaded, monkeypatch: pytest.MonkeyPatch, said: bytes) -> None:
    """As many as there may be, silent or in the middle of a header, keep others out, but for `stall_seconds` only."""
    from sapper.models.serving import connections

    monkeypatch.setattr(connections, "MOST", 8)

    def silent(stack: contextlib.ExitStack, port: int) -> list[socket.socket]:
        made = [stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=20)) for _ in range(8)]
        for one in made:
            with contextlib.suppress(ConnectionError):  # cut already, on a slow machine
                one.sendall(said)
        return made

    def rest(one: socket.socket) -> bytes:
        try:
            return one.recv(100)
        except ConnectionError:
            return b""

    with serving(model, stall_seconds=60.0) as found, contextlib.ExitStack() as stack:
        silent(stack, found.port)
        assert found.get("/health")[0] == 503
    with serving(model, stall_seconds=1.5) as found, contextlib.ExitStack() as stack:
        assert [rest(one) for one in silent(stack, found.port)] == [b""] * 8
        assert found.get("/health")[0] == 200


def test_a_client_that_takes_nothing_of_its_answer_is_cut(model: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(model, stall_seconds=1.5) as found, socket.socket() as deaf:
        scheduler = found.server.engine.scheduler
        slowed(scheduler, monkeypatch)
        monkeypatch.setattr("sapper.models.serving.application._event", lambda value: "x" * 100_000)
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(("127.0.0.1", found.port))
        send(deaf, {"prompt": "x", "max_tokens": 1000, "temperature": 0, "stream": True})
        limit = time.monotonic() + 20
        while found.server.metrics.cancelled == 0:
            assert time.monotonic() < limit
            time.sleep(0.02)
        found.idle()
        assert scheduler.tokens_made < 1000 and found.get("/health")[0] == 200


def test_a_flood_is_refused_and_those_that_were_taken_are_answered(model: Loaded) -> None:
    with serving(model, slots=1, queue=2) as found:
        def ask(number: int) -> int:
            return found.post(json.dumps({"prompt": [number + 1], "max_tokens": 200, "temperature": 0}).encode())[0]

        with ThreadPoolExecutor(16) as pool:
            statuses = sorted(pool.map(ask, range(16)))
        assert set(statuses) == {200, 429} and statuses.count(200) >= 3
        found.idle()
        assert found.post(b'{"prompt": "x", "max_tokens": 1}')[0] == 200
        text = found.get("/metrics")[1]
        assert f'sapper_requests_total{{path="/v1/completions",status="429"}} {statuses.count(429)}' in text


def test_the_time_of_a_request_is_limited(model: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(model, seconds=0.3) as found:
        slowed(found.server.engine.scheduler, monkeypatch)
        status, answer = found.post(b'{"prompt": [5], "max_tokens": 1000, "temperature": 2, "seed": 3}')
        assert status == 408 and answer["error"]["code"] == "time_limit"
        found.idle()


def test_metrics_are_what_prometheus_reads(running: Running) -> None:
    running.client().completions.create(model="small", prompt="hello", max_tokens=3, temperature=0)
    running.idle()
    status, text = running.get("/metrics")
    assert status == 200
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(values["sapper_generated_tokens_total"]) >= 1 and float(values["sapper_running"]) == 0
    assert values["sapper_pages"] == values["sapper_pages_free"]
    assert float(values['sapper_first_token_seconds_bucket{le="+Inf"}']) == float(
        values["sapper_first_token_seconds_count"]) >= 1
    assert all(line.startswith(("# HELP ", "# TYPE ", "sapper_")) for line in text.splitlines())


def test_an_engine_that_fails_says_so_and_answers_everybody(model: Loaded) -> None:
    with serving(model) as found:
        def fail() -> bool:
            raise ZeroDivisionError("planted")

        found.server.engine.scheduler.step = fail
        assert found.post(b'{"prompt": "x"}')[0] == 503
        assert found.get("/health")[0] == 503 and found.post(b'{"prompt": "x"}')[0] == 503
        assert isinstance(found.server.engine.failure, ZeroDivisionError)


def test_stopping_tells_those_that_wait(model: Loaded) -> None:
    from sapper.models.serving.engine import Engine, Stopped

    engine = Engine(Scheduler(model, model.batch(1, 64)), 4)
    engine.start()
    told = []
    jobs = [Job([5], 1000, Sampling(2.0, seed=3), told=lambda piece, job: told.append(job.ending)) for _ in range(3)]
    for job in jobs:
        engine.submit(job)
    engine.close()
    assert all(job.ending for job in jobs) and not engine.healthy
    with pytest.raises(Stopped):
        engine.submit(Job([5], 1, Sampling()))


def test_clients_are_told_that_a_server_stops(model: Loaded, monkeypatch: pytest.MonkeyPatch,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    """Who streams, who waits for a whole answer, and who has not sent all of a request: none of them holds it up, and
    none is a failure."""
    monkeypatch.setattr("sapper.models.serving.connections.GRACE_SECONDS", 0.3)
    monkeypatch.setattr("sapper.models.serving.connections.PARTING_SECONDS", 0.5)
    ends: list[str] = []

    def ask(client: Any, streams: bool) -> None:
        try:
            answer = client.completions.create(model="small", prompt="hello", max_tokens=1000, stream=streams)
            ends.append(str(list(answer)[-1]))
        except openai.APIError as error:
            ends.append(str(error))

    with socket.socket() as half:
        with serving(model) as found:
            scheduler = found.server.engine.scheduler
            slowed(scheduler, monkeypatch)
            half.connect(("127.0.0.1", found.port))
            send(half, {"prompt": "hello"}, size=1000)
            clients = [threading.Thread(target=ask, args=(found.client(), streams)) for streams in (True, False)]
            for client in clients:
                client.start()
            limit = time.monotonic() + 30
            while scheduler.tokens_made < 6:
                assert time.monotonic() < limit
                time.sleep(0.01)
        for client in clients:
            client.join(30)
        with contextlib.suppress(ConnectionResetError):
            assert half.recv(100) == b""
    assert len(ends) == 2 and all("the server stops" in end for end in ends)
    assert capsys.readouterr().err == ""
