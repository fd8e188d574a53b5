"""Data for the three stages: reading, formats, chat templates, batches and agreement.

See ``docs/data.md`` for the formats with examples.
"""

from __future__ import annotations

from rlhf.data.agreement import AgreementStats, agreement_stats
from rlhf.data.chat import ChatFormat
from rlhf.data.collate import (
    EncodedExample,
    EncodedPair,
    encode_demonstrations,
    encode_preferences,
    pad_left,
    pad_right,
    prepare_tokenizer,
)
from rlhf.data.errors import DataError
from rlhf.data.formats import Demonstration, to_demonstrations, to_preferences, to_prompts
from rlhf.data.preferences import PreferenceDataset, PreferencePair, TiedComparison
from rlhf.data.reading import load_as, load_rows, source_name, split_slice
from rlhf.data.split import split_holdout
from rlhf.data.types import Message, Prompt, Text

__all__ = [
    "AgreementStats",
    "ChatFormat",
    "DataError",
    "Demonstration",
    "EncodedExample",
    "EncodedPair",
    "Message",
    "PreferenceDataset",
    "PreferencePair",
    "Prompt",
    "Text",
    "TiedComparison",
    "agreement_stats",
    "encode_demonstrations",
    "encode_preferences",
    "load_as",
    "load_rows",
    "pad_left",
    "pad_right",
    "prepare_tokenizer",
    "source_name",
    "split_holdout",
    "split_slice",
    "to_demonstrations",
    "to_preferences",
    "to_prompts",
]
