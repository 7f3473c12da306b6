"""How busy models are and what a step waits for, by hand."""

from atlas_jax.rollout.timing import ALL, Meter, Phase, Span, Trace, Workload, of_usage
from tests.rollout.scripts import completion


class Clock:
    """A clock that is set by hand."""

    now = 0.0

    def __call__(self):
        """Returns the time."""
        return self.now


def test_seats_and_busy_time_of_overlapping_requests():
    clock = Clock()
    meter = Meter(clock)
    trace = Trace(meter)
    clock.now = 1.0
    first = trace.span(Phase.POLICY, 0, 0)
    written = first.__enter__()
    clock.now = 3.0
    with trace.span(Phase.GUIDED, 0, 1), trace.span(Phase.POLICY, 0, 1, seats=2):
        clock.now = 4.0
    written.append(completion("text", 7))
    clock.now = 5.0
    first.__exit__(None, None, None)
    clock.now = 10.0
    usage = meter.read()
    assert usage.secs == 10.0
    assert usage.seat_secs == {"teacher": 4.0 + 2.0, "student": 1.0}
    assert usage.busy_secs == {"teacher": 4.0, "student": 1.0}
    assert usage.tokens == 7
    clock.now = 12.0
    assert meter.read() == Workload(2.0, {"teacher": 0.0, "student": 0.0}, dict(usage.busy_secs) | {
        "teacher": 0.0, "student": 0.0}, 0)  # fmt: skip


def test_a_period_in_which_requests_go_on_counts_them():
    clock = Clock()
    meter = Meter(clock)
    with Trace(meter).span(Phase.PROBE, 0):
        clock.now = 2.0
        meter.read()
        clock.now = 5.0
    assert meter.read().seat_secs["student"] == 3.0


SPANS = [
    Span(Phase.BASELINE, 0, ALL, 0.0, 4.0),
    Span(Phase.PROBE, 0, ALL, 0.0, 2.0),
    Span(Phase.POLICY, 0, 0, 2.0, 9.0),
    Span(Phase.POLICY, 0, 1, 2.0, 5.0),
    Span(Phase.GUIDED, 0, 0, 9.0, 10.0),
    Span(Phase.GUIDED, 0, 1, 5.0, 12.0),
    Span(Phase.REWARD, 0, ALL, 12.0, 13.0),
    Span(Phase.PROBE, 1, ALL, 0.0, 6.0),
    Span(Phase.POLICY, 1, 0, 6.0, 11.0),
]


def test_the_critical_path_is_that_of_the_last_sample():
    trace = Trace(Meter(Clock()))
    trace.spans = SPANS
    path = [(span.phase, span.place, span.member) for span in trace.critical_path()]
    assert path == [
        (Phase.PROBE, 0, ALL), (Phase.POLICY, 0, 1), (Phase.GUIDED, 0, 1), (Phase.REWARD, 0, ALL),
    ]  # fmt: skip
    assert (trace.generate_secs, trace.score_secs) == (12, 1)
    assert Trace().critical_path() == []


def test_the_times_of_phases_are_means_over_questions():
    trace = Trace(Meter(Clock()))
    trace.spans = SPANS
    assert trace.metrics() == {
        "perf/baseline_secs": (4, 1), "perf/probe_secs": (2 + 6, 2),
        "perf/policy_secs": (7 + 5, 2), "perf/guided_secs": (7, 1),
    }  # fmt: skip


def test_seconds_are_counted_once_for_all_processes():
    usage = Workload(10.0, {"teacher": 20.0, "student": 5.0}, {"teacher": 8.0, "student": 4.0}, 300)
    one, other = of_usage(usage, True), of_usage(usage, False)
    total = {name: [a + b for a, b in zip(one[name], other[name], strict=True)] for name in one}
    assert {name: x / y for name, (x, y) in total.items()} == {
        "perf/rollout_tokens_per_sec": 60.0, "perf/teacher_seats": 4.0, "perf/student_seats": 1.0,
        "perf/teacher_busy_frac": 0.8, "perf/student_busy_frac": 0.4,
    }  # fmt: skip
