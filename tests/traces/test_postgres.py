"""Sessions of a real database: what is read, in which order, and what happens when it fails."""

import datetime
import gc
import itertools
import json
import subprocess
import sys
import threading

import psycopg
import pytest

from atlas_jax import training_data
from atlas_jax.traces import files, postgres
from atlas_jax.traces.postgres import Access
from atlas_jax.traces.query import Query
from tests import runtime_database
from tests.runtime_database import START, execute, mixed_sessions, new_database, server, session

COUNT = 2000
MIDDLE = START + datetime.timedelta(seconds=COUNT // 10)


@pytest.fixture(scope="module")
def rows():
    return mixed_sessions(COUNT)


@pytest.fixture(scope="module")
def url(rows):
    return new_database(rows)


@pytest.fixture(scope="module")
def everything(url):
    return training_data.get_training_sessions(url, limit=COUNT + 1)


@pytest.fixture(scope="module")
def small():
    return new_database([session(i) for i in range(60)])


def numbers(sessions):
    return [s.session_metadata["session_id"] for s in sessions]


def read(url, query=None, limit=None, offset=0, **access):
    query = query or Query(include_trajectory_events=False)
    database = postgres.open_database(url, query, Access(**access))
    return postgres.read(database, query, limit, offset)


def ids(records):
    return [record["session_metadata"]["session_id"] for record in records]


def test_database_and_export_give_equal_sessions(url, everything, tmp_path):
    export = tmp_path / "traces.jsonl.zst"
    command = [sys.executable, "tools/export_traces.py", "--database-url", url]
    result = subprocess.run(
        [*command, "--output", str(export), "--include-all-statuses"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert f"{COUNT} sessions written" in result.stdout
    exported = [s for _, s in files.read(str(export))]
    assert numbers(everything) == list(range(COUNT, 0, -1))
    for a, b in zip(everything, exported, strict=True):
        assert a == b


def test_a_session_has_what_was_inserted(url):
    found = training_data.get_session_by_id(url, 1)
    row = session(0)
    assert (found.task, found.final_answer, found.plan) == ("What is 0 plus 0?", "0", row["plan"])
    assert found.session_reward == row["reward"]
    assert found.student_learning == "learned 0"
    assert [e["event"]["payload"]["data"]["output"] for e in found.trajectory_events] == [
        "0.0", "0.1", "0.2",
    ]  # fmt: skip
    assert {e["actor"] for e in found.trajectory_events} == {"student"}
    first, second = found.steps
    assert (first.tool, first.tool_params, first.depends_on) == ("reader", {"n": 0}, [])
    assert (second.guidance, second.attempts) == (["Mind the carry in 0."], 2)
    assert second.reward.score == row["reward"]["score"]
    assert [a["attempt"] for a in second.attempt_history] == [1, 2]
    assert second.context["prior_results_text"] == {"1": "0 and 0"}
    assert second.runtime == {"reward_skipped": True}
    assert found.session_metadata["created_at"] == START.isoformat()


def test_a_session_that_is_not_there_is_none(url):
    assert training_data.get_session_by_id(url, 10**12) is None


def test_parts_that_are_not_wanted_are_left_out(small):
    found = training_data.get_session_by_id(
        small, 1, include_trajectory_events=False, include_learning_data=False
    )
    assert (found.trajectory_events, found.session_reward) == (None, None)


def test_events_are_the_newest_in_order():
    many = session(0, events=[runtime_database.event(k, str(k)) for k in range(205)])
    (found,) = training_data.get_training_sessions(new_database([many]))
    outputs = [e["event"]["payload"]["data"]["output"] for e in found.trajectory_events]
    assert outputs == [str(k) for k in range(5, 205)]


def test_the_newest_events_are_kept_of_each_session():
    rows = [session(i, events=[runtime_database.event(k, f"{i}.{k}") for k in range(i)])
            for i in range(6)]  # fmt: skip
    found = read(new_database(rows), Query(), events_per_session=2, page_size=4)
    texts = [
        [e["event"]["payload"]["data"]["output"] for e in record.get("trajectory_events", ())]
        for record in found
    ]
    assert texts == [["5.3", "5.4"], ["4.2", "4.3"], ["3.1", "3.2"], ["2.0", "2.1"], ["1.0"], []]


AWKWARD = (
    "18446744073709551616", "-9223372036854775809", "1e400", "1" + "0" * 400 + ".5", "1e-400",
    "0.1", "3.0", "-0.0", "123456789012345678901234567890.123456789", "1" + "0" * 5000,
    '"\\u00e9 \\ud83d\\ude00 \\n \\u0001"', '{"b": 1, "a": 2, "a": {"": 3}}', "null", "true",
    '"[NaN, {\\"a\\": 1, \\"a\\": 2}]"', '"[1,"', "[" * 600 + "]" * 600,
)  # fmt: skip
BEYOND_JSONB = ('"\\u0000"', '"\\ud800"', "[1, 2E5]")
BEYOND_JSON = ("[NaN, -Infinity]", "[1,")


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("jsonb", AWKWARD),
        ("json", AWKWARD + BEYOND_JSONB),
        ("text", AWKWARD + BEYOND_JSONB + BEYOND_JSON),
    ],
)
def test_columns_hold_what_the_standard_decoder_makes_of_them(kind, values):
    url = new_database([session(0, events=[])])
    execute(url, f"ALTER TABLE trajectory_events ALTER event TYPE {kind}")
    with psycopg.connect(url) as connection:
        connection.cursor().executemany(
            f"INSERT INTO trajectory_events (session_id, event) VALUES (1, %s::{kind})",
            [[value] for value in values],
        )
        stored = connection.execute("SELECT event::text FROM trajectory_events ORDER BY id")
        texts = [text for (text,) in stored]
    (record,) = read(url, Query())
    found = [event["event"] for event in record["trajectory_events"]]
    assert list(map(repr, found)) == [repr(standard(text)) for text in texts]


def standard(text):
    try:
        return json.loads(text)
    except ValueError:
        return text


def test_a_column_of_a_type_of_its_own_is_a_text(url):
    url = new_database([session(0)])
    execute(url, "CREATE TYPE fate AS ENUM ('running', 'succeeded')")
    execute(url, "ALTER TABLE sessions ALTER status DROP DEFAULT, ALTER status TYPE fate "
                 "USING status::fate")  # fmt: skip
    (found,) = training_data.get_training_sessions(url)
    assert found.session_metadata["status"] == "succeeded"


def test_the_collector_runs_again_after_a_read(small):
    training_data.get_training_sessions(small, limit=1)
    assert gc.isenabled()
    execute(small, "UPDATE sessions SET created_at = 'infinity' WHERE id = 1")
    with pytest.raises(ValueError, match="refuses the query"):
        training_data.get_training_sessions(small)
    assert gc.isenabled()
    execute(small, "UPDATE sessions SET created_at = %s WHERE id = 1", START)


def key_of(row):
    metadata = row["metadata"]
    metadata = json.loads(metadata) if isinstance(metadata, str) else metadata or {}
    return metadata.get("learning_key")


def score_of(row):
    stats = row["reward_stats"]
    stats = json.loads(stats) if isinstance(stats, str) else stats or {}
    score = stats.get("score")
    return float(score) if isinstance(score, str) else score


FILTERS = {
    "min_reward": (0.7, lambda r: score_of(r) is not None and score_of(r) >= 0.7),
    "created_after": (MIDDLE, lambda r: r["created_at"] >= MIDDLE),
    "created_before": (MIDDLE, lambda r: r["created_at"] < MIDDLE),
    "learning_key": ("key1", lambda r: key_of(r) == "key1"),
    "status_filters": (["succeeded", "failed"], lambda r: r["status"] in ("succeeded", "failed")),
    "review_status_filters": (["approved"], lambda r: r["review_status"] == "approved"),
}


@pytest.mark.parametrize(
    "names", [*itertools.combinations(FILTERS, 1), *itertools.combinations(FILTERS, 2)]
)
def test_filters_alone_and_in_pairs_equal_a_plain_filter(url, rows, everything, names):
    values = {name: FILTERS[name][0] for name in names}
    expected = [
        i + 1 for i, row in enumerate(rows) if all(FILTERS[name][1](row) for name in names)
    ][::-1]
    found = training_data.get_training_sessions(
        url, limit=COUNT, include_trajectory_events=False, **values
    )
    assert numbers(found) == expected
    assert training_data.count_training_sessions(url, **values) == len(expected)
    assert numbers(filter(Query(**values).matches, everything)) == expected


def test_limit_and_offset_cut_the_newest_first_order(small):
    assert ids(read(small, limit=5, offset=3, page_size=2)) == [57, 56, 55, 54, 53]
    assert ids(read(small, limit=0)) == []
    assert numbers(training_data.get_training_sessions(small, limit=2)) == [60, 59]


@pytest.mark.parametrize("page_size", [1, 3, 60, 61])
def test_pages_hold_each_session_once_with_its_own_events(small, page_size):
    found = list(read(small, Query(), page_size=page_size))
    assert ids(found) == list(range(60, 0, -1))
    for record in found:
        texts = [e["event"]["payload"]["data"]["output"] for e in record["trajectory_events"]]
        assert texts == [f"{record['session_metadata']['session_id'] - 1}.{k}" for k in range(3)]


def test_sessions_that_arrive_during_the_read_change_nothing():
    url = new_database([session(0) for _ in range(40)])  # all of one moment
    found = read(url, page_size=4)
    first = list(itertools.islice(found, 10))
    with psycopg.connect(url) as connection:
        runtime_database.fill(
            connection, [session(0), session(0, created_at=START.replace(year=2020))]
        )
        connection.execute("UPDATE sessions SET status = 'failed'")
    assert ids(first + list(found)) == list(range(40, 0, -1))


def test_a_connection_that_is_cut_continues_where_it_broke():
    url = new_database([session(0) for _ in range(40)])
    found = read(url, Query(), page_size=4)
    first = list(itertools.islice(found, 10))
    with psycopg.connect(url) as connection:
        cut = connection.execute(
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity "
            "WHERE application_name = 'atlas_jax' AND datname = current_database()"
        )
        assert cut.fetchone() == (1,)
        runtime_database.fill(connection, [session(0, created_at=START.replace(year=2020))])
    rest = list(found)
    assert ids(first + rest) == list(range(40, 0, -1))
    assert all(len(record["trajectory_events"]) == 3 for record in rest)


def test_a_server_that_restarts_is_waited_for(small):
    found = read(small, Query(), page_size=4)
    first = list(itertools.islice(found, 10))
    server()._stop()
    starter = threading.Timer(1.0, server().ensure_postgres_running)
    starter.start()
    assert ids(first + list(found)) == list(range(60, 0, -1))
    starter.join()


def test_a_server_that_stays_away_is_an_error(small):
    found = read(small, page_size=4, retry_secs=0.0)
    next(found)
    server()._stop()
    with pytest.raises(ConnectionError, match=r"cannot be read.*check that the server runs"):
        list(found)
    with pytest.raises(ConnectionError, match="check that the server runs"):
        training_data.count_training_sessions(small)
    server().ensure_postgres_running()


def locked(url):
    connection = psycopg.connect(url)
    connection.execute("LOCK TABLE guidance_notes IN ACCESS EXCLUSIVE MODE")
    return connection


def test_a_statement_that_takes_too_long_is_tried_with_fewer_sessions(small):
    query = Query()
    database = postgres.open_database(small, query, Access(statement_timeout_secs=0.4))
    holder = locked(small)
    threading.Timer(0.6, holder.close).start()
    assert ids(postgres.read(database, query)) == list(range(60, 0, -1))


def test_a_statement_that_takes_too_long_in_every_way_is_an_error(small):
    query = Query()
    database = postgres.open_database(small, query, Access(statement_timeout_secs=0.1))
    with locked(small), pytest.raises(TimeoutError, match=r"raise data\.statement_timeout_secs"):
        list(postgres.read(database, query))


def as_role(url, role, password=""):
    return url.replace("postgres:@", f"{role}:{password}@")


def test_select_is_the_only_right_that_is_needed(small):
    execute(small, "CREATE ROLE reader LOGIN")
    reader = as_role(small, "reader")
    with pytest.raises(ValueError, match=r"permission denied.*GRANT SELECT ON ALL TABLES"):
        training_data.get_training_sessions(reader)
    execute(small, "GRANT SELECT ON ALL TABLES IN SCHEMA public TO reader")
    assert len(training_data.get_training_sessions(reader)) == 60


def test_a_wrong_password_is_an_error_that_does_not_show_it(small, tmp_path):
    execute(small, "CREATE ROLE locked LOGIN PASSWORD 'right'")
    rules = server().pgdata / "pg_hba.conf"
    rules.write_text(f"local all locked scram-sha-256\n{rules.read_text()}")
    execute(small, "SELECT pg_reload_conf()")
    with pytest.raises(ConnectionError, match="password authentication failed") as error:
        training_data.get_training_sessions(as_role(small, "locked", "s3cret"))
    assert "s3cret" not in str(error.value)
    with pytest.raises(ValueError, match="permission denied"):
        training_data.get_training_sessions(as_role(small, "locked", "right"))


@pytest.mark.parametrize("url", [
    "", "s3cret", "postgresql://u:s3cret%zz@host/db", "host='s3cret",
    "postgresql://u:a@s3cret@host/db", "postgresql://u:s3cret/b@host/db",
])  # fmt: skip
def test_a_url_that_cannot_be_read_is_an_error_that_does_not_show_it(url):
    with pytest.raises(ValueError, match="write postgresql://USER") as error:
        training_data.get_training_sessions(url)
    assert "s3cret" not in str(error.value)


def test_another_database_is_an_error():
    with pytest.raises(ValueError, match=r'not a database of the Atlas SDK.*"sessions"'):
        training_data.get_training_sessions(server().get_uri())


def test_a_database_older_than_the_reviews_answers_all_but_their_filter():
    url = new_database([session(i) for i in range(4)])
    execute(url, "ALTER TABLE sessions DROP review_status, DROP review_notes, DROP reward_audit")
    found = training_data.get_training_sessions(url)
    assert {s.session_metadata["review_status"] for s in found} == {"pending"}
    with pytest.raises(ValueError, match=r"older than the column review_status.*leave the filter"):
        training_data.get_training_sessions(url, review_status_filters=["approved"])


ATTACK = "x'); DROP TABLE sessions; --"


@pytest.mark.parametrize("name", ["learning_key", "status_filters", "review_status_filters"])
def test_a_text_to_filter_by_is_a_value_and_never_sql(small, name):
    value = [ATTACK] if name.endswith("filters") else ATTACK
    assert training_data.get_training_sessions(small, **{name: value}) == []
    assert training_data.count_training_sessions(small, **{name: value}) == 0
    assert training_data.count_training_sessions(small) == 60


# A process of its own, because the types of all arguments are checked in this one.
TRY_ALL = """
import sys
from atlas_jax import training_data
url, attack, *names = sys.argv[1:]
for name in names:
    by_id = name == "session_id"
    call = training_data.get_session_by_id if by_id else training_data.get_training_sessions
    try:
        call(url, **{name: attack})
    except ValueError as error:
        print(error)
"""


def test_sql_in_place_of_a_number_or_a_time_is_an_error(small):
    names = ("min_reward", "created_after", "created_before", "limit", "offset", "session_id")
    command = [sys.executable, "-c", TRY_ALL, small, ATTACK, *names]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    for name, line in zip(names, result.stdout.splitlines(), strict=True):
        assert line.startswith(f'{name}="x\'); DROP TABLE sessions; --" must be')
    assert training_data.count_training_sessions(small) == 60


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"status_filters": "succeeded"},
            r"must be a list of texts, such as \['succeeded'\]",
        ),
        ({"learning_key": "a\0b"}, "without NUL"),
        ({"limit": -1}, "limit=-1 must be 0 or more"),
    ],
)
def test_a_filter_of_the_wrong_kind_is_an_error(small, values, message):
    with pytest.raises(ValueError, match=message):
        training_data.get_training_sessions(small, **values)


def test_an_unknown_filter_is_an_error(small):
    with pytest.raises(TypeError, match="max_reward"):
        training_data.get_training_sessions(small, max_reward=1.0)
