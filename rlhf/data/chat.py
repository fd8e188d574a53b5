"""Text to token ids and back: the one place that knows templates.

A conversation is rendered as text up to each border between a prompt and an assistant's turn.
What lies between two borders is tokenised for itself and the pieces are joined, so the ids of a
prompt are exactly the first ids of that prompt with an answer, whatever the tokenizer would merge.

Only the template writes special tokens. Where a message's own text spells one ("</s>",
"<|im_end|>"), it becomes the ordinary tokens of those characters, so no text can end a turn or
forge another. To this end the spelling is broken by a mark before the template sees it, and the
rendered text is tokenised on each side of the mark.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from rlhf.data.errors import DataError
from rlhf.data.types import Message, Text, completion_messages, prompt_messages

TEMPLATES = ("auto", "instruction", "none")
_MARK = "\ufdd0"  # a code point that Unicode keeps for such uses; in a text it would be dropped


@dataclass(frozen=True)
class _Piece:
    text: str
    turn: int | None = None  # the index of the assistant's message that this is, if it is one


class ChatFormat:
    """Turns prompts and completions into token ids under one template.

    Args:
        tokenizer: a Hugging Face tokenizer with an EOS token.
        template: one of

            - ``"auto"``: the tokenizer's own chat template if it has one, else "instruction";
            - ``"instruction"``: ``### Instruction:\\n{user}\\n\\n### Response:\\n{assistant}``;
            - ``"none"``: the texts joined as they stand.

            Under the last two every assistant's turn is closed by EOS, and the sequence begins
            with BOS if the tokenizer normally puts one there.

    Attributes:
        template: what is in use: "chat", "instruction" or "none".

    Raises:
        ValueError: for an unknown template or a tokenizer without EOS.
    """

    def __init__(self, tokenizer: Any, template: str = "auto") -> None:
        if template not in TEMPLATES:
            raise ValueError(f"unknown template {template!r}; use one of {', '.join(TEMPLATES)}.")
        if tokenizer.eos_token_id is None:
            raise ValueError(
                "the tokenizer has no EOS token, so no answer could end; set tokenizer.eos_token."
            )
        self.tokenizer = tokenizer
        has_chat = template == "auto" and bool(tokenizer.chat_template)
        self.template = "chat" if has_chat else template.replace("auto", "instruction")
        self._bos = [] if has_chat else _leading_bos(tokenizer)
        self._anchor = _find_anchor(tokenizer)
        self._special = _special_pattern(tokenizer)

    def prompt_ids(self, prompt: Text) -> list[int]:
        """The ids [P] that a model continues to answer ``prompt``.

        Raises:
            DataError: if the template cannot render the prompt, or nothing is left of it.
        """
        return self._tokenize(self._pieces(prompt_messages(prompt), open_turn=True))[0]

    def encode(self, prompt: Text, completion: str | list[Message]) -> tuple[list[int], list[int]]:
        """A prompt with its completion.

        Returns:
            ``(input_ids [L], loss_mask [L])``. The ids begin with ``prompt_ids(prompt)`` and end
            with EOS. The mask is 1 on every token of the completion's assistant turns, EOS
            included, and 0 elsewhere. The completion may be empty: then only EOS is 1.
        """
        opening = prompt_messages(prompt)
        messages = opening + completion_messages(completion)
        return self._encode(messages, first_trained=len(opening))

    def encode_messages(self, messages: list[Message]) -> tuple[list[int], list[int]]:
        """A conversation that ends with the assistant; every assistant turn has mask 1.

        Returns:
            ``(input_ids [L], loss_mask [L])`` as ``encode`` does.
        """
        return self._encode(messages, first_trained=0)

    def special_tokens_in(self, text: str) -> list[str]:
        """The special tokens that ``text`` spells; they are encoded as ordinary characters."""
        return list(dict.fromkeys(self._special.findall(text))) if self._special else []

    @cached_property
    def largest_id(self) -> int:
        """The largest of the tokenizer's ids."""
        return max(self.tokenizer.get_vocab().values())

    def prompt_text(self, ids: list[int]) -> str:
        """The text of a prompt's ids, without special tokens."""
        return self._decode(ids, special=False)

    def decode_completion(self, ids: list[int], *, special: bool = False) -> str:
        """The text of completion ids, exactly as it continues a prompt; special tokens are left
        out unless ``special``.

        Tokenizers of the SentencePiece kind drop the first space of whatever they decode; here it
        stays, so that prompt + completion is again the whole text.
        """
        if not self._anchor:
            return self._decode(ids, special)
        anchor = self._anchor[1]
        return self._decode([*anchor, *ids], special)[len(self._decode(anchor, special)) :]

    def _decode(self, ids: list[int], special: bool) -> str:
        return self.tokenizer.decode(
            ids, skip_special_tokens=not special, clean_up_tokenization_spaces=False
        )

    # Rendering

    def _pieces(self, messages: list[Message], *, open_turn: bool) -> list[_Piece]:
        messages = [{**m, "content": self._broken(m["content"])} for m in messages]
        pieces: list[_Piece] = []
        done = ""
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                before = self._continue(done, messages[:i], open_turn=True)
                after = self._continue(before, messages[: i + 1], open_turn=False)
                end = self._turn_end(after, len(before))
                pieces += [_Piece(before[len(done) :]), _Piece(after[len(before) : end], turn=i)]
                done = after[:end]
        if open_turn:
            pieces.append(_Piece(self._continue(done, messages, open_turn=True)[len(done) :]))
        return pieces

    def _broken(self, text: str) -> str:
        """``text`` with a mark behind the first character of every special token in it."""
        if self._special is None:
            return text
        return self._special.sub(lambda match: text[match.start()] + _MARK, text)

    def _continue(self, done: str, messages: list[Message], *, open_turn: bool) -> str:
        """Render ``messages``, making sure that the text goes on from ``done``."""
        text = self._render(messages, open_turn=open_turn)
        if not text.startswith(done):
            raise DataError(
                "the tokenizer's chat template writes the beginning of this conversation "
                "differently once it goes on, so prompt and answer cannot be told apart; use "
                "another template (template='instruction')."
            )
        return text

    def _render(self, messages: list[Message], *, open_turn: bool) -> str:
        if self.template == "chat":
            return self._render_chat(messages, open_turn=open_turn)
        closed = [
            m["content"] + (self.tokenizer.eos_token if m["role"] == "assistant" else "")
            for m in messages
        ]
        if self.template == "none":
            return "".join(closed)
        heads = {"system": "", "user": "### Instruction:\n", "assistant": "### Response:\n"}
        turns = [heads[m["role"]] + c for m, c in zip(messages, closed, strict=True)]
        return "\n\n".join([*turns, heads["assistant"]] if open_turn else turns)

    def _render_chat(self, messages: list[Message], *, open_turn: bool) -> str:
        from jinja2.exceptions import TemplateError

        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=open_turn
            )
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise DataError(
                f"the tokenizer's chat template refuses the turns {roles}: {error}. Change them, "
                "or use template='instruction'."
            ) from error

    def _turn_end(self, text: str, start: int) -> int:
        """Where the assistant's turn from ``start`` ends: after its EOS, before a line break."""
        eos = self.tokenizer.eos_token
        at = text.rfind(eos, start)
        closed = at >= 0 and not text[at + len(eos) :].strip()
        return at + len(eos) if closed else len(text)

    # Tokenising

    def _encode(self, messages: list[Message], first_trained: int) -> tuple[list[int], list[int]]:
        if not messages or messages[-1]["role"] != "assistant":
            raise DataError("the last message must be the assistant's.")
        ids, turns = self._tokenize(self._pieces(messages, open_turn=False))
        last = len(messages) - 1
        if ids[-1] != self.tokenizer.eos_token_id:
            # A template that closes turns with a token of its own: the end is marked all the same.
            ids, turns = [*ids, self.tokenizer.eos_token_id], [*turns, last]
        return ids, [int(turn is not None and turn >= first_trained) for turn in turns]

    def _tokenize(self, pieces: list[_Piece]) -> tuple[list[int], list[int | None]]:
        ids = list(self._bos)
        turns: list[int | None] = [None] * len(ids)
        begun = False
        for piece in pieces:
            new = self._piece_ids(piece, continues=begun)
            ids += new
            turns += [piece.turn] * len(new)
            begun = begun or bool(piece.text)
        if not ids:
            raise DataError("nothing is left of the prompt under this template; give it text.")
        return ids, turns

    def _piece_ids(self, piece: _Piece, *, continues: bool) -> list[int]:
        eos = self.tokenizer.eos_token
        if piece.turn is not None and piece.text.endswith(eos):
            # By id, so that the end is EOS even where the tokenizer would not parse it in text.
            body = self._text_ids(piece.text[: -len(eos)], continues=continues)
            return [*body, self.tokenizer.eos_token_id]
        return self._text_ids(piece.text, continues=continues)

    def _text_ids(self, text: str, *, continues: bool) -> list[int]:
        ids: list[int] = []
        for part in text.split(_MARK):
            ids += self._part_ids(part, continues=continues)
            continues = continues or bool(part)
        return ids

    def _part_ids(self, text: str, *, continues: bool) -> list[int]:
        if not text:
            return []
        if not (continues and self._anchor):
            return _plain_ids(self.tokenizer, text)
        anchor, anchor_ids = self._anchor
        ids = _plain_ids(self.tokenizer, anchor + text)
        if ids[: len(anchor_ids)] != anchor_ids:
            raise DataError(f"the tokenizer merges {anchor!r} with what follows: {text[:40]!r}.")
        return ids[len(anchor_ids) :]


def _plain_ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _special_pattern(tokenizer: Any) -> re.Pattern[str] | None:
    """Matches where the text of a special token begins, also within another one's.

    A token of a single character cannot be broken up, so it stays what it is.
    """
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    tokens = {token for token in (*tokenizer.all_special_tokens, *added) if len(token) > 1}
    longest_first = sorted(tokens, key=len, reverse=True)
    spelled = "|".join(map(re.escape, longest_first))
    return re.compile(f"(?=({spelled})).", re.DOTALL) if tokens else None


def _leading_bos(tokenizer: Any) -> list[int]:
    """The BOS token, as a list, if the tokenizer puts one in front of a text."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("x")["input_ids"][:1] == [bos] else []


def _find_anchor(tokenizer: Any) -> tuple[str, list[int]] | None:
    """A text to put before a continuation where the tokenizer begins every text with a space.

    SentencePiece tokenizers do (their "dummy prefix"): "a" alone becomes the ids of " a". Behind
    an anchor, whose ids are cut off again, it does not. None where nothing of the kind happens.
    """
    anchor = "\n"
    ids = _plain_ids(tokenizer, anchor)
    behind = _plain_ids(tokenizer, anchor + "a")
    if behind[: len(ids)] == ids and behind[len(ids) :] == _plain_ids(tokenizer, "a"):
        return None
    return anchor, ids
