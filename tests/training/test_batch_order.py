"""The order of the data is a function of seed and epoch alone, and banks are what sees the same batches."""

import random

import pytest

from blipfit import grid
from blipfit.recipe import TrainingConfig
from blipfit.training import bank_member, batch_order


def equal(count):
    """Lengths of questions that are all alike."""
    return [7] * count


@pytest.mark.parametrize("grouped", [True, False])
def test_every_question_once_an_epoch_and_no_short_batch(grouped):
    training = TrainingConfig(batch_size=3, accumulation=2, group_by_length=grouped)
    batches = batch_order.effective_batches([i % 5 for i in range(20)], training, 0)
    assert [len(batch) for batch in batches] == [6, 6, 6]
    used = [i for batch in batches for i in batch]
    assert len(set(used)) == 18
    assert set(used) <= set(range(20))


@pytest.mark.parametrize("grouped", [True, False])
def test_the_order_depends_on_seed_and_epoch_and_on_nothing_else(grouped):
    def batches(epoch, count=40, **settings):
        part = TrainingConfig(group_by_length=grouped, **settings)
        return batch_order.effective_batches(equal(count), part, epoch)

    one = batches(3, batch_size=4, learning_rate=1e-3)
    assert one == batches(3, batch_size=2, accumulation=2)
    assert one != batches(4, batch_size=4)
    assert one != batches(3, batch_size=4, seed=1)
    assert batches(0, batch_size=4) != [list(range(i, i + 4)) for i in range(0, 40, 4)]
    on_every_machine = [[0, 3, 2], [4, 5, 1]] if grouped else [[4, 5, 1], [0, 3, 2]]
    assert batches(0, 6, batch_size=3) == on_every_machine


def test_grouped_batches_hold_little_padding_and_still_change_with_the_epoch():
    lengths = [random.Random(i).randint(10, 60) for i in range(800)]
    training = TrainingConfig(batch_size=16, group_by_length=True)

    def padded(batches):
        return sum(len(batch) * max(lengths[i] for i in batch) for batch in batches) / sum(lengths)

    grouped = batch_order.effective_batches(lengths, training, 0)
    drawn = batch_order.effective_batches(lengths, training.model_copy(update={"group_by_length": False}), 0)
    assert padded(grouped) < 1.1 < 1.5 < padded(drawn)
    together = {frozenset(batch) for batch in grouped}
    assert not together & {frozenset(batch) for batch in batch_order.effective_batches(lengths, training, 1)}
    # Long ones do not all come first or last.
    longest = [max(lengths[i] for i in batch) for batch in grouped]
    assert longest not in (sorted(longest), sorted(longest, reverse=True))


def test_a_batch_comes_by_length_and_its_questions_are_those_drawn():
    lengths = [random.Random(i).randint(10, 60) for i in range(96)]
    training = TrainingConfig(batch_size=8, accumulation=2)
    batches = batch_order.effective_batches(lengths, training, 0)
    drawn = batch_order.effective_batches(equal(96), training, 0)
    assert [set(batch) for batch in batches] == [set(batch) for batch in drawn]
    assert batches != drawn
    for batch in batches:
        assert [lengths[i] for i in batch] == sorted(lengths[i] for i in batch)


def test_fewer_questions_than_a_batch_make_none():
    assert batch_order.effective_batches(equal(5), TrainingConfig(batch_size=6), 0) == []
    assert len(batch_order.effective_batches(equal(6), TrainingConfig(batch_size=6), 0)) == 1


def test_micro_batches_are_the_batch_in_order():
    training = TrainingConfig(batch_size=2, accumulation=3)
    assert list(batch_order.micro_batches([5, 4, 3, 2, 1, 0], training)) == [[5, 4], [3, 2], [1, 0]]


def test_the_grid_falls_into_banks_of_equal_questions():
    """Two banks a language model: the Q-Former fully trained or not. Ten-epoch experiments are no reason to part."""
    keys: dict[tuple, list[int]] = {}
    for number, recipe in enumerate(grid.recipes("iconqa"), start=1):
        keys.setdefault(bank_member.bank_key(recipe), []).append(number)
    assert sorted(keys.values()) == [[*range(1, 13)], [*range(13, 33)], [*range(33, 45)], [*range(45, 65)]]


@pytest.mark.parametrize(
    "change",
    [
        "training.seed=1",
        "training.group_by_length=true",
        "training.batch_size=8",
        "training.accumulation=2",
        "training.dropout=false",
        "training.precision=bf16",
        "training.max_text_tokens=64",
        "training.max_target_tokens=64",
        "data.limit=5",
        "data.prompt=vqa-v1",
        "data.images=stored",
        "model.revision=abc",
        "model.name=tiny-t5",
        "evaluation.batch_size=4",
        "adapter.qformer=full",
        "performance.compile=true",
        "performance.cuda_graphs=true",
        "performance.pad_to_multiple_of=8",
        "performance.checkpointing=query",
        "performance.checkpointing=answer",
    ],
)
def test_what_must_be_equal_in_a_bank(change):
    recipe = grid.recipe("iconqa", 15)
    assert bank_member.bank_key(recipe) != bank_member.bank_key(recipe.override([change]))


@pytest.mark.parametrize(
    "change",
    [
        "training.learning_rate=1",
        "training.weight_decay=0",
        "training.betas=[0.5, 0.5]",
        "training.max_epochs=1",
        "training.patience=1",
        "adapter.rank=2",
        "adapter.alpha=1",
        "adapter.llm=attn",
        "adapter.qformer=[self_attn]",
        "experiment=other",
    ],
)
def test_what_may_differ_in_a_bank(change):
    recipe = grid.recipe("iconqa", 15)
    assert bank_member.bank_key(recipe) == bank_member.bank_key(recipe.override([change]))


def test_dropout_seeds_differ_by_place_and_are_the_same_everywhere():
    places = [(42, e, s, m) for e in range(3) for s in range(3) for m in range(2)] + [(43, 0, 0, 0)]
    seeds = [batch_order.step_seed(*place) for place in places]
    assert len(set(seeds)) == len(places)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert batch_order.step_seed(42, 0, 0, 0) == 4062196238990054430  # on every machine


def test_a_method_of_pefts_layers_shares_no_bank():
    two = [grid.recipe("iconqa", experiment, "tiny").override(["adapter.method=dora"]) for experiment in (28, 32)]
    assert bank_member.bank_key(two[0]) != bank_member.bank_key(two[1])
    assert bank_member.bank_key(two[0]) < bank_member.bank_key(two[1])  # keys are sorted
    assert len({bank_member.bank_key(grid.recipe("iconqa", experiment, "tiny")) for experiment in (28, 32)}) == 1
