"""tokenizer.json -> ids, with the `tokenizers` library."""

import json
from functools import cached_property
from pathlib import Path

import tokenizers

from .config import only, read_object, shown
from .errors import CheckpointError, InputError

# The one value that is implemented of settings that change ids.
SETTINGS = {"add_bos_token": True, "add_eos_token": False, "add_prefix_space": True, "split_special_tokens": False}


class Tokenizer:
    """The Phi-3-vision tokenizer: Llama's BPE, a BOS at the front, special tokens in plain text parsed as such."""

    def __init__(self, path: str | Path):
        path = Path(path)
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.is_file():
            raise CheckpointError(f"{path} does not exist: a checkpoint folder needs a tokenizer.json")
        _check_settings(path.with_name("tokenizer_config.json"))
        try:
            self.tokenizer = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8-sig"))
            self.tokenizer.no_truncation()
            self.tokenizer.no_padding()
            if getattr(self.tokenizer.model, "dropout", None):  # merges left out at random, to train with
                self.tokenizer.model.dropout = None
            bos, text = (self.tokenizer.encode(text).ids for text in ("", "a cat"))
        except BaseException as e:
            raise CheckpointError(f"{path} is not a readable tokenizer.json: {_reason(e)}") from None
        if len(bos) != 1 or text[:1] != bos:
            raise CheckpointError(f"{path}: an empty text has the ids {shown(bos)}, 'a cat' {shown(text)}; a BOS is "
                                  "needed in front of every text, and nothing else in an empty one")  # fmt: skip
        self.largest_id = max(*bos, *self.tokenizer.get_vocab().values())

    def __call__(self, text: str) -> list[int]:
        """Ids of one text, BOS first. "" gives the BOS alone. Raises InputError where it is not valid Unicode."""
        try:
            text.encode()
        except UnicodeEncodeError as e:
            raise InputError(
                f"the text is not valid Unicode: character {e.start} is a lone surrogate", name="text"
            ) from None
        try:
            return self.tokenizer.encode(text).ids
        except BaseException as e:
            raise InputError(f"the tokenizer cannot read the text: {_reason(e)}", name="text") from None

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


def _check_settings(path: Path) -> None:
    """Refuses what transformers would change of tokenizer.json by the file beside it."""
    settings = read_object(path, "") if path.is_file() else {}
    only({k: v for k, v in settings.items() if v is not None}, f"{path}: ", **SETTINGS)


def _reason(error: BaseException) -> str:
    """What the library says: it raises bare Exception for everything, and panics, which are none. Others are raised."""
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error
    return f"{type(error).__name__}: {error}"[:300]  # which may quote all of a file
