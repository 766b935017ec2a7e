"""Running text with hidden words, for masked language modelling (Devlin et al., 2019, section 3.1).

Whole words are chosen, each with probability 0.15; of their tokens 80 % become the mask token, 10 % a random token and
10 % stay. The model is to tell what each of the chosen tokens was. (BERT first chose tokens one by one; whole words are
the masking of its later checkpoints. A part of a word gives the rest of it away.)

What is random comes in as ``draws``, uniform numbers: :class:`WordMasker` alone decides what they do, for the masks
that are drawn once, on which models are compared, and for those that training draws anew in every step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Dataset, List, Value
from torch import nn

from ..errors import InputError
from .texts import IGNORED, chunks_of, token_rows

#: share of the words that are chosen, in expectation
CHOSEN = 0.15
#: of the chosen tokens, the share that becomes the mask token, and the share that becomes a random one
MASKED, RANDOM = 0.8, 0.1
#: number of the word of tokens that belong to none and are never chosen: special ones, and padding
NO_WORD = -1
#: uniform numbers per position: whether its word is chosen, what becomes of the token, which one is random
DRAWS = 3
#: seed of the masks that are drawn once
FIXED_SEED = 0
#: added to the seeds of training's masks, so that other draws of the same step are independent of them
STEP_SEED = 7_368_787

_CHUNK = 1000


@dataclass(frozen=True)
class WordMasker:
    """Hides the words that uniform numbers choose.

    Args:
        mask_token: id of the mask token.
        vocabulary: random tokens are drawn from the ids below this.
    """

    mask_token: int
    vocabulary: int

    @classmethod
    def of(cls, tokenizer: Any) -> WordMasker:
        """That of a transformers tokenizer; InputError unless it has a mask token and says where words begin."""
        named = f"--model {tokenizer.name_or_path}: its tokenizer"
        if tokenizer.mask_token_id is None:
            raise InputError(f"{named} has no mask token, which --task mlm hides words with; pass a model such as BERT")
        if not tokenizer.is_fast:
            raise InputError(
                f"{named} is not a fast one, which --task mlm needs to know where words begin; save the model with "
                "tokenizer.json"
            )
        return cls(tokenizer.mask_token_id, len(tokenizer))

    def __call__(
        self, input_ids: torch.Tensor, words: torch.Tensor, draws: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(``input_ids`` with hidden words, labels), both int64 [B, T] on the device of the arguments.

        Args:
            input_ids: int64 [B, T].
            words: int64 [B, T], the number of each token's word in its row, below T, or ``NO_WORD``.
            draws: uniform in [0, 1), float64 [B, DRAWS, L] with L >= T: for each position whether the word of that
                number is chosen, what becomes of the token there if its word is, and which token is the random one.

        Returns:
            Labels are the tokens of the chosen words, with those that stay as they are, and ``IGNORED`` elsewhere.
        """
        by_word, fate, which = draws[..., : input_ids.shape[1]].unbind(1)
        chosen = (words != NO_WORD) & (by_word.gather(1, words.clamp(min=0)) < CHOSEN)
        random = (which * self.vocabulary).long().clamp(max=self.vocabulary - 1)
        hidden = torch.where(fate < MASKED + RANDOM, random, input_ids).masked_fill(fate < MASKED, self.mask_token)
        return torch.where(chosen, hidden, input_ids), input_ids.masked_fill(~chosen, IGNORED)

    def again(
        self, input_ids: torch.Tensor, labels: torch.Tensor, words: torch.Tensor, draws: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Other words hidden in rows that this masker has made; arguments and returns as for calling it."""
        return self(torch.where(labels == IGNORED, input_ids, labels), words, draws)


def uniform(generator: torch.Generator, rows: int, length: int) -> torch.Tensor:
    """``draws`` of :class:`WordMasker` on the generator's device: float64 [rows, DRAWS, length]."""
    return torch.rand((rows, DRAWS, length), generator=generator, dtype=torch.float64, device=generator.device)


def step_draws(seed: int, step: int, rows: int, length: int, device: torch.device | str) -> torch.Tensor:
    """The ``draws`` of training step ``step``, of a whole batch of ``rows`` examples, on ``device``.

    They follow from the arguments alone: a resumed run repeats them, and several processes, of which each takes the
    rows that are its own, hide what one process would have hidden.
    """
    generator = torch.Generator(device).manual_seed(seed * 1_000_003 + step + STEP_SEED)
    return uniform(generator, rows, length)


def tokenize_masked_blocks(
    documents: Dataset, column: str, tokenizer: Any, max_length: int, description: str
) -> Dataset:
    """The documents as one stream of tokens, cut into blocks of which some words are hidden, for good.

    Blocks have ``max_length`` tokens, the last perhaps fewer, with the special tokens that the tokenizer puts around a
    text. Between two documents stands its separator, if it has one, as in RoBERTa (Liu et al., 2019, section 4.2).
    Words are those of the tokenizer: what it splits texts into before it looks at its vocabulary, for BERT at spaces
    and around punctuation. Of a word that the end of a block cuts each part counts as a word of its block. Special
    tokens are no words wherever they stand, the one for unknown words among them.

    The hidden words follow from the blocks alone, on every machine, so that perplexities of models with the same
    tokenizer compare. A block may have none.

    Returns:
        Columns input_ids (with hidden words), attention_mask (ones), labels (the tokens of the hidden words;
        ``IGNORED`` elsewhere), words (int32: the number of each token's word in its block, or ``NO_WORD``) and length.

    Raises:
        InputError: the tokenizer has no mask token or knows no words; ``max_length`` leaves no room for a token; no
            word is hidden.
    """
    masker = WordMasker.of(tokenizer)
    before, after = _around(tokenizer)
    room = max_length - len(before) - len(after)
    if room < 1:
        raise InputError(f"--max-length {max_length}: leaves no room for text; pass at least {max_length - room + 1}")
    stream, words = _stream(documents, column, tokenizer, description)
    no_words = [np.full(len(special), NO_WORD) for special in (before, after)]
    ids, numbers = [], []
    for start in range(0, len(stream), room):
        ids.append(np.concatenate((before, stream[start : start + room], after)))
        numbers.append(_in_block(np.concatenate((no_words[0], words[start : start + room], no_words[1]))))
    generator = torch.Generator().manual_seed(FIXED_SEED)
    chunks = [
        _hide(masker, ids[at : at + _CHUNK], numbers[at : at + _CHUNK], generator, max_length)
        for at in range(0, len(ids), _CHUNK)
    ]
    if not any(label != IGNORED for chunk in chunks for row in chunk["labels"] for label in row):
        raise InputError(
            f"--task mlm: no word of {len(documents)} documents was chosen to be hidden, as {CHOSEN:.0%} of all are; "
            "pass more text"
        )
    return datasets.concatenate_datasets(chunks)


def _hide(
    masker: WordMasker, ids: list[np.ndarray], words: list[np.ndarray], generator: torch.Generator, length: int
) -> Dataset:
    """The rows of some blocks; the draws of a block do not depend on how many there are."""
    padded = [
        nn.utils.rnn.pad_sequence([torch.as_tensor(row, dtype=torch.int64) for row in rows], True, NO_WORD)
        for rows in (ids, words)
    ]
    hidden, labels = masker(*padded, uniform(generator, len(ids), length))
    lengths = [len(row) for row in ids]
    found = [[row[:size].numpy() for row, size in zip(rows, lengths)] for rows in (hidden, labels)]
    rows = token_rows(found[0], [np.ones(size, dtype=np.int32) for size in lengths], found[1])
    return rows.add_column("words", words, feature=List(Value("int32")))


def _in_block(words: np.ndarray) -> np.ndarray:
    """The words of a block, numbered from 0."""
    numbers, places = np.unique(words, return_inverse=True)
    return places - int(numbers[0] == NO_WORD)


def _around(tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    """Ids of the special tokens before and after a text, int64."""
    encoded = tokenizer(tokenizer.mask_token)
    inside = [at for at, word in enumerate(encoded.word_ids(0)) if word is not None]
    ids = np.array(encoded["input_ids"])
    return ids[: inside[0]], ids[inside[-1] + 1 :]


def _stream(documents: Dataset, column: str, tokenizer: Any, description: str) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of all documents that are not empty, and the number of each token's word, both int64 [N]."""
    ids, words, count = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)], 0
    for rows in chunks_of(documents, description):
        texts = [text for text in rows[column] if text]
        # a document is longer than a model's input on purpose: no warning
        encoded = tokenizer(texts, add_special_tokens=False, verbose=False) if texts else {"input_ids": []}
        for index, tokens in enumerate(encoded["input_ids"]):
            if not tokens:
                continue
            if len(ids) > 1 and tokenizer.sep_token_id is not None:
                ids.append(np.array([tokenizer.sep_token_id]))
                words.append(np.array([NO_WORD]))
            # tokens without a word (None) are special
            own = np.array(encoded.word_ids(index), dtype=np.float64)
            if np.unique(own).size == 1 < len(texts[index].split()):
                raise InputError(
                    f"--model {tokenizer.name_or_path}: its tokenizer takes whole texts for one word; --task mlm needs "
                    "one that splits texts into words"
                )
            special = np.isnan(own) | np.isin(tokens, tokenizer.all_special_ids)
            words.append(np.where(special, NO_WORD, np.nan_to_num(own).astype(np.int64) + count))
            ids.append(np.array(tokens))
            count = max(count, int(words[-1].max()) + 1)
    return np.concatenate(ids), np.concatenate(words)
