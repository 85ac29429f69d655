"""The model of a pre-training run with what it learns by, its tokenizer, and the folder that it leaves."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GPT2LMHeadModel, PreTrainedConfig, PreTrainedModel

from kozero import distributed
from kozero.checkpoint import RunState
from kozero.errors import require
from models import encoders, language_model
from models.causal_lm import CausalLM
from models.language_model import checkpoint_activations
from models.loading import load_any_config
from pretrain.arguments import CorpusArguments, PretrainingArguments
from pretrain.objectives import EncoderPretraining
from pretrain.rows import Tokens

ROOT = Path(__file__).parent.parent
SAMPLE_TOKENIZER = ROOT / "sample_data" / "tokenizer"
ARCHITECTURES = {kind.model_type: name for name, (kind, _) in encoders.ENCODERS.items()} | {"gpt2": "causal_lm"}

# How an exported folder is used, for its card.
LANGUAGE_MODEL_USE = """from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)"""
ENCODER_USE = """import models.encoders  # of KoZeRO: tells transformers the architecture
from transformers import AutoModel, AutoTokenizer

model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
# heads.safetensors holds what stood on the encoder in pre-training"""


def load_tokenizer(corpus: CorpusArguments) -> Any:
    """The tokenizer of a run; the sample one without a name. One that cannot make the rows of an encoder is refused
    here, before the corpus is read."""
    name = corpus.tokenizer_name_or_path
    if not name:
        name = str(SAMPLE_TOKENIZER)
        distributed.say("no --tokenizer_name_or_path: using the sample tokenizer (4,096 tokens)")
    writes = corpus.model == "causal_lm"
    tokenizer = distributed.machine_first(lambda: language_model.load_tokenizer(name, writes))
    if not writes:
        Tokens.of(tokenizer)
    return tokenizer


def build_module(training: PretrainingArguments, corpus: CorpusArguments, tokenizer: Any) -> nn.Module:
    """The model with its objectives: random weights, or those of --checkpoint."""
    if training.checkpoint:
        check_checkpoint(training.checkpoint, corpus)
    writes = corpus.model == "causal_lm"
    model = causal_lm(training, corpus, len(tokenizer)) if writes else encoder_of(training, corpus, tokenizer)
    if corpus.dropout is not None:
        language_model.set_dropout(model, corpus.dropout)
    length, positions = corpus.max_seq_length, model.config.max_position_embeddings
    few = f"the model has {positions} positions; choose at most that"
    require(length <= positions, f"--max_seq_length {length}: {few}")
    if training.gradient_checkpointing:
        checkpoint_activations(model)
    if writes:
        pauses = (corpus.pause_token, corpus.num_pauses > 0)
        return language_model.with_pause_token(model, tokenizer, training.checkpoint, *pauses, training.seed).module
    with torch.random.fork_rng():
        torch.manual_seed(training.seed)
        module = EncoderPretraining(model, corpus.task)
    if training.checkpoint and (fresh := encoders.load_heads(module, training.checkpoint)):
        distributed.say(f"--checkpoint {training.checkpoint}: no {', '.join(fresh)} beside the encoder; drawn anew")
    return module


def check_checkpoint(folder: str, corpus: CorpusArguments) -> None:
    """The model of --checkpoint has its own config, which must be of the architecture that --model names."""
    named = f"--checkpoint {folder}"
    own = "the checkpoint has a config.json of its own; leave --config_file out"
    require(not corpus.config_file, f"--config_file {corpus.config_file} and {named}: {own}")
    kind = load_any_config(folder, "--checkpoint").model_type
    known = f"one of {', '.join(ARCHITECTURES)} is needed here"
    require(kind in ARCHITECTURES, f"{named}: model_type {kind!r}; {known}")
    found = ARCHITECTURES[kind]
    other = f"its architecture is {found}, that of this run {corpus.model}; give --model {found}"
    require(found == corpus.model, f"{named}: {other}")


def causal_lm(training: PretrainingArguments, corpus: CorpusArguments, num_tokens: int) -> GPT2LMHeadModel:
    """A GPT-2 of a config file, its vocabulary a multiple of 128 (which keeps matrix products fast), or a folder's."""
    folder, flag = training.checkpoint, "--checkpoint"
    if folder:
        config = language_model.load_config(folder, flag)
        lm = language_model.load_weights(folder, config, flag)
        language_model.check_vocabulary(num_tokens, lm.config.vocab_size, foreign=True)
        return lm
    path = corpus.config_file or str(ROOT / "models" / "kogpt2_config.json")
    config = language_model.read_config(Path(path))
    rows = -(-num_tokens // 128) * 128
    if config.vocab_size != rows:
        used = f"the tokenizer's {num_tokens}, rounded up to {rows}, is used"
        distributed.say(f"{path}: vocab_size {config.vocab_size}: {used}")
    config.vocab_size = rows
    return language_model.random_weights(config, training.seed, path)


def encoder_of(training: PretrainingArguments, corpus: CorpusArguments, tokenizer: Any) -> PreTrainedModel:
    """An encoder of a config file, or a folder's, whose tokenizer must be that of this run."""
    if training.checkpoint:
        source = f"--checkpoint {training.checkpoint}"
        encoder = encoders.load_encoder(training.checkpoint, "--checkpoint")
        num_rows, num_tokens = encoder.config.vocab_size, len(tokenizer)
        own = f"give its own with --tokenizer_name_or_path {training.checkpoint}"
        require(num_rows == num_tokens, f"{source}: has {num_rows:,} tokens, the tokenizer {num_tokens:,}; {own}")
        check_segments(encoder.config, corpus.task, source)
        return encoder
    path = Path(corpus.config_file or encoders.config_file_of(corpus.model))
    config = encoders.read_encoder_config(path, corpus.model, tokenizer, distributed.say)
    check_segments(config, corpus.task, f"--config_file {path}")
    return encoders.build_encoder(config, training.seed)


def check_segments(config: PreTrainedConfig, task: str, source: str) -> None:
    """Whether two segments changed places is read at [CLS], which must tell them apart and see them."""
    if task != "mlm_sop":
        return
    few = f"type_vocab_size {config.type_vocab_size}: --task mlm_sop has 2 segments; raise it or give --task mlm"
    require(config.type_vocab_size >= 2, f"{source}: {few}")
    blind = "causal true: [CLS] sees nothing behind it, so --task mlm_sop cannot be learnt; give --task mlm"
    require(not config.causal, f"{source}: {blind}")


def pause_settings(module: CausalLM, corpus: CorpusArguments, tokenizer: Any) -> dict[str, Any]:
    """What config.json of the exported model says about its pauses: those of this run, or of the one before it."""
    if not corpus.num_pauses:
        return getattr(module.lm.config, "pause", None) or {}
    token = {"token": tokenizer.convert_ids_to_tokens(module.pause_id), "token_id": module.pause_id}
    where = {"placement": corpus.pause_placement, "fraction": corpus.pause_fraction}
    return token | where | {"num_pauses": 0, "num_inference_pauses": 0}


def export(
    module: nn.Module, corpus: CorpusArguments, tokenizer: Any, folder: Path, state: dict | None, text: str
) -> None:
    """Fill a folder that transformers loads, without weights where `state` is None; the heads of an encoder lie in it
    too."""
    if isinstance(module, CausalLM):
        model = language_model.LanguageModel(module, tokenizer, {})
        language_model.export(folder, model, state, pause_settings(module, corpus, tokenizer), text)
        return
    encoders.export_encoder(folder, module, state, tokenizer, text)


def card(name: str, run: dict, state: RunState) -> str:
    """A short model card: what it is, from which text and settings, with which scores, and how it is loaded."""
    arguments = run["arguments"]
    scores = state.best_scores
    kept = f"those of step {state.best_step:,}, the best evaluation" if scores else "the last"
    corpus = arguments["corpus_path"] or "the sample corpus"
    if arguments["corpus_hub"]:
        corpus = f"{arguments['corpus_hub']}, split {arguments['hub_split']}, column {arguments['text_column']}"
    facts = [
        f"Start: {arguments['checkpoint'] or 'random weights'}",
        f"Tokenizer: {arguments['tokenizer_name_or_path'] or 'the sample tokenizer (4,096 tokens)'}",
        f"Corpus: {corpus}",
        f"Steps: {state.step:,}, {state.real_tokens:,} tokens; the weights are {kept}",
    ]
    if arguments["pause_fraction"]:
        facts.append(f"Pauses: {arguments['pause_fraction']:.0%} of every row, at random places, not counted as tokens")
    table = [f"| {key} | {value:.4f} |" for key, value in scores.items()]
    parts = [
        "---\nlanguage: ko\nlibrary_name: transformers\n---",
        f"# {name}",
        f"{arguments['model']}, pre-trained with {arguments['task']} by KoZeRO.",
        "\n".join(f"- {fact}" for fact in facts),
        "\n".join(["| held-out score | |", "|---|---|", *table]) if table else "Nothing was held out.",
        f"```python\n{LANGUAGE_MODEL_USE if arguments['model'] == 'causal_lm' else ENCODER_USE}\n```",
        f"```\n{run['command']}\n```",
    ]
    return "\n\n".join(parts) + "\n"
