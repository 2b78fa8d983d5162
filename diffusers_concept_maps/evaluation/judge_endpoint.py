"""A judge behind an endpoint that speaks the chat protocol of OpenAI, as most servers of models do."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, urlsplit, urlunsplit

import torch

from diffusers_concept_maps.errors import ConceptMapsError, ConceptMapsValueError
from diffusers_concept_maps.evaluation.judge import RUBRIC, Question, Verdict, parse_verdict, shortened

KEY_VARIABLE = "CONCEPT_MAPS_JUDGE_KEY"
"""The environment variable with the key; without it none is sent, as servers of one's own need."""

_LONGEST_WAIT = 60.0  # seconds; more is not waited, whatever a server asks for
_FORMATS = ("jpeg", "png")
_TRANSIENT = (TimeoutError, ConnectionResetError, BrokenPipeError, http.client.IncompleteRead)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirection could lead the key, and the frames, to someone else."""

    def redirect_request(self, *arguments: Any) -> None:
        return None


@dataclass(frozen=True)
class ChatJudge:
    """Ask a model that sees pictures; every call of `rate` sends twelve frames of the clip to the endpoint.

    The key is read from `KEY_VARIABLE` when a request is sent; it is kept nowhere and shown in no error.

    Attributes:
        url: of the endpoint, such as `https://host/v1`; `/chat/completions` is added where it is missing.
        model: the name that the endpoint has for the model.
        temperature: 0 as in the paper; None leaves it out, for models that take none.
        timeout: seconds to wait for an answer.
        attempts: how often a request is sent, where the endpoint is busy (429), fails (5xx) or does not answer.
        backoff: seconds before the second attempt, doubled for each further one, unless the endpoint names a time.
        image_format: "jpeg" (quality 95), or "png" without loss, several times as large.

    Raises:
        ConceptMapsValueError: one of these cannot be used.
    """

    url: str
    model: str
    temperature: float | None = 0.0
    timeout: float = 300.0
    attempts: int = 5
    backoff: float = 1.0
    image_format: str = "jpeg"

    def __post_init__(self) -> None:
        parts = _split(self.url)
        if "@" in parts.netloc:
            raise ConceptMapsValueError(
                f"the judge's URL at {parts.hostname} holds a name or a password; leave it out, and put the key into "
                f"the environment variable {KEY_VARIABLE}"
            )
        if not self.model.strip():
            raise ConceptMapsValueError(f"the judge's model is {self.model!r}; expected the endpoint's name for it")
        if self.attempts < 1 or not self.timeout > 0 or not self.backoff >= 0:
            raise ConceptMapsValueError(
                f"{self.attempts} attempts, timeout {self.timeout}, backoff {self.backoff}; expected at least one "
                f"attempt, a timeout above 0 and a backoff of at least 0"
            )
        if self.image_format not in _FORMATS:
            raise ConceptMapsValueError(f"unknown image format {self.image_format!r}; expected 'jpeg' or 'png'")

    @property
    def name(self) -> str:
        """The model."""
        return self.model

    def rate(self, question: Question) -> Verdict:
        """Rate one map.

        Raises:
            ConceptMapsError: no connection, a refusal, or a reply without ratings.
        """
        return parse_verdict(self._content(self._post(self._body(question))))

    def _body(self, question: Question) -> dict[str, Any]:
        grids = question.grids
        content = [_text(question.text())]
        for title, picture in (("frames", grids.raw), ("masked frames", grids.overlay), ("heat map", grids.heat_map)):
            url = f"data:image/{self.image_format};base64,{_encoded(picture, self.image_format)}"
            content += [_text(f"The {title}:"), {"type": "image_url", "image_url": {"url": url, "detail": "high"}}]
        messages = [{"role": "system", "content": RUBRIC}, {"role": "user", "content": content}]
        body: dict[str, Any] = {"model": self.model, "messages": messages}
        return body if self.temperature is None else body | {"temperature": self.temperature}

    def _post(self, body: dict[str, Any]) -> bytes:
        request = urllib.request.Request(self._target(), json.dumps(body).encode(), self._headers(), method="POST")
        opener = urllib.request.build_opener(_NoRedirects)
        for attempt in range(self.attempts):
            wait = min(self.backoff * 2**attempt, _LONGEST_WAIT)
            try:
                with opener.open(request, timeout=self.timeout) as response:
                    return bytes(response.read())
            except urllib.error.HTTPError as error:
                failure = self._refusal(error.code, _said(error))
                if error.code != 429 and error.code < 500:
                    raise failure from None
                wait = _named_wait(error.headers.get("Retry-After"), wait)
            except (OSError, http.client.HTTPException) as error:
                reason = getattr(error, "reason", error)
                failure = ConceptMapsError(f"no answer from the judge at {self._where()}: {reason!r}; check the URL")
                if not isinstance(reason, _TRANSIENT):
                    raise failure from None
            if attempt + 1 < self.attempts:
                time.sleep(wait)
        raise failure

    def _refusal(self, code: int, text: str) -> ConceptMapsError:
        """What the endpoint answered in place of a reply, in words."""
        key = os.environ.get(KEY_VARIABLE, "").strip()
        said = shortened(text.replace(key, "***") if key else text)
        advice = {
            401: f"put a valid key into the environment variable {KEY_VARIABLE}",
            403: f"put a key that may use the model into the environment variable {KEY_VARIABLE}",
            404: "check the URL and the model",
            429: "wait, or ask for a higher limit",
        }.get(code, "try again later" if code >= 500 else "check the URL, the model and its options")
        return ConceptMapsError(f"the judge at {self._where()} answered {code}: {said!r}; {advice}")

    def _content(self, reply: bytes) -> str:
        """The text of the answer in the endpoint's reply."""
        text = reply.decode("utf-8", "replace")
        try:
            choice = json.loads(text)["choices"][0]
            message = choice["message"]
            content, refusal = message.get("content"), message.get("refusal")
            finish = choice.get("finish_reason")
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ConceptMapsError(
                f"the judge at {self._where()} answered {shortened(text)!r}; expected a chat completion; check the URL"
            ) from error
        if refusal or finish == "content_filter":
            raise ConceptMapsError(
                f"the judge refuses to rate: {shortened(str(refusal or content))!r}; try another model"
            )
        if not isinstance(content, str) or not content.strip():
            raise ConceptMapsError(
                f"the judge's reply is empty (finish_reason {finish!r}); expected ratings; raise the model's limit of "
                f"tokens, or try another model"
            )
        return content

    def _target(self) -> str:
        parts = urlsplit(self.url)
        path = parts.path.rstrip("/")
        return urlunsplit(
            parts._replace(
                path=path if path.endswith("/chat/completions") else f"{path}/chat/completions", fragment=""
            )
        )

    def _where(self) -> str:
        """The endpoint, without a query, which may hold secrets."""
        return urlunsplit(urlsplit(self._target())._replace(query=""))

    def _headers(self) -> dict[str, str]:
        key = os.environ.get(KEY_VARIABLE, "").strip()
        if not all("!" <= character <= "~" for character in key):
            raise ConceptMapsError(
                f"the environment variable {KEY_VARIABLE} holds characters that no key has; expected visible ASCII "
                f"characters; copy the key again"
            )
        return {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})


def _split(url: str) -> SplitResult:
    """The parts of a URL that a request can be sent to; raises otherwise."""
    refused = ConceptMapsValueError(f"the judge's URL is {url!r}; expected one like 'https://host/v1'")
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        raise refused from None
    if not usable or not all("!" <= character <= "~" for character in url):
        raise refused
    return parts


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _encoded(picture: torch.Tensor, image_format: str) -> str:
    """A picture uint8 `[3, height, width]` as a file in base64."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy()).save(buffer, image_format, quality=95)
    return base64.b64encode(buffer.getvalue()).decode()


def _said(error: urllib.error.HTTPError) -> str:
    """What an endpoint says with a status that is no success, as far as it can be read."""
    try:
        with error:
            return error.read().decode("utf-8", "replace")
    except (OSError, http.client.HTTPException) as failure:
        return f"unreadable: {failure!r}"


def _named_wait(header: str | None, otherwise: float) -> float:
    """Seconds to wait: those that a server names, if it names any."""
    named = header is not None and header.strip().isdecimal()
    return min(float(header), _LONGEST_WAIT) if header is not None and named else otherwise
