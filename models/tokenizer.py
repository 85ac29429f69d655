"""The files of a tokenizer, and the guard that keeps its special tokens out of the ids of a user's text."""

import base64
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Regex
from tokenizers.pre_tokenizers import Sequence, Split
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import cached_file, is_sentencepiece_available

from kozero.errors import UserError, require

NO_CLASS = (
    "nothing that tells how its other files are read; add a tokenizer_config.json with their tokenizer_class, e.g. "
    "GPT2Tokenizer (vocab.json, merges.txt), BertTokenizer (vocab.txt), LlamaTokenizer or T5Tokenizer (.model)"
)
# KoGPT2's and BERT's special and spare tokens: none of them is a word, also where their files do not call it special.
RESERVED = re.compile(r"</?s>|<(pad|unk|mask|usr|sys|unused\d+)>|\[(PAD|UNK|CLS|SEP|MASK|unused\d+)\]")
MOST_GROWTH, LONGEST_FORM = 1000, 54  # times as long as a text; bytes of the longest that Unicode's forms make of one
AROUND = (("", ""), ("가", ""), ("", "가"), ("가", "가"), ("a", "a"), ("\ue000", "\ue000"))
TO_FULL_WIDTH = {code: code + 0xFEE0 for code in range(0x21, 0x7F)}  # what NFKC turns into ASCII


def read_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder or hub name: a tokenizer.json as it is, other files by AutoTokenizer.

    AutoTokenizer builds even a tokenizer.json anew where the model's type has a tokenizer class: KoGPT2's becomes a
    byte-level GPT-2 tokenizer, which finds no Korean in that vocabulary.

    Raises: UserError for files that are missing; otherwise what transformers raises.
    """

    def has(file: str) -> bool:
        return cached_file(name, file, _raise_exceptions_for_missing_entries=False) is not None

    if has("tokenizer.json"):
        check_growth(name)
        return PreTrainedTokenizerFast.from_pretrained(name)
    for here, missing in (("vocab.json", "merges.txt"), ("merges.txt", "vocab.json")):
        require(not has(here) or has(missing), f"tokenizer {name}: {here} without {missing}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except ValueError as error:
        require("instantiate the backend" not in str(error), f"tokenizer {name}: no tokenizer.json, and {NO_CLASS}")
        if "tiktoken" in str(error):  # asked for last, whatever is wrong with a .model file
            wrong = "is no sentencepiece model" if is_sentencepiece_available() else "needs: pip install sentencepiece"
            raise UserError(f"tokenizer {name}: its .model file {wrong}") from None
        raise
    check_files(tokenizer, name)
    return tokenizer


def check_growth(name: str) -> None:
    """Refuse a tokenizer.json whose steps may make a text of a line larger than memory. Before the library reads it,
    which sends added tokens through them."""
    values = json.loads(Path(cached_file(name, "tokenizer.json")).read_bytes())
    for part in ("normalizer", "decoder"):
        times = growth(values.get(part))
        long = f"its {part} may make a text {times:,.0f} times as long; give one without such a step"
        require(times <= MOST_GROWTH, f"tokenizer {name}: {long}")


def growth(step: Any) -> float:
    """How many times as long a step of a tokenizer.json makes a text, at most. What Unicode's own forms add is left
    out, for no file can choose it."""
    kind = step.get("type") if isinstance(step, dict) else None
    if kind == "Sequence":
        return math.prod(map(growth, step.get("normalizers") or step.get("decoders") or ()))
    if kind == "Prepend":
        return 1 + len(step["prepend"])
    if kind == "Replace":  # an expression may match between all characters
        text = step["pattern"].get("String")
        return max(1, len(step["content"]) / len(text)) if text else 1 + len(step["content"])
    if kind == "Precompiled":  # sentencepiece's: the size of a trie, the trie, what it maps to, each ended by a zero
        charsmap = base64.b64decode(step["precompiled_charsmap"] or "")
        mapped = charsmap[4 + int.from_bytes(charsmap[:4], "little") :].split(b"\0")
        return max(1, max(map(len, mapped)) / LONGEST_FORM)
    return 1


def check_files(tokenizer: Any, name: str) -> None:
    """Refuse a tokenizer that AutoTokenizer builds although files of its class are missing: one without words, or one
    that splits text otherwise."""
    kind = type(tokenizer)
    fast = f"tokenizer {name}: {kind.__name__} has no fast form, which is needed here; convert it to a tokenizer.json"
    require(isinstance(tokenizer, PreTrainedTokenizerFast), fast)
    # Without a class of its own a .model file loses the mark of a space that its texts begin with.
    require(kind is not PreTrainedTokenizerFast, f"tokenizer {name}: no tokenizer.json, and {NO_CLASS}")
    for key, file in kind.vocab_files_names.items():
        found = key == "tokenizer_file" or tokenizer.init_kwargs.get(key)
        require(bool(found), f"tokenizer {name}: no tokenizer.json, and no {file}, which {kind.__name__} needs")


def keep_out_of_text(tokenizer: PreTrainedTokenizerFast, also: Iterable[int] = ()) -> None:
    """Make sure that no text has the id of a special token, of a spare one or of those in `also`, whatever it spells.
    Only the token for unknown characters stays, unless it has another role too.

    An added token that is not special would be found in every text, so it is made special. Where the model itself
    spells a token, by its vocabulary or its merges, text is cut within that spelling before the model sees it.

    Raises: UserError when text becomes such a token all the same.
    """
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = tokenizer.split_special_tokens = True
    backend.no_padding()
    backend.no_truncation()
    if getattr(backend.model, "dropout", None):
        backend.model.dropout = None  # of merges, by chance: a text is encoded once here, and its scores are to last
    added = backend.get_added_tokens_decoder()
    kept = kept_out(tokenizer, added, also)
    plain = [token for number, token in added.items() if number in kept and not token.special]
    for token in plain:
        token.special = True
    backend.add_special_tokens(plain)
    if spelled := [token for number, token in kept.items() if is_spelled(backend, token, number)]:
        pre_tokenizer = backend.pre_tokenizer
        backend.pre_tokenizer = Sequence([pre_tokenizer, cut_within(spelled)]) if pre_tokenizer else cut_within(spelled)
    check_text(tokenizer, kept)


def kept_out(tokenizer: PreTrainedTokenizerFast, added: dict[int, Any], also: Iterable[int]) -> dict[int, str]:
    """The tokens that no text may become, by id."""
    special = {number for number, token in added.items() if token.special}
    named = {number for token, number in tokenizer.get_vocab().items() if RESERVED.fullmatch(token)}
    ids = sorted(special | named | set(tokenizer.all_special_ids) | set(also))
    return {number: token for number in ids if (token := tokenizer.convert_ids_to_tokens(number))}


def is_spelled(backend: Any, token: str, number: int) -> bool:
    """Whether the model gives a token for its spelling, or within other text, and is handed that spelling whole."""

    def ids(text: str) -> list[int]:
        try:
            return [found.id for found in backend.model.tokenize(text)]
        except Exception:  # a model without a token for unknown characters
            return []

    texts = [before + token + behind for before, behind in AROUND]
    splits = backend.pre_tokenizer.pre_tokenize_str if backend.pre_tokenizer else lambda text: [(text, None)]
    return (
        len(token) > 1
        and any(number in ids(text) and not any(number in ids(one) for one in text) for text in texts)  # known letters
        and any(token in part for text in texts for part, _ in splits(text))
    )


def cut_within(tokens: Iterable[str]) -> Split:
    """Parts text behind the first character of each spelling of some tokens."""
    return Split(Regex("|".join(f"{re.escape(t[0])}(?={re.escape(t[1:])})" for t in tokens)), "merged_with_previous")


def check_text(tokenizer: PreTrainedTokenizerFast, kept: dict[int, str]) -> None:
    """Encode the spelling of each token, and what NFKC makes that spelling of, alone and within other text."""
    named = tokenizer.special_tokens_map.items()
    roles = {str(token) for role, token in named if role != "unk_token"}
    refused = {number for number, token in kept.items() if number != tokenizer.unk_token_id or token in roles}
    for before, behind in AROUND:
        texts = [f"{before}{form}{behind}" for t in kept.values() for form in (t, t.translate(TO_FULL_WIDTH))]
        ids = tokenizer.backend_tokenizer.encode(" ".join(texts), add_special_tokens=False).ids
        for number in refused.intersection(ids):
            raise UserError(
                f"tokenizer {tokenizer.name_or_path}: text becomes its token {kept[number]!r}, which no text may; give "
                "another tokenizer"
            )
