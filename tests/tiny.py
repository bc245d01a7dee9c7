"""Tiny real models: a Llama of two layers and a byte-level BPE tokenizer trained on a few sentences.

They load, sample, train and save like the big ones; only their size differs.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CORPUS = [
    "def add(a, b):\n    return a + b\n",
    "The answer to the question is forty-two, because six times seven is forty-two.",
    "for i in range(10):\n    print(i)\n",
    "What is the sum of three and four? Three and four is seven.",
]
PROMPTS = [
    *("What is the sum of 3 and 4?", "def add(a, b):", "for i in"),
    *("The answer is", "What is six times seven?", "pri"),
]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def save_tiny_model(
    directory: Path,
    *,
    seed: int = 0,
    layers: int = 2,
    vocab_size: int = 300,
    output_width: int | None = None,
    width: int = 32,
) -> Path:
    """A random model in `directory` as `save_pretrained` writes it; other seeds give other weights.

    `vocab_size` is the tokenizer's; `output_width` the head's, padded where it is greater; `width` the hidden states'.
    """
    tokenizer = tiny_tokenizer(vocab_size)
    generator_state = torch.get_rng_state()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=output_width or len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.8 * 32 / width,  # so that distributions are peaked, as a trained model's are
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    torch.set_rng_state(generator_state)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def swap_ids(directory: Path, one: str, other: str) -> Path:
    """Give two tokens of a saved tokenizer each other's id; its size stays, and what ids mean does not."""
    path = directory / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab[one], vocab[other] = vocab[other], vocab[one]
    for token in tokenizer["added_tokens"]:
        token["id"] = vocab[token["content"]]
    path.write_text(json.dumps(tokenizer))
    return directory


def tiny_tokenizer(vocab_size: int = 300) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a chat template; deterministic."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|bos|>", "<|end|>", "<|pad|>", "<|user|>", "<|assistant|>", "<|system|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        chat_template=CHAT_TEMPLATE,
    )
