"""RoBERTa's tokenizer as one file for a bundle, from a folder the user has."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from engine.errors import BacklineError

START, END, PADDING = "<s>", "</s>", "<pad>"


def read_tokenizer(folder: Path) -> Tokenizer:
    """A byte-level BPE that puts <s> and </s> around a text, as roberta-base's.

    folder: holds `tokenizer.json`, or `vocab.json` and `merges.txt`; a path to the tokenizer.json itself will
    do. Raises BacklineError for a folder without them, and for a tokenizer without RoBERTa's special tokens.
    """
    folder = Path(folder)
    whole = folder if folder.is_file() else folder / "tokenizer.json"
    try:
        if whole.is_file():
            tokenizer = Tokenizer.from_file(str(whole))
        elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            tokenizer = _from_merges(folder)
        else:
            raise BacklineError(
                f"{folder} holds no tokenizer (tokenizer.json, or vocab.json and merges.txt)."
            )
    except BacklineError:
        raise
    except Exception as error:  # tokenizers raises bare Exception
        raise BacklineError(f"{folder} holds a tokenizer that cannot be read: {error}.") from error
    ids = [tokenizer.token_to_id(token) for token in (START, PADDING, END)]
    if ids != [0, 1, 2] or tokenizer.encode("").ids != [0, 2]:
        raise BacklineError(
            f"{folder} holds another tokenizer than RoBERTa's: <s>, <pad>, </s> must be 0, 1, 2."
        )
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _from_merges(folder: Path) -> Tokenizer:
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split(" ", 1) for line in lines if line and not line.startswith("#version")]
    merges = [(left, right) for left, right in pairs]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.RobertaProcessing(
        (END, vocabulary[END]), (START, vocabulary[START]), add_prefix_space=False
    )
    tokenizer.add_special_tokens([token for token in (START, PADDING, END, "<unk>") if token in vocabulary])
    return tokenizer
