"""The miniatures' own tokenizers: the four kinds that the published models use, trained on small text.

They are the tokenizer classes of the real checkpoints, so everything that reads a real one reads these: T5's
unigram pieces with `</s>` appended; LLaMA's BPE with byte fallback and `</s>` as the first token, as the Vicuna
checkpoints of InstructBLIP have it; BERT's lower-cased word pieces between `[CLS]` and `[SEP]`, with `[DEC]`
added; CLIP's lower-cased byte BPE. Any English text tokenises without an unknown.
"""

import json
from collections.abc import Iterable
from typing import Any

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import BertTokenizer, CLIPTokenizer, LlamaTokenizer, T5Tokenizer

ASCII = [chr(code) for code in range(33, 127)]
# What English school texts use beyond ASCII. LLaMA's and CLIP's tokenizers fall back on bytes and need no list.
BEYOND_ASCII = list("°×÷±²³½¼¾µ£€¢§©®·–—‘’“”•…→←≤≥≠−√πΔéèêëáàâäíîïóôöúûüñçÉÖÜ")
# In training only: no piece may hold a word and the stop after it, or `red` and `red.` would be two answers.
STOPS = pre_tokenizers.Split(Regex(r"[.,:;?!]"), behavior="isolated")
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]

# Frequent words of other data sets, so that their texts do not fall apart into letters.
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

    The trainer of unigram models breaks words apart on so little text. So the pieces come from merging pairs, and
    their scores say: the fewest pieces, and among those the earlier merged.
    """
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always"), STOPS]
    )
    letters = [*ASCII, *BEYOND_ASCII, "▁"]
    trainer = trainers.BpeTrainer(vocab_size=size - 3, initial_alphabet=letters, show_progress=False)
    raw.train_from_iterator(texts, trainer)
    merged, _ = _bpe(raw)
    scored = [(piece, -10.0 - rank / size) for rank, piece in enumerate(merged)]
    specials = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return T5Tokenizer(vocab=[*specials, *scored], extra_ids=0, model_max_length=512)


def train_llama(texts: Iterable[str], size: int) -> LlamaTokenizer:
    """Train byte-fallback BPE: `<unk>` 0, `<s>` 1, `</s>` 2, 256 bytes, letters, merges, then `[PAD]`.

    `</s>` begins and ends a text, as in the Vicuna checkpoints of InstructBLIP.
    """
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(prepend_scheme="first"), STOPS])
    trainer = trainers.BpeTrainer(vocab_size=size - 3 - len(BYTES), initial_alphabet=[*ASCII, "▁"], show_progress=False)
    raw.train_from_iterator(texts, trainer)
    vocabulary, merges = _bpe(raw)
    ordered = ["<unk>", "<s>", "</s>", *BYTES, *vocabulary]
    return LlamaTokenizer(
        vocab={piece: index for index, piece in enumerate(ordered)},
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
    # A word piece inside a word is another piece (`##a`): every letter must be seen in both places.
    both = [f"{letter}{other}" for letter in letters for other in (letter, "a")]
    raw.train_from_iterator([*texts, *both], trainer)
    vocabulary = sorted(raw.get_vocab().items(), key=lambda item: item[1])
    pieces = [piece for piece, _ in vocabulary]
    for letter in letters:
        stripped = raw.normalizer.normalize_str(letter)
        pieces += [form for form in (stripped, f"##{stripped}") if form not in pieces and stripped]
    tokenizer = BertTokenizer(
        vocab={piece: index for index, piece in enumerate(pieces)},
        truncation_side="left",
        model_max_length=512,
    )
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    return tokenizer


def train_clip(texts: Iterable[str], size: int, longest: int) -> CLIPTokenizer:
    """Train CLIP's byte BPE with `</w>` at word ends; `<|startoftext|>` and `<|endoftext|>` come last."""
    bytes_ = pre_tokenizers.ByteLevel.alphabet()
    raw = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    raw.normalizer = CLIPTokenizer().backend_tokenizer.normalizer
    raw.pre_tokenizer = CLIPTokenizer().backend_tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=size - 2 - len(bytes_),
        initial_alphabet=sorted(bytes_),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    raw.train_from_iterator(texts, trainer)
    vocabulary, merges = _bpe(raw)
    ends = [f"{byte}</w>" for byte in sorted(bytes_) if f"{byte}</w>" not in vocabulary]
    ordered = [*vocabulary, *ends, "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={piece: index for index, piece in enumerate(ordered)}, merges=merges, model_max_length=longest
    )


def _bpe(raw: Tokenizer) -> tuple[list[str], list[tuple[str, str]]]:
    """The pieces of a trained BPE in the order of their ids, and its merges."""
    model: dict[str, Any] = json.loads(raw.to_str())["model"]
    pieces = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return pieces, [(left, right) for left, right in model["merges"]]
