"""The work that both sides do. Of torch and transformers alone: TRL's environment has no more."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

# What both sides are told, TRL's defaults where it has them. No clipping of gradients: TRL 1.12
# has a setting for it and does not read it. No entropy bonus: it has none.
LEARNING_RATE, ADAM_EPS = 3e-6, 1e-8
TEMPERATURE, KL_COEF, CLIP_RANGE, VALUE_COEF = 0.7, 0.05, 0.2, 0.1
PAD, EOS = 0, 2  # SmolLM2's <|endoftext|> and <|im_end|>; TRL takes an EOS that pads for no token
WORDS = """
    the ship left house before sun was up and went along with wind until it rain from town
    over where some people had made long road for water then came back home but they could not
    find any good place near small tree
"""

Number = Literal["float32", "bfloat16"]
Device = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Work:
    """A training run.

    Attributes:
        models: Folder with ``policy`` and ``reward``.
        dtype: Of matrix products. TRL has no such setting: its weights have this type.
        weights: Type of our weights.
        optimizer: Ours; TRL's is PyTorch's AdamW, with moments of the weights' type.
        critic: ``separate`` or, ours alone, ``shared``.
        varied: Whether responses end at different lengths instead of at the longest.
        updates: How many are timed, after one that is not.
        device: ``cpu`` or ``cuda``, on both sides.
    """

    models: str
    dtype: Number = "float32"
    weights: Number = "float32"
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    critic: Literal["separate", "shared"] = "separate"
    varied: bool = False
    updates: int = 1
    batch: int = 16
    micro_batch: int = 16
    prompt: int = 32
    response: int = 32
    epochs: int = 4
    device: Device = "cpu"

    @property
    def policy_folder(self) -> str:
        return str(Path(self.models) / "policy")

    @property
    def reward_folder(self) -> str:
        return str(Path(self.models) / "reward")

    @property
    def lengths(self) -> list[int]:
        """Tokens of each response: the longest, or evenly spread up to it and shuffled."""
        if not self.varied:
            return [self.response] * self.batch
        spread = [max(1, self.response * (row + 1) // self.batch) for row in range(self.batch)]
        order = torch.randperm(self.batch, generator=torch.Generator().manual_seed(0))
        return [spread[row] for row in order.tolist()]

    def prompts(self, tokenizer: Any) -> list[str]:
        """Enough texts for all updates and one more, of exactly ``prompt`` tokens each.

        One batch more, since accelerate takes an optimizer step for each micro-batch of what it
        believes to be the last batch.
        """
        generator, words = torch.Generator().manual_seed(1), WORDS.split()
        texts: list[str] = []
        for _ in range(self.batch * (self.updates + 2)):
            picked = torch.randint(len(words), (self.prompt,), generator=generator).tolist()
            texts.append(" ".join(words[index] for index in picked))
            assert len(tokenizer(texts[-1])["input_ids"]) == self.prompt, texts[-1]
        return texts


@dataclass
class Report:
    """What a side has to say: one number of seconds for each timed update."""

    seconds: list[float]
    optimizer_steps: int
    lengths: list[int]
    phases: dict[str, float] = field(default_factory=dict)
    peak_mib: float = 0.0


class ForcedLengths(LogitsProcessor):
    """Ends each response at its length, or (``varied`` off) none; no token is padding by chance."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.last = torch.tensor(work.lengths, device=work.device) - 1

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, [PAD, EOS]] = -torch.inf
        if self.work.varied:
            ends = self.last == input_ids.shape[1] - self.work.prompt
            scores[ends] = -torch.inf
            scores[ends, EOS] = 0.0
        return scores


def force_lengths(policy: Any, work: Work) -> list[list[int]]:
    """Have ``policy.generate`` end responses as the work says.

    Returns:
        A list that will hold the lengths of the responses of each call.
    """
    plain, seen = policy.generate, list[list[int]]()

    def generate(*args: Any, logits_processor: Sequence[Any] = (), **kwargs: Any) -> Any:
        processors = LogitsProcessorList([ForcedLengths(work), *logits_processor])
        output = plain(*args, logits_processor=processors, **kwargs)
        ids = output if isinstance(output, Tensor) else output.sequences
        seen.append(response_lengths(ids[:, work.prompt :]))
        return output

    policy.generate = generate
    return seen


def response_lengths(responses: Tensor) -> list[int]:
    """Tokens of each row up to its first EOS, inclusive."""
    earlier = (responses == EOS).long().cumsum(1) - (responses == EOS).long()
    return (earlier == 0).sum(1).tolist()


def timed_updates(update: Callable[[], object], work: Work) -> list[float]:
    """Seconds of each update after the first, which warms up."""
    update()
    seconds = []
    for _ in range(work.updates):
        start = now(work)
        update()
        seconds.append(now(work) - start)
    return seconds


def now(work: Work) -> float:
    """Seconds, when all that was asked of the device is done."""
    if work.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_mib(work: Work) -> float:
    """The process's peak: of its resident set, or of what it had of the GPU's memory."""
    if work.device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(line for line in status if line.startswith("VmHWM:"))
    return int(peak.split()[1]) / 1024


def run_side(run: Callable[[Work], Report]) -> None:
    """The program of a side: its work as JSON in the first argument, its report the last line."""
    work = Work(**json.loads(sys.argv[1]))
    torch.manual_seed(0)
    report = run(work)
    report.peak_mib = peak_mib(work)
    print("\n" + json.dumps(asdict(report)), flush=True)
