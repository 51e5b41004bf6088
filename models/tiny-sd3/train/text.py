# Copyright 2026 The KubeDiffusion Authors
# SPDX-License-Identifier: Apache-2.0
"""Tokenizers for the world's words, the three small text encoders, and the context they make.

Stable Diffusion 3's pipeline pads T5 to `max_sequence_length` (256 unless told otherwise) and lets
the transformer attend to all the padding. Training on 256 tokens would cost four times as much, so
a step runs T5 at a random length, hands the transformer the words and a few of the pad tokens, and
raises the attention logits of those few by log(pads they stand for / pads taken).
"""

import json
import math
import random
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerBase,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from train.world import BACKGROUNDS, COLORS, PLACES, RELATIONS, SHAPES, SIZES

CLIP_WIDTH, CLIP_LENGTH = 64, 24
CONTEXT_WIDTH = 2 * CLIP_WIDTH
T5_FULL_LENGTH = 256
PADS_TAKEN = 3
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
OPENINGS = ("a picture of", "an image of", "a drawing of", "draw", "please draw", "show me")
GRAMMAR = "a an the on and to background somewhere shape shapes object objects"


def vocabulary() -> list[str]:
    """Every word that gets a token of its own."""
    phrases = [GRAMMAR, *OPENINGS, *COLORS, *BACKGROUNDS, *SHAPES, *SIZES, *PLACES, *RELATIONS]
    return sorted({word for phrase in phrases for word in phrase.split()})


def decorate(caption: str, rng: random.Random) -> str:
    """Now and then what people type besides: an opening, an unknown word, a full stop."""
    if rng.random() < 0.06:
        caption = f"{rng.choice(OPENINGS)} {caption}"
    if rng.random() < 0.03:
        words = caption.split()
        word = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 4)))
        words.insert(rng.randint(0, len(words)), word)
        caption = " ".join(words)
    return caption + "." if rng.random() < 0.05 else caption


def _merge_until_whole(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent pair first, after which every word is one token."""
    split = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while True:
        counts: dict[tuple[str, str], int] = {}
        for parts in split:
            for pair in pairwise(parts):
                counts[pair] = counts.get(pair, 0) + 1
        if not counts:
            return merges
        best = max(sorted(counts), key=lambda pair: counts[pair])
        merges.append(best)
        split = [_apply_merge(parts, best) for parts in split]


def _apply_merge(parts: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] = merged[-1] + part
        else:
            merged.append(part)
    return merged


def write_clip_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer in which a word of the world is one token, any other a few letters."""
    folder.mkdir(parents=True, exist_ok=True)
    merges = _merge_until_whole(vocabulary())
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    symbols = [*letters, *"0123456789.,!?"]
    tokens = [BOS, EOS, "<|unk|>", *symbols, *(s + "</w>" for s in symbols)]
    tokens += ["".join(pair) for pair in merges]
    index = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    (folder / "vocab.json").write_text(json.dumps(index, indent=0))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": CLIP_LENGTH,
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "unk_token": "<|unk|>",  # not the end token: CLIP pools at the first of those
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    return CLIPTokenizer.from_pretrained(folder)


def write_t5_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """A T5 tokenizer (Unigram, one piece a word, any case); an unknown word is <unk>."""
    folder.mkdir(parents=True, exist_ok=True)
    pieces = [(token, 0.0) for token in ("<pad>", "</s>", "<unk>")]
    # The T5 class drops a normalizer, so other cases are pieces: `tie_cases` makes them synonyms.
    words = [form for word in vocabulary() for form in (word, *_cased(word))]
    pieces += [(f"▁{word}", -1.0) for word in dict.fromkeys(words)] + [("▁", -4.0), (".", -3.0)]
    tokenizer = T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=T5_FULL_LENGTH)
    tokenizer.save_pretrained(folder)
    return T5TokenizerFast.from_pretrained(folder)


def tokenizers(folder: Path) -> tuple[CLIPTokenizer, PreTrainedTokenizerBase]:
    """Both tokenizers, written on the first call only: other processes may be reading them."""
    clip, t5 = folder / "tokenizer", folder / "tokenizer_3"
    if (t5 / "tokenizer.json").exists():
        return CLIPTokenizer.from_pretrained(clip), T5TokenizerFast.from_pretrained(t5)
    return write_clip_tokenizer(clip), write_t5_tokenizer(t5)


def _cased(word: str) -> tuple[str, str]:
    return word.capitalize(), word.upper()


@torch.no_grad()
def tie_cases(encoder: T5EncoderModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give "Red" and "RED" the embedding of "red", which alone is trained."""
    rows = encoder.get_input_embeddings().weight
    for word in vocabulary():
        source = tokenizer.convert_tokens_to_ids(f"▁{word}")
        for form in _cased(word):
            rows[tokenizer.convert_tokens_to_ids(f"▁{form}")] = rows[source].clone()


def make_clip(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    """A CLIP text encoder: 64 wide, 2 layers."""
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=CLIP_WIDTH,
            intermediate_size=4 * CLIP_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=CLIP_LENGTH,
            projection_dim=CLIP_WIDTH,
            hidden_act="gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_t5(tokenizer: PreTrainedTokenizerBase) -> T5EncoderModel:
    """A T5 encoder: as wide as the transformer's context, 1 layer."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=CONTEXT_WIDTH,
            d_kv=32,
            d_ff=2 * CONTEXT_WIDTH,
            num_layers=1,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


@dataclass(frozen=True)
class Tokens:
    """A batch of captions for all encoders; `words` T5 tokens are content, the rest padding."""

    clip: torch.Tensor
    t5: torch.Tensor
    words: int


@dataclass(frozen=True)
class Context:
    """What the transformer gets; the last `shared` tokens count `weight` times each."""

    tokens: torch.Tensor
    pooled: torch.Tensor
    shared: int
    weight: float

    @property
    def logit(self) -> float:
        """What to add to the shared tokens' attention logits."""
        return math.log(self.weight)


class TextEncoders(nn.Module):
    """The two CLIPs and T5, joined the way Stable Diffusion 3's pipeline joins them."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.clip_tokenizer, self.t5_tokenizer = tokenizers(folder)
        self.clip_1 = make_clip(self.clip_tokenizer)
        self.clip_2 = make_clip(self.clip_tokenizer)
        self.t5 = make_t5(self.t5_tokenizer)

    def tokenize(self, captions: list[str], t5_length: int) -> Tokens:
        """Token ids, as the pipeline's own tokenizing makes them."""
        captions = [caption.lower() for caption in captions]
        options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        clip = self.clip_tokenizer(captions, max_length=CLIP_LENGTH, **options).input_ids
        t5 = self.t5_tokenizer(captions, max_length=t5_length, **options)
        return Tokens(clip, t5.input_ids, int(t5.attention_mask.sum(1).max()))

    def forward(self, tokens: Tokens, generator: torch.Generator) -> Context:
        """Encode, and keep a few of T5's pad tokens for all."""
        one, two = (
            clip(tokens.clip, output_hidden_states=True) for clip in (self.clip_1, self.clip_2)
        )
        said = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], -1)
        t5 = self.t5(tokens.t5)[0]
        pads = t5.shape[1] - tokens.words
        taken = min(PADS_TAKEN, pads)
        chosen = tokens.words + torch.randperm(pads, generator=generator)[:taken]
        parts = [said.to(t5.dtype), t5[:, : tokens.words], t5[:, chosen]]
        pooled = torch.cat([one.text_embeds, two.text_embeds], -1)
        return Context(torch.cat(parts, 1), pooled, taken, pads / taken if taken else 1.0)
