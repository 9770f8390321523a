"""What a tokenizer's file may say.

MidiTok is handed nothing of it but the merges, after a look at them. All else follows from
tokens.json. MidiTok would build whatever vocabulary a file asks for, of any size, and take any name
in it for an attribute of its own: here the file has to say what follows, and no more.
"""

import json
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from pydantic import ConfigDict, Field
from typing_extensions import TypedDict  # pydantic wants this one before Python 3.12

from lib.env.errors import Damaged
from lib.env.schema import Count, parse, read_json

AGAIN = "build it again"
MOST_TOKENS = 2**16  # a token is written in 16 bits
MOST_LETTERS = 4_000_000  # in all tokens together; a letter stands for a base token
MARK = "▁"  # put before a bar by Hugging Face's Metaspace, which stands for no music

Names = Annotated[dict[str, Count], Field(max_length=MOST_TOKENS)]


class Metaspace(TypedDict):
    """How bars are told apart before they are merged."""

    type: Literal["Metaspace"]
    replacement: Literal["▁"]


class Merges(TypedDict):
    """Byte-pair encoding and nothing else: no token dropped by chance, no other alphabet."""

    type: Literal["BPE"]
    vocab: Names
    merges: Annotated[list, Field(max_length=MOST_TOKENS)]
    dropout: NotRequired[None]
    unk_token: NotRequired[None]
    continuing_subword_prefix: NotRequired[Literal[""] | None]
    end_of_word_suffix: NotRequired[Literal[""] | None]
    ignore_merges: NotRequired[Literal[False]]


class Added(TypedDict):
    """A token that is never merged."""

    id: Count
    content: str


class Model(TypedDict):
    """A tokenizer of Hugging Face's, of the one kind that `Tokenizer.learn` makes."""

    added_tokens: Annotated[list[Added], Field(max_length=MOST_TOKENS)]
    pre_tokenizer: Metaspace
    model: Merges
    truncation: NotRequired[None]
    padding: NotRequired[None]
    normalizer: NotRequired[None]
    post_processor: NotRequired[None]


class File(TypedDict):
    """tokenizer.json as MidiTok writes it; without merges it ends after the versions."""

    __pydantic_config__ = ConfigDict(extra="forbid")
    config: dict[str, Any]
    tokenization: str
    miditok_version: NotRequired[str]
    symusic_version: NotRequired[str]
    hf_tokenizers_version: NotRequired[str]
    _vocab_base: NotRequired[Names]
    _vocab_base_byte_to_token: NotRequired[dict[str, str]]
    _model: NotRequired[str]


def load_merges(path: str | Path, base) -> None:
    """Give `base`, a tokenizer of MidiTok's that knows none yet, the merges in its file.

    Raises `UserError`, which names the fact that does not follow from `base`, or makes no sense.
    """
    found = read_json(path, File, do=AGAIN)
    ours = json.loads(json.dumps(base.to_dict()))
    letters = base._vocab_base_byte_to_token
    wanted = {
        "tokenization": ours["tokenization"],
        "_vocab_base": base.vocab,
        "_vocab_base_byte_to_token": letters,
    }
    settings = _flat(ours["config"])
    for name, value in _flat(found["config"]).items():
        # other versions of MidiTok know more facts, or fewer
        if name in settings and value != settings[name]:
            raise _damaged(
                path,
                f"config.{name} is {json.dumps(value)[:80]}, and the tokens are those of "
                f"{json.dumps(settings[name])[:80]}",
            )
    for name, value in wanted.items():
        if found.get(name, value) != value:
            raise _damaged(path, f"{name} is not that of its settings")
    if "_model" in found:
        model = parse(found["_model"], Model, where=f"{path}, _model", do=AGAIN)
        _check_merges(path, model, {letter: base.vocab[name] for letter, name in letters.items()})
        base._model = _opened(path, found["_model"])
        base._vocab_learned_bytes_to_tokens = {
            token: [letters[letter] for letter in token.removeprefix(MARK)]
            for token in model["model"]["vocab"]
        }


def _flat(config: dict) -> dict:
    """Settings, with those that MidiTok keeps in a table of their own among the others."""
    more = config.get("additional_params")
    return {**config, **more, "additional_params": {}} if isinstance(more, dict) else config


def _check_merges(path: str | Path, model: Model, letters: dict[str, int]) -> None:
    """Raise `UserError` unless base tokens keep their numbers and all others are made of them."""
    vocab = model["model"]["vocab"]
    strange = {letter for token in vocab for letter in token.removeprefix(MARK)} - letters.keys()
    moved = [letter for letter, number in letters.items() if vocab.get(letter) != number]
    added = [token for token in model["added_tokens"] if vocab.get(token["content"]) != token["id"]]
    for wrong, why in (
        (sum(map(len, vocab)) > MOST_LETTERS, "its tokens are too long"),
        (
            sorted(vocab.values()) != list(range(len(vocab))),
            "its tokens are not numbered from 0 on",
        ),
        (moved, "a base token has another number among the merges"),
        (strange, "a merge is of what is no base token"),
        (added, "an added token is none of the vocabulary"),
    ):
        if wrong:
            raise _damaged(path, why)


def _opened(path: str | Path, text: str):
    """The merges, in Hugging Face's tokenizer."""
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # it has no kind of error of its own
        raise _damaged(path, f"its merges make no sense, {str(error)[:80]}") from error


def _damaged(path: str | Path, why: str) -> Damaged:
    return Damaged(f"{path} is damaged ({why}): {AGAIN}")
