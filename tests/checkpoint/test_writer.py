"""Weights as they are written: checksums, and what happens when one of several processes cannot."""

import json
import os
import pathlib
import resource
import signal
import socket
import sys

import jax
import numpy as np
import pytest

from atlas_jax import distributed, stopping
from atlas_jax.checkpoint import hf, outgoing, writer
from atlas_jax.config import MeshConfig
from atlas_jax.hosts import joined
from atlas_jax.options.train import HostsConfig
from atlas_jax.types import Address
from tests import processes, tiny, words

WORDS = ("a", "b")
LIMIT = 64 << 10  # bytes of a file that the process with a "full disk" may write


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = words.save(tmp_path_factory.mktemp("model"), WORDS, hidden_size=64)
    return path, *tiny.load(path, MeshConfig(), jax.devices()[:1])


def write(directory, decoder, params, **options):
    directory.mkdir()
    files = [writer.tensors(decoder)]
    return writer.write(params, decoder, directory, "bfloat16", files, lambda _: True, **options)


def test_checksums_differ_where_what_is_written_differs(model, tmp_path):
    _, decoder, exact = model
    params = jax.tree.map(lambda p: p.astype("bfloat16").astype("float32"), exact)
    first, again = (write(tmp_path / name, decoder, params) for name in "ab")
    assert first.shape == (len(writer.tensors(decoder)),)
    np.testing.assert_array_equal(first, again)
    # By less than a step of bfloat16, then by one.
    nudge, step = (jax.tree.map(lambda p, by=by: p * (1 + by), params) for by in (1e-6, 2**-7))
    np.testing.assert_array_equal(write(tmp_path / "c", decoder, nudge), first)
    assert (write(tmp_path / "d", decoder, step) != first).all()


def test_an_error_is_named_with_process_and_host(model, tmp_path):
    _, decoder, params = model
    files = [writer.tensors(decoder)]
    with pytest.raises(
        writer.WriteError,
        match=rf"process 0 on {socket.gethostname()} cannot write .*: FileNotFoundError",
    ):
        writer.write(params, decoder, tmp_path / "nowhere", "bfloat16", files, lambda _: True)


def write_own(target, decoder, params, dtype, stop=stopping.requested):
    values = outgoing.Outgoing(params, decoder, dtype)
    files = outgoing.order(decoder, jax.process_count())
    outgoing.write_own(values, target, dtype, files, stop)
    return values


def test_only_what_may_be_stopped_is_stopped(model, tmp_path):
    _, decoder, params = model
    stopping.request("SIGTERM")
    (tmp_path / "push").mkdir()
    try:
        with pytest.raises(stopping.StopRequestedError, match="SIGTERM"):
            write_own(tmp_path / "push", decoder, params, "bfloat16")
        write(tmp_path / "final", decoder, params)
    finally:
        stopping.reset()
    size = sum(writer.num_bytes(tensor, "bfloat16") for tensor in writer.tensors(decoder))
    assert os.path.getsize(tmp_path / "final" / "model.safetensors") > size


def main():
    """One of two processes; the last argument says what it writes."""
    model, output, kind, port, process = sys.argv[1:]
    address = Address(f"127.0.0.1:{port}", 2, int(process))
    hosts = HostsConfig(stall_timeout_secs=60)
    with joined(hosts, address):
        source = hf.open_source(model)
        decoder, params = tiny.decoder_and_params(
            tiny.from_hf(source.config), source, MeshConfig(), jax.devices()
        )
        target = pathlib.Path(output, kind)
        if (kind, process) in (("push", "1"), ("export", "0")):
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails instead
            resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT))
        try:
            if kind == "push":
                if distributed.is_main():
                    target.mkdir()
                distributed.barrier("the directory")
                write_own(target, decoder, params, "float32")
            else:
                files = hf.ModelFiles(source.config, {}, words.tokenizer(WORDS), "float32")
                hf.export(
                    params, decoder, files, str(target), dtype="float32", max_shard_size=10**9,
                    source="a test",
                )  # fmt: skip
        except writer.WriteError as error:
            sys.stdout.write(json.dumps({"error": str(error)}) + "\n")
            sys.stdout.flush()
        distributed.barrier("both have gone on")


@pytest.mark.parametrize(("kind", "ill"), [("push", 1), ("export", 0)])
def test_a_full_disk_on_one_of_two_hosts_is_an_error_on_both(model, tmp_path, kind, ill):
    """Before, the other one waited in a collective until the stall limit killed both."""
    port = processes.free_port()
    code = "import tests.checkpoint.test_writer as t; t.main()"
    environment = os.environ | {"XLA_FLAGS": processes.xla_flags(1)}
    commands = [
        {
            "args": [sys.executable, "-c", code, model[0], str(tmp_path), kind, str(port), str(i)],
            "env": environment,
        }
        for i in range(2)
    ]
    run = processes.finish(commands, tmp_path / "logs")
    for process in range(2):
        (error,) = [line for line in run.text(process).splitlines() if line.startswith('{"error')]
        text = json.loads(error)["error"]
        assert text.startswith(f"process {ill} on {socket.gethostname()} cannot write {tmp_path}")
        assert "File too large" in text
    named = "cannot write"
    assert sum(named in line for line in run.text(ill).splitlines()) == 2, "at once, and in the end"
    assert not (tmp_path / "export").exists()
