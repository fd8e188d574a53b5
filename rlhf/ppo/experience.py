"""What a rollout gives and an update takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from rlhf.ppo.kept_forward import KeptForward

Self = TypeVar("Self", bound="Sequences")


@dataclass
class Sequences:
    """Prompts with their responses. B rows, P prompt and T response positions.

    Attributes:
        prompt_ids: int64 [B, P], left padded. prompt_mask: bool [B, P].
        responses: int64 [B, T]. response_mask: bool [B, T], True on the tokens that are trained. A
            False one between two True ones (a tool's output, say) is read but not trained.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    responses: Tensor
    response_mask: Tensor

    def __len__(self) -> int:
        return self.responses.shape[0]

    def attended(self) -> Tensor:
        """bool [B, T]: response positions up to the last trained one."""
        return self.response_mask.flip(1).cumsum(1).flip(1) > 0

    def lengths(self) -> list[tuple[int, int]]:
        """(prompt, response) lengths of each row, read by the host once."""
        both = torch.stack([self.prompt_mask.sum(1), self.attended().sum(1)], dim=1)
        return [(prompt, response) for prompt, response in both.tolist()]

    def micro_batch(self: Self, rows: Sequence[int], lengths: Sequence[tuple[int, int]]) -> Self:
        """These rows, without columns of padding alone.

        No rows stand for a micro-batch that only keeps step with other ranks: the first row, with
        nothing in it that is trained.
        """
        part = rows or [0]
        prompt = max(lengths[row][0] for row in part)
        response = max(1, max(lengths[row][1] for row in part))
        found = self.select(part, prompt_length=prompt, response_length=response)
        if not rows:
            found.response_mask = torch.zeros_like(found.response_mask)
        return found

    def select(
        self: Self,
        rows: Sequence[int],
        *,
        prompt_length: int | None = None,
        response_length: int | None = None,
    ) -> Self:
        """These rows; with lengths, the last columns of the prompts and the first of the rest."""
        index = torch.as_tensor(list(rows), device=self.responses.device)
        width = self.prompt_ids.shape[1]
        prompt_columns = slice(width - (width if prompt_length is None else prompt_length), width)
        response_columns = slice(response_length)

        def pick(name: str, value: Any) -> Any:
            if isinstance(value, list):
                return [value[row] for row in rows]
            if isinstance(value, dict):
                return {key: pick(name, part) for key, part in value.items()}
            if not isinstance(value, Tensor):
                return value
            if value.dim() == 1:
                return value[index]
            columns = prompt_columns if name.startswith("prompt_") else response_columns
            return value[index, columns]

        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return type(self)(**{name: pick(name, value) for name, value in fields.items()})


@dataclass
class Experience(Sequences):
    """One batch of responses with all that an update needs, which a user may change beforehand.

    Whoever changes ``scores`` calls ``PPOTrainer.estimate_advantages(experience)`` afterwards.

    Attributes:
        ended: bool [B], whether the response ended by itself: at an EOS, a stop id or string.
        prompts: The rows ``{"prompt": ..., **columns}`` that the reward got. texts: The responses'.
        scores: fp32 [B], what the reward returned.
        logprobs: fp32 [B, T], under the policy that sampled, at the training temperature; 0 where
            response_mask is False, as in all that follow.
        ref_logprobs: fp32 [B, T], under the reference.
        values: fp32 [B, T], the critic's value of the state before each token; None without one.
        advantages, rewards, kl: fp32 [B, T]. returns: fp32 [B, T], the critic's targets, or None.
            See ``rlhf.ppo.estimators``.
        kl_coef: Weight of the KL penalty for this batch.
        score_parts: Of several weighted rewards, what each returned, fp32 [B] by name.
        seconds: Time that each phase of the rollout took.
        kept: Forward passes that the first step need not repeat; see ``rlhf.ppo.kept_forward``.
    """

    ended: Tensor
    prompts: list[dict[str, Any]]
    texts: list[str]
    scores: Tensor
    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor | None
    advantages: Tensor
    returns: Tensor | None
    rewards: Tensor
    kl: Tensor
    kl_coef: float = 0.0
    score_parts: dict[str, Tensor] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    kept: Sequence[KeptForward] = field(default=(), repr=False)

    def check_shapes(self) -> None:
        """Raise ValueError, naming the field, where a tensor does not fit the masks."""
        for each in dataclasses.fields(self):
            value = getattr(self, each.name)
            if not isinstance(value, Tensor):
                continue
            of_prompts = each.name.startswith("prompt_")
            mask = self.prompt_mask if of_prompts else self.response_mask
            expected = mask.shape if value.dim() > 1 else mask.shape[:1]
            if value.shape != expected:
                raise ValueError(
                    f"{each.name} of the experience has shape {tuple(value.shape)}; expected "
                    f"{tuple(expected)}, to fit {'prompt_mask' if of_prompts else 'response_mask'}"
                )
