"""Tokens of a dataset: the same by workers and from the file, and made anew when it must be."""

import dataclasses
import datetime
import pathlib
import random
import threading
import time

import filelock
import numpy as np
import pytest

from atlas_jax.config import SFTConfig
from atlas_jax.data import chat, encoding_pool, loader, tokenized
from atlas_jax.data.chat_template import ChatTemplate
from atlas_jax.data.examples import Conversation, PlainText
from atlas_jax.data.sources import Row, Rows
from tests.tokenizers import CHATML, QWEN3, chatml_tokenizer, llama2_tokenizer

TOKENIZER = chatml_tokenizer(QWEN3)
WORDS = ("four", " It", "is", "café", "😀", "\n\n", "<think>", "</think>", "<|im_end|>", "  ", "x")


class Silent(ChatTemplate):
    """Refuses to render, as a template that is not needed may."""

    _takes_system = True

    def __call__(self, *args, **kwargs):
        """Fails the test."""
        raise AssertionError("rendered again")


def samples(count, seed=0):
    """Returns conversations and plain texts of random words, some of them empty or refused."""
    rng = random.Random(seed)

    def text():
        return "".join(rng.choices(WORDS, k=rng.randrange(12)))

    found = []
    for i in range(count):
        roles = rng.choice(
            [
                ("user", "assistant") * rng.randrange(1, 4),
                ("system", "user"),
                ("system", "user", "assistant"),
                ("assistant", "user", "assistant"),
            ]
        )
        messages = [{"role": role, "content": text()} for role in roles]
        sample = Conversation(f"r:{i}", messages, rng.choice([0, 0, 1]))
        found.append(PlainText(f"r:{i}", text(), text()) if i % 5 == 0 else sample)
    return found  # fmt: skip


def options(**changes):
    return chat.mask_options(TOKENIZER, True, 40)._replace(**changes)


def same(a, b):
    def plain(encoded):
        return [encoded.name, encoded.notes, encoded.reason] + [
            array.tolist() for array in encoded.example or ()
        ]

    return list(map(plain, a)) == list(map(plain, b))


def test_workers_make_what_one_process_makes():
    template, rows = ChatTemplate(TOKENIZER), samples(700)
    queue, done = encoding_pool._Queue(rows), {}
    with encoding_pool._helped(queue, done, (template, options()), 1):
        until = time.monotonic() + 300
        while len(done) < 3 and time.monotonic() < until:
            time.sleep(0.05)
    found = [encoded for place in sorted(done) for encoded in done[place]]
    alone = list(chat.encode(template, rows, options()))
    assert same(found, alone)
    assert {note for encoded in alone for note in encoded.notes} >= {
        "empty", "rejected", "truncated", "split",
    }  # fmt: skip


def test_what_workers_leave_undone_is_done_by_the_process_itself(monkeypatch):
    template, rows = ChatTemplate(TOKENIZER), samples(600)
    alone = list(chat.encode(template, rows, options()))
    for module in (encoding_pool._MODULE, "atlas_jax.not_there"):
        monkeypatch.setattr(encoding_pool, "_MODULE", module)
        assert same(encoding_pool.encode(template, rows, options()), alone)


def test_a_long_dataset_is_encoded_by_workers_and_a_short_one_is_not(monkeypatch):
    template, rows = ChatTemplate(TOKENIZER), samples(600)
    workers = []
    start = encoding_pool._start

    def counted():
        workers.append(start())
        return workers[-1]

    monkeypatch.setattr(encoding_pool, "_start", counted)
    monkeypatch.setattr(encoding_pool, "_num_processors", lambda: 2)
    alone = tokenized.tokenize(template, rows, options())
    assert not workers
    monkeypatch.setattr(tokenized, "_WORTH_SECS", 0.0)
    helped = tokenized.tokenize(template, rows, options())
    assert len(workers) == 1
    assert helped.remarks == alone.remarks
    for found, expected in zip(helped.sequences, alone.sequences, strict=True):
        np.testing.assert_array_equal(found, expected)


def build(token_dir, template=None, count=300, frac=1.0, seed=0):
    fields = [
        {"messages": s.messages} if isinstance(s, Conversation)
        else {"prompt": s.prompt, "completion": s.completion}
        for s in samples(count, seed)
    ]  # fmt: skip
    config = SFTConfig(max_seq_length=40)
    data = dataclasses.replace(config.data, max_rejected_frac=frac)
    config = dataclasses.replace(config, data=data)
    rows = Rows([Row(f"r:{i}", f) for i, f in enumerate(fields)], ["r:x: is not JSON"])
    template = template or ChatTemplate(TOKENIZER)
    return loader.build(rows, config, template, loader.HostRows(4), token_dir=str(token_dir))


def test_a_second_start_reads_the_file_and_says_the_same(tmp_path):
    plain, first = build(""), build(tmp_path)
    again = build(tmp_path, Silent(TOKENIZER))
    assert plain.report == first.report == again.report
    assert plain.fingerprint == first.fingerprint == again.fingerprint
    assert again.token_path == first.token_path
    assert all(again.report.notes[note] for note in ("rejected", "empty", "truncated"))
    assert np.array_equal(again.batch(1).loss_mask, plain.batch(1).loss_mask)
    with pytest.raises(ValueError, match="dataset rows cannot be used") as made:
        build("", frac=0.1)
    with pytest.raises(ValueError, match="dataset rows cannot be used") as read:
        build(tmp_path, Silent(TOKENIZER), frac=0.1)
    assert str(made.value) == str(read.value)


def test_the_fingerprint_covers_all_that_decides():
    rows, day = samples(5), datetime.date(2025, 1, 2)
    later = datetime.date(2025, 1, 3)
    other = [*rows[:4], rows[4]._replace(tools=({"name": 2**70},))]
    surrogate = [*rows[:4], rows[4]._replace(tools=({"name": "\ud800"},))]
    renamed = [*rows[:4], rows[4]._replace(name="r:9")]
    cases = [
        (ChatTemplate(TOKENIZER, {}, day), rows, options()),
        (ChatTemplate(TOKENIZER, {"enable_thinking": False}, day), rows, options()),
        (ChatTemplate(TOKENIZER, {}, later), rows, options()),
        (ChatTemplate(chatml_tokenizer(CHATML), {}, day), rows, options()),
        (ChatTemplate(chatml_tokenizer(QWEN3, trim_offsets=False), {}, day), rows, options()),
        (ChatTemplate(llama2_tokenizer(), {}, day), rows, options()),
        *((ChatTemplate(TOKENIZER, {}, day), few, options())
          for few in (rows[:4], rows[::-1], other, surrogate, renamed)),
        *((ChatTemplate(TOKENIZER, {}, day), rows, options(**changes))
          for changes in ({"max_length": 41}, {"completion_only": False}, {"stop_ids": {7}})),
    ]  # fmt: skip
    found = [tokenized.fingerprint(*case) for case in cases]
    assert len(set(found)) == len(cases)
    TOKENIZER("x", truncation=True, max_length=4)  # leaves its mark on the tokenizer
    assert found[0] == tokenized.fingerprint(*cases[0])


def broken(path, kind):
    content = path.read_bytes()
    if kind == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "changed":
        middle = content.index(b"tokens.npy") + 200
        path.write_bytes(content[:middle] + b"\xff" * 8 + content[middle + 8 :])
    elif kind == "foreign":
        path.write_text("not ours")
    else:  # whole, but of other rows
        other = build(path.parent, seed=1).token_path
        other.replace(path)


@pytest.mark.parametrize("kind", ["cut", "changed", "foreign", "other"])
def test_a_file_that_is_not_what_it_should_be_is_made_again(tmp_path, kind, caplog):
    first = build(tmp_path)
    content = first.token_path.read_bytes()
    broken(first.token_path, kind)
    again = build(tmp_path)
    assert "does not hold the tokens of the rows" in caplog.text
    assert again.fingerprint == first.fingerprint
    assert again.report == first.report
    assert first.token_path.read_bytes() == content


def test_a_disk_that_takes_no_file_costs_the_next_start_its_time(tmp_path, monkeypatch, caplog):
    def full(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(np, "savez", full)
    assert build(tmp_path).fingerprint == build("").fingerprint
    assert "cannot be kept" in caplog.text
    assert not list(tmp_path.glob("*.npz"))


def test_files_of_other_fingerprints_are_removed_and_nothing_else(tmp_path):
    old, kept = build(tmp_path, seed=1).token_path, build(tmp_path).token_path
    users = [tmp_path / name for name in ("tokens-0123456789abcdef.npz", "tokens-mine.npz")]
    users[0].write_text("of somebody else")
    np.savez(users[1], header=np.zeros(3))
    tokenized.remove_others(str(tmp_path), [kept, None])
    assert not old.exists()
    assert kept.exists()
    assert all(path.exists() for path in users)


def test_a_process_waits_for_the_one_that_makes_the_file(tmp_path):
    made = build(tmp_path / "made").token_path
    target, found = tmp_path / "shared" / made.name, []
    target.parent.mkdir()
    waiting = threading.Thread(
        target=lambda: found.append(build(target.parent, Silent(TOKENIZER)).fingerprint)
    )
    with filelock.FileLock(target.with_name("tokens.lock")):
        waiting.start()
        waiting.join(1.0)
        assert waiting.is_alive()
        pathlib.Path(made).replace(target)
    waiting.join(60.0)
    assert found == [build("").fingerprint]
