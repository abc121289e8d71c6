"""Load the tokenizers of a checkpoint, and check that they give the ids that the weights were trained with."""

from pathlib import Path
from typing import Any

from blipfit.errors import UserError
from blipfit.recipe import Family

# A tokenizer of the wrong class has the right vocabulary but gives other ids, so the ids of texts are compared.
_KNOWN_IDS: dict[tuple[str, int], dict[str, list[int]]] = {
    ("t5", 32100): {
        "Question: Which is (b) the barn owl?": [11860, 10, 4073, 19, 41, 115, 61, 8, 13754, 3, 2381, 40, 58],
    },
    ("vicuna", 32000): {
        "Question: Which is (b) the barn owl?": [
            *(894, 29901, 8449, 338, 313, 29890, 29897, 278, 2594, 29876, 8152, 29880, 29973),
        ],
        "of the  are": [310, 278, 29871, 526],  # two spaces, as in 24 of 842 prompts of ScienceQA
    },
    ("bert", 30522): {
        "Question: Which is (b) the barn owl?": [3160, 1024, 2029, 2003, 1006, 1038, 1007, 1996, 8659, 13547, 1029],
    },
}
"""(kind of tokenizer, size of its vocabulary) → text → its ids, from the published tokenizers and sentencepiece."""
_PLAIN_ENGLISH = "Question: Which is (b) the barn owl?"


def load_tokenizers(folder: str, revision: str | None = None) -> tuple[Any, Any]:
    """Load the Q-Former's and the language model's tokenizer of a checkpoint; no code in it is run.

    Raises UserError if a tokenizer cannot be loaded.
    """
    return _load_tokenizer(folder, "qformer_tokenizer", revision), _load_tokenizer(folder, "", revision)


def _load_tokenizer(folder: str, subfolder: str, revision: str | None) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, subfolder=subfolder, revision=revision, trust_remote_code=False
        )
        source = Path(folder, subfolder, "tokenizer.model")
        if source.is_file() and not source.with_name("tokenizer.json").exists():
            follow_sentencepiece(tokenizer, source)
    except Exception as error:  # damaged files raise many classes, and tokenizers raises Exception itself
        location = f" in {subfolder}/" if subfolder else ""
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{folder}: its tokenizer{location} cannot be loaded ({reason:.300}); get a complete copy"
        ) from error
    return tokenizer


def follow_sentencepiece(tokenizer: Any, file: Path) -> None:
    """Make LLaMA's tokenizer, derived by transformers from a sentencepiece file, give that file's ids, in place.

    transformers orders the merges by the ids of the merged pieces, sentencepiece by their scores: they differ in the
    pieces of several spaces, which have the lowest scores but not the last ids. transformers puts no space before a
    text that starts with one, sentencepiece always does. With both corrected, the tokenizer is the hub's
    tokenizer.json. `file`: `tokenizer.model`. Raises RuntimeError or OSError if it is damaged.
    """
    from sentencepiece import SentencePieceProcessor
    from tokenizers import models, normalizers

    pieces = SentencePieceProcessor(model_file=str(file))
    vocabulary = {pieces.id_to_piece(index): index for index in range(pieces.get_piece_size())}
    by_score = sorted(vocabulary, key=lambda piece: (-pieces.get_score(vocabulary[piece]), vocabulary[piece]))
    merges = [
        (piece[:end], piece[end:])
        for piece in by_score
        for end in range(1, len(piece))
        if piece[:end] in vocabulary and piece[end:] in vocabulary
    ]
    backend = tokenizer.backend_tokenizer
    vocabulary = backend.get_vocab(with_added_tokens=False)
    backend.model = models.BPE(vocab=vocabulary, merges=merges, fuse_unk=True, byte_fallback=True)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = None


def check_tokenizers(hf: Any, family: Family, qformer: Any, language: Any, name: str) -> None:
    """Raise UserError if the Q-Former's or the language model's tokenizer does not fit the weights."""
    for part, tokenizer, vocab_size in (
        ("Q-Former", qformer, hf.config.qformer_config.vocab_size),
        ("language model", language, hf.config.text_config.vocab_size),
    ):
        if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= vocab_size:
            raise UserError(f"{name}: the {part}'s tokenizer has no usable pad token; get a current copy")
        if max(tokenizer("(a) yes").input_ids) >= vocab_size:
            raise UserError(
                f"{name}: the {part}'s tokenizer has ids beyond its {vocab_size} embeddings; get a current copy"
            )
    if family == "vicuna" and language.bos_token != "</s>":
        raise UserError(
            f"{name}: BOS is {language.bos_token!r}, the InstructBLIP Vicuna checkpoints use '</s>'; "
            "get the current hub copy (old ones also lack <image> and num_query_tokens)"
        )
    for kind, tokenizer in ((family, language), ("bert", qformer)):
        if tokenizer.unk_token_id in tokenizer(_PLAIN_ENGLISH, add_special_tokens=False).input_ids:
            # Without its files, transformers silently makes a tokenizer of a handful of words.
            raise UserError(f"{name}: the {kind} tokenizer does not know plain English; get a copy with its files")
        for text, expected in _KNOWN_IDS.get((kind, tokenizer.vocab_size), {}).items():
            ids = tokenizer(text, add_special_tokens=False).input_ids
            if ids != expected:
                raise UserError(
                    f"{name}: the {kind} tokenizer gives other ids than the original for the text {text!r} "
                    f"({ids[:6]} instead of {expected[:6]}); its tokenizer files are of another class or were made "
                    "from others, get a fresh copy"
                )
