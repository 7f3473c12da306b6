"""Weights without files: what is sent, in which order, and what happens when it is not received.

No GPU takes part. The communicator is `tests.fake_nccl`, and vLLM's own receiver unpacks what it
has recorded.
"""

import contextlib
import functools
import json
import pathlib
import subprocess

import jax
import numpy as np
import pytest

from atlas_jax.checkpoint import outgoing
from atlas_jax.rollout import libnccl, nccl
from tests import fake_nccl, stand_in
from tests.rollout import served
from tests.rollout.test_push import OPTIONS, PROMPT, texts, up

VLLM = pathlib.Path(__file__).parents[2] / ".venv-vllm/bin/python"


@pytest.fixture
def link(old, tmp_path):
    """Returns a context with servers on a wire, the way to them, and the wire."""

    @contextlib.contextmanager
    def make(ranks=(1,), secs=60.0):
        wire = fake_nccl.Wire()
        with stand_in.running(str(old.model.source.path), len(ranks)) as servers:
            for (_, server), count in zip(servers, ranks, strict=True):
                server.wire, server.ranks = wire, count
            make_sync = functools.partial(nccl.NcclSync, make=wire.communicator)
            options = OPTIONS._replace(control_timeout_secs=secs)
            with served.connected(
                old, [url for url, _ in servers], tmp_path,
                prompt=PROMPT, options=options, make_sync=make_sync,
            ) as found:  # fmt: skip
                yield found, [server for _, server in servers], wire

    return make


def files(found):
    return list(found.sync._versions.root.glob("v*"))


def written_files(ours, directory):
    """The bytes of all tensors in the order of sending, as the way of files writes them."""
    (order,) = outgoing.order(ours.model.decoder, 1)
    values = dict(outgoing.Outgoing(ours.params, ours.model.decoder, "bfloat16"))
    outgoing.write_own(values.items(), directory, "bfloat16", [order], lambda: False)
    content = (directory / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    return order, content[start:]


def test_servers_serve_what_was_sent_and_no_file_is_written(link, old, new, caplog):
    with caplog.at_level("INFO"), link((1, 2)) as (found, servers, wire):
        for version, ours in ((1, new), (2, old), (3, new)):
            values = found.sync.push(ours.params, version)
            assert values["sync/servers"] == (2, 1)
            assert values["sync/probe_diff"][0] < 1e-5
            assert {c.weights_version for c in texts(found)} == {version}
        assert not files(found)
        inits = [body["init_info"] for server in servers
                 for _, path, _, body in server.calls if "init_weight" in path]  # fmt: skip
        assert [(i["rank_offset"], i["world_size"]) for i in inits] == [(1, 4), (2, 4)]
        assert [call[0] for call in wire.calls] == ["connect", *["broadcast"] * 3]
        said = [r.getMessage() for r in caplog.records if r.getMessage().startswith("NCCL")]
        urls = [server.url for server in found.pool.servers]
        assert said == [f"NCCL 2.99.1 here, 2.98.7 at {url}" for url in urls]
        assert [p for _, p, _, _ in servers[0].calls if "weight_update" in p or "update_w" in p][
            :4
        ] == ["/start_weight_update", "/update_weights", "/finish_weight_update",
              "/update_weight_version"]  # fmt: skip


def test_packs_hold_whole_layers_one_after_another_and_all_bytes(link, new, tmp_path, monkeypatch):
    monkeypatch.setattr(nccl, "PACK_BYTES", 4000)
    order, content = written_files(new, tmp_path)
    with link() as (found, (server,), wire):
        found.sync.push(new.params, 1)
        assert b"".join(wire.packs) == content
        assert len(wire.packs) > 3
        (update,) = [body["update_info"] for _, path, _, body in server.calls
                     if path == "/update_weights"]  # fmt: skip
    assert update["names"] == [tensor.name for tensor in order]
    assert update["shapes"] == [list(tensor.shape) for tensor in order]
    assert set(update["dtype_names"]) == {"bfloat16"}
    layers = [int(name.split(".")[2]) for name in update["names"] if ".layers." in name]
    assert layers == sorted(layers)
    # A pack ends with the tensor that takes it above the limit.
    ends = np.cumsum([2 * np.prod(tensor.shape) for tensor in order])
    sizes = [len(pack) for pack in wire.packs]
    assert set(np.cumsum(sizes)) <= set(ends)
    assert all(size > 4000 for size in sizes[:-1])


RECEIVE = """
import contextlib, json, sys, torch
from vllm.distributed.weight_transfer import packed_tensor, nccl_engine
from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo
told = json.loads(open(sys.argv[1]).read())
init = NCCLWeightTransferInitInfo(**told["init_info"])
update = nccl_engine.NCCLWeightTransferUpdateInfo(**told["update_info"])
assert len(init.nccl_unique_id_bytes) == 128 and init.packed
class Stream:
    def synchronize(self): pass
packed_tensor._get_streams = lambda device, count: [Stream()] * count
torch.cuda.stream = lambda stream: contextlib.nullcontext()
torch.accelerator.current_device_index = lambda: 0
class Group:
    at, content = 0, open(sys.argv[2], "rb").read()
    sizes = iter(told["sizes"])
    def broadcast(self, tensor, src):
        assert src == 0 and tensor.numel() == next(self.sizes), "NCCL would hang"
        end = self.at + tensor.numel()
        tensor.copy_(torch.frombuffer(bytearray(self.content[self.at:end]), dtype=torch.uint8))
        self.at = end
found = {}
class Model:
    def load_weights(self, weights):
        found.update((name, tensor.clone()) for name, tensor in weights)
engine = object.__new__(nccl_engine.NCCLWeightTransferEngine)
engine.model_update_group, engine.model, engine.device = Group(), Model(), "cpu"
engine.packed, engine.packed_num_buffers = init.packed, init.packed_num_buffers
engine.packed_buffer_size_bytes = init.packed_buffer_size_bytes
engine.receive_weights(update)
assert next(Group.sizes, None) is None
import safetensors.torch
safetensors.torch.save_file(found, sys.argv[3])
"""
"""vLLM's receiver, on tensors in memory: only streams and the wire are replaced."""


def test_vllm_receives_what_was_sent(link, new, tmp_path, monkeypatch):
    import safetensors.numpy

    monkeypatch.setattr(nccl, "PACK_BYTES", 4000)
    with link() as (found, (server,), wire):
        found.sync.push(new.params, 1)
        bodies = {path: body for _, path, _, body in server.calls}
    told = {
        "init_info": bodies["/init_weight_transfer_engine"]["init_info"],
        "update_info": bodies["/update_weights"]["update_info"],
        "sizes": [len(pack) for pack in wire.packs],
    }
    (tmp_path / "told.json").write_text(json.dumps(told))
    (tmp_path / "packs").write_bytes(b"".join(wire.packs))
    names = ("told.json", "packs", "received.safetensors")
    subprocess.run(
        [VLLM, "-c", RECEIVE, *(str(tmp_path / name) for name in names)], check=True, timeout=300
    )
    received = safetensors.numpy.load_file(tmp_path / "received.safetensors")
    sent = dict(outgoing.Outgoing(new.params, new.model.decoder, "bfloat16"))
    assert received.keys() == sent.keys()
    for name, value in sent.items():
        assert received[name].tobytes() == value.tobytes(), name


def falls_back(found, wire, new, old, caplog):
    assert found.sync.push(new.params, 2)["sync/servers"] == (2, 1)
    assert {c.weights_version for c in texts(found)} == {2}
    (file,) = files(found)
    assert file.name.startswith("v2.")
    assert len([r for r in caplog.records if "through files from here on" in r.getMessage()]) == 1
    wire.hangs = ""
    calls = len(wire.calls)
    assert ("abort",) in wire.calls
    assert found.sync.push(old.params, 3)["sync/servers"] == (2, 1)
    assert len(wire.calls) == calls, "it stays with files"
    written = texts(found)
    assert {c.weights_version for c in written} == {3}
    expected = old.logprobs(written[0].prompt_ids, np.asarray(written[0].token_ids))
    np.testing.assert_allclose(written[0].untruncated_logprobs, expected, atol=0.01)


def test_a_transfer_that_hangs_ends_at_its_deadline_and_files_take_over(link, old, new, caplog):
    with link((1, 1), secs=4.0) as (found, _, wire):
        found.sync.push(old.params, 1)
        wire.hangs = "broadcast"
        falls_back(found, wire, new, old, caplog)


def test_a_group_that_does_not_form_ends_at_its_deadline_and_files_take_over(
    link, old, new, caplog
):
    with link((1, 1), secs=4.0) as (found, _, wire):
        wire.hangs = "connect"
        falls_back(found, wire, new, old, caplog)


@pytest.mark.parametrize("path", ["/start_weight_update", "/update_weights"])
def test_a_server_that_takes_no_part_leaves_no_other_one_waiting(link, old, new, caplog, path):
    with link((1, 1)) as (found, servers, wire):
        found.sync.push(old.params, 1)
        servers[1].faults = [{"path": path, "do": "status", "status": 500, "times": 1}]
        falls_back(found, wire, new, old, caplog)


def test_a_server_that_was_down_gets_a_file_and_joins_the_next_group(link, old, new):
    with link((1, 1)) as (found, _, wire):
        found.sync.push(old.params, 1)
        server = found.pool.servers[1]
        found.pool.call(lambda: found.pool.drop(server, "test"))
        assert found.sync.push(new.params, 2)["sync/servers"] == (2, 1)
        assert up(found) == [True, True]
        assert files(found)
        packs = len(wire.packs)
        assert found.sync.push(old.params, 3)["sync/servers"] == (2, 1)
        assert len(wire.packs) > packs
        assert {c.weights_version for c in texts(found)} == {3}


def test_a_server_that_computes_something_else_is_found_out_as_with_files(link, old, new):
    with link((1, 1)) as (found, servers, wire):
        found.sync.push(old.params, 1)
        servers[0].faults = [{"path": "/update_weight_version", "do": "noise", "size": 1.0}]
        assert found.sync.push(new.params, 2)["sync/servers"] == (1, 1)
        assert up(found) == [False, True]
        assert ("abort",) not in wire.calls


def test_a_missing_library_is_one_line(monkeypatch):
    monkeypatch.setattr("ctypes.CDLL", _no_library)
    with pytest.raises(ValueError, match=r"weight_sync=nccl needs NCCL.*atlas_jax\[cuda\]"):
        libnccl.find()


def _no_library(name):
    raise OSError(f"{name}: cannot open shared object file")


def test_packs_are_bytes_of_any_dtype():
    tensors = [("a", jax.numpy.arange(6, dtype="float32").reshape(2, 3)),
               ("b", jax.numpy.ones(5, "bfloat16"))]  # fmt: skip
    (pack,) = nccl.packs(tensors, 100)
    expected = b"".join(np.asarray(value).tobytes() for _, value in tensors)
    assert np.asarray(pack).tobytes() == expected
    assert [p.nbytes for p in nccl.packs(tensors, 23)] == [24, 10]
