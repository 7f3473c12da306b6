"""Addresses of servers: one spelling for each, and which of them are on this host."""

import dataclasses

import pytest

from atlas_jax import addresses, config


def test_a_list_is_split_at_commas_and_bare_of_slashes():
    assert addresses.split(" http://a:1/, http://b:2 ,,") == ["http://a:1", "http://b:2"]
    assert addresses.split("") == []


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("http://localhost:8765", "http://127.0.0.1:8765/"),
        ("http://[::1]:8765", "http://127.0.0.1:8765"),
        ("http://HOST", "http://host:80"),
        ("https://host:443/v1/", "https://host/v1"),
    ],
)
def test_spellings_of_one_address_are_equal(one, other):
    assert addresses.canonical(one) == addresses.canonical(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("http://host:80", "http://host:8000"),
        ("http://host", "https://host"),
        ("http://host:1/a", "http://host:1/b"),
    ],
)
def test_other_addresses_differ(one, other):
    assert addresses.canonical(one) != addresses.canonical(other)


@pytest.mark.parametrize("text", ["127.0.0.1:8765", "host", "ftp://host:1", "http://h:port"])
def test_what_is_no_address_is_refused_with_what_to_write(text):
    with pytest.raises(ValueError, match=r"is not the address of a server; write http://HOST:PORT"):
        addresses.canonical(text)


@pytest.mark.parametrize(
    ("teachers", "students", "message"),
    [
        ("http://localhost:1", "http://127.0.0.1:1/", r"student_servers has .*teacher_servers"),
        ("http://a:80,http://a", "http://b:1", r"teacher_servers has http://a, .*teacher_servers"),
        ("a:1", "http://b:1", "write http://HOST:PORT"),
        (",", "http://b:1", "without rollout.teacher_servers"),
    ],
)
def test_a_server_has_one_role_and_is_named_once(teachers, students, message):
    base = config.GRPOConfig()
    options = dataclasses.replace(
        base,
        model_name_or_path="m",
        student_model="s",
        output_dir="o",
        data=dataclasses.replace(
            base.data, dataset_path="d", teacher_template="{question} {approach}"
        ),
        rollout=dataclasses.replace(
            base.rollout, backend="vllm", teacher_servers=teachers, student_servers=students
        ),
    )
    with pytest.raises(ValueError, match=message):
        config.validate(options)
    fine = dataclasses.replace(
        options.rollout, teacher_servers="http://a:1,http://a:2", student_servers="http://b:1"
    )
    config.validate(dataclasses.replace(options, rollout=fine))
