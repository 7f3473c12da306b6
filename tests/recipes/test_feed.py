"""The batches that come of rollouts: which groups train, what stops a run, where it continues."""

import asyncio
import contextlib
import dataclasses
import json
import threading
import time

import jax
import numpy as np
import pytest

from atlas_jax import config as config_lib
from atlas_jax import losses, metrics
from atlas_jax.config import GRPOConfig, MeshConfig, RewardConfig, RolloutConfig
from atlas_jax.data.questions import QuestionOrder
from atlas_jax.recipes import grpo
from atlas_jax.recipes.feed import Feed, Parts
from atlas_jax.recipes.layout import Layout
from atlas_jax.recipes.local_backend import LocalBackend
from atlas_jax.recipes.rollouts import Asker, Rollouts
from atlas_jax.rollout.sampling import Sampling
from atlas_jax.rollout.student_cache import StudentCache
from atlas_jax.rollout.teaching import Draws
from atlas_jax.sharding import Sharding, make_mesh
from atlas_jax.step import TrainState
from atlas_jax.stopping import StopRequestedError
from atlas_jax.types import DependencyError, Question, Reward
from tests.rollout.scripts import Script, protocol, questions

CONFIG = dataclasses.replace(
    GRPOConfig(),
    num_generations=2,
    beta=0.0,
    reward=RewardConfig(names=("exact_match",), max_failed_frac=0.5),
    rollout=RolloutConfig(protocol="direct"),
)


def make_feed(tmp_path, say, reward=None, config=CONFIG, how=None, count=8, per_row=2):
    """Returns a feed of two groups of two whose policy is a script."""
    config = dataclasses.replace(config, output_dir=str(tmp_path))
    config_lib.validate(dataclasses.replace(config, model_name_or_path="m",
        data=dataclasses.replace(config.data, dataset_path="d")))  # fmt: skip
    parts = Parts(
        config=config,
        layout=Layout(questions=2, per_row=per_row, microbatches=1, buckets=(64, 256)),
        order=QuestionOrder(questions(count), 0, False),
        backend=LocalBackend(lambda params, version: Script(say, version=version).model, None),
        protocol=how or protocol(size=2),
        reward=reward or grpo.make_reward(config, contextlib.ExitStack()),
        logprobs_fn=lambda params, batch: batch.rollout_logprobs,
        sharding=Sharding(make_mesh(MeshConfig(), jax.devices()[:1]), "fsdp", "none"),
        writer=metrics.MetricWriter(str(tmp_path), 0, enabled=False),
        student_cache=StudentCache("greedy"),
    )
    return Feed(parts, None)


def state_of(step):
    return TrainState(np.int32(step), {}, None)


def recorded(tmp_path, step):
    path = tmp_path / "rollouts" / f"step_{step:06d}_process_0.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def useful(prompt, member):
    """One of two is right for q1, q4 and q5, none for the others."""
    number = prompt.split("q")[1]
    return number if member and number in "145" else "9"


@pytest.mark.parametrize(
    ("rounds", "asked", "position"),
    [
        (0, ["id0", "id1"], 2),
        (1, ["id2", "id1"], 3),
        (2, ["id3", "id1"], 4),
        (3, ["id4", "id1"], 5),
    ],
)
def test_groups_without_a_difference_are_replaced(tmp_path, rounds, asked, position):
    rollout_options = dataclasses.replace(CONFIG.rollout, refill_rounds=rounds)
    config = dataclasses.replace(CONFIG, rollout=rollout_options)
    feed = make_feed(tmp_path, useful, config=config)
    given = feed.next(state_of(6), time.sleep)
    found = recorded(tmp_path, 7)
    assert [s["question_id"] for s in found][::2] == asked
    assert feed.get_state()["position"] == position
    assert given.metrics.get("rollout/refills") == ((position - 2, 1) if rounds else None)
    assert {s["completion"]["weights_version"] for s in found} == {6}
    zero = 2 - len({"id1", "id4"} & set(asked))
    assert given.metrics["reward/zero_std_group_frac"] == (zero, 2)
    rows = np.asarray(given.batch.advantages)[0]
    assert [bool(row.any()) for row in rows] == [name in ("id1", "id4") for name in asked]


def test_the_feed_continues_where_its_state_says(tmp_path):
    feed = make_feed(tmp_path, useful)
    feed.next(state_of(0), time.sleep)
    other = make_feed(tmp_path / "other", useful)
    other.set_state(json.loads(json.dumps(feed.get_state())))
    feed.next(state_of(1), time.sleep)
    other.next(state_of(1), time.sleep)
    assert recorded(tmp_path, 2) == recorded(tmp_path / "other", 2)
    assert [s["question_id"] for s in recorded(tmp_path, 2)] == ["id2", "id2", "id3", "id3"]


def test_other_questions_are_refused_on_resume(tmp_path):
    saved = make_feed(tmp_path, useful).get_state()
    with pytest.raises(ValueError, match=r"the dataset, the seed or data.shuffle differ; restore"):
        make_feed(tmp_path, useful, count=7).set_state(saved)


def test_other_questions_are_asked_from_the_same_position_where_they_are_allowed(tmp_path):
    feed = make_feed(tmp_path, useful)
    feed.next(state_of(0), time.sleep)
    other = make_feed(tmp_path / "other", useful, count=7)
    other.set_state(feed.get_state(), allow_other_data=True)
    assert other.get_state()["position"] == feed.get_state()["position"]
    assert other.get_state()["fingerprint"] != feed.get_state()["fingerprint"]


def with_one_unscored(tmp_path, allowed):
    """A feed of four samples, one of which gets no score; `allowed` is `max_failed_frac`."""

    def reward(samples):
        scores = (
            None if (r.question.id, r.completion.text) == ("id1", "1") else 0.0 for r in samples
        )
        return [Reward(score, {"unscored": "why"}) for score in scores]

    options = dataclasses.replace(CONFIG.reward, max_failed_frac=allowed)
    config = dataclasses.replace(CONFIG, reward=options)
    return make_feed(tmp_path, useful, reward, config)


def test_a_sample_without_a_score_does_not_train(tmp_path):
    given = with_one_unscored(tmp_path, 0.25).next(state_of(0), time.sleep)
    assert given.metrics["reward/failed_frac"] == (1, 4)
    assert [s["trains"] for s in recorded(tmp_path, 1)] == [True, True, True, False]
    mask = np.asarray(given.batch.loss_mask) & (np.asarray(given.batch.sequence_ids) == 2)
    assert mask.any(axis=-1).tolist() == [[True, False]]


def test_too_many_samples_without_a_score_stop_the_run(tmp_path):
    feed = with_one_unscored(tmp_path, 0.24)
    with pytest.raises(RuntimeError, match=r"1 of 4 samples(?s:.*)max_failed_frac=0.24.*why"):
        feed.next(state_of(0), time.sleep)
    assert len(recorded(tmp_path, 1)) == 4  # to look at


@pytest.mark.parametrize("well_after", [2, 3, 4])
def test_samples_without_a_score_are_asked_for_again(tmp_path, well_after):
    asked, waits = [], []

    def reward(samples):
        asked.append([(r.question.id, r.completion.text) for r in samples])
        ill = Reward(None, {"unscored": "why"}, True)
        rest = ill if len(asked) < well_after else Reward(0.5, {})
        return [Reward(0.5, {}), *[rest] * (len(samples) - 1)]

    options = dataclasses.replace(CONFIG.reward, max_failed_frac=0.2, retry_waits_secs=(1.0, 2.0))
    feed = make_feed(tmp_path, useful, reward, dataclasses.replace(CONFIG, reward=options))
    if well_after == 4:
        with pytest.raises(DependencyError, match=r"1 of 4"):
            feed.next(state_of(0), waits.append)
        assert feed.get_state()["position"] == 0  # the same questions next time
    else:
        given = feed.next(state_of(0), waits.append)
        assert given.metrics["reward/failed_frac"] == (0, 4)
        assert feed.get_state()["position"] == 2
    assert [len(samples) for samples in asked] == [4, 3, 2][:well_after]
    assert asked[1] == asked[0][1:]
    assert waits == [1.0, 2.0][: well_after - 1]


def test_what_waiting_does_not_help_is_not_waited_for(tmp_path):
    def reward(samples):
        return [Reward(None, {"unscored": "no key"}) for _ in samples]

    waits = []
    with pytest.raises(DependencyError, match="no key"):
        make_feed(tmp_path, useful, reward).next(state_of(0), waits.append)
    assert waits == []


def test_a_signal_while_waiting_leaves_the_position(tmp_path):
    def reward(samples):
        return [Reward(None, {"unscored": "later"}, True) for _ in samples]

    def pause(secs):
        raise StopRequestedError

    feed = make_feed(tmp_path, useful, reward)
    with pytest.raises(StopRequestedError):
        feed.next(state_of(0), pause)
    assert feed.get_state()["position"] == 0


def test_a_prompt_that_does_not_fit_trains_nothing(tmp_path):
    how = protocol(size=2, prompt=9)
    feed = with_long(make_feed(tmp_path, useful, how=how, count=2), 2)
    given = feed.next(state_of(0), time.sleep)
    assert [s["trains"] for s in recorded(tmp_path, 1)] == [False, False, True, True]
    assert np.asarray(given.batch.loss_mask).any(axis=-1).tolist() == [[False, True]]
    assert given.metrics["rollout/failed_frac"] == (2, 4)
    assert given.metrics["reward/failed_frac"] == given.metrics["reward/skipped_frac"] == (2, 4)
    assert given.metrics["rollout/trained_frac"] == (2, 4)
    assert given.num_tokens == len("direct q1") + 2 * 2  # a prompt and two letters that stop


@pytest.mark.parametrize("updates", [1, 3])
@pytest.mark.parametrize(("per_row", "prompts"), [(2, 1), (1, 2)])
def test_tokens_are_those_that_the_updates_read(tmp_path, updates, per_row, prompts):
    config = dataclasses.replace(CONFIG, num_iterations=updates)
    feed = make_feed(
        tmp_path, lambda _, member: "12" * (1 + member), config=config, per_row=per_row
    )
    given = feed.next(state_of(0), time.sleep)
    written = (2 + 1) + (4 + 1)  # two texts with their stop tokens
    assert given.num_tokens == updates * 2 * (prompts * len("direct q0") + written)
    tokens, positions = given.metrics["perf/real_token_frac"]
    assert tokens == 2 * (prompts * len("direct q0") + written)
    assert positions == given.batch.segment_ids.size > tokens


def with_long(feed, count):
    """Makes the first of `count` questions too long to be asked."""
    long = [Question("long", "a question too long", "1", {}), *questions(count)[1:]]
    feed = Feed(feed._parts._replace(order=QuestionOrder(long, 0, False)), None)
    return feed


@pytest.mark.parametrize("outages", [0, 1, 2])
def test_only_outages_count_towards_the_end_of_a_run(tmp_path, outages):
    """One of two questions does not fit; a judge is away for some of the other's two samples."""
    options = dataclasses.replace(CONFIG.reward, max_failed_frac=0.5, retry_waits_secs=(1.0,))
    config = dataclasses.replace(CONFIG, reward=options)
    rule = grpo.make_reward(config, contextlib.ExitStack())

    def reward(samples):
        away = Reward(None, {"unscored": "the judge is away"}, True)
        found = rule(samples)
        return [*found[: len(found) - outages], *[away] * outages]

    waits = []
    how = protocol(size=2, prompt=9)
    feed = with_long(make_feed(tmp_path, useful, reward, config, how, 2), 2)
    if outages == 2:
        with pytest.raises(DependencyError, match=r"2 of 2 samples could not.*the judge is away"):
            feed.next(state_of(0), waits.append)
        assert waits == [1.0]
    else:
        given = feed.next(state_of(0), waits.append)
        assert given.metrics["reward/failed_frac"] == (2 + outages, 4)
        assert given.metrics["reward/skipped_frac"] == (2, 4)
        assert waits == []
    found = recorded(tmp_path, 1)
    assert [s["skipped"] for s in found] == [True, True, False, False]
    assert [s["trains"] for s in found] == [False, False, outages < 2, outages < 1]


def loss_weight(batch, per_row):
    """Returns loss and weight of the one microbatch of a batch."""
    options = losses.PolicyOptions.of(GRPOConfig(beta=0.0), 8, per_row)
    batch = jax.tree.map(lambda x: x[0], batch)
    return losses.policy_loss(batch.rollout_logprobs, batch, options)[0]


def test_a_step_whose_teacher_writes_no_lesson_trains_nothing_and_ends_nothing(tmp_path, caplog):
    options = dataclasses.replace(CONFIG.reward, max_failed_frac=0.0, retry_waits_secs=(1.0,))
    config = dataclasses.replace(CONFIG, reward=options)
    feed = make_feed(tmp_path, lambda prompt, member: "no tags", None, config)
    student = Script(lambda prompt, member: "1").model
    backend = LocalBackend(feed._parts.backend.publish, student)
    how = protocol("unscored", 2)
    feed = Feed(feed._parts._replace(backend=backend, protocol=how), None)
    with caplog.at_level("WARNING"):
        given = feed.next(state_of(0), pytest.fail)
    assert given.metrics["reward/skipped_frac"] == (4, 4)
    assert given.metrics["rollout/trained_frac"] == (0, 4)
    assert given.metrics["rollout/failed_frac"] == (0, 4)  # the teacher's texts are there
    assert {s["guided"]["finish_reason"] for s in recorded(tmp_path, 1)} == {"skipped: no lesson"}
    assert feed.get_state()["position"] == 2
    said = [record.getMessage() for record in caplog.records]
    (line,) = [line for line in said if line.startswith("step 1 ")]
    assert line.startswith("step 1 trains nothing: of 4 samples 4 have no score")
    assert "answer: skipped: no lesson" in line
    assert tuple(map(float, loss_weight(given.batch, 2))) == (0.0, 0.0)


def test_with_a_greedy_student_neither_a_leak_nor_no_lesson_is_the_best_text(tmp_path):
    """The honest lesson harms, the leak makes the answer right, the others change nothing."""
    texts = ("<teaching>wrong</teaching>", "<teaching>It is {}.</teaching>",
             "<teaching>...</teaching>", "no tags")  # fmt: skip

    def tutor(prompt, member):
        return texts[member].format(prompt.split("q")[1][0])

    def pupil(prompt, member):
        return "99" if "wrong" in prompt else prompt[-1]

    reward = RewardConfig(answer_leak_penalty=1.0, missing_lesson_penalty=0.3)
    rollout_options = RolloutConfig(student_temperature=0.0)
    config = dataclasses.replace(CONFIG, num_generations=4, student_model="s", reward=reward,
        rollout=rollout_options)  # fmt: skip
    feed = make_feed(tmp_path, tutor, config=config, how=protocol(size=4))
    backend = LocalBackend(feed._parts.backend.publish, Script(pupil).model)
    layout = feed._parts.layout._replace(per_row=4)
    feed = Feed(feed._parts._replace(backend=backend, layout=layout), None)
    given = feed.next(state_of(0), pytest.fail)
    rewards = [s["reward"] for s in recorded(tmp_path, 1)]
    assert rewards == pytest.approx([-1.0, -2.0, -1.3, -1.3] * 2)
    assert given.metrics["teaching/malformed_frac"] == (2, 8)
    assert given.metrics["teaching/missing_frac"] == (4, 8)
    assert given.metrics["teaching/answer_leak_frac"] == (2, 8)


@pytest.mark.parametrize("rounds", [0, 1])
def test_a_group_of_which_nothing_trains_is_replaced_like_an_equal_one(tmp_path, rounds):
    """All of q0's texts are cut, though their rewards differ."""
    rollout_options = dataclasses.replace(CONFIG.rollout, refill_rounds=rounds)
    config = dataclasses.replace(CONFIG, rollout=rollout_options, mask_truncated_completions=True)

    def say(prompt, member):
        number = prompt.split("q")[1]
        return ("0123" if member else "9123") if number == "0" else number * member or "8"

    how = protocol(size=2, policy=4)
    reward = grpo.make_reward(config, contextlib.ExitStack())

    def first_letter(samples):
        cut = [
            r._replace(completion=r.completion._replace(text=r.completion.text[:1]))
            for r in samples
        ]
        return reward(cut)

    feed = make_feed(tmp_path, say, first_letter, config, how)
    given = feed.next(state_of(0), time.sleep)
    found = recorded(tmp_path, 1)
    assert [s["question_id"] for s in found][::2] == [["id0", "id1"], ["id2", "id1"]][rounds]
    assert [s["trains"] for s in found] == [bool(rounds)] * 2 + [True] * 2
    assert given.metrics["rollout/trained_frac"] == (2 + 2 * rounds, 4)
    assert feed.get_state()["position"] == 2 + rounds


def test_the_same_question_twice_in_a_batch_is_two_groups(tmp_path):
    """Groups are places in the batch, not prompts: rewards 1 0 and 0 0 share no mean."""
    calls = iter([1.0, 0.0, 0.0, 0.0])

    def reward(samples):
        return [Reward(next(calls), {}) for _ in samples]

    feed = make_feed(tmp_path, useful, reward, count=1)
    given = feed.next(state_of(0), time.sleep)
    found = recorded(tmp_path, 1)
    assert len({tuple(s["completion"]["prompt_ids"]) for s in found}) == 1
    half = 0.5 / (np.sqrt(0.5) + 1e-4)  # by hand: mean 1/2, standard deviation sqrt(1/2)
    assert [s["advantage"] for s in found] == pytest.approx([half, -half, 0.0, 0.0])
    assert given.metrics["reward/zero_std_group_frac"] == (1, 2)


PLUS = [Question(f"id{i}", f"what is {i} + 50?", str(i + 50), {}) for i in range(8)]


def taught(tmp_path, lessons, refills=0):
    """Returns a feed of groups of two lessons; the student is right with any, and not alone."""
    config = dataclasses.replace(
        CONFIG,
        reward=RewardConfig(),
        rollout=RolloutConfig(refill_rounds=refills),
        student_model="s",
    )
    feed = make_feed(tmp_path, lambda prompt, member: "", config=config, how=protocol(size=2))

    def student(prompt, member):
        number = int(prompt.split("what is ")[1].split()[0])
        return f"Answer: {number + 50 if prompt.startswith('with') else 0}"

    def teacher(prompt, member):
        number = int(prompt.split("what is ")[1].split()[0])
        return f"<teaching>{lessons(number, member)}</teaching>"

    parts = feed._parts._replace(
        order=QuestionOrder(PLUS, 0, False),
        backend=LocalBackend(
            lambda params, version: Script(teacher, version=version).model, Script(student).model
        ),
    )
    return Feed(parts, None)


def test_a_leak_that_makes_the_student_right_is_the_worse_of_its_group(tmp_path):
    feed = taught(tmp_path, lambda i, member: ("add them", f"it is {i + 50}.")[member])
    given = feed.next(state_of(0), lambda secs: None)
    rows = recorded(tmp_path, 1)
    assert [row["reward"] for row in rows] == [1.0, 0.5, 1.0, 0.5]
    assert [row["advantage"] > 0 for row in rows] == [True, False, True, False]
    assert rows[1]["reward_details"]["own_value"] == 1.0
    assert given.metrics["reward/no_honest_group_frac"] == (0, 2)
    assert given.metrics["teaching/answer_leak_frac"] == (2, 4)


@pytest.mark.parametrize(("refills", "asked"), [(0, ["id0", "id1"]), (1, ["id0", "id2"])])
def test_a_group_of_leaks_trains_nothing_and_is_counted_or_replaced(tmp_path, refills, asked):
    """The lessons of id1 all state the answer; those of the others differ."""
    feed = taught(
        tmp_path,
        lambda i, member: f"it is {i + 50}." if member or i == 1 else "add",
        refills,
    )
    given = feed.next(state_of(0), lambda secs: None)
    rows = recorded(tmp_path, 1)
    assert [row["question_id"] for row in rows[::2]] == asked
    leaks = asked.count("id1")
    assert given.metrics["reward/no_honest_group_frac"] == (leaks, 2)
    assert [row["trains"] for row in rows] == [True, True, *[not leaks] * 2]
    assert given.metrics["reward/skipped_frac"] == (2 * leaks, 4)


@pytest.mark.parametrize("masked", [False, True])
def test_truncated_completions_can_be_left_out(tmp_path, masked):
    config = dataclasses.replace(CONFIG, mask_truncated_completions=masked)
    how = protocol(size=2, policy=4)
    feed = make_feed(tmp_path, lambda _, member: "12345" if member else "1", None, config, how)
    given = feed.next(state_of(0), time.sleep)
    assert given.metrics["rollout/truncated_frac"] == (2, 4)
    assert [s["trains"] for s in recorded(tmp_path, 1)] == [True, not masked] * 2


def ahead(config, depth):
    options = dataclasses.replace(
        config.rollout, backend="vllm", teacher_servers="http://host", max_staleness=depth
    )
    return dataclasses.replace(config, rollout=options)


@pytest.mark.parametrize("depth", [1, 2])
def test_batches_made_ahead_ask_the_same_questions(tmp_path, depth):
    feeds = {
        name: make_feed(tmp_path / name, useful, config=config)
        for name, config in (("in_turn", CONFIG), ("ahead", ahead(CONFIG, depth)))
    }
    for step in range(6):
        given = {name: feed.next(state_of(step), time.sleep) for name, feed in feeds.items()}
        found = {name: recorded(tmp_path / name, step + 1) for name in feeds}
        asked = {n: [s["question_id"] for s in samples] for n, samples in found.items()}
        assert asked["ahead"] == asked["in_turn"]
        assert feeds["ahead"].get_state() == feeds["in_turn"].get_state()
        versions = {s["completion"]["weights_version"] for s in found["ahead"]}
        assert versions == {max(step - depth, 0)}
        assert given["ahead"].metrics["rollout/version_lag_max"] == (step - min(versions), 1)
        assert given["in_turn"].metrics["rollout/version_lag_max"] == (0, 1)
    feeds["ahead"].close()


def test_a_batch_in_flight_at_a_checkpoint_is_made_again(tmp_path):
    config = ahead(CONFIG, 1)
    whole = make_feed(tmp_path / "whole", useful, config=config)
    for step in range(3):
        whole.next(state_of(step), time.sleep)
        if step == 1:
            state = json.loads(json.dumps(whole.get_state()))
    resumed = make_feed(tmp_path / "resumed", useful, config=config)
    resumed.set_state(state)
    resumed.next(state_of(2), time.sleep)
    found, again = (recorded(tmp_path / name, 3) for name in ("whole", "resumed"))
    assert [s["question_id"] for s in found] == [s["question_id"] for s in again]
    assert {s["completion"]["weights_version"] for s in found} == {1}
    assert {s["completion"]["weights_version"] for s in again} == {2}, (
        "with the weights of the resume"
    )
    for feed in (whole, resumed):
        feed.close()


def test_what_fails_ahead_is_raised_where_it_is_needed(tmp_path):
    def say(prompt, member):
        if "q4" in prompt:
            raise DependencyError("no server is left")
        return useful(prompt, member)

    feed = make_feed(tmp_path, say, config=ahead(CONFIG, 1))
    feed.next(state_of(0), time.sleep)
    feed.next(state_of(1), time.sleep)
    with pytest.raises(DependencyError, match="no server is left"):
        feed.next(state_of(2), time.sleep)
    assert feed.get_state()["position"] == 4
    feed.close()


class Servers(Script):
    """A script that takes samples one by one, and waits at `gate` where a prompt says so."""

    def __init__(self, say, slow="", version=0):
        super().__init__(say, version=version)
        self.slow = slow
        self.gate = threading.Event()
        self.sent = []

    @property
    def model(self):
        """The script as a model of servers."""
        return super().model._replace(complete=self._one)

    async def _one(self, request, sample, sampling):
        prompt = "".join(map(chr, request.prompt_ids))
        self.sent.append(prompt)
        while self.slow and self.slow in prompt and not self.gate.is_set():
            await asyncio.sleep(0.01)
        return self._complete(request, sample)


def served(tmp_path, servers, depth, reward=None):
    """Returns a feed whose policy is on servers that all steps share."""
    feed = make_feed(tmp_path, useful, reward, ahead(CONFIG, depth))
    backend = LocalBackend(lambda params, version: servers.model, None)
    return Feed(feed._parts._replace(backend=backend), None)


def eventually(holds):
    end = time.monotonic() + 300
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_questions_that_move_alone_make_the_same_steps(tmp_path, depth):
    expected = make_feed(tmp_path / "batches", useful)
    servers = Servers(useful)
    feed = served(tmp_path / "servers", servers, depth)
    for step in range(4):
        known, given = (f.next(state_of(step), time.sleep) for f in (expected, feed))
        found = [recorded(tmp_path / name, step + 1) for name in ("batches", "servers")]
        for sample in (*found[0], *found[1]):
            for name in ("weights_version", "version_spans"):
                sample["completion"].pop(name)
        assert found[0] == found[1]
        assert feed.get_state() == expected.get_state()
        np.testing.assert_array_equal(known.batch.tokens, given.batch.tokens)
        np.testing.assert_array_equal(known.batch.advantages, given.batch.advantages)
        # The questions of this step and of `depth` more have been asked, and no others.
        eventually(lambda step=step: len(servers.sent) == 4 * (step + 1 + depth))
    feed.close()
    feed.join()


def test_a_slow_question_holds_up_neither_other_rewards_nor_later_steps(tmp_path):
    scored = []

    def reward(samples):
        scored.append([sample.question.id for sample in samples])
        return [Reward(0.5, {}) for _ in samples]

    servers = Servers(useful, slow="q1")
    feed = served(tmp_path, servers, 1, reward)
    made = []
    take = threading.Thread(target=lambda: made.append(feed.next(state_of(0), time.sleep)))
    take.start()
    eventually(lambda: len(scored) == 3)
    assert sorted(scored) == [["id0"] * 2, ["id2"] * 2, ["id3"] * 2]
    assert not made
    servers.gate.set()
    take.join(300)
    assert [s["question_id"] for s in recorded(tmp_path, 1)] == ["id0", "id0", "id1", "id1"]
    metrics_ = made[0].metrics
    assert metrics_["perf/teacher_seats"][0] > 0
    assert metrics_["perf/policy_secs"][1] == 2
    feed.close()
    feed.join()


def test_closing_gives_up_questions_in_flight(tmp_path):
    servers = Servers(useful, slow="q2")
    feed = served(tmp_path, servers, 1)
    feed.next(state_of(0), time.sleep)
    eventually(lambda: len(servers.sent) == 8)
    feed.close()
    feed.join()  # though nothing opens the gate
    assert "rollouts" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize("alone", [False, True])
def test_samples_are_scored_by_themselves_where_the_reward_allows_it(alone):
    """Two of three samples are written, of equal text; the third one waits."""
    scored = []

    def reward(samples):
        scored.append([sample.member for sample in samples])
        return [Reward(float(sample.member), {}) for sample in samples]

    servers = Servers(lambda prompt, member: "ab"[member // 2])
    one = servers._one

    async def complete(request, sample, sampling):
        while sample == 2 and not servers.gate.is_set():
            await asyncio.sleep(0.01)
        return await one(request, sample, sampling)

    asker = Asker(
        question=lambda place: questions(1)[0],
        student=None,
        protocol=protocol(size=3),
        draws=Draws(Sampling(), 0),
        cache=StudentCache("never"),
        reward=reward,
        scores_beside=True,
        scores_alone=alone,
    )
    rollouts = Rollouts(asker)
    step = rollouts.begin(servers.model._replace(complete=complete), [0])
    if alone:
        eventually(lambda: len(scored) == 2)
    assert sorted(scored) == [[0], [1]][: 2 * alone]
    assert not step.done()
    servers.gate.set()
    collected = step.result(30)
    assert sorted(scored) == ([[0], [1], [2]] if alone else [[0, 1, 2]])
    assert [sample.reward.value for sample in collected.samples] == [0.0, 1.0, 2.0]
    assert sum(span.phase == "reward" for span in collected.trace.spans) == len(scored)
    rollouts.close()
    rollouts.join(5.0)
