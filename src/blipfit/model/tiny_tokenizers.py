"""The miniatures' own tokenizers: the four kinds that the published models use, trained on little text.

They have the tokenizer classes of the real checkpoints, so all code for real tokenizers works with them: T5's unigram
pieces with `</s>` at the end; LLaMA's BPE with byte fallback and `</s>` as the first token, as in the Vicuna
checkpoints of InstructBLIP; BERT's lower-cased word pieces between `[CLS]` and `[SEP]`, with `[DEC]` added; CLIP's
lower-cased byte BPE. Every English text is tokenized without an unknown token.
"""

import json
from collections.abc import Iterable
from typing import Any

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import BertTokenizer, CLIPTokenizer, LlamaTokenizer, T5Tokenizer

ASCII = [chr(code) for code in range(33, 127)]
# Characters of English school texts that are not in ASCII; LLaMA's and CLIP's tokenizers use bytes for them instead.
BEYOND_ASCII = list("°×÷±²³½¼¾µ£€¢§©®·–—‘’“”•…→←≤≥≠−√πΔéèêëáàâäíîïóôöúûüñçÉÖÜ")
# Used in training only: no piece may join a word and its punctuation, or `red` and `red.` would be different answers.
PUNCTUATION = pre_tokenizers.Split(Regex(r"[.,:;?!]"), behavior="isolated")
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]

# Frequent words of other data sets, so that their texts are not split into letters.
COMMON_WORDS = """
a about above across after again air all along also an and animal animals answer any are area around
as at away back based be because been before being below best between blue body book both bottom
brown but by called can cannot car center centre change city class closest cold color colour compare
compared complete contain contains context correct could country day describe description determine
did different direction distance do does down draw each earth east energy equal every example
experiment eye far fewer figure find first fish flower food following for force form four from front
fruit full game give given glass go graph gray great green group had half happen has have he height
help her here high higher his hold hot hour house how human if image in inside into is it its kind
known land large largest last left length less letter life light like line list live living long
look low lower made magnet make many map mass material may me mean measure men middle minute mixture
more most move much my name near need never new next no north not number object objects ocean of off
old on one only or orange order other our out outside over page pair paper part particles passage
past pattern people person picture piece place plant point pole population possible property
question read red region right river rock same sample scale school science sea second see select
sentence sequence set shape shapes she short shorter should show shown shows side similar size sky
small smaller so solid solution some sound south space species square star state states statement
stay stone story strength such surface system table take tall temperature text than that the their
them then there these they thing this those three through time to top total toward tree triangle
true two type under up upon use used using very warm was water way we weight well went were west
what when where whether which while white who whole why will wind with within without word words
work world would write year yellow yes you young your
""".split()  # noqa: SIM905 (a list would take a page)


def train_t5(texts: Iterable[str], size: int) -> T5Tokenizer:
    """Train unigram pieces: `<pad>` 0, `</s>` 1, `<unk>` 2, then at most `size - 3` pieces; no sentinels.

    The trainer for unigram models splits words too finely on so little text. Therefore the pieces come from BPE, with
    scores that prefer fewer pieces, and then pieces that were merged earlier.
    """
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always"), PUNCTUATION]
    )
    letters = [*ASCII, *BEYOND_ASCII, "▁"]
    trainer = trainers.BpeTrainer(vocab_size=size - 3, initial_alphabet=letters, show_progress=False)
    raw.train_from_iterator(texts, trainer)
    pieces, _ = _pieces_and_merges(raw)
    scores = [(piece, -10.0 - rank / size) for rank, piece in enumerate(pieces)]
    specials = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return T5Tokenizer(vocab=[*specials, *scores], extra_ids=0, model_max_length=512)


def train_llama(texts: Iterable[str], size: int) -> LlamaTokenizer:
    """Train byte-fallback BPE: `<unk>` 0, `<s>` 1, `</s>` 2, 256 bytes, letters, merges, then `[PAD]`.

    `</s>` is both the start and the end token, as in the Vicuna checkpoints of InstructBLIP.
    """
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(prepend_scheme="first"), PUNCTUATION])
    trainer = trainers.BpeTrainer(vocab_size=size - 3 - len(BYTES), initial_alphabet=[*ASCII, "▁"], show_progress=False)
    raw.train_from_iterator(texts, trainer)
    merged_pieces, merges = _pieces_and_merges(raw)
    pieces = ["<unk>", "<s>", "</s>", *BYTES, *merged_pieces]
    return LlamaTokenizer(
        vocab={piece: index for index, piece in enumerate(pieces)},
        merges=merges,
        unk_token="</s>",
        bos_token="</s>",
        eos_token="</s>",
        pad_token="[PAD]",
        add_bos_token=True,
        padding_side="right",
        model_max_length=2048,
    )


def train_bert(texts: Iterable[str], size: int) -> BertTokenizer:
    """Train lower-cased word pieces, `[PAD]` 0 … `[MASK]` 4, with `[DEC]` added last as in the checkpoints."""
    raw = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    raw.normalizer = normalizers.BertNormalizer(lowercase=True)
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=specials, show_progress=False)
    letters = sorted({character.lower() for character in [*ASCII, *BEYOND_ASCII]})
    # A letter inside a word is another piece (`##a`) than at its start: every letter must occur in both positions.
    letter_pairs = [f"{letter}{next_letter}" for letter in letters for next_letter in (letter, "a")]
    raw.train_from_iterator([*texts, *letter_pairs], trainer)
    vocabulary = sorted(raw.get_vocab().items(), key=lambda item: item[1])
    pieces = [piece for piece, _ in vocabulary]
    for letter in letters:
        normalized = raw.normalizer.normalize_str(letter)
        pieces += [piece for piece in (normalized, f"##{normalized}") if piece not in pieces and normalized]
    tokenizer = BertTokenizer(
        vocab={piece: index for index, piece in enumerate(pieces)},
        truncation_side="left",
        model_max_length=512,
    )
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    return tokenizer


def train_clip(texts: Iterable[str], size: int, max_length: int) -> CLIPTokenizer:
    """Train CLIP's byte BPE with `</w>` at word ends; `<|startoftext|>` and `<|endoftext|>` are the last ids."""
    byte_characters = pre_tokenizers.ByteLevel.alphabet()
    raw = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    raw.normalizer = CLIPTokenizer().backend_tokenizer.normalizer
    raw.pre_tokenizer = CLIPTokenizer().backend_tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=size - 2 - len(byte_characters),
        initial_alphabet=sorted(byte_characters),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    raw.train_from_iterator(texts, trainer)
    merged_pieces, merges = _pieces_and_merges(raw)
    word_ends = [f"{byte}</w>" for byte in sorted(byte_characters) if f"{byte}</w>" not in merged_pieces]
    pieces = [*merged_pieces, *word_ends, "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={piece: index for index, piece in enumerate(pieces)}, merges=merges, model_max_length=max_length
    )


def _pieces_and_merges(raw: Tokenizer) -> tuple[list[str], list[tuple[str, str]]]:
    """Return the pieces of a trained BPE tokenizer in the order of their ids, and its merges."""
    model: dict[str, Any] = json.loads(raw.to_str())["model"]
    pieces = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return pieces, [(left, right) for left, right in model["merges"]]
