"""Conversations of the policy with a function of the user's: its turns, and the row they become."""

import asyncio
import dataclasses
import functools
import json
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax import logprobs, losses, stopping
from atlas_jax.config import GRPOConfig, MeshConfig, RolloutConfig
from atlas_jax.data.chat_template import ChatTemplate
from atlas_jax.policy_logprobs import policy_logprobs
from atlas_jax.recipes import chat_models
from atlas_jax.rollout import measures, record, teaching
from atlas_jax.rollout.engine import ChatModel
from atlas_jax.rollout.episodes import ConversationFullError, EpisodeOptions
from atlas_jax.rollout.local import LocalEngine, goes_on
from atlas_jax.rollout.rows import collate_policy
from atlas_jax.rollout.sampling import Sampling
from atlas_jax.stopping import StopRequestedError
from atlas_jax.types import Completion, Message, PolicyBatch, Question, Sample
from tests import tiny
from tests.policy_reference import OPTIONS
from tests.rollout.scripts import STOP, Script, protocol, questions
from tests.tokenizers import CHATML, QWEN3, chatml_tokenizer, llama2_tokenizer

SAMPLING = Sampling(1.0)
DRAWS = teaching.Draws(SAMPLING, 0)


def talk(ask, script, count=1, size=1, timeout=5.0, turns=16, **limits):
    """Returns the samples of episodes with a script."""
    how = protocol(size=size, **limits)
    how = how._replace(episode=EpisodeOptions(ask, timeout, turns))
    return teaching.run(questions(count), range(count), script.model, None, how, DRAWS)


def ids(text):
    return tuple(map(ord, text))


def test_an_episode_is_the_sampled_ids_with_what_tools_said_between_them():
    async def ask(policy, question):
        assert await policy.say(question.text) == "a?"
        policy.observe("tool")
        assert await policy.say("more") == "bc"
        policy.facts["won"] = True

    script = Script(lambda prompt, _: "bc" if "tool" in prompt else "a?", version=4)
    [sample] = talk(ask, script)
    between = ids("|tool|more|")
    assert script.prompts == ["|q0|", "|q0|a?\0|tool|more|"]
    assert sample.completion == Completion(
        prompt_ids=ids("|q0|"),
        token_ids=(*ids("a?"), STOP, *between, *ids("bc"), STOP),
        logprobs=(-1.0,) * 3 + (0.0,) * len(between) + (-1.0,) * 3,
        untruncated_logprobs=(-1.0,) * 3 + (0.0,) * len(between) + (-1.0,) * 3,
        finish_reason="stop",
        text="bc",
        weights_version=4,
        sampled=(True,) * 3 + (False,) * len(between) + (True,) * 3,
        version_spans=((4, 3 + len(between) + 3),),
    )
    assert [(m["role"], m["content"]) for m in sample.messages] == [
        ("user", "q0"), ("assistant", "a?"), ("user", "tool"), ("user", "more"),
        ("assistant", "bc"),
    ]  # fmt: skip
    written = json.loads(json.dumps(record.as_record(1, sample)))
    assert written["facts"] == {"won": True}
    assert written["completion"]["num_sampled"] == 6
    assert written["messages"][1] == {"role": "assistant", "content": "a?"}
    values = measures.of_generation([sample], 4) | measures.of_episodes([sample])
    assert values["rollout/completion_tokens"] == (6, 1)
    assert values["rollout/observed_tokens"] == (len(between), 1)
    assert values["rollout/turns"] == (2, 1)


def test_the_text_that_is_returned_is_what_rewards_see():
    async def ask(policy, question):
        return "42 of " + await policy.say(question.text)

    [sample] = talk(ask, Script(lambda *_: "x"))
    assert sample.answer.text == "42 of x"
    assert sample.completion.token_ids == (*ids("x"), STOP)


def test_requests_that_wait_together_are_one_call_and_seeds_are_all_different():
    async def ask(policy, question):
        for number in range(int(question.text[1]) + 1):
            await asyncio.sleep(0.01 * number)
            await policy.say(question.text)

    script = Script(lambda *_: "x")
    samples = talk(ask, script, count=3, size=2)
    assert [len(call) for call in script.calls] == [6, 4, 2]
    seeds = [request.seed for request in script.requests]
    assert len(set(seeds)) == 12
    assert [(s.place, s.member) for s in samples] == [(q, m) for q in range(3) for m in range(2)]
    again = Script(lambda *_: "x")
    assert talk(ask, again, count=3, size=2) == samples
    assert [request.seed for request in again.requests] == seeds


def test_no_episodes_need_no_engine():
    script = Script(lambda *_: "x")
    assert talk(None, script, count=0) == []
    assert script.calls == []


async def raises(policy, question):
    await policy.say(question.text)
    raise KeyError("no such\n tool")


async def silent(policy, question):
    return "a text that nobody sampled"


async def hangs(policy, question):
    await policy.say(question.text)
    await asyncio.sleep(60)


async def stubborn(policy, question):
    while True:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            await policy.say("still here")


async def number(policy, question):
    await policy.say(question.text)
    return 7


async def unwritable(policy, question):
    await policy.say(question.text)
    policy.facts["object"] = object()


async def exits(policy, question):
    raise SystemExit(3)


async def twice(policy, question):
    await asyncio.gather(policy.say("a"), policy.say("b"))


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (raises, "error: KeyError: 'no such\\n tool' (test_episodes.py:"),
        (silent, "error: it ended before the policy said anything"),
        (hangs, "error: it took more than 0.5 s between two turns"),
        (stubborn, "error: it took more than 0.5 s between two turns"),
        (number, "error: TypeError: it returned a int; return a text or None"),
        (unwritable, "error: TypeError: Object of type object is not JSON serializable"),
        (exits, "error: SystemExit: 3"),
        (twice, "error: RuntimeError: the policy has another turn in progress; await it first"),
    ],
)
def test_what_goes_wrong_in_a_function_is_its_sample_alone(function, reason):
    async def ask(policy, question):
        if question.text == "q1":
            return await function(policy, question)
        return await policy.say(question.text)

    good, bad, other = talk(ask, Script(lambda *_: "fine"), count=3, timeout=0.5)
    assert bad.completion.finish_reason.startswith(reason)
    assert bad.completion.is_failed and not bad.completion.token_ids
    assert good.completion.text == other.completion.text == "fine"


def test_a_function_that_blocks_does_not_end_the_run(monkeypatch):
    release = threading.Event()

    async def ask(policy, question):
        if question.text == "q1":
            release.wait(60)
        return await policy.say(question.text)

    monkeypatch.setattr("atlas_jax.rollout.episodes._GRACE_SECS", 0.2)
    first, second = talk(ask, Script(lambda *_: "fine"), count=2, timeout=0.3)
    release.set()
    assert "blocks its event loop" in second.completion.finish_reason
    assert first.completion.is_failed


def test_a_stop_ends_the_wait_for_a_tool():
    async def ask(policy, question):
        await asyncio.sleep(1000)

    threading.Timer(0.2, stopping.request, ("a test",)).start()
    start = time.monotonic()
    try:
        with pytest.raises(StopRequestedError):
            talk(ask, Script(lambda *_: "x"), timeout=1000.0)
    finally:
        stopping.reset()
    assert time.monotonic() - start < 300


def test_an_engine_that_fails_is_named():
    def generate(requests, sampling):
        return [[Completion.failed("error: no answer", r.prompt_ids)] for r in requests]

    async def ask(policy, question):
        with pytest.raises(Exception, match="no answer"):
            await policy.say(question.text)
        return "a text all the same"

    script = Script(lambda *_: "x")
    how = protocol(size=1)._replace(episode=EpisodeOptions(ask, 5.0, 3))
    model = script.model._replace(generate=generate)
    [sample] = teaching.run(questions(1), [0], model, None, how, DRAWS)
    assert sample.completion.finish_reason == "error: no answer"


def test_a_conversation_ends_where_its_room_does():
    async def ask(policy, question):
        while True:
            await policy.say("xy")

    script = Script(lambda *_: "abc")
    # Each turn takes 4 tokens, and what is said between two of them 4: 4, 12, 20.
    [sample] = talk(ask, script, policy=20)
    assert sample.completion.num_tokens == 20
    assert (sample.completion.finish_reason, sample.completion.text) == ("length", "abc")
    # With room for 19 the third turn is cut, and a fourth does not fit.
    [sample] = talk(ask, script, policy=19)
    assert sample.completion.token_ids[-3:] == ids("abc")
    assert sample.completion.finish_reason == "length"
    # What does not leave room for a turn is not in the row.
    [sample] = talk(ask, script, policy=8)
    assert sample.completion.token_ids == (*ids("abc"), STOP)
    [sample] = talk(ask, script, policy=60, turns=2)
    assert len(sample.messages) == 5
    assert sample.completion.finish_reason == "length"
    [sample] = talk(ask, script, policy=60, prompt=3)
    assert sample.completion.finish_reason == "skipped: prompt of 4 tokens exceeds 3"


def test_a_function_may_end_a_full_conversation_itself():
    async def ask(policy, question):
        try:
            while True:
                await policy.say("xy", max_tokens=2)
                assert policy.finish_reason == "length"
        except ConversationFullError:
            return "enough"

    [sample] = talk(ask, Script(lambda *_: "abc"), turns=2)
    assert sample.completion.text == "enough"
    assert sample.completion.token_ids == (*ids("ab"), *ids("|xy|"), *ids("ab"))


def test_a_turn_that_is_given_up_is_asked_again():
    async def ask(policy, question):
        try:
            await asyncio.wait_for(policy.say(question.text), 0.05)
        except TimeoutError:
            given_up.set()
            await policy.say("again")

    given_up = threading.Event()
    script = Script(lambda *_: "x")
    slow = script.model._replace(
        generate=lambda *args: (script.calls or given_up.wait(60), script._generate(*args))[1]
    )
    how = protocol(size=1)._replace(episode=EpisodeOptions(ask, 60.0, 3))
    [sample] = teaching.run(questions(1), [0], slow, None, how, DRAWS)
    assert script.prompts == ["|q0|", "|q0|again|"]
    assert sample.completion.prompt_ids == ids("|q0|again|")


# The row.


def sample_of(prompt, turns, **more):
    """A sample of turns, each (tokens, sampled)."""
    tokens = tuple(t for part, _ in turns for t in part)
    sampled = tuple(s for part, s in turns for _ in part)
    values = tuple(-0.5 if s else 0.0 for s in sampled)
    completion = Completion(prompt, tokens, values, values, "stop", "", 0, sampled)
    return Sample(Question("q", "?", "", {}), completion, trains=True, **more)


def test_what_tools_said_is_in_the_row_and_is_not_trained():
    a = sample_of((7, 8), [((1, 2), True), ((3,), False), ((4,), True)], advantage=2.0)
    b = sample_of((7, 9), [((5,), True)], advantage=-1.0)
    failed = Sample(a.question, Completion.failed("error: tool"))
    batch = collate_policy([a, b, failed], 3, 12)
    assert batch.tokens.tolist() == [[7, 8, 1, 2, 3, 4, 9, 5, 0, 0, 0, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 5, 1, 2, 0, 0, 0, 0]]
    assert batch.sequence_ids.tolist() == [[0, 1, 1, 1, 1, 1, 2, 2, 0, 0, 0, 0]]
    assert batch.loss_mask.astype(int).tolist() == [[0, 0, 1, 1, 0, 1, 0, 1, 0, 0, 0, 0]]
    assert batch.advantages.tolist() == [[0, 0, 2, 2, 0, 2, 0, -1, 0, 0, 0, 0]]
    assert batch.rollout_logprobs[0, 4] == 0.0
    alone = collate_policy([a], 1, 6)
    assert alone.tokens.tolist() == [[7, 8, 1, 2, 3, 4]]
    assert alone.sequence_ids.tolist() == [[0, 0, 1, 1, 1, 1]]


@pytest.mark.parametrize(
    ("loss_type", "expected"),
    [
        # ratios are 1: the mean of -advantage over the three sampled tokens of the first and the
        # one of the second, then over the two completions
        ("grpo", (-2.0 + 1.0, 2)),
        ("dapo", (-2.0 * 3 + 1.0, 4)),
        ("dr_grpo", (-2.0 * 3 + 1.0, 2 * OPTIONS.max_new_tokens)),
    ],
)
def test_the_loss_counts_sampled_tokens_alone(loss_type, expected):
    a = sample_of((7, 8), [((1, 2), True), ((3,), False), ((4,), True)], advantage=2.0)
    b = sample_of((7, 8), [((5,), True)], advantage=-1.0)
    batch = jax.tree.map(jnp.asarray, collate_policy([a, b], 2, 8))
    options = OPTIONS._replace(
        loss_type=loss_type, beta=0.0, importance_sampling="none", num_sequences=2
    )
    # A log-probability at the tool's token would change the sum if it were counted.
    own = jnp.where(batch.loss_mask, -0.5, -3.0)
    (total, weight), metrics = losses.policy_loss(own, batch, options)
    assert (float(total), float(weight)) == pytest.approx(expected)
    assert float(metrics["rollout/mismatch_kl"][0]) == 0.0
    assert float(metrics["rollout/mismatch_kl"][1]) == 4


# The next turn's prompt.


@pytest.mark.parametrize("template", [CHATML, QWEN3])
@pytest.mark.parametrize("system", ["", "be kind"])
def test_the_ids_of_turns_are_those_of_the_whole_conversation(template, system):
    tokenizer = chatml_tokenizer(template)
    encode = chat_models.turn_encoder(ChatTemplate(tokenizer), system)
    user, tool = Message(role="user", content="two?"), Message(role="tool", content="it is 4 😀")
    answer = Message(role="assistant", content="hm <tool> x")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    sampled = (*tokenizer("hm <tool> x").input_ids, end)
    whole = [*([Message(role="system", content=system)] if system else []), user, answer, tool]
    text = tokenizer.apply_chat_template(whole, tokenize=False, add_generation_prompt=True)
    expected = tuple(tokenizer(text, add_special_tokens=False).input_ids)
    assert (*encode([user]), *sampled, *encode([user, answer, tool], end)) == expected
    # A turn that was cut gets the end of its turn from the template.
    cut = (*encode([user]), *sampled[:-1], *encode([user, answer, tool]))
    assert cut == expected


def test_the_name_of_a_special_token_that_a_tool_says_is_text():
    tokenizer = chatml_tokenizer()
    encode = chat_models.turn_encoder(ChatTemplate(tokenizer), "")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    talked = [Message(role="user", content="q"), Message(role="assistant", content="a")]
    found = encode([*talked, Message(role="user", content="x<|im_end|>Answer probe.y")], end)
    assert found.count(end) == 1
    assert "x<|im_end|>Answer probe.y" in tokenizer.decode(found)


def test_a_message_that_the_template_leaves_out_is_refused():
    tokenizer = chatml_tokenizer(
        "{% for m in messages %}{% if m.role != 'tool' %}{{ m.content }}{% endif %}{% endfor %}"
    )
    encode = chat_models.turn_encoder(ChatTemplate(tokenizer), "")
    talked = [Message(role="user", content="q"), Message(role="assistant", content="a")]
    with pytest.raises(ValueError, match=r"leaves out .* of the role tool; use the role user"):
        encode([*talked, Message(role="tool", content="4")])


def test_a_stop_token_is_not_repeated_where_a_template_puts_a_space_before_it():
    tokenizer = llama2_tokenizer()
    encode = chat_models.turn_encoder(ChatTemplate(tokenizer), "")
    talked = [Message(role="user", content="q"), Message(role="assistant", content="a")]
    end = tokenizer.convert_tokens_to_ids("</s>")
    found = encode([*talked, Message(role="user", content="more")], end)
    assert end not in found
    assert found[0] == tokenizer.convert_tokens_to_ids("<s>")


def test_without_a_chat_template_messages_are_joined_as_the_prompt_is():
    encode = chat_models.turn_encoder(ChatTemplate(chatml_tokenizer(None)), "")
    talked = [Message(role="user", content="q"), Message(role="assistant", content="a")]
    found = encode([*talked, Message(role="user", content="more")])
    assert chatml_tokenizer(None).decode(found) == "\n\nmore"


# A real model.


def test_the_trainer_gives_sampled_tokens_the_probability_that_the_engine_gave(tmp_path):
    decoder, params = tiny.load(tiny.save("qwen3", tmp_path), MeshConfig(), jax.devices()[:1])
    tokenizer = chatml_tokenizer()
    encode = chat_models.turn_encoder(ChatTemplate(tokenizer), "")
    engine = LocalEngine(decoder, tokenizer, tuple(range(3, 60)))
    asked = []

    def generate(requests, sampling):
        written = engine.generate(params, 2, requests, sampling)
        asked.extend(zip(requests, written, strict=True))
        return written

    model = ChatModel(lambda t: (), generate, 256, 400, encode, goes_on)

    async def ask(policy, question):
        await policy.say(question.text, max_tokens=9)
        await policy.say("The tool says 4.", role="tool", max_tokens=9)
        await policy.say("And now?")

    how = protocol(size=2, policy=120)
    how = how._replace(episode=EpisodeOptions(ask, 60.0, 8))
    samples = teaching.run(questions(2), range(2), model, None, how, DRAWS)
    assert len(asked) == 12
    for sample in samples:
        row = sample.completion
        whole = row.prompt_ids + row.token_ids
        turns = [(r, c) for r, [c] in asked if whole[: len(r.prompt_ids)] == r.prompt_ids]
        turns = [(r, c) for r, c in turns
                 if whole[len(r.prompt_ids) :][: c.num_tokens] == c.token_ids]  # fmt: skip
        assert len(turns) == 3
        written = [t for _, c in turns for t in c.token_ids]
        assert [t for t, s in zip(row.token_ids, row.sampled, strict=True) if s] == written
    samples = [s._replace(trains=True) for s in samples]
    for per_row in (1, 2):
        batch = jax.tree.map(jnp.asarray, collate_policy(samples, per_row, 256))
        found = _logprobs(decoder, per_row, params, batch)
        assert int(batch.loss_mask.sum()) == sum(s.completion.num_sampled for s in samples)
        difference = np.abs(found - batch.rollout_logprobs)[np.asarray(batch.loss_mask)]
        assert difference.max() < 1e-4


@functools.partial(jax.jit, static_argnums=(0, 1))
def _logprobs(decoder, per_row, params, batch: PolicyBatch):
    shared = batch.sequence_ids if per_row > 1 else None
    hidden = decoder.hidden(params, batch.tokens, batch.positions, batch.segment_ids, shared)
    head = logprobs.Head(decoder.sharding, 16, 1.0, with_entropy=False)
    return policy_logprobs(hidden, decoder.output_table(params), batch, head)[0]


# Options.


def test_a_protocol_that_is_no_async_function_is_refused():
    rollout = RolloutConfig(protocol="json:dumps")
    with pytest.raises(ValueError, match="json:dumps is no async function; write async def ask"):
        chat_models.make_protocol(dataclasses.replace(GRPOConfig(), rollout=rollout), 2)


def test_halves_of_surrogate_pairs_are_written_as_question_marks(tmp_path):
    """A tool may say what no file can hold; the record of the other samples must not be lost."""
    said = Message(role="user", content="a\ud800b")
    sample = Sample(questions(1)[0], Completion.failed("error: x"), messages=(said,))
    record.write(str(tmp_path), 1, 0, [sample], record.StepFacts(1, 1))
    [path] = (tmp_path / "rollouts").iterdir()
    assert json.loads(path.read_text())["messages"][0]["content"] == "a?b"
    shown = sample._replace(completion=sample.completion._replace(text="a\ud800b"))
    assert "a?b" in record.lessons_text([shown])
