"""The model of a pre-training run with what it learns by, its tokenizer, and the folder that it leaves."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GPT2LMHeadModel, PreTrainedModel

from kozero import distributed
from kozero.engines.base import Engine
from kozero.errors import require
from models import encoders, language_model
from models.causal_lm import CausalLM, build
from models.language_model import checkpoint_activations
from pretrain.arguments import CorpusArguments, PretrainingArguments
from pretrain.objectives import EncoderPretraining

ROOT = Path(__file__).parent.parent
SAMPLE_TOKENIZER = ROOT / "sample_data" / "tokenizer"


def load_tokenizer(corpus: CorpusArguments) -> Any:
    """The tokenizer of a run; the sample one without a name."""
    name = corpus.tokenizer_name_or_path
    if not name:
        name = str(SAMPLE_TOKENIZER)
        distributed.say("no --tokenizer_name_or_path: using the sample tokenizer (4,096 tokens)")
    writes = corpus.model == "causal_lm"
    return distributed.machine_first(lambda: language_model.load_tokenizer(name, writes))


def build_module(training: PretrainingArguments, corpus: CorpusArguments, tokenizer: Any) -> nn.Module:
    """The model with its objectives: random weights, or those of --checkpoint."""
    if corpus.model == "causal_lm":
        lm = causal_lm(training, corpus, len(tokenizer))
        if corpus.dropout is not None:
            language_model.set_dropout(lm, corpus.dropout)
        check_positions(corpus, lm.config.n_positions)
        if training.gradient_checkpointing:
            checkpoint_activations(lm)
        return CausalLM(lm, list(range(len(tokenizer), lm.config.vocab_size)))
    encoder = encoder_of(training, corpus, tokenizer)
    if corpus.dropout is not None:
        encoders.set_dropout(encoder, corpus.dropout)
    check_positions(corpus, encoder.config.max_position_embeddings)
    if training.gradient_checkpointing:
        checkpoint_activations(encoder)
    with torch.random.fork_rng():
        torch.manual_seed(training.seed)
        module = EncoderPretraining(encoder, corpus.task)
    if training.checkpoint and (fresh := encoders.load_heads(module, training.checkpoint)):
        distributed.say(f"--checkpoint {training.checkpoint}: no {', '.join(fresh)} beside the encoder; drawn anew")
    return module


def causal_lm(training: PretrainingArguments, corpus: CorpusArguments, num_tokens: int) -> GPT2LMHeadModel:
    """A GPT-2 of a config file, its vocabulary a multiple of 128 (which keeps matrix products fast), or a folder's."""
    if training.checkpoint:
        lm = language_model.load_weights(training.checkpoint, language_model.load_config(training.checkpoint))
        language_model.check_vocabulary(num_tokens, lm.config.vocab_size, foreign=True)
        return lm
    config = language_model.read_config(Path(corpus.config_file or ROOT / "models" / "kogpt2_config.json"))
    config.vocab_size = -(-num_tokens // 128) * 128
    return build(config, training.seed)


def encoder_of(training: PretrainingArguments, corpus: CorpusArguments, tokenizer: Any) -> PreTrainedModel:
    """An encoder of a config file, or a folder's, whose tokenizer must be that of this run."""
    if training.checkpoint:
        encoder = encoders.load_encoder(training.checkpoint)
        require(
            encoder.config.vocab_size == len(tokenizer),
            f"--checkpoint {training.checkpoint}: has {encoder.config.vocab_size:,} tokens, the tokenizer "
            f"{len(tokenizer):,}; give its own with --tokenizer_name_or_path {training.checkpoint}",
        )
        return encoder
    path = Path(corpus.config_file or encoders.config_file_of(corpus.model))
    config = encoders.read_encoder_config(path, corpus.model, tokenizer)
    return encoders.build_encoder(config, training.seed)


def check_positions(corpus: CorpusArguments, positions: int) -> None:
    """A row must fit the model."""
    require(
        corpus.max_seq_length <= positions,
        f"--max_seq_length {corpus.max_seq_length}: the model has {positions} positions; choose at most that",
    )


def export(engine: Engine, module: nn.Module, tokenizer: Any, folder: Path, text: str) -> None:
    """Write the best weights as a folder that transformers loads; the heads of an encoder lie beside it."""
    state = engine.full_state_dict()
    if not distributed.is_main():
        return
    if isinstance(module, CausalLM):
        language_model.export(folder, language_model.LanguageModel(module, tokenizer, None, {}), state, {}, text)
        return
    encoders.export_encoder(folder, module, state, tokenizer, text)


def card(name: str, run: dict, scores: dict[str, float]) -> str:
    """A short model card."""
    arguments = run["arguments"]
    rows = "\n".join(f"| {key} | {value:.4f} |" for key, value in scores.items())
    return (
        f"---\nlanguage: ko\n---\n# {name}\n\n{arguments['model']}, pre-trained with {arguments['task']} by KoZeRO.\n\n"
        f"| held-out score | |\n|---|---|\n{rows}\n\n```\n{run['command']}\n```\n"
    )
