"""A GPT-2 language model with its tokenizer: from the hub, a folder or a JSON config, and back into a folder that
plain transformers loads. Of the rest of the project only `kozero.errors` and `kozero.json_files` are used."""

import copy
import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.activations import ACT2FN
from transformers.utils import logging as transformers_logging

from kozero.errors import UserError, first_line, nearest, no_panic, require
from kozero.json_files import check_keys, read_json
from models import loading
from models.causal_lm import CausalLM, build, reset_row, resize_vocabulary
from models.loading import build_or_refuse, cannot_load, load_any_config, load_checked, quiet, require_folder
from models.tokenizer import keep_out_of_text, read_tokenizer

transformers_logging.disable_progress_bar()  # a bar for each file that is read or written hides what matters

# What KoGPT2's own tokenizer files leave out (its authors pass them by hand), and BERT's names.
SPECIAL_TOKENS = {
    "bos_token": ("</s>",),
    "eos_token": ("</s>",),
    "unk_token": ("<unk>", "[UNK]"),
    "pad_token": ("<pad>", "[PAD]"),
    "mask_token": ("<mask>", "[MASK]"),
    "cls_token": ("[CLS]",),
    "sep_token": ("[SEP]",),
}
DEFAULT_PAUSE, NEW_PAUSE = "<unused0>", "<pause>"
FLAG = "--model_name_or_path"
SPARE_ROWS = 128  # fewer rows without a token round a vocabulary up
FILE_NAME = re.compile(r"\w[\w.-]{,99}", re.ASCII)
# What is no buffer: files of the hub hold those besides.
WEIGHTS = re.compile(r"(transformer\.)?h\.\d+\.(ln|attn\.c|mlp)|lm_head\.bias")
SIZES = ("n_layer", "n_embd", "n_head", "vocab_size", "n_positions", "n_inner")
DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
RANGES = (*((name, 0, 1) for name in DROPOUTS), ("layer_norm_epsilon", 1e-20, 1), ("initializer_range", 0, 10))


@dataclass
class LanguageModel:
    """A model ready for an engine, and its tokenizer."""

    module: CausalLM
    tokenizer: PreTrainedTokenizerFast
    pause_settings: dict[str, Any]  # those it was trained with; empty for a model that has not met pauses

    @property
    def pause_id(self) -> int | None:
        """The token that pauses; None where the vocabulary has none."""
        return self.module.pause_id

    @property
    def config(self) -> GPT2Config:
        """The model's configuration, as transformers saves it in config.json."""
        return self.module.lm.config


def load_tokenizer(name: str, writes: bool = True) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a folder or hub name, with the usual special tokens where its files name none. No text has
    the id of a special token (see keep_out_of_text).

    Args: writes: it is for a model that writes, and so has to end a text.

    Raises: UserError when it is not there, has no end-of-text token that it needs, or takes text for a special token.
    """
    require_folder(name, "tokenizer")
    try:
        with quiet(), no_panic(f"tokenizer {name}"):
            tokenizer = read_tokenizer(name)
            complete(tokenizer, name, writes)
            keep_out_of_text(tokenizer)
    except UserError:
        raise
    except Exception as error:  # OSError, ValueError, or the tokenizer library's own bare Exception
        raise cannot_load(name, "tokenizer", error) from None
    return tokenizer


def complete(tokenizer: PreTrainedTokenizerFast, name: str, writes: bool) -> None:
    """Give a tokenizer the usual special tokens where its files name none; refuse what load_tokenizer does."""
    vocabulary = tokenizer.get_vocab()
    last, number = max(vocabulary.items(), key=itemgetter(1), default=("", -1))
    beyond = f"the id of {last!r} is {number:,}, and it has {len(tokenizer):,} tokens; give one whose ids have no gaps"
    require(number < len(tokenizer), f"tokenizer {name}: {beyond}")
    for role, tokens in SPECIAL_TOKENS.items():
        for token in tokens:
            if getattr(tokenizer, role) is None and token in vocabulary:
                setattr(tokenizer, role, token)
    if (unknown := getattr(tokenizer.backend_tokenizer.model, "unk_token", None)) in vocabulary:
        tokenizer.unk_token = unknown  # what is given for unknown characters, whatever a file says
    if writes and tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer {name}: no end-of-text token; its vocabulary lacks </s>")
    if writes and tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token


def read_config(path: Path) -> GPT2Config:
    """A GPT2Config from JSON; an unknown key or another architecture is a UserError."""
    values = read_model_json(path, "gpt2")
    known = {f.name for f in dataclasses.fields(GPT2Config)} | {"model_type"}
    check_keys(values, known, f"--config_file {path}")
    try:
        with quiet():
            config = GPT2Config(**values)
    except Exception as error:  # the config checks types by several libraries' errors
        raise UserError(f"--config_file {path}: {first_line(error)}") from None
    check_gpt2(config, f"--config_file {path}")
    return with_one_gelu(config)


def check_gpt2(config: GPT2Config, where: str) -> None:
    """Refuse the first value that no GPT-2 can have, or that is not built here; `where` names the file."""

    def check(right: bool, key: str, what: str) -> None:
        require(right, f"{where}: {key} {getattr(config, key)!r}: must be {what}")

    for key in SIZES:
        value, most = getattr(config, key), loading.MOST_LAYERS if key == "n_layer" else 2**24
        whole = (type(value) is int and 1 <= value <= most) or (value is None and key == "n_inner")
        check(whole, key, f"a whole number from 1 to {most:,}")
    check(config.n_embd % config.n_head == 0, "n_head", f"a divisor of n_embd {config.n_embd}")
    for key, least, most in RANGES:
        value = getattr(config, key)
        check(type(value) in (int, float) and least <= value < most, key, f"in [{least:g}, {most:g})")
    check(config.add_cross_attention is False, "add_cross_attention", "false")
    check(config.tie_word_embeddings is True, "tie_word_embeddings", "true: the head is tied to the embedding")
    name = config.activation_function
    require(name in ACT2FN, f"{where}: activation_function {name!r} is unknown{nearest(name, ACT2FN)}")


def with_one_gelu(config: GPT2Config) -> GPT2Config:
    """The same formula in one kernel instead of eight."""
    if config.activation_function == "gelu_new":
        config.activation_function = "gelu_pytorch_tanh"
    return config


def read_model_json(path: Path, *model_types: str) -> dict[str, Any]:
    """The values of a model's JSON config, which must name one of `model_types`."""
    try:
        values = read_json(path)
    except UserError as error:
        raise UserError(f"--config_file {error}") from None
    if not isinstance(values, dict) or values.get("model_type") not in model_types:
        found = values.get("model_type") if isinstance(values, dict) else type(values).__name__
        wanted = " or ".join(map(repr, model_types))
        raise UserError(f"--config_file {path}: model_type {found!r}; {wanted} is needed here")
    return values


def load_config(name: str, flag: str = FLAG) -> GPT2Config:
    """The config of a folder or hub name."""
    config = load_any_config(name, flag)
    require(config.model_type == "gpt2", f"{flag} {name}: model_type {config.model_type!r}; 'gpt2' is needed here")
    check_gpt2(config, f"{flag} {name}: config.json")
    return with_one_gelu(config)


def load_weights(name: str, config: GPT2Config, flag: str = FLAG) -> GPT2LMHeadModel:
    """A pre-trained GPT-2 in 32 bit."""
    lm = load_checked(AutoModelForCausalLM, config, name, flag, WEIGHTS.match)
    tied = lm.lm_head.weight is lm.transformer.wte.weight  # transformers leaves two that differ apart
    own = "its lm_head.weight differs from its embedding; give a model whose head is the embedding, as config.json says"
    require(tied, f"{flag} {name}: {own}")
    lm.generation_config = GenerationConfig()  # what may be written is the model's business here, not a file's
    return lm


def random_weights(config: GPT2Config, seed: int, path: str) -> GPT2LMHeadModel:
    """A model of a config file's sizes."""
    return build_or_refuse(lambda: build(config, seed), config, path)


def load(
    model_name_or_path: str | None, config_file: str | None, tokenizer_name: str | None, *, pause_token: str,
    with_pauses: bool, seed: int, dropout: float | None = None,
) -> LanguageModel:  # fmt: skip
    """Build a LanguageModel, the same on every rank.

    Args:
        model_name_or_path: hub name or folder; else `config_file` makes one with random weights.
        tokenizer_name: hub name or folder; the model's own by default.
        pause_token: token that pauses. A tokenizer that lacks it gets a new one when `with_pauses`.
        with_pauses: this run trains with pauses; a model that has not met any gets a fresh pause row.
        dropout: replaces the three dropout rates of the config.
    """
    require(bool(model_name_or_path) != bool(config_file), "give either --model_name_or_path or --config_file")
    named = tokenizer_name or model_name_or_path
    require(bool(named), "--config_file makes random weights and needs --tokenizer_name_or_path")
    config = load_config(model_name_or_path) if model_name_or_path else read_config(Path(config_file))
    tokenizer = load_tokenizer(named)
    lm = load_weights(model_name_or_path, config) if model_name_or_path else random_weights(config, seed, config_file)
    # Without it GPT-2 looks for padding in every batch and warns; rows here are packed and generation passes its own.
    lm.config.pad_token_id = None
    check_vocabulary(len(tokenizer), lm.config.vocab_size, foreign=bool(model_name_or_path and tokenizer_name))
    if dropout is not None:
        set_dropout(lm, dropout)
    return with_pause_token(lm, tokenizer, model_name_or_path, pause_token, with_pauses, seed)


def with_pause_token(
    lm: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, name: str | None, pause_token: str, with_pauses: bool,
    seed: int,
) -> LanguageModel:  # fmt: skip
    """The model with its pause token found, or made when `with_pauses`; see load."""
    settings = pause_settings_of(lm.config, name)
    token = settings.get("token", pause_token)
    check_pause_token(token, tokenizer)
    same = pause_token in (token, DEFAULT_PAUSE)
    require(same, f"--pause_token {pause_token}: {name} was trained with {token}; leave it out")
    pause_id, known = tokenizer.get_vocab().get(token), "token" in settings
    lacks = known and pause_id is None
    require(not lacks, f"{name}: its config.json pauses with {token}, which the tokenizer lacks")
    if pause_id is None and with_pauses:
        pause_id = add_pause_token(lm, tokenizer)
    if pause_id is not None:
        keep_out_of_text(tokenizer, [pause_id])
    if with_pauses and not known:
        reset_row(lm, pause_id, seed)
    silent = [*range(len(tokenizer), lm.config.vocab_size), *([pause_id] if with_pauses or known else [])]
    return LanguageModel(CausalLM(lm, silent, pause_id), tokenizer, settings)


def pause_settings_of(config: PreTrainedConfig, name: str | None) -> dict[str, Any]:
    """The pauses that a model was trained with, empty when with none."""
    settings, most = getattr(config, "pause", None) or {}, getattr(config, "max_position_embeddings", 0)
    numbers = ("num_pauses", "num_inference_pauses")
    right = isinstance(settings, dict)
    if right and settings:
        right = isinstance(settings.get("token"), str) or settings.get("placement") == "filler"
        right = right and all(type(settings.get(k)) is int and 0 <= settings[k] <= most for k in numbers)
    needed = f"it needs token, {' and '.join(numbers)}, {most} at most"
    require(right, f"{name}: 'pause' in its config.json is {settings!r}; {needed}")
    return settings


def check_pause_token(token: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    """A pause is a token that no text contains: neither a word nor one that means something already."""
    if not isinstance(token, str) or not re.fullmatch(r"<[^<>\s]+>", token):
        raise UserError(f"--pause_token {token!r}: not a spare token; name one like <unused0>")
    if token in tokenizer.all_special_tokens and token != NEW_PAUSE:
        raise UserError(f"--pause_token {token}: the tokenizer uses it already; name a spare one like <unused0>")


def check_vocabulary(num_tokens: int, vocab_size: int, foreign: bool) -> None:
    """A model needs a row for each token; with a tokenizer that is not its own, hundreds of unused rows are a sign
    that the two do not belong together."""
    if num_tokens > vocab_size or (foreign and vocab_size - num_tokens >= SPARE_ROWS):
        raise UserError(
            f"vocabulary mismatch: the tokenizer has {num_tokens:,} tokens, the model {vocab_size:,} rows; give the "
            "tokenizer that belongs to the model with --tokenizer_name_or_path"
        )


def add_pause_token(lm: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast) -> int:
    """Add `<pause>` to a vocabulary without spare tokens, and rows for it where there are none left."""
    tokenizer.add_tokens([AddedToken(NEW_PAUSE, special=True)], special_tokens=True)
    if len(tokenizer) > lm.config.vocab_size:
        resize_vocabulary(lm, len(tokenizer))
    return tokenizer.convert_tokens_to_ids(NEW_PAUSE)


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Recompute activations in the backward pass; transformers renamed the call in 5.23."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    # It also lets all embeddings' outputs require gradients: the backward pass would cross frozen layers for nothing.
    model.disable_input_require_grads()


def own_values(config: PreTrainedConfig) -> dict[str, int | float | str]:
    """Sizes and choices of an architecture by their names in config.json, without dropout rates."""
    values = config.to_dict()
    own = values.keys() - PreTrainedConfig().to_dict().keys() | {"model_type"}
    kept = (name for name in sorted(own) if "drop" not in name and isinstance(values[name], int | float | str))
    return {name: values[name] for name in kept}


def values_of_model(config: PreTrainedConfig) -> dict[str, int | float | str]:
    """The same by the words that tell a user which of them has changed."""
    return {f"{name} of the model": value for name, value in own_values(config).items()}


def set_dropout(model: PreTrainedModel, rate: float) -> None:
    """One dropout rate everywhere, in the config and in the modules that were built from it."""
    for name in {*DROPOUTS, "dropout_prob"} & model.config.to_dict().keys():
        setattr(model.config, name, rate)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = rate


def export(
    folder: Path, model: LanguageModel, state: dict[str, torch.Tensor] | None, pause: dict[str, Any], card: str
) -> None:
    """Fill a folder that `AutoModelForCausalLM` and `AutoTokenizer` load: safetensors in 32 bit with tied weights
    once, the tokenizer, pause settings in config.json, silent tokens in generation_config.json, and a model card.

    Args: state: all weights by the names of `model.module`; None: the folder without them.
    """
    config, tokenizer = copy.deepcopy(model.config), model.tokenizer
    roles = {role: getattr(tokenizer, role) for role in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config.update(roles)
    if pause:
        config.pause = pause
    with torch.device("meta"):
        lm = GPT2LMHeadModel(config)
    if state is not None:
        missing, unexpected = lm.load_state_dict(model.module.plain_state(state), strict=False, assign=True)
        lm.tie_weights()
        if set(missing) - {"lm_head.weight"} or unexpected:
            raise RuntimeError(f"weights do not match the model: missing {missing}, unexpected {unexpected}")
    silent = [*range(len(tokenizer), config.vocab_size), *([pause["token_id"]] if "token_id" in pause else [])]
    lm.generation_config.update(**roles, suppress_tokens=silent or None)
    save_folder(folder, lm, tokenizer, card, None if state is None else {})


def save_folder(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, card: str,
    beside: Mapping[str, dict[str, torch.Tensor]] | None,
) -> None:  # fmt: skip
    """Fill a folder with a model, its tokenizer and card.

    Args: beside: files of further weights; None: no weights at all.
    """
    model.save_pretrained(folder, state_dict={} if beside is None else None)
    # The names of chat templates become those of files unless they are kept in tokenizer_config.json.
    templates = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    tokenizer.save_pretrained(folder, save_jinja_files=all(map(FILE_NAME.fullmatch, templates)))
    (folder / "README.md").write_text(card, encoding="utf-8", errors="backslashreplace")
    for name, weights in (beside or {}).items():
        save_file(weights, folder / name)
