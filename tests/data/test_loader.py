"""The stream of batches: complete, the same for every number of processes, restorable."""

import dataclasses
import json

import numpy as np
import pytest

from atlas_jax.config import SFTConfig
from atlas_jax.data import loader
from atlas_jax.data.chat_template import ChatTemplate
from atlas_jax.data.loader import HostRows
from atlas_jax.data.packing import split_rows
from atlas_jax.data.sources import Row, Rows
from tests.tokenizers import chatml_tokenizer

CONFIG = SFTConfig(max_seq_length=64)
TOKENIZER = chatml_tokenizer()
NUM_ROWS = 11


def rows(count=NUM_ROWS):
    """Texts of 4 to 14 tokens whose first token tells them apart."""
    texts = [(chr(65 + i), "4" * (i % 11 + 2)) for i in range(count)]
    return Rows(
        [Row(f"t.jsonl:{i + 1}", {"prompt": p, "completion": c}) for i, (p, c) in enumerate(texts)],
        [],
    )


def build(layout=HostRows(4), data=None, training=True, **changes):  # noqa: B008 - immutable
    config = dataclasses.replace(CONFIG, **changes)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, **(data or {})))
    return loader.build(rows(), config, ChatTemplate(TOKENIZER), layout, training=training)


def segments(batch):
    """Returns the tokens of every example in a batch."""
    found = []
    for tokens, ids in zip(batch.tokens, batch.segment_ids, strict=True):
        found += [tuple(tokens[ids == i].tolist()) for i in range(1, ids.max() + 1)]
    return found


def epoch(dataset, number):
    steps = range(dataset.num_steps(number), dataset.num_steps(number + 1))
    return [example for step in steps for example in segments(dataset.batch(step))]


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("packing", [False, True])
def test_epoch_holds_every_example_exactly_once(packing):
    dataset = build(packing=packing)
    every = sorted(tuple(dataset.example(i).tokens.tolist()) for i in range(NUM_ROWS))
    assert len(set(every)) == NUM_ROWS
    for number in (0, 1, 2):
        assert sorted(epoch(dataset, number)) == every


@pytest.mark.parametrize("packing", [False, True])
def test_order_follows_seed_and_epoch(packing):
    dataset, again, other = (build(packing=packing, seed=seed) for seed in (1, 1, 2))
    assert epoch(dataset, 0) == epoch(again, 0)
    assert epoch(dataset, 1) == epoch(again, 1)
    assert epoch(dataset, 0) != epoch(dataset, 1)
    assert epoch(dataset, 0) != epoch(other, 0)


@pytest.mark.parametrize("changes", [{"training": False}, {"data": {"shuffle": False}}])
def test_rows_keep_their_order_without_shuffling(changes):
    dataset = build(**changes)
    in_order = [tuple(dataset.example(i).tokens.tolist()) for i in range(NUM_ROWS)]
    assert epoch(dataset, 0) == epoch(dataset, 1) == in_order


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_together_hold_the_global_batch(packing, processes):
    whole = build(packing=packing)
    parts = [build(HostRows(4, p, processes), packing=packing) for p in range(processes)]
    assert {part.fingerprint for part in parts} == {whole.fingerprint}
    for step in range(whole.num_steps(2)):
        shares = [part.batch(step) for part in parts]
        together = [np.concatenate(arrays) for arrays in zip(*shares, strict=True)]
        assert same(together, whole.batch(step))


def test_microbatches_of_unpacked_rows_are_sorted_and_padded_each():
    data = {"length_buckets": (6, 10)}
    whole, sorted_rows = (build(HostRows(4, microbatches=m), data) for m in (1, 2))
    for step in range(3):
        batch = sorted_rows.batch(step)
        assert sorted(segments(batch)) == sorted(segments(whole.batch(step)))
        lengths = (batch.segment_ids > 0).sum(1)
        assert lengths.tolist() == sorted(lengths, reverse=True)
        # The smallest length, 6, 10 or the 64 of `max_seq_length`, that holds the longer of two.
        expected = tuple(min(n for n in (6, 10, 64) if n >= lengths[i]) for i in (0, 2))
        assert sorted_rows.row_lengths(step) == expected
        parts = split_rows(batch, expected)
        assert sum(int((part.segment_ids > 0).sum()) for part in parts) == lengths.sum()
    assert len({sorted_rows.row_lengths(step) for step in range(3)}) > 1
    assert sorted_rows.fingerprint == whole.fingerprint


def test_processes_share_each_sorted_microbatch():
    whole = build(HostRows(4, microbatches=2))
    parts = [build(HostRows(4, p, 2, microbatches=2)) for p in range(2)]
    for step in range(3):
        expected = whole.batch(step).tokens.reshape(2, 2, -1)
        found = [p.batch(step).tokens.reshape(2, 1, -1) for p in parts]
        np.testing.assert_array_equal(np.concatenate(found, axis=1), expected)
        assert {p.row_lengths(step) for p in parts} == {whole.row_lengths(step)}


@pytest.mark.parametrize("packing", [False, True])
def test_each_process_knows_the_tokens_of_the_whole_step(packing):
    """Also where its own share is shorter or blank, and over the borders of epochs."""
    options = {"packing": packing, "max_seq_length": 16}
    streams = [build(HostRows(4, p, 4), **options).batches() for p in range(4)]
    totals = []
    for _ in range(10):
        own = [int((next(stream).segment_ids > 0).sum()) for stream in streams]
        assert {stream.num_tokens for stream in streams} == {sum(own)}
        totals.append((sum(own), 4 * own[0]))
    assert any(true != guessed for true, guessed in totals)
    for stream in streams:
        stream.close()


def test_last_batch_of_an_epoch_is_filled_with_blank_rows():
    batch = build().batch(2)  # 11 rows in steps of 4
    assert batch.segment_ids.any(axis=1).tolist() == [True, True, True, False]
    assert not batch.loss_mask[3].any()


def test_process_whose_share_is_all_blank_has_the_same_shape():
    first, last = (build(HostRows(4, p, 4)).batch(2) for p in (0, 3))
    assert first.tokens.shape == last.tokens.shape
    assert not last.segment_ids.any()


def test_unpacked_batches_have_the_bucket_of_their_longest_row():
    dataset = build(data={"shuffle": False, "length_buckets": (8, 12, 128)})
    lengths = [len(dataset.example(i).tokens) for i in range(NUM_ROWS)]
    assert (max(lengths[:4]), max(lengths[4:8]), max(lengths)) == (7, 11, 14)
    assert [dataset.batch(step).tokens.shape for step in range(3)] == [(4, 8), (4, 12), (4, 64)]


def test_packed_batches_have_the_length_of_a_row():
    dataset = build(packing=True, max_seq_length=30)
    assert {dataset.batch(step).tokens.shape for step in range(4)} == {(4, 30)}


def test_rows_of_every_epoch_keep_to_the_segments_of_the_first():
    dataset = build(packing=True, max_seq_length=30)
    most = dataset.max_segments
    assert most % 8 == 0
    widest = max(dataset.batch(s).segment_ids.max() for s in range(dataset.num_steps(3)))
    assert 1 < widest <= most
    assert build().max_segments == 1


def test_buckets_above_the_longest_row_are_cut_to_it():
    assert loader.capped_buckets((256, 64, 128), 100) == (64, 100)
    assert loader.capped_buckets((64, 100), 100) == (64, 100)
    assert loader.capped_buckets((), 100) == (100,)


def test_num_steps_counts_started_steps_of_fractions():
    dataset = build()  # 3 steps an epoch
    assert [dataset.num_steps(e) for e in (0.1, 0.5, 1.0, 1.5, 2.0, 10.0)] == [1, 2, 3, 5, 6, 30]


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("stop", [1, 2, 3, 4, 5])
def test_restored_iterator_continues_as_if_uninterrupted(packing, stop):
    dataset = build(HostRows(2), packing=packing, max_seq_length=32)
    assert dataset.num_steps(1) < 7  # so that the run below crosses an epoch's border
    whole = dataset.batches()
    expected = [next(whole) for _ in range(9)]
    first = dataset.batches()
    for _ in range(stop):
        next(first)
    state = json.loads(json.dumps(first.get_state()))
    assert state["step"] == stop
    second = build(HostRows(2), packing=packing, max_seq_length=32).batches()
    next(second)  # what was read before the restore does not matter
    second.set_state(state)
    assert all(same(next(second), batch) for batch in expected[stop:])
    for batches in (whole, first, second):
        batches.close()


def test_batches_of_a_range_start_and_stop_there():
    dataset = build()
    found = list(dataset.batches(2, 5))
    assert len(found) == 3
    assert all(same(a, dataset.batch(step)) for a, step in zip(found, (2, 3, 4), strict=True))


def test_iterator_restored_at_its_end_is_exhausted():
    dataset = build()
    batches = dataset.batches(0, 3)
    list(batches)
    state = batches.get_state()
    again = dataset.batches(0, 3)
    again.set_state(state)
    assert list(again) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"packing": True},
        {"data": {"shuffle": False}},
        {"max_seq_length": 9, "data": {"max_rejected_frac": 1.0}},
    ],
)
def test_state_of_other_data_is_refused(changes):
    state = build(**changes).batches().get_state()
    with pytest.raises(ValueError, match=r"checkpoint at step 0 is from data .* new output_dir"):
        build().batches().set_state(state)


def test_a_position_in_other_data_is_kept_where_they_are_allowed():
    old = build(seed=1).batches()
    next(old)
    dataset = build()
    new = dataset.batches()
    new.set_state(old.get_state(), allow_other_data=True)
    assert same(next(new), dataset.batch(1))
    assert new.get_state() == {"step": 2, "fingerprint": dataset.fingerprint}


def test_fingerprint_changes_with_a_row_and_with_its_mask():
    def fingerprint(fields, completion_only=True):
        data = dataclasses.replace(CONFIG.data, completion_only=completion_only)
        config = dataclasses.replace(CONFIG, data=data)
        named = Rows([Row("t:0", fields)], [])
        return loader.build(named, config, ChatTemplate(TOKENIZER), HostRows(1)).fingerprint

    found = {
        fingerprint(conversation("x", "y")),
        fingerprint(conversation("x", "z")),
        fingerprint(conversation("x", "y"), completion_only=False),
    }
    assert len(found) == 3


def test_fingerprint_does_not_depend_on_processes_or_padding():
    buckets = {"length_buckets": (16,), "num_workers": 1}
    assert build().fingerprint == build(HostRows(4, 1, 2), data=buckets).fingerprint
    assert build().fingerprint != build(HostRows(8)).fingerprint


def test_layout_that_does_not_divide_is_an_error():
    with pytest.raises(ValueError, match="6 rows a step do not divide over 4 processes"):
        build(HostRows(6, 0, 4))


def conversation(user, assistant):
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return {"messages": messages}


def test_report_counts_and_names_every_row():
    fields = [
        conversation("x", "y"),
        conversation("x", "  "),
        conversation("x" * 60, "y"),
        conversation("x", "y" * 60),
        {"question": "q"},
    ]
    named = Rows([Row(f"t:{i}", f) for i, f in enumerate(fields)], ["t:9: is not JSON"])
    config = dataclasses.replace(
        CONFIG, max_seq_length=40, data=dataclasses.replace(CONFIG.data, max_rejected_frac=0.9)
    )
    report = loader.build(named, config, ChatTemplate(TOKENIZER), HostRows(1)).report
    assert (report.rows, report.examples) == (6, 2)
    unreadable, unknown = report.notes["rejected"]
    assert unreadable == "t:9: is not JSON"
    assert unknown.startswith("t:4: lacks messages; it has question")
    assert {note: names for note, names in report.notes.items() if names} == {
        "rejected": (unreadable, unknown), "empty": ("t:1",), "masked": ("t:2",),
        "truncated": ("t:3",),
    }  # fmt: skip
    # "y" and its stop token, and the example that was cut: 40 tokens less its prompt.
    prompt = TOKENIZER("<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
    assert report.trained_tokens == 2 + 40 - len(prompt)
    assert report.tokens == len(prompt) + 3 + 40


def test_rows_that_are_cut_masked_or_empty_count_against_the_limit():
    good = [Row(f"t:{i}", conversation("x", "y")) for i in range(2)]
    for lost in (conversation("x" * 60, "y"), conversation("x", ""), conversation("x", "y" * 60)):
        data = dataclasses.replace(CONFIG.data, max_rejected_frac=0.3)
        config = dataclasses.replace(CONFIG, max_seq_length=40, data=data)
        named = Rows([*good, Row("t:9", lost)], [])
        with pytest.raises(ValueError, match=r"1 of 3 dataset rows cannot be used.*\n  t:9: "):
            loader.build(named, config, ChatTemplate(TOKENIZER), HostRows(1))


def test_nothing_left_is_an_error_with_the_counts():
    named = Rows([Row("t:0", conversation("x" * 60, "y")), Row("t:1", conversation("x", ""))], [])
    lenient = dataclasses.replace(CONFIG.data, max_rejected_frac=1.0)
    config = dataclasses.replace(CONFIG, max_seq_length=40, data=lenient)
    with pytest.raises(ValueError, match=r"no example is left of 2 rows: .*1 empty, 1 masked"):
        loader.build(named, config, ChatTemplate(TOKENIZER), HostRows(1))


def test_rows_that_the_template_refuses_stop_the_run():
    refusing = chatml_tokenizer("{{ raise_exception('never') }}")
    named = Rows([Row("t:0", conversation("x", "y"))], [])
    with pytest.raises(ValueError, match=r"1 of 1 dataset rows(.|\n)*t:0: .*never"):
        loader.build(named, CONFIG, ChatTemplate(refusing), HostRows(1))


def test_conversations_without_a_chat_template_stop_the_run():
    named = Rows([Row("t:0", conversation("x", "y"))], [])
    with pytest.raises(ValueError, match="has no chat template"):
        loader.build(named, CONFIG, ChatTemplate(chatml_tokenizer(None)), HostRows(1))
