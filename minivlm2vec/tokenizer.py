"""tokenizer.json -> ids, with the `tokenizers` library."""

import json
from functools import cached_property
from pathlib import Path

import tokenizers

from .errors import CheckpointError, InputError


class Tokenizer:
    """The Phi-3-vision tokenizer: Llama's BPE, a BOS at the front, special tokens in plain text parsed as such."""

    def __init__(self, path: str | Path):
        path = Path(path)
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.is_file():
            raise CheckpointError(f"{path} does not exist: a checkpoint folder needs a tokenizer.json")
        try:
            self.tokenizer = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as e:  # the library raises bare Exception for everything
            raise CheckpointError(f"{path} is not a readable tokenizer.json: {e}") from None
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()

    def __call__(self, text: str) -> list[int]:
        """Ids of one text, BOS first. "" gives the BOS alone. Raises InputError where it is not valid Unicode."""
        try:
            text.encode()
        except UnicodeEncodeError as e:
            raise InputError(
                f"the text is not valid Unicode: character {e.start} is a lone surrogate", name="text"
            ) from None
        return self.tokenizer.encode(text).ids

    @cached_property
    def longest_token(self) -> int:
        """Characters of the vocabulary's longest token."""
        return max(map(len, self.tokenizer.get_vocab()))

    def __len__(self) -> int:
        return self.tokenizer.get_vocab_size()

    def content_hash(self) -> str:
        """A name for the vocabulary, to tell two tokenizers apart."""
        import hashlib

        state = json.loads(self.tokenizer.to_str())
        return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()[:16]
