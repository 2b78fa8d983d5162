"""A judge behind an endpoint, against a server in a thread: what is sent, and what is made of every kind of answer."""

from __future__ import annotations

import argparse
import base64
import io
import json
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_concept_maps import ConceptMapsError, ConceptMapsValueError
from diffusers_concept_maps.commands._judge import add_judge_arguments, judge_of
from diffusers_concept_maps.evaluation.judge import RUBRIC, Question, Verdict, score_sample
from diffusers_concept_maps.evaluation.judge_endpoint import KEY_VARIABLE, ChatJudge
from diffusers_concept_maps.evaluation.judge_grids import make_grids

RATINGS = {"SL": 4, "TL": 2, "PR": 5, "SS": 3, "OBJ": 1}
KEY = "sk-secret-0123456789"
SMOOTH = torch.arange(32) * torch.arange(24)[:, None] // 3  # as a photograph, it survives JPEG
FRAMES = torch.stack([torch.stack([SMOOTH, SMOOTH.flip(0), 255 - SMOOTH - frame]) for frame in range(13)])
FRAMES = FRAMES.clamp(0, 255).to(torch.uint8)
SCORES = torch.rand(4, 3, 4, generator=torch.Generator().manual_seed(0))
QUESTION = Question('say "5"', "a dog", make_grids(FRAMES, SCORES, frames_per_latent=4))


def completion(content: Any = None, **message: Any) -> str:
    text = json.dumps(RATINGS) if content is None else content
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text} | message}]})


class Server(ThreadingHTTPServer):
    """Gives the prepared answers in turn, and keeps the requests."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, dict[str, str], str]] = []
        self.requests: list[tuple[str, dict[str, str], Any]] = []
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def answer(self, status: int, text: str, **headers: str) -> None:
        self.answers.append((status, {name.replace("_", "-"): value for name, value in headers.items()}, text))


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, dict(self.headers), body))
        status, headers, text = self.server.answers.pop(0)
        if status == 0:
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(text.encode()))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text.encode())

    do_GET = do_POST

    def log_message(self, *arguments: Any) -> None:
        """Say nothing."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()
    assert server.answers == []


def judge(server: Server, **options: Any) -> ChatJudge:
    return ChatJudge(server.url, "model", **({"backoff": 0.0, "attempts": 3} | options))


def decoded(part: dict[str, Any], kind: str) -> np.ndarray:
    assert part["type"] == "image_url"
    header, data = part["image_url"]["url"].split(",", 1)
    assert header == f"data:image/{kind};base64"
    with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as picture:
        assert picture.format == kind.upper()
        assert picture.mode == "RGB"
        return np.asarray(picture)


@pytest.mark.parametrize("kind", ["png", "jpeg"])
def test_what_is_sent(server: Server, kind: str) -> None:
    server.answer(200, completion())
    assert judge(server, image_format=kind).rate(QUESTION) == Verdict(RATINGS, "")
    ((path, headers, body),) = server.requests
    assert path == "/v1/chat/completions"
    assert headers["Content-Type"] == "application/json"
    assert "Authorization" not in headers
    assert set(body) == {"model", "messages", "temperature"}
    assert (body["model"], body["temperature"]) == ("model", 0)
    system, user = body["messages"]
    assert system == {"role": "system", "content": RUBRIC}
    assert user["role"] == "user"
    assert [part["type"] for part in user["content"]] == ["text", *["text", "image_url"] * 3]
    assert user["content"][0]["text"] == QUESTION.text()
    assert user["content"][0]["text"].startswith('Concept: "say \\"5\\""\n')
    assert [part["text"] for part in user["content"][1::2]] == ["The frames:", "The masked frames:", "The heat map:"]
    grids = (QUESTION.grids.raw, QUESTION.grids.overlay, QUESTION.grids.heat_map)
    for part, grid in zip(user["content"][2::2], grids, strict=True):
        difference = abs(decoded(part, kind).astype(int) - grid.permute(1, 2, 0).numpy())
        assert difference.max() == 0 if kind == "png" else difference.mean() < 6


def test_frames_are_arranged_in_time(server: Server) -> None:
    server.answer(200, completion())
    score_sample(judge(server, image_format="png"), FRAMES, SCORES, "dog", "a dog", frames_per_latent=4)
    raw = decoded(server.requests[0][2]["messages"][1]["content"][2], "png")
    assert raw.shape == (3 * 24, 4 * 32, 3)
    for cell, frame in enumerate([0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 12]):
        top, left = 24 * (cell // 4), 32 * (cell % 4)
        assert np.array_equal(raw[top : top + 24, left : left + 32], FRAMES[frame].permute(1, 2, 0).numpy())


def test_temperature_can_be_left_out(server: Server) -> None:
    server.answer(200, completion())
    judge(server, temperature=None).rate(QUESTION)
    assert "temperature" not in server.requests[0][2]


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("{}", "/v1/chat/completions"),
        ("{}/", "/v1/chat/completions"),
        ("{}/chat/completions", "/v1/chat/completions"),
        ("{}?api-version=1", "/v1/chat/completions?api-version=1"),
    ],
)
def test_urls(server: Server, url: str, path: str) -> None:
    server.answer(200, completion())
    ChatJudge(url.format(server.url), "model").rate(QUESTION)
    assert server.requests[0][0] == path


def test_key_is_sent_and_nothing_else_knows_it(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    made_before = judge(server)
    monkeypatch.setenv(KEY_VARIABLE, f" {KEY}\n")
    server.answer(200, completion())
    record = score_sample(made_before, FRAMES, SCORES, "dog", "a dog")
    assert server.requests[0][1]["Authorization"] == f"Bearer {KEY}"
    assert KEY not in json.dumps(server.requests[0][2])
    assert KEY not in json.dumps(record)
    assert KEY not in repr(made_before)
    assert KEY not in str(vars(made_before))


def test_bad_key(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    server.answer(401, json.dumps({"error": {"message": f"Incorrect API key: {KEY}"}}))
    with pytest.raises(
        ConceptMapsError, match=rf"answered 401: .*Incorrect API key: \*\*\*.*{KEY_VARIABLE}"
    ) as caught:
        judge(server).rate(QUESTION)
    assert KEY not in str(caught.value)
    assert len(server.requests) == 1


@pytest.mark.parametrize("key", ["two words", "line\nbreak", "schlüssel"])
def test_impossible_key_is_not_sent(server: Server, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv(KEY_VARIABLE, key)
    with pytest.raises(ConceptMapsError, match=f"{KEY_VARIABLE} holds characters that no key has") as caught:
        judge(server).rate(QUESTION)
    assert key not in str(caught.value)
    assert server.requests == []


@pytest.mark.parametrize(("status", "advice"), [(400, "check the URL, the model and its options"), (404, "check the")])
def test_mistakes_are_not_repeated(server: Server, status: int, advice: str) -> None:
    server.answer(status, '{"error": "temperature is not supported"}')
    with pytest.raises(ConceptMapsError, match=f"answered {status}: .*temperature is not supported.*; {advice}"):
        judge(server).rate(QUESTION)


@pytest.mark.parametrize("failure", [429, 500, 503, 0])
def test_passing_failures_are_survived(server: Server, failure: int) -> None:
    for _ in range(2):
        server.answer(failure, "busy")
    server.answer(200, completion())
    assert judge(server).rate(QUESTION).ratings == RATINGS
    assert len({json.dumps(body) for _, _, body in server.requests}) == 1
    assert len(server.requests) == 3


def test_reply_that_breaks_off_is_asked_for_again(server: Server) -> None:
    server.answer(200, completion(), Content_Length="9999")
    server.answer(200, completion())
    assert judge(server).rate(QUESTION).ratings == RATINGS


@pytest.mark.parametrize(("failure", "message"), [(429, "answered 429: 'busy'; wait"), (500, "try again later")])
def test_lasting_failures_end(server: Server, failure: int, message: str) -> None:
    for _ in range(3):
        server.answer(failure, "busy")
    with pytest.raises(ConceptMapsError, match=message):
        judge(server).rate(QUESTION)
    assert len(server.requests) == 3


def test_waits(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    for header in ({}, {}, {"Retry_After": "7"}, {"Retry_After": "900"}, {"Retry_After": "Wed, 21 Oct 2015"}):
        server.answer(429, "busy", **header)
    server.answer(200, completion())
    judge(server, attempts=6, backoff=0.5).rate(QUESTION)
    assert waits == [0.5, 1.0, 7.0, 60.0, 8.0]


def test_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ConceptMapsError, match=f"no answer from the judge at {url}/chat/completions: .*imed ?out"):
            ChatJudge(url, "model", timeout=0.1, attempts=2, backoff=0).rate(QUESTION)


def test_nobody_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("a wrong URL is tried again"))
    with pytest.raises(ConceptMapsError, match="no answer from the judge at .*ConnectionRefused.*; check the URL"):
        ChatJudge(f"http://127.0.0.1:{port}", "model").rate(QUESTION)


def test_redirections_are_not_followed(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    server.answer(302, "", Location=f"{server.url}/elsewhere")
    with pytest.raises(ConceptMapsError, match="answered 302"):
        judge(server).rate(QUESTION)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ("<html>Welcome</html>", "answered '<html>Welcome</html>'; expected a chat completion"),
        ("[]", r"answered '\[\]'; expected a chat completion"),
        ('{"choices": []}', "expected a chat completion"),
        ('{"choices": [{"message": "hello"}]}', "expected a chat completion"),
        (completion("", refusal="I cannot help with that."), "the judge refuses to rate: 'I cannot help with that.'"),
        (json.dumps({"choices": [{"message": {"content": None}, "finish_reason": "content_filter"}]}), "refuses"),
        (json.dumps({"choices": [{"message": {"content": None}, "finish_reason": "length"}]}), "'length'.*limit"),
        (completion("Sorry, I cannot."), "the rating SL is missing in the judge's reply 'Sorry, I cannot.'"),
        (completion('{"SL": 9, "TL": 1, "PR": 1, "SS": 1, "OBJ": 1}'), "the rating SL is 9"),
    ],
)
def test_replies_without_ratings(server: Server, reply: str, message: str) -> None:
    server.answer(200, reply)
    with pytest.raises(ConceptMapsError, match=message):
        judge(server).rate(QUESTION)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"url": "file:///etc/passwd"},
            "the judge's URL is 'file:///etc/passwd'; expected one like 'https://host/v1'",
        ),
        ({"url": "host/v1"}, "the judge's URL is 'host/v1'"),
        ({"url": "https:///v1"}, "the judge's URL is"),
        ({"url": "https://host:port/v1"}, "the judge's URL is"),
        ({"url": "http://[::1/v1"}, "the judge's URL is"),
        ({"url": "https://host/v 1"}, "the judge's URL is"),
        ({"url": f"https://me:{KEY}@host/v1"}, f"holds a name or a password; .* {KEY_VARIABLE}"),
        ({"model": " "}, "the judge's model is ' '"),
        ({"attempts": 0}, "0 attempts"),
        ({"timeout": 0.0}, "timeout 0.0"),
        ({"backoff": -1.0}, r"backoff -1.0"),
        ({"image_format": "gif"}, "unknown image format 'gif'"),
    ],
)
def test_settings_that_cannot_be_used(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConceptMapsValueError, match=message) as caught:
        ChatJudge(**({"url": "https://host/v1", "model": "model"} | options))
    assert KEY not in str(caught.value)


def test_secrets_in_a_query_are_not_shown(server: Server) -> None:
    server.answer(400, "no")
    with pytest.raises(ConceptMapsError, match="answered 400") as caught:
        ChatJudge(f"{server.url}?key={KEY}", "model").rate(QUESTION)
    assert KEY not in str(caught.value)


def test_help_names_the_variable(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        parsed("--help")
    assert KEY_VARIABLE in capsys.readouterr().out


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_judge_arguments(parser)
    return parser.parse_args(arguments)


def test_nothing_is_sent_without_a_url(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    monkeypatch.setattr(socket, "create_connection", lambda *arguments, **options: pytest.fail("something is sent"))
    assert judge_of(parsed()) is None


def test_arguments() -> None:
    url, model = ["--judge-url", "https://host/v1"], ["--judge-model", "m"]
    assert judge_of(parsed(*url, *model)) == ChatJudge("https://host/v1", "m")
    without = parsed(*url, *model, "--judge-default-temperature")
    assert judge_of(without) == ChatJudge("https://host/v1", "m", temperature=None)
    with pytest.raises(ConceptMapsValueError, match="--judge-url is there without --judge-model"):
        judge_of(parsed(*url))
    with pytest.raises(ConceptMapsValueError, match="--judge-model is there without --judge-url"):
        judge_of(parsed(*model))
    with pytest.raises(ConceptMapsValueError, match="the judge's URL is ''"):
        judge_of(parsed("--judge-url", "", *model))
