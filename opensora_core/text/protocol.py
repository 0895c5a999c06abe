"""What every text encoder offers: prompts in, `Condition` out."""

from __future__ import annotations

from typing import Protocol

from opensora_core.tensors import Condition


class TextEncoder(Protocol):
    """Prompts -> `Condition`. What a prompt becomes never depends on the others of its batch."""

    @property
    def max_length(self) -> int:
        """The number of tokens that a prompt is cut at, special tokens included."""
        ...

    def encode(self, prompts: list[str]) -> Condition:
        """Clean, tokenise and encode; on the device and in the dtype that the encoder was loaded with.

        Raises:
            InputError: a prompt that cannot be encoded, such as an unknown class.
        """
        ...

    def count_tokens(self, prompt: str) -> int:
        """Count the tokens of a prompt after cleaning and before cutting, special tokens included."""
        ...
