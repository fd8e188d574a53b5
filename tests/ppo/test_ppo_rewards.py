"""Rewards of every kind: async, several, another tokenizer's model, behind HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import IO, Any

import pytest
import torch
from tiny_models import tiny_llama, tiny_tokenizer

from rlhf import HTTPReward, RewardModel, WeightedRewards
from rlhf import http_reward as module
from rlhf.data import DataError
from rlhf.models import scalar_model_from_causal
from rlhf.ppo.scoring import RewardError, reward_models, score_responses
from rlhf.sources import load_reward

ROWS = [{"prompt": f"prompt {n}", "bonus": n} for n in range(5)]
TEXTS = ["a" * n for n in range(5)]


def length(prompts: list[Any], responses: list[str]) -> list[float]:
    return [float(len(text)) for text in responses]


async def slow_length(prompts: list[Any], responses: list[str]) -> list[float]:
    return list(await asyncio.gather(*[asyncio.sleep(0, float(len(text))) for text in responses]))


def test_an_async_reward_is_awaited() -> None:
    assert score_responses(slow_length, ROWS, TEXTS).tolist() == [0, 1, 2, 3, 4]


def test_an_async_reward_is_awaited_inside_a_running_loop() -> None:
    """As in a notebook."""

    async def cell() -> list[float]:
        return score_responses(slow_length, ROWS, TEXTS).tolist()

    assert asyncio.run(cell()) == [0, 1, 2, 3, 4]


def test_an_async_reward_that_fails_names_the_prompt() -> None:
    async def broken(prompts: list[Any], responses: list[str]) -> list[float]:
        raise TimeoutError("no answer")

    with pytest.raises(RewardError, match=r"TimeoutError: no answer .*'prompt 0'"):
        score_responses(broken, ROWS, TEXTS)


def test_several_rewards_are_a_weighted_sum_and_shown_apart(make_trainer: Any) -> None:
    def bonus(prompts: list[Any], responses: list[str], bonus: list[int]) -> list[int]:
        return bonus

    reward = WeightedRewards({"length": (length, 0.1), "bonus": (bonus, -2.0)})
    expected = [0.1 * n - 2.0 * n for n in range(5)]
    assert score_responses(reward, ROWS, TEXTS).tolist() == pytest.approx(expected)
    called = reward([row["prompt"] for row in ROWS], TEXTS, bonus=[row["bonus"] for row in ROWS])
    assert called == pytest.approx(expected)
    trainer = make_trainer(reward=reward)
    experience = trainer.rollout(next(trainer.prompts))
    metrics = trainer.update(experience)
    parts = metrics["score/length"], metrics["score/bonus"]
    assert metrics["score"] == pytest.approx(0.1 * parts[0] - 2.0 * parts[1], rel=1e-5)
    assert parts[1] == pytest.approx(sum(row["bonus"] for row in experience.prompts) / 8)


@pytest.mark.parametrize("kept", [{}, [], {"a": 1.0}, {"a": (length, 0.0)}])
def test_a_reward_may_have_an_attribute_called_rewards(kept: Any, make_trainer: Any) -> None:
    """Only ``WeightedRewards`` is a sum of parts; any other callable is called."""

    class Remembering:
        def __init__(self) -> None:
            self.rewards = kept

        def __call__(self, prompts: list[Any], responses: list[str]) -> list[float]:
            return length(prompts, responses)

    assert score_responses(Remembering(), ROWS, TEXTS).tolist() == [0, 1, 2, 3, 4]
    trainer = make_trainer(reward=Remembering())
    experience = trainer.rollout(next(trainer.prompts))
    assert experience.scores.tolist() == length([], experience.texts)


def test_sums_may_be_parts_of_sums() -> None:
    judge = RewardModel(scalar_model_from_causal(tiny_llama(3)), tiny_tokenizer())
    inner = WeightedRewards({"length": (length, 2.0), "model": (judge, 0.0)})
    outer = WeightedRewards({"inner": (inner, 3.0)})
    assert score_responses(outer, ROWS, TEXTS).tolist() == [0, 6, 12, 18, 24]
    assert reward_models(outer) == [judge]


def test_a_part_that_fails_is_named() -> None:
    reward = WeightedRewards({"good": (length, 1.0), "bad": (lambda p, r: [float("nan")] * 5, 1.0)})
    with pytest.raises(RewardError, match=r"reward 'bad': .* is nan.*'prompt 0'"):
        score_responses(reward, ROWS, TEXTS)


def test_a_weighted_sum_beyond_float32_names_the_prompt() -> None:
    reward = WeightedRewards({"huge": (lambda p, r: [0, 1e38, 0, 0, 0], 100.0)})
    with pytest.raises(RewardError, match=r"response 2 of 5 is inf.*'prompt 1'"):
        score_responses(reward, ROWS, TEXTS)


@pytest.mark.parametrize(
    ("rewards", "error"),
    [({}, ValueError), ({"a": (length, float("inf"))}, ValueError), ({"a": (3, 1.0)}, TypeError)],
)
def test_weighted_rewards_are_checked_at_once(rewards: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        WeightedRewards(rewards)


def test_a_reward_model_reads_texts_with_its_own_tokenizer_and_template(make_trainer: Any) -> None:
    """Its token ids are other ones than the policy's, and only texts pass between them."""
    tokenizer = tiny_tokenizer()
    words = {word: 127 - index for word, index in tokenizer.get_vocab().items()}
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["model"]["vocab"] = words
    for token in backend["added_tokens"]:
        token["id"] = words[token["content"]]
    own = type(tokenizer)(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(json.dumps(backend)),
        eos_token="<end>",
        pad_token="<pad>",
    )
    own.chat_template = "{% for m in messages %}{{ m['content'] }} <end> {% endfor %}"
    assert own("w1")["input_ids"] != tokenizer("w1")["input_ids"]
    reward = RewardModel(scalar_model_from_causal(tiny_llama(3), seed=2), own)
    trainer = make_trainer(reward=reward)
    experience = trainer.rollout(next(trainer.prompts))
    prompts = [row["prompt"] for row in experience.prompts]
    expected = reward.score(prompts, experience.texts)
    assert experience.scores.tolist() == pytest.approx(expected, abs=1e-6)
    assert experience.scores.std() > 0.01
    with pytest.raises(DataError, match="for the reward model"):  # also as one of several
        make_trainer(
            reward=WeightedRewards({"model": (reward, 1.0)}), prompts=["w1 " * 54], policy=None
        )


class Server:
    """An endpoint on loopback that answers as it is told to."""

    def __init__(self, answers: Callable[[int, dict[str, Any]], tuple[int, bytes]]) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: dict[str, str] = {}
        self.write: Callable[[IO[bytes], bytes], Any] = lambda file, content: file.write(content)
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                request = {**json.loads(body), "key": self.headers.get("X-Key")}
                status, content = answers(len(server.requests), request)
                server.requests.append(request)
                self.send_response(status)
                if status == 302:
                    self.send_header("Location", "http://127.0.0.1:9/elsewhere")
                for name, value in server.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                with contextlib.suppress(OSError):  # the client has gone
                    server.write(self.wfile, content)

            def log_message(self, *args: Any) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/score"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Server]]:
    """Starts servers; and waiting between attempts takes no time."""
    servers = []
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)

    def start(answers: Callable[[int, dict[str, Any]], tuple[int, bytes]]) -> Server:
        servers.append(Server(answers))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def right(number: int, request: dict[str, Any]) -> tuple[int, bytes]:
    return 200, json.dumps({"scores": [len(text) for text in request["responses"]]}).encode()


def test_an_endpoint_scores_in_batches_with_columns(serve: Any) -> None:
    server = serve(right)
    reward = HTTPReward(server.url, batch_size=2, headers={"X-Key": "secret"})
    assert score_responses(reward, ROWS, TEXTS).tolist() == [0, 1, 2, 3, 4]
    assert [len(request["responses"]) for request in server.requests] == [2, 2, 1]
    assert server.requests[1]["prompts"] == ["prompt 2", "prompt 3"]
    assert server.requests[1]["columns"] == {"bonus": [2, 3]}
    assert server.requests[0]["key"] == "secret"
    assert reward(["p"], ["abc"], responses=[3]) == [3]
    assert server.requests[-1]["columns"] == {"responses": [3]}


def test_a_command_line_names_an_endpoint(serve: Any) -> None:
    assert load_reward(serve(right).url)(["p"], ["abc"]) == [3]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_an_endpoint_that_is_down_and_then_up_costs_nothing(serve: Any, status: int) -> None:
    server = serve(lambda number, request: right(number, request) if number > 1 else (status, b""))
    assert score_responses(HTTPReward(server.url), ROWS, TEXTS).tolist() == [0, 1, 2, 3, 4]
    assert len(server.requests) == 3


def test_an_endpoint_that_stays_down_is_named(make_trainer: Any, serve: Any) -> None:
    server = serve(lambda number, request: (503, b""))
    trainer = make_trainer(reward=HTTPReward(server.url, retries=2))
    before = [parameter.clone() for parameter in trainer.policy.parameters()]
    with pytest.raises(RewardError, match=r"127.0.0.1.*3 attempts; the last: status 503 .*'w1"):
        trainer.rollout(next(trainer.prompts))
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.policy.parameters()))
    trainer.reward = length
    trainer.update(trainer.rollout(next(trainer.prompts)))


def test_nobody_listening_is_named(serve: Any) -> None:
    server = serve(right)
    server.close()
    with pytest.raises(RewardError, match=r"gave no answer in 2 attempts"):
        HTTPReward(server.url, retries=1)(["p"], ["r"])


def test_a_timeout_is_tried_again_and_then_named(serve: Any) -> None:
    release = threading.Event()

    def hang(number: int, request: dict[str, Any]) -> tuple[int, bytes]:
        release.wait(20)
        return 200, b""

    server = serve(hang)
    with pytest.raises(RewardError, match=r"2 attempts; .*[Tt]imed out"):
        HTTPReward(server.url, timeout=0.1, retries=1)(["p"], ["r"])
    release.set()


@pytest.mark.parametrize("flaw", ["cut", "stalled", "dripping"])
def test_an_answer_that_breaks_off_is_asked_for_again(serve: Any, flaw: str) -> None:
    ended = threading.Event()
    server = serve(lambda number, request: (200, right(number, request)[1] + b" " * 200))

    def write(file: IO[bytes], content: bytes) -> None:
        if len(server.requests) > 1:
            file.write(content)
        elif flaw == "dripping":  # never silent for as long as the timeout
            for place in range(len(content)):
                file.write(content[place : place + 1])
                ended.wait(0.02)
        else:
            file.write(content[:5])
            ended.wait(20 if flaw == "stalled" else 0)

    server.write = write
    assert HTTPReward(server.url, timeout=0.5)(["p"], ["abc"]) == [3]
    assert len(server.requests) > 1
    ended.set()


def test_an_answer_that_always_breaks_off_is_named(serve: Any) -> None:
    server = serve(right)
    server.write = lambda file, content: file.write(content[:5])
    with pytest.raises(RewardError, match=r"2 attempts; the last: its answer broke off"):
        HTTPReward(server.url, retries=1)(["p"], ["r"])
    assert len(server.requests) == 2


def test_an_answer_in_a_broken_encoding_is_an_error_at_once(serve: Any) -> None:
    server = serve(right)
    server.headers["Content-Encoding"] = "gzip"
    with pytest.raises(RewardError, match="broken encoding"):
        HTTPReward(server.url)(["p"], ["r"])
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("status", "content", "message"),
    [
        (404, b"no such page", r"status 404 .*'no such page'"),
        (302, b"", "status 302"),
        (200, b"<html>", r"answered with '<html>'; expected JSON like"),
        (200, b"[1, 2]", "expected JSON like"),
        (200, b'{"scores": [1]}', "answered with 1 scores for 5 responses"),
        (200, b'{"scores": 3}', "answered with 3 for 5 responses"),
        (200, b'{"scores": [1, 2, NaN, 4, 5]}', r"response 3 of 5 is nan.*'prompt 2'"),
        (200, b'{"scores": [1, 2, "3", 4, 5]}', r"response 3 of 5 is '3'"),
    ],
)
def test_an_answer_of_another_form_is_an_error_at_once(
    serve: Any, status: int, content: bytes, message: str
) -> None:
    server = serve(lambda number, request: (status, content))
    with pytest.raises(RewardError, match=message):
        score_responses(HTTPReward(server.url), ROWS, TEXTS)
    assert len(server.requests) == 1


def test_an_answer_without_end_is_not_read_whole(
    serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LARGEST_ANSWER", 100)
    server = serve(lambda number, request: (200, b" " * 1000))
    with pytest.raises(RewardError, match="more than 100 bytes"):
        HTTPReward(server.url)(["p"], ["r"])


def test_columns_that_json_does_not_know_are_said_so(serve: Any) -> None:
    with pytest.raises(RewardError, match="cannot be sent"):
        HTTPReward(serve(right).url)(["p"], ["r"], odd=[object()])


@pytest.mark.parametrize(
    ("url", "options"),
    [
        ("file:///etc/passwd", {}),
        ("localhost:80", {}),
        ("http://", {}),
        ("http://a", {"timeout": 0}),
        ("http://a", {"retries": -1}),
        ("http://a", {"batch_size": 0}),
    ],
)
def test_what_is_no_endpoint_is_refused(url: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"address|timeout="):
        HTTPReward(url, **options)
