"""Where a response ends: at an EOS or stop id, or with the token that completes a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from rlhf.data import ChatFormat
from rlhf.ppo.generation.settings import SamplingOptions


class Ending:
    """The one rule for where responses end, while they are sampled and afterwards.

    It looks at a response's own ids: never at its prompt, and never at the padding token, which may
    be EOS. transformers' ``StopStringCriteria`` would see the prompt, too, and knows a token's text
    only apart from its neighbours; here stop strings are found in the text that ids decode to,
    special tokens shown, with any tokenizer.

    Args:
        policy: The model that samples; its generation config may name EOS ids.
        tokenizer: Its tokenizer.
        options: With stop ids, stop strings, and the length up to which nothing ends.

    Attributes:
        ids: The ids that end a response, sorted.
        window: So many tokens can make up a stop string at most, a byte each.

    Raises:
        ValueError: A stop id is not in the model's vocabulary.
    """

    def __init__(self, policy: Any, tokenizer: Any, options: SamplingOptions) -> None:
        size = policy.get_input_embeddings().weight.shape[0]
        for stop in options.stop_token_ids:
            if stop >= size:
                raise ValueError(
                    f"stop_token_ids has {stop}, and the model's vocabulary ends at {size - 1}"
                )
        self.ids = sorted({*eos_token_ids(policy, tokenizer), *options.stop_token_ids})
        self.stop_strings = list(options.stop_strings)
        self.min_new_tokens = options.min_new_tokens
        self._format = ChatFormat(tokenizer, "none")
        # One more, since some tokenizers decode the first token of a text otherwise.
        self.window = 1 + max((len(stop.encode()) for stop in self.stop_strings), default=0)

    def completes_stop_string(self, tail: Sequence[int], length: int) -> bool:
        """Whether the last token of a response so far completes a stop string.

        As with EOS, ``min_new_tokens`` tokens must come before it.

        Args:
            tail: The last ``window`` ids of the response, or more of them.
            length: How many it has in all.
        """
        if not self.stop_strings or length <= self.min_new_tokens:
            return False
        return self._stop_position(list(tail[-self.window :]), special=True) is not None

    def cut(self, response: Sequence[int]) -> tuple[list[int], bool]:
        """A response through its first end, inclusive, and whether it has one."""
        for length, token in enumerate(response, start=1):
            tail = response[max(0, length - self.window) : length]
            if token in self.ids or self.completes_stop_string(tail, length):
                return list(response[:length]), True
        return list(response), False

    def text(self, response: Sequence[int]) -> str:
        """The text of a response that is cut, exactly as it continues its prompt.

        Without special tokens, and of one that a stop string ended without the stop string and what
        follows it in its last token.
        """
        text = self._format.decode_completion(list(response))
        if not self.completes_stop_string(response, len(response)):
            return text
        position = self._stop_position(list(response), special=False)
        return text[:position]

    def _stop_position(self, ids: list[int], *, special: bool) -> int | None:
        """Where in the ids' text the stop string begins that the last of them completes."""
        text = self._format.decode_completion(ids, special=special)
        if not any(stop in text for stop in self.stop_strings):
            return None
        # Bytes of a character that is not complete yet are shown as U+FFFD, perhaps one for each.
        before = self._format.decode_completion(ids[:-1], special=special).rstrip("\ufffd")
        found = [text.find(stop, max(0, len(before) - len(stop) + 1)) for stop in self.stop_strings]
        return min((position for position in found if position >= 0), default=None)


class StopAtStrings(StoppingCriteria):
    """Ends the rows of a batch whose response completes a stop string.

    Args:
        ending: The rule.
        prompt_width: Columns of the batch that are its prompts.

    Attributes:
        lengths: Of the responses ended so far, by row.
    """

    def __init__(self, ending: Ending, prompt_width: int) -> None:
        self.ending = ending
        self.prompt_width = prompt_width
        self.lengths: dict[int, int] = {}

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        length = input_ids.shape[1] - self.prompt_width
        for row, tail in enumerate(input_ids[:, -min(length, self.ending.window) :].tolist()):
            if row not in self.lengths and self.ending.completes_stop_string(tail, length):
                self.lengths[row] = length
        ended = [row in self.lengths for row in range(len(input_ids))]
        return torch.tensor(ended, device=input_ids.device)


def eos_token_ids(policy: Any, tokenizer: Any) -> list[int]:
    """The ids that end a response: the generation config's and the tokenizer's."""
    configured = getattr(policy.generation_config, "eos_token_id", None)
    listed = configured if isinstance(configured, list | tuple) else [configured]
    return sorted({int(i) for i in [*listed, tokenizer.eos_token_id] if i is not None})
