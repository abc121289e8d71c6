"""What the Q-Former and the language model read, token by token.

The expected ids were computed from the vocabularies with other libraries: sentencepiece for LLaMA, tokenizers for T5
and BERT.
"""

from dataclasses import fields

import pytest
import torch

import checkpoints
from blipfit.data.batches import EncodedQuestion, TargetBatch, TextEncoder
from blipfit.data.prompts import PromptedQuestion

SHORT = PromptedQuestion(
    "<Image> Question: Is it 3 o'clock? Options: (a) yes (b) no. Short answer:", "(b) no", ("(a) yes", "(b) no")
)
LONG = PromptedQuestion(
    "Context: {"
    + "The robin is a small bird. " * 40
    + "} Question: {Which bird is it?} Options: {(a) robin\n(b) owl\n} Answer:",
    "(b) owl",
    ("(a) robin", "(b) owl"),
)
SHORT_BERT = [101, 1026, 3746, 1028, 3160, 1024, 2003, 2009, 1017, 1051, 1005, 5119, 1029, 7047, 1024, 1006, 1037]
SHORT_BERT += [1007, 2748, 1006, 1038, 1007, 2053, 1012, 2460, 3437, 1024, 102]
SHORT_T5 = [3, 2, 29979, 3155, 11860, 10, 27, 7, 34, 220, 3, 32, 31, 17407, 58, 17011, 10, 41, 9, 61, 4273, 41, 115]
SHORT_T5 += [61, 150, 5, 7110, 1525, 10, 1]
SHORT_LLAMA = [529, 2940, 29958, 894, 29901, 1317, 372, 29871, 29941, 288, 29915, 13058, 29973, 25186, 29901, 313]
SHORT_LLAMA += [29874, 29897, 4874, 313, 29890, 29897, 694, 29889, 13899, 1234, 29901]
# The end of the long prompt: the question and the options.
END_BERT = [3160, 1024, 1063, 2029, 4743, 2003, 2009, 1029, 1065, 7047, 1024, 1063, 1006, 1037, 1007, 5863, 1006]
END_BERT += [1038, 1007, 13547, 1065, 3437, 1024, 102]
END_T5 = [11860, 10, 3, 2, 518, 107, 362, 5963, 19, 34, 58, 2, 17011, 10, 3, 2, 599, 9, 61, 3, 5840, 77, 41, 115, 61]
END_T5 += [3, 2381, 40, 3, 2, 11801, 10, 1]
END_LLAMA = [894, 29901, 426, 8809, 436, 11199, 338, 372, 13684, 25186, 29901, 426, 29898, 29874, 29897, 696, 2109]
END_LLAMA += [13, 29898, 29890, 29897, 8152, 29880, 13, 29913, 673, 29901]
WHOLE = {"t5": 440, "vicuna": 352}  # tokens of the long prompt, </s> or BOS included
NO = {"t5": [41, 115, 61, 150, 1], "vicuna": [313, 29890, 29897, 694, 2]}
YES = {"t5": [41, 9, 61, 4273, 1], "vicuna": [313, 29874, 29897, 4874]}
OWL = {"t5": [41, 115, 61, 3, 2381, 40, 1], "vicuna": [313, 29890, 29897, 8152, 29880, 2]}


@pytest.fixture
def text(hub_like, family) -> TextEncoder:
    return checkpoints.load(hub_like[family]).text


def test_golden_short_prompt(text: TextEncoder, family):
    (e,) = text.encode([SHORT])
    prompt = SHORT_T5 if family == "t5" else [2, *SHORT_LLAMA]
    # Vicuna's targets end in </s> and its candidates do not: T5's scores alone count the end token.
    candidates = [YES[family], NO[family] if family == "t5" else NO[family][:-1]]
    assert e == EncodedQuestion(SHORT_BERT, prompt, prompt, NO[family], candidates)


def test_golden_cut_from_the_left(text: TextEncoder, family):
    (e,) = text.encode([LONG])
    assert len(e.qformer) == len(e.training_prompt) == 128
    assert (e.qformer[0], e.qformer[-len(END_BERT) :]) == (101, END_BERT)
    end = END_T5 if family == "t5" else END_LLAMA
    assert e.training_prompt[-len(end) :] == end
    assert len(e.evaluation_prompt) == WHOLE[family]  # in evaluation the language model reads the whole prompt
    if family == "t5":
        assert e.training_prompt == e.evaluation_prompt[-128:]
    else:
        assert e.training_prompt == [2, *e.evaluation_prompt[-127:]]
        assert e.evaluation_prompt[0] == 2
    assert e.target == OWL[family]


def test_golden_training_batch(text: TextEncoder, family):
    short, long = text.encode([SHORT, LONG])
    batch = text.targets([short, long])
    assert batch.qformer_ids_BT.shape == (2, 128)
    assert batch.qformer_ids_BT[0].tolist() == SHORT_BERT + [0] * (128 - len(SHORT_BERT))
    assert batch.qformer_mask_BT.sum(1).tolist() == [len(SHORT_BERT), 128]
    assert batch.labels_N.tolist() == NO[family] + OWL[family]
    if family == "t5":
        assert batch.text_ids_BT[0].tolist() == SHORT_T5 + [0] * (128 - len(SHORT_T5))
        assert batch.text_mask_BT.sum(1).tolist() == [len(SHORT_T5), 128]
        assert batch.decoder_ids_BA.tolist() == [[0, 41, 115, 61, 150, 0, 0], [0, 41, 115, 61, 3, 2381, 40]]
        assert batch.positions_N.tolist() == [0, 1, 2, 3, 4, 7, 8, 9, 10, 11, 12, 13]
    else:
        pad, answer = 32000, NO["vicuna"]
        assert batch.decoder_ids_BA is None
        assert batch.text_ids_BT.shape == (2, 128 + len(OWL["vicuna"]))
        row = [2, *SHORT_LLAMA, *answer]
        assert batch.text_ids_BT[0].tolist() == row + [pad] * (134 - len(row))
        assert batch.text_ids_BT[1, 128:].tolist() == OWL["vicuna"]
        assert batch.text_mask_BT[0].tolist() == [1] * len(row) + [0] * (134 - len(row))
        # The position before a token predicts it. There is loss on the answer and its end token, not on the prompt.
        first = len(SHORT_LLAMA)
        assert batch.positions_N.tolist() == [*range(first, first + 5), *range(134 + 127, 134 + 133)]


def test_golden_ranking_batch(text: TextEncoder, family):
    batch = text.candidates(text.encode([SHORT, LONG]))
    pad = 0 if family == "t5" else 32000
    width = batch.candidate_ids_MA.shape[1]
    assert batch.question_M.tolist() == [0, 0, 1, 1]
    assert batch.candidate_ids_MA[0].tolist() == YES[family] + [pad] * (width - len(YES[family]))
    assert batch.candidate_mask_MA[0].tolist() == [1] * len(YES[family]) + [0] * (width - len(YES[family]))
    assert batch.text_ids_BT.shape == (2, WHOLE[family])
    assert batch.qformer_ids_BT.shape == (2, 128)


def test_an_answer_is_cut_from_the_right_and_keeps_its_end(hub_like, family):
    text = checkpoints.load(hub_like[family], max_target=4).text
    (e,) = text.encode([PromptedQuestion("Question:", "(b) owl", ("(b) owl",))])
    assert e.target == [*OWL[family][:3], text.llm_tokenizer.eos_token_id]
    assert e.candidates == [e.target if family == "t5" else OWL[family][:4]]


def test_another_length_of_text(hub_like, family):
    text = checkpoints.load(hub_like[family], max_text=16).text
    (e,) = text.encode([LONG])
    assert (len(e.qformer), len(e.training_prompt), len(e.evaluation_prompt)) == (16, 16, WHOLE[family])


def test_every_row_has_a_label(backbone):
    """T5's loss is NaN if all labels are ignored; the end token is always a label."""
    batch = backbone.text.targets(backbone.text.encode([PromptedQuestion("Question:", "", ()), SHORT]))
    assert batch.labels_N[0] == backbone.text.llm_tokenizer.eos_token_id
    assert len(batch.labels_N) == len(batch.positions_N)


def test_a_batch_moves_to_a_device_with_all_its_tensors(backbone):
    batch = backbone.text.targets(backbone.text.encode([SHORT, LONG])).to("meta")
    assert batch.labels_N.is_meta
    assert batch.text_ids_BT.is_meta
    assert (batch.decoder_ids_BA is None) == (backbone.family == "vicuna")


def test_labels_are_the_tokens_after_their_positions(backbone):
    """The causal text at the positions plus one equals the labels, and so do T5's decoder ids."""
    encoded = backbone.text.encode([SHORT, LONG])
    batch = backbone.text.targets(encoded)
    if backbone.family == "vicuna":
        assert torch.equal(batch.text_ids_BT.flatten()[batch.positions_N + 1], batch.labels_N)
    else:
        inputs = batch.decoder_ids_BA.flatten()[batch.positions_N]
        starts = [0, len(encoded[0].target)]
        assert inputs[starts].tolist() == [backbone.text.decoder_start] * 2
        inner = [i for i in range(1, len(inputs)) if i not in starts]
        assert torch.equal(inputs[inner], batch.labels_N[[i - 1 for i in inner]])


LENGTHS = ("qformer_ids_BT", "qformer_mask_BT", "text_ids_BT", "text_mask_BT")


def _text_of(batch: TargetBatch) -> list[list[list[int]]]:
    """Return the tokens of both texts of a batch, row by row, without padding."""
    pairs = ((batch.qformer_ids_BT, batch.qformer_mask_BT), (batch.text_ids_BT, batch.text_mask_BT))
    return [[row[mask.bool()].tolist() for row, mask in zip(*pair, strict=True)] for pair in pairs]


@pytest.mark.parametrize("multiple", [2, 8, 12, 64])
def test_lengths_and_labels_are_padded_to_a_multiple(backbone, multiple):
    """Answers are padded to a multiple of at most 8: they are short, and each padding token costs a row of logits."""
    text = backbone.text
    encoded = text.encode([SHORT, LONG])
    plain_batch = text.targets(encoded)
    batch = text.targets(encoded, multiple)
    for name in LENGTHS:
        width, expected = getattr(batch, name).shape[1], getattr(plain_batch, name).shape[1]
        assert width % multiple == 0
        assert 0 <= width - expected < multiple
    if backbone.family == "t5":
        width, expected = batch.decoder_ids_BA.shape[1], plain_batch.decoder_ids_BA.shape[1]
        assert width % min(multiple, 8) == 0
        assert 0 <= width - expected < min(multiple, 8)
    assert len(batch.labels_N) == len(batch.positions_N)
    assert len(batch.labels_N) % multiple == 0
    assert 0 <= len(batch.labels_N) - len(plain_batch.labels_N) < multiple


@pytest.mark.parametrize("multiple", [8, 64])
def test_padding_to_a_multiple_keeps_tokens_and_labels(backbone, multiple):
    text = backbone.text
    encoded = text.encode([SHORT, LONG])
    plain_batch = text.targets(encoded)
    batch = text.targets(encoded, multiple)
    assert _text_of(batch) == _text_of(plain_batch)
    count = len(plain_batch.labels_N)
    assert torch.equal(batch.labels_N[:count], plain_batch.labels_N)
    assert (batch.labels_N[count:] == -100).all()
    assert (batch.positions_N[count:] == 0).all()
    # Each label is predicted from the same token of the same row.
    name = "decoder_ids_BA" if backbone.family == "t5" else "text_ids_BT"
    ids, plain_ids = getattr(batch, name), getattr(plain_batch, name)
    assert torch.equal(ids.flatten()[batch.positions_N[:count]], plain_ids.flatten()[plain_batch.positions_N])
    rows = batch.positions_N[:count] // ids.shape[1]
    assert torch.equal(rows, plain_batch.positions_N // plain_ids.shape[1])


def test_padding_to_a_multiple_gives_few_shapes(backbone):
    """Questions of many lengths give few shapes, so that a compiled or captured step can be reused."""
    text = backbone.text
    prompts = [PromptedQuestion("word " * n, "yes " * (n % 5), ()) for n in range(1, 25)]

    def shapes(multiple: int) -> set[tuple[torch.Size, ...]]:
        batches = [text.targets([e], multiple) for e in text.encode(prompts)]
        return {tuple(tensor.shape for tensor in batch.tensors()) for batch in batches}

    assert len(shapes(32)) < len(shapes(1)) / 4


@pytest.mark.parametrize("rows", [slice(0, None, 2), slice(1, None, 2)])
def test_some_rows_are_as_long_as_in_the_whole_batch(backbone, rows):
    encoded = backbone.text.encode([SHORT, LONG, SHORT])
    whole, part = backbone.text.targets(encoded), backbone.text.targets(encoded, rows=rows)
    names = ["qformer_ids_BT", "qformer_mask_BT", "text_ids_BT", "text_mask_BT"]
    names += ["decoder_ids_BA"] if backbone.family == "t5" else []
    for name in names:
        assert torch.equal(getattr(part, name), getattr(whole, name)[rows])
    assert part.labels_N.tolist() == [token for e in encoded[rows] for token in e.target]
    ids, whole_ids = getattr(part, names[-1]), getattr(whole, names[-1])
    if backbone.family == "vicuna":
        ids, whole_ids = part.text_ids_BT, whole.text_ids_BT
    own = [p for p in whole.positions_N.tolist() if p // whole_ids.shape[1] in range(3)[rows]]
    assert torch.equal(ids.flatten()[part.positions_N], whole_ids.flatten()[own])


def test_evaluation_batches_are_not_padded_to_a_multiple(backbone):
    text = backbone.text
    encoded = text.encode([SHORT, LONG])
    prompts, candidates = text.prompts(encoded), text.candidates(encoded)
    text.targets(encoded, 64)
    for batch, expected in ((text.prompts(encoded), prompts), (text.candidates(encoded), candidates)):
        assert all(torch.equal(getattr(batch, f.name), getattr(expected, f.name)) for f in fields(batch))


@pytest.mark.parametrize("multiple", [1, 16])
def test_a_batch_is_restored_from_its_tensors(backbone, multiple):
    batch = backbone.text.targets(backbone.text.encode([SHORT, LONG]), multiple)
    tensors = batch.tensors()
    assert len(tensors) == (7 if backbone.family == "t5" else 6)
    copy = TargetBatch.from_tensors(tensors)
    assert all(getattr(copy, f.name) is getattr(batch, f.name) for f in fields(batch))
