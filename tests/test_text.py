"""The text that each token adds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tokencredit.lm.text import pieces
from tokencredit.tasks.reckon import model_path


@pytest.fixture(scope="module")
def byte_level():
    """A tokenizer of single bytes and a few merges, so that characters are split over tokens."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    inner.train_from_iterator(["hello world, hello there"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, clean_up_tokenization_spaces=False)


def test_words_keep_their_spaces():
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    ids = tokenizer("@2 7 + 2 <eos>")["input_ids"]
    assert pieces(tokenizer, ids) == ["@2", " 7", " +", " 2", " <eos>"]


def test_a_split_character_belongs_to_the_token_that_completes_it(byte_level):
    ids = byte_level("é")["input_ids"]
    assert len(ids) == 2 and pieces(byte_level, ids) == ["", "é"]


@given(text=st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=30))
def test_pieces_are_the_text(byte_level, text):
    ids = byte_level(text)["input_ids"]
    found = pieces(byte_level, ids)
    assert len(found) == len(ids)
    assert "".join(found) == byte_level.decode(ids)
