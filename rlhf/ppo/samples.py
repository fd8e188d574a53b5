"""Some responses of a batch, for a person to read."""

from __future__ import annotations

from typing import Any

from rlhf.data import Text
from rlhf.ppo.experience import Experience


def samples_of(experience: Experience, count: int) -> list[dict[str, Any]]:
    """The first responses of a batch, which is in random order, with their figures."""
    kl = experience.kl.sum(1).tolist()
    lengths = experience.response_mask.sum(1).tolist()
    return [
        {
            "prompt": as_text(experience.prompts[row]["prompt"]),
            "response": experience.texts[row],
            "score": float(experience.scores[row]),
            "kl": kl[row],
            "tokens": lengths[row],
            "ended": bool(experience.ended[row]),
        }
        for row in range(min(count, len(experience)))
    ]


def as_text(prompt: Text) -> str:
    """A prompt as one text: messages a line each, with who speaks."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)
