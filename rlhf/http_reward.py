"""A reward behind an HTTP endpoint."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import requests
import urllib3

from rlhf.data import Text
from rlhf.engine.batching import chunks
from rlhf.ppo.scoring import RewardError, shorten

# A score is a few bytes; an answer of this size is something else.
LARGEST_ANSWER = 16 << 20
PIECE = 64 << 10  # bytes that are read at a time
LONGEST_WAIT = 30.0


class Unavailable(Exception):
    """The endpoint did not answer this time; asking again may help."""


class HTTPReward:
    """Scores responses by asking a server.

    Each request is a POST of the JSON ``{"prompts": [...], "responses": [...], "columns": {...}}``;
    the answer is ``{"scores": [...]}``, one finite number for each response. A connection that
    fails or breaks off, a timeout, status 429 and any 5xx are tried again, after 0.5, 1, 2, ...
    seconds; anything else that is no answer is an error at once. Redirects are not followed.

    Args:
        url: http or https.
        timeout: Seconds for an answer, which must be complete by then.
        retries: How often to ask again.
        batch_size: Responses in one request; None for all.
        headers: Sent with each request, an authorisation, say.

    Raises:
        ValueError: The url is no http address, or a number makes no sense.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: float = 60.0,
        retries: int = 5,
        batch_size: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).netloc:
            raise ValueError(f"{url!r} is no http:// or https:// address")
        if not timeout > 0 or retries < 0 or (batch_size is not None and batch_size < 1):
            raise ValueError(
                f"timeout={timeout!r} must be above 0, retries={retries!r} at least 0, "
                f"batch_size={batch_size!r} at least 1 or None"
            )
        self.url = url
        self.timeout = timeout
        self.retries = retries
        self.batch_size = batch_size
        self.headers = {"Content-Type": "application/json", **(headers or {})}

    def __call__(
        self, prompts: Sequence[Text], responses: Sequence[str], /, **columns: list[Any]
    ) -> list[float]:
        """The scores of responses.

        Raises:
            RewardError: No answer after all retries, or one that is no list of scores.
        """
        scores: list[float] = []
        for rows in chunks(range(len(responses)), self.batch_size or len(responses)):
            part = {name: [values[row] for row in rows] for name, values in columns.items()}
            request = {
                "prompts": [prompts[row] for row in rows],
                "responses": [responses[row] for row in rows],
                "columns": part,
            }
            scores += self._ask(request)
        return scores

    def _ask(self, request: dict[str, Any]) -> list[float]:
        try:
            body = json.dumps(request, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise RewardError(
                f"the prompts or their columns cannot be sent to {self.url} as JSON: {error}"
            ) from error
        reason: Exception | None = None
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(min(LONGEST_WAIT, 0.5 * 2 ** (attempt - 1)))
            try:
                return self._scores(self._post(body), request)
            except (Unavailable, requests.ConnectionError, requests.Timeout) as error:
                reason = error
        raise RewardError(
            f"{self.url} gave no answer in {self.retries + 1} attempts; the last: {reason} "
            f"(for the prompt {shorten(request['prompts'][0])}). Nothing was updated."
        ) from reason

    def _post(self, body: bytes) -> bytes:
        deadline = time.monotonic() + self.timeout
        with requests.post(
            self.url,
            data=body,
            headers=self.headers,
            timeout=self.timeout,
            allow_redirects=False,
            stream=True,
        ) as answer:
            status = f"status {answer.status_code} {answer.reason}"
            if answer.status_code == 429 or answer.status_code >= 500:
                raise Unavailable(status)
            content = self._read(answer, deadline)
            if answer.status_code != 200:
                text = content[:200].decode("utf-8", "replace")
                raise RewardError(f"{self.url} answered with {status}: {text!r}")
            return content

    def _read(self, answer: requests.Response, deadline: float) -> bytes:
        """The body of an answer, as it comes in: one that drips is not waited for either."""
        content = bytearray()
        try:
            while piece := answer.raw.read1(PIECE, decode_content=True):
                content += piece
                if len(content) > LARGEST_ANSWER:
                    raise RewardError(f"{self.url} answered with more than {LARGEST_ANSWER} bytes")
                if time.monotonic() > deadline:
                    raise Unavailable(f"its answer was not complete after {self.timeout:g} seconds")
        except urllib3.exceptions.DecodeError as error:
            raise RewardError(f"{self.url} answered with a broken encoding: {error}") from error
        except urllib3.exceptions.HTTPError as error:  # requests passes these on as they are
            raise Unavailable(f"its answer broke off: {error}") from error
        return bytes(content)

    def _scores(self, content: bytes, request: dict[str, Any]) -> list[float]:
        try:
            answer = json.loads(content)
            scores = answer["scores"]
        except (ValueError, TypeError, KeyError) as error:
            text = content[:200].decode("utf-8", "replace")
            raise RewardError(
                f'{self.url} answered with {text!r}; expected JSON like {{"scores": [0.5, ...]}}'
            ) from error
        asked = len(request["responses"])
        if not isinstance(scores, list) or len(scores) != asked:
            found = f"{len(scores)} scores" if isinstance(scores, list) else repr(scores)[:80]
            raise RewardError(f"{self.url} answered with {found} for {asked} responses")
        return scores
