"""Secrets in every form that libpq or a URL allows; libpq itself says what the password is."""

import io
import json
import logging as python_logging
import re
import subprocess
import sys
import time
import urllib.parse

import pytest
from absl import logging
from hypothesis import given, settings
from hypothesis import strategies as st
from psycopg.conninfo import conninfo_to_dict

from atlas_jax.config import DataConfig, GRPOConfig, RewardConfig, RIMConfig
from atlas_jax.llm_client import ServerError
from atlas_jax.masking import HIDDEN, hide
from atlas_jax.options.judges import JudgeModel
from atlas_jax.options.train import masked

# No letter of these stands anywhere else in the texts below.
LETTERS = "QZXJKV"
secrets = st.text(st.sampled_from(LETTERS + "%&=?/:@#'\"\\ ,;.+-*!$(){}[]<>~`^|_é0123456789"),
                  min_size=1).filter(lambda s: set(s) & set(LETTERS))  # fmt: skip


def quoted(value):
    """A value as libpq's quotes have it."""
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


def escaped(value):
    """A value without quotes: what would end it has a backslash."""
    return re.sub(r"([\s\\'])", r"\\\1", value)


def encoded(text):
    """A text of which every character is percent-encoded."""
    return "".join(f"%{byte:02X}" for byte in text.encode())


def url(value):
    return urllib.parse.quote(value, safe="")


LIBPQ = {
    "quoted": lambda s: f"host=db password={quoted(s)} user=a",
    "spaces around the sign": lambda s: f"password \t=\n {quoted(s)} host=db",
    "escaped": lambda s: f"host=db password={escaped(s)} user=a",
    "last": lambda s: f"host=db\npassword={escaped(s)}",
    "URL": lambda s: f"postgresql://a:{url(s)}@db:5433/b",
    "short scheme": lambda s: f"postgres://a:{url(s)}@db/b?sslmode=require",
    "no user": lambda s: f"postgresql://:{url(s)}@db/b",
    "all of it encoded": lambda s: f"postgresql://a:{encoded(s)}@db/b",
    "several hosts": lambda s: f"postgresql://a:{url(s)}@db:1,[::1]:2/b?target_session_attrs=any",
    "parameter": lambda s: f"postgresql://db/b?user=a&password={url(s)}",
    "encoded parameter": lambda s: f"postgresql:///b?host=%2Ftmp&{encoded('password')}={url(s)}&a",
}
OTHERS = {
    "SQLAlchemy": lambda s: f"postgresql+psycopg://a:{url(s)}@db/b",
    "key of a certificate": lambda s: f"postgresql://db/b?sslpassword={url(s)}&sslmode=require",
    "certificate, as keyword": lambda s: f"host=db sslpassword = {quoted(s)}",
    "variable": lambda s: f"PGPASSWORD={quoted(s)} psql -h db",
    "in options": lambda s: f"host=db options='-c app.password={url(s)}' user=a",
    "in options of a URL": lambda s: f"postgresql://db/b?options=-c%20app.token%3D{url(url(s))}",
    "judge": lambda s: f"https://a:{url(s)}@db:8765/v1",
    "token as the user": lambda s: f"https://{url(s)}@db/v1",
    "list of servers": lambda s: f"http://a:{url(s)}@db:1/v1,http://b:{url(s)}@db:2/v1",
    "another scheme": lambda s: f"redis://:{url(s)}@db:6379/0",
    "Google's key": lambda s: f"https://db/v1?key={url(s)}&alt=json",
    "api_key": lambda s: f"https://db/v1?a=b&api_key={url(s)}",
    "token": lambda s: f"https://db/v1?token={url(s)}",
    "JSON": lambda s: json.dumps({"api_key": s, "a": 1}),
    "header": lambda s: f"authorization: Bearer {url(s)}",
}


@pytest.mark.parametrize("form", list(LIBPQ))
@settings(max_examples=60, deadline=None)
@given(secret=secrets)
def test_no_character_of_a_password_of_libpq_is_left(form, secret):
    text = LIBPQ[form](secret)
    text = text.removesuffix("&a")
    assert conninfo_to_dict(text)["password"] == secret
    check(text, secret)


@pytest.mark.parametrize("form", list(OTHERS))
@settings(max_examples=40, deadline=None)
@given(secret=secrets)
def test_no_character_of_another_secret_is_left(form, secret):
    check(OTHERS[form](secret), secret)


@settings(max_examples=60, deadline=None)
@given(secret=secrets)
def test_what_should_have_been_encoded_is_hidden_too(secret):
    check(f"postgresql://a:{secret}@db/b", secret)
    check(f"postgresql://db/b?password={secret.replace('&', '').replace(' ', '')}", secret)


def check(text, secret):
    """Nothing of the secret is left in the text, alone or in a message of several."""
    for whole in (text, f"cannot reach {text}", f"{text}: 401: no\n{text}"):
        shown = hide(whole)
        assert HIDDEN in shown
        assert not set(shown) & set(LETTERS), shown
        assert hide(shown) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://atlas:a/b@hunter2@db/atlas", "postgresql://atlas:***@db/atlas"),
        ("password=a\\ b host=db", "password=*** host=db"),
        ("postgresql://db/b?user=a&password=x&b=1", "postgresql://db/b?user=a&password=***&b=1"),
        ("http://u:p@h:1/v1,http://u:q@i:2/v1", "http://***@h:1/v1,http://***@i:2/v1"),
        ("https://h/v1?key=x&b=1: 401: nope", "https://h/v1?key=***&b=1: 401: nope"),
        ("api_key_env=sk-proj-a1b2c3d4e5f6g7h8", "api_key_env=***"),
    ],
)
def test_what_is_no_secret_stays(text, shown):
    assert hide(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "postgresql://atlas@db:5433/atlas", "http://127.0.0.1:8765/v1: no reply: by a@b",
        "postgresql://[::1]:5432/db", "step 2/3 reward/tokens=3 max_new_tokens=512",
        "the token is here, the password there", "Qwen/Qwen3-8B", "/data/sk-learn/hf_models", "",
        "http://[::1]:8765 is healthy", "{question}\n\nKey: 3 = 3?",
    ],
)  # fmt: skip
def test_texts_without_a_secret_stay(text):
    assert hide(text) == text


def test_a_secret_that_the_end_of_a_message_would_cut_is_hidden():
    body = "x" * 280 + " http://user:QQQQQQQQQQQQQQQQQQQQQQ@db/v1"
    assert not set(str(ServerError("http://db", 500, body))) & set(LETTERS)


@pytest.mark.parametrize("part", ["x://y:", "postgres://a:", "https://", "password='", "?a=b&"])
def test_no_text_takes_long(part):
    text = "a@b" + part * 20_000 + "http://u:hush@h"
    start = time.process_time()
    assert "hush" not in hide(text)
    assert time.process_time() - start < 60  # minutes, if time grew with the square of the length


def test_config_logs_and_errors_show_none(capsys):
    address = "http://u:QQQ@db/v1?key=ZZZ"
    rim = RIMConfig(small_model=JudgeModel(base_url=address))
    config = GRPOConfig(
        data=DataConfig(db_url="host=db password = 'Q Z'"), reward=RewardConfig(rim=rim)
    )
    texts = [
        json.dumps(masked(config)),
        str(ServerError(address, 401, "Bearer QQQQQQQQQ is unknown")),
        logged(address),
    ]
    for text in texts:
        assert HIDDEN in text
        assert not set(text) & set("QZX"), text
    assert masked(GRPOConfig())["reward"]["rim"]["small_model"]["api_key_env"] == ""


def logged(address):
    """What a log shows of a line with an address, in a process of its own."""
    code = (
        "import sys; from absl import logging; from atlas_jax import masking; "
        "masking.mask_logs(); logging.warning('cannot reach %s', sys.argv[1])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, address], capture_output=True, text=True, check=True
    )
    assert "cannot reach" in result.stderr
    return result.stderr


def test_a_second_call_changes_nothing_and_tracebacks_stay():
    from atlas_jax import masking

    before = list(logging.get_absl_logger().filters)
    try:
        masking.mask_logs()
        masking.mask_logs()
        added = [f for f in logging.get_absl_logger().filters if f not in before]
        assert len(added) <= 1
        stream = io.StringIO()
        handler = python_logging.StreamHandler(stream)
        logging.get_absl_logger().addHandler(handler)
        logging.warning("%d of %d", 1, 2)
        logging.get_absl_logger().removeHandler(handler)
        assert stream.getvalue() == "1 of 2\n"
    finally:
        logging.get_absl_logger().filters = before
        logging.get_absl_handler().filters = [
            f for f in logging.get_absl_handler().filters if f not in added
        ]
