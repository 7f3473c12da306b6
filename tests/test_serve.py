"""The launcher of vLLM servers: what it starts, refuses and says, and that nothing outlives it."""

import concurrent.futures
import contextlib
import errno
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

from atlas_jax import keeper, serve, server_token, vllm_python
from atlas_jax.rollout import capabilities
from tests import processes, vllm_servers, vllm_stub, words

PYTHON = vllm_python.VllmPython("python", has_command=False, is_v2=False)
WAIT_SECS = 300  # on a machine that others use too


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A directory that has all that a model needs."""
    return words.save(tmp_path_factory.mktemp("model"), ("answer", "hint"))


class Stub:
    """`serve` with the program that stands for vLLM."""

    def __init__(self, folder, model, *flags, port=0, **environment):
        self.folder, self.port = folder, port or processes.free_port()
        self.python, inherited = vllm_stub.write(folder)
        inherited.pop("VLLM_API_KEY", None)
        self.log = folder / "serve.log"
        command = [sys.executable, "-m", "atlas_jax.serve", "--model", str(model)]
        command += ["--port", str(self.port), "--python", self.python, *map(str, flags)]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, env=inherited | environment, stdout=log, stderr=subprocess.STDOUT
            )

    def pids(self, role="*"):
        """Returns the ids of the processes that have started, by role."""
        found = [path.name.split("_") for path in self.folder.glob(f"{role}_*")]
        return {role: int(pid) for role, pid in found if role != "partial"}

    def text(self):
        """Returns what was printed."""
        return self.log.read_text()

    def wait_until(self, reached):
        """Waits for a state of the server."""
        limit = time.monotonic() + WAIT_SECS
        while not reached():
            assert time.monotonic() < limit, self.text()
            time.sleep(0.05)

    def wait_up(self):
        """Waits until the server is healthy and all its processes run."""
        self.wait_until(lambda: "serves" in self.text() and len(self.pids()) == 3)

    def every(self, role):
        """Returns the ids of all processes of a role, the newest last."""
        paths = [p for p in self.folder.glob(f"{role}_*") if not p.name.startswith("partial")]
        paths.sort(key=lambda path: path.stat().st_mtime_ns)
        return [int(path.name.rpartition("_")[2]) for path in paths]

    def fronts(self):
        """Returns flags and environment of each front end."""
        return [
            json.loads((self.folder / f"front_{pid}").read_text()) for pid in self.every("front")
        ]

    def front(self):
        """Returns flags and environment of the only front end."""
        (front,) = self.fronts()
        return front


def alive(pid):
    """Returns whether a process runs, which a dead one that nobody buried does not."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        status = pathlib.Path(f"/proc/{pid}/stat").read_text()
        return status.rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.fixture
def start(tmp_path, model):
    """Starts a server; all are ended after the test."""
    with starter(tmp_path, model) as begin:
        yield begin


@contextlib.contextmanager
def starter(folder, model):
    stubs = []

    def begin(*flags, **environment):
        stubs.append(Stub(folder / f"stub_{len(stubs)}", model, *flags, **environment))
        return stubs[-1]

    try:
        yield begin
    finally:
        for stub in stubs:
            stub.process.kill()
            stub.process.wait()
            for pid in filter(alive, stub.pids()):
                os.kill(pid, signal.SIGKILL)


ENDS = {
    ("serve", signal.SIGHUP): 0,
    ("serve", signal.SIGQUIT): 0,
    ("serve", signal.SIGTERM): 0,
    ("serve", signal.SIGINT): 0,
    ("serve", signal.SIGKILL): -9,
    ("keeper", signal.SIGKILL): 137,
    ("front", signal.SIGKILL): 137,
    ("engine", signal.SIGKILL): 1,
    ("worker", signal.SIGSTOP): 0,
}
"""Who gets which signal, and the exit code of `serve`, which is then told to end if need be."""


@pytest.fixture(scope="module")
def ended(tmp_path_factory, model):
    """Servers of which one process got a signal, with that and all its processes."""
    with starter(tmp_path_factory.mktemp("ends"), model) as begin:
        stubs = {end: begin("--restarts", "0") for end in ENDS}
        for (victim, number), stub in stubs.items():
            stub.wait_up()
            stub.all = stub.pids()
            front = stub.all["front"]
            status = pathlib.Path(f"/proc/{front}/stat").read_text()
            stub.all |= {"serve": stub.process.pid}
            stub.all["keeper"] = int(status.rpartition(")")[2].split()[1])
            os.kill(stub.all[victim], number)
            if victim == "worker":
                stub.process.terminate()
        yield stubs


@pytest.mark.parametrize("end", ENDS, ids=lambda end: f"{end[0]}-{end[1].name}")
def test_nothing_outlives_a_server_that_ends_in_whatever_way(ended, end):
    stub = ended[end]
    assert stub.process.wait(WAIT_SECS) == ENDS[end]
    stub.wait_until(lambda: not any(map(alive, stub.all.values())))
    # A segment is freed by Python's resource tracker, which nobody may have killed before.
    stub.wait_until(lambda: not any(map(os.path.exists, stub.front()["left"])))
    if end[0] == "engine":
        assert "vLLM ended by itself: exit code 0" in stub.text()


def crash(stub, starts=1):
    """Kills the engine of a server that has become healthy so many times."""
    stub.wait_until(lambda: stub.text().count("serves") == starts)
    stub.wait_until(lambda: len(stub.every("engine")) == starts)
    os.kill(stub.every("engine")[-1], signal.SIGKILL)


def test_vllm_is_started_again_on_its_port_with_its_token_until_it_ends_too_often(start, tmp_path):
    file = tmp_path / "server_token"
    stub = start("--restarts", "2", "--token-file", file)
    for number in range(3):
        crash(stub, number + 1)
    assert stub.process.wait(WAIT_SECS) == 1
    text = stub.text()
    reason = "vLLM ended by itself: exit code 0; it is"
    for word in ("started again in 1 s (1 of 2)", "started again in 2 s (2 of 2)",
                 "not started again (--restarts)"):  # fmt: skip
        assert f"{reason} {word}" in text
    fronts = stub.fronts()
    assert {front["environment"]["VLLM_API_KEY"] for front in fronts} == {file.read_text().strip()}
    assert {front["flags"][front["flags"].index("--port") + 1] for front in fronts} == {
        str(stub.port)
    }
    stub.wait_until(lambda: not any(map(alive, stub.every("*"))))


def test_what_does_not_start_again_ends_with_its_reason(start):
    stub = start("--restarts", "1", STUB_LATER="ValueError: no block size")
    crash(stub)
    assert stub.process.wait(WAIT_SECS) == 1
    last = stub.text().splitlines()[-1]
    assert f"vLLM did not start: ValueError: no block size{serve._HINT}; it is not started" in last


def test_a_signal_before_vllm_is_started_again_ends_everything_at_once(start):
    stub = start("--restarts", "9")
    for number in range(3):
        crash(stub, number + 1)
    stub.wait_until(lambda: "again in 4 s (3 of 9)" in stub.text())
    stub.process.terminate()
    assert stub.process.wait(WAIT_SECS) == 0
    assert len(stub.fronts()) == 3, "none was started after the signal"


def test_a_signal_while_it_starts_ends_it(start):
    stub = start(STUB_WAITS="1")
    stub.wait_until(lambda: stub.pids("worker"))
    stub.process.terminate()
    stub.process.wait(WAIT_SECS)
    stub.wait_until(lambda: not any(map(alive, stub.pids().values())))


def test_under_nohup_the_end_of_the_terminal_ends_nothing(start):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stub = start()
    finally:
        signal.signal(signal.SIGHUP, before)
    stub.wait_up()
    stub.process.send_signal(signal.SIGHUP)
    stub.process.send_signal(signal.SIGTERM)
    stub.process.wait(WAIT_SECS)
    assert "SIGTERM: ending vLLM" in stub.text()
    assert "SIGHUP" not in stub.text()


def refusal(*arguments, **environment):
    """Returns what `serve` says to wrong arguments, which is one line, and its exit code."""
    command = [sys.executable, "-m", "atlas_jax.serve", *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=WAIT_SECS,
        env=os.environ | environment,
    )  # fmt: skip
    assert not done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line, done.returncode


def test_a_used_port_is_refused_before_anything_starts(model, start):
    stub = start()
    stub.wait_up()
    line, code = refusal("--model", model, "--port", stub.port, "--python", stub.python)
    assert code == 1
    assert f"cannot listen on 127.0.0.1:{stub.port} (Address already in use); end what" in line


def test_a_server_of_somebody_else_on_the_port_is_not_taken_for_ours(start):
    """It came between the look at the port and the start of vLLM, which takes a while."""
    slow = start(STUB_WAITS="1")
    slow.wait_until(lambda: slow.pids("worker"))
    thief = start(port=slow.port)
    thief.wait_up()
    time.sleep(2)  # for `serve` to look at /health, which answers now
    (slow.folder / "go").touch()
    assert slow.process.wait(WAIT_SECS) == 1
    assert "serves" not in slow.text()
    assert "vLLM did not start: OSError: [Errno 98] Address already in use" in slow.text()
    assert thief.process.poll() is None


def without(model, folder, *names):
    """Returns a copy of a model without some of its files."""
    shutil.copytree(model, folder)
    for name in names:
        (folder / name).unlink()
    return folder


def test_a_model_directory_that_is_wrong_or_incomplete_is_refused_by_what_is_missing(
    model, tmp_path
):
    def message(path, *flags):
        line, code = refusal("--model", path, *flags)
        assert code == 1
        return line

    assert message("no/such/model").endswith("the model directory no/such/model does not exist")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").touch()
    shutil.copytree(model, tmp_path / "run" / "final")
    line = message(tmp_path / "run")
    assert "has no weight files (*.safetensors), no tokenizer files" in line
    assert line.endswith(f"did you mean {tmp_path}/run/final?")
    no_config = without(model, tmp_path / "a", "config.json")
    assert message(no_config).endswith(f"the model directory {no_config} has no config.json")
    sharded = without(model, tmp_path / "b")
    (sharded / "model.safetensors").rename(sharded / "model-00001-of-00002.safetensors")
    shards = {"x": "model-00001-of-00002.safetensors", "y": "model-00002-of-00002.safetensors"}
    index = sharded / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": shards}))
    assert message(sharded).endswith("has no model-00002-of-00002.safetensors")
    index.write_text("{}")
    assert "index.json has no weight_map; download it again" in message(sharded)
    tokenizers = [path.name for path in pathlib.Path(model).glob("tokenizer*")]
    bare = without(model, tmp_path / "c", *tokenizers)
    assert message(bare).endswith("has no tokenizer files")
    serve.check_model(str(bare), ["--tokenizer=elsewhere"])
    serve.check_model("owner/name")


def test_a_wrong_flag_is_one_line_and_help_is_shown():
    assert refusal("--port", "0", "--model", "m")[1] == 2
    assert refusal()[1] == 2
    line, code = refusal("--model", "m", "--api-key", "secret")
    assert (code, "secret" in line, "--token-file" in line) == (2, False, True)
    shown = subprocess.run(
        [sys.executable, "-m", "atlas_jax.serve", "--help"], capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert "--token-file FILE" in shown.stdout


@pytest.mark.parametrize(
    ("python", "message"),
    [(sys.executable, "has no vLLM; run launch/install_vllm.sh"), ("nowhere", "does not run")],
)
def test_an_interpreter_without_vllm_is_refused(python, message):
    with pytest.raises(ValueError, match=message):
        vllm_python.find_python(python)


def test_vllm_for_cpus_is_refused_on_a_host_with_a_gpu(model, tmp_path):
    """The real wheel of these tests, beside a driver that lists a GPU."""
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\necho GPU 0: of a test\n")
    driver.chmod(0o755)
    line, code = refusal("--model", model, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert code == 1
    assert "has vLLM for CPUs, and this host has a GPU" in line
    assert line.endswith("run WHEEL=vllm launch/install_vllm.sh")


FAILURES = {
    "api_server.py: error: unrecognized arguments: --modle-len": "usage: api_server.py\n    [-h]",
    "Value error, max_model_len (9) is greater than 8. [type=value_error, input_value=…]": (
        "Traceback (most recent call last):\n  File\nValidationError: 1 validation error for X"
    ),
    "(Worker pid=1) ERROR 11-26 21:59:09 [multiproc_executor.py:1063] ValueError: no block size": (
        "(Worker pid=1) ERROR 11-26 21:59:09 [multiproc_executor.py:1063] Traceback"
    ),
}
"""Last lines of vLLM that say something, as it prints them, and what stands before."""


def test_why_vllm_did_not_start_is_its_last_line_that_says_so(start):
    after = "RuntimeError: Engine core initialization failed. See root cause above.\n  more"
    stubs = [
        start(STUB_CODE="3", STUB_SAYS=f"{before}\n{line}\n{after}")
        for line, before in FAILURES.items()
    ]
    stubs += [start(STUB_CODE="3"), start(STUB_CODE="0")]
    found = ("api_server.py: error: unrecognized arguments: --modle-len",
             "max_model_len (9) is greater than 8.", "ValueError: no block size",
             "exit code 3", "exit code 0")  # fmt: skip
    for stub, reason in zip(stubs, found, strict=True):
        assert stub.process.wait(WAIT_SECS) == 1
        last = stub.text().splitlines()[-1]
        assert last == f"error: vLLM did not start: {reason}{serve._HINT}"
        assert "INFO a line of the log" in stub.text()
        assert "Traceback" not in stub.text()
        assert "usage" not in stub.text()
    whole = start(STUB_CODE="3", STUB_SAYS="Traceback\nValueError: x", ATLAS_TRACEBACK="1")
    assert whole.process.wait(WAIT_SECS) == 1
    assert "Traceback\nValueError: x\n" in whole.text()


def test_what_a_server_complained_of_and_survived_is_shown(start):
    stub = start(STUB_SAYS="ERROR of no consequence\nand its end")
    stub.wait_up()
    stub.wait_until(lambda: "ERROR of no consequence\nand its end" in stub.text())


@pytest.mark.parametrize(
    ("wheel", "chosen", "start", "runner"),
    [
        ("cpu 0.32.0 False", "", ["vllm.entrypoints.openai.api_server", "--model", "dir"], "0"),
        ("cpu 0.33.0 False", "", ["vllm.entrypoints.openai.api_server", "--model", "dir"], "0"),
        ("gpu 0.32.0 True", "", ["vllm.entrypoints.cli.main", "serve", "dir"], "0"),
        ("gpu 0.33.0 True", "", ["vllm.entrypoints.cli.main", "serve", "dir"], "1"),
        ("gpu 0.33.0 True", "0", ["vllm.entrypoints.cli.main", "serve", "dir"], "0"),
        ("gpu 1.0.0rc1 True", "", ["vllm.entrypoints.cli.main", "serve", "dir"], "1"),
    ],
)  # fmt: skip
def test_command_and_model_runner_are_those_of_the_version(
    tmp_path, monkeypatch, wheel, chosen, start, runner
):
    """0.33.0 calls the module (`entrypoints/openai/api_server.py:52`) and V1 deprecated."""
    path, _ = vllm_stub.write(tmp_path / "stub")
    for name, value in (
        ("STUB_FOLDER", str(tmp_path)),
        ("STUB_WHEEL", wheel),
        ("VLLM_USE_V2_MODEL_RUNNER", chosen),
    ):
        monkeypatch.setenv(name, value)
    python = vllm_python.find_python(path)
    line = serve.command(python, "dir", "127.0.0.1", 8765, [])
    assert line[:2] == [path, "-m"]
    assert line[2:5] == start
    processor = line[line.index("--logits-processors") + 1]
    assert processor == {"0": capabilities.LOGPROBS[1], "1": capabilities.V2_PROCESSOR}[runner]
    environment = serve.environment(os.environ, is_v2=python.is_v2)
    assert environment["VLLM_USE_V2_MODEL_RUNNER"] == runner


def test_a_server_with_adapters_loads_them_while_it_runs():
    allowed = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"
    assert serve.environment({}, more=["--enable-lora"])[allowed] == "1"
    assert allowed not in serve.environment({}, more=["--max-lora-rank", "8"])


def test_flags_of_vllm_are_handed_through_and_win():
    more = ["--tensor-parallel-size", "2", "--logprobs-mode", "raw_logprobs"]
    line = serve.command(PYTHON, "dir", "127.0.0.1", 8765, more)
    assert line[-4:] == more
    assert line.index("--model") < len(line) - 4


def overrides(*more):
    """Returns the flags about the model's config that vLLM gets, in its order."""
    line = serve.command(PYTHON, "dir", "127.0.0.1", 8765, [*more, "--seed", "1"])
    assert line[-2:] == ["--seed", "1"]
    found = [word for word in line if "overrides" in word]
    return [word.removeprefix("--hf-overrides.") for word in found]


def test_the_head_is_float32_beside_overrides_of_the_user(caplog):
    assert overrides() == ['head_dtype="float32"']
    both = ['head_dtype="float32"', 'rope_scaling={"factor": 2}']
    user = '{"rope_scaling": {"factor": 2}}'
    assert overrides("--hf-overrides", user) == both
    assert overrides(f"--hf_overrides={user}") == both
    assert overrides("--hf-overrides.rope_theta=1") == ['head_dtype="float32"', "rope_theta=1"]
    assert not caplog.text
    assert overrides("--hf-overrides", '{"head_dtype": "model"}') == ['head_dtype="model"']
    assert "another head_dtype than float32" in caplog.text
    caplog.clear()
    assert overrides("--hf-overrides.head_dtype=model")[-1] == "head_dtype=model"
    assert "another head_dtype than float32" in caplog.text
    for wrong in ("{", "[1]", "3"):
        with pytest.raises(ValueError, match="no JSON object"):
            overrides("--hf-overrides", wrong)


TOKEN_FLAGS = ("--middleware", "guard.Guard")


@pytest.fixture
def no_key(monkeypatch, tmp_path):
    """No key and no cache of the user's."""
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_the_guard_is_on_where_there_is_a_token_and_wherever_others_reach_the_port(
    start, tmp_path, no_key
):
    file = tmp_path / "run" / "server_token"
    open_to_all = start("--host", "0.0.0.0")
    local = start()
    named = start("--token-file", file)
    keyed = start("--token-file", tmp_path / "unused", VLLM_API_KEY="secret-of-mine")
    for stub in (open_to_all, local, named, keyed):
        stub.wait_up()
    default = tmp_path / "cache" / "atlas_jax" / "server_token"
    assert f"the token of the server is in {default}" in open_to_all.text()
    assert f"the token of the server is in {file}" in named.text()
    assert not (tmp_path / "unused").exists()
    tokens = {
        open_to_all: default.read_text().strip(),
        named: file.read_text().strip(),
        keyed: "secret-of-mine",
    }
    assert len(set(tokens.values())) == 3
    for stub, token in tokens.items():
        front = stub.front()
        assert tuple(front["flags"][-2:]) == TOKEN_FLAGS
        assert front["environment"]["VLLM_API_KEY"] == token
        assert token not in stub.text()
        commands = [path.read_bytes() for path in pathlib.Path("/proc").glob("[0-9]*/cmdline")]
        assert not any(token.encode() in command for command in commands)
    assert "guard.Guard" not in local.front()["flags"]
    assert "VLLM_API_KEY" not in local.front()["environment"]


def test_servers_of_a_run_share_a_token_that_only_its_owner_reads(tmp_path):
    file = tmp_path / "run" / "server_token"
    with concurrent.futures.ThreadPoolExecutor(32) as threads:
        (token,) = set(threads.map(lambda _: server_token.read_or_make(file), range(32)))
    assert len(token) >= 32
    assert server_token.read(file) == token
    assert file.stat().st_mode & 0o777 == 0o600
    assert list(file.parent.iterdir()) == [file]
    for mode in (0o640, 0o604, 0o620):
        file.chmod(mode)
        with pytest.raises(ValueError, match=f"has mode {mode:o} and owner 0, so others may"):
            server_token.read_or_make(file)
    file.chmod(0o600)
    for text in ("", "\n", "two words", "sch\u00f6n"):
        file.write_text(text)
        with pytest.raises(ValueError, match="holds no token"):
            server_token.read_or_make(file)


def test_a_token_can_be_made_where_there_are_no_hard_links(tmp_path, monkeypatch):
    def link(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    file = tmp_path / "server_token"
    assert server_token.read_or_make(file) == server_token.read(file)
    assert file.stat().st_mode & 0o777 == 0o600


def ask(url, method, path, token=""):
    """Returns the status of a reply."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(url + path, method=method, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status
    except urllib.error.HTTPError as error:
        return error.code


def test_every_route_of_vllm_but_health_asks_for_the_token(tmp_path, no_key):
    model = words.save(tmp_path / "model", ("answer",), hidden_size=64)
    file = tmp_path / "server_token"
    with vllm_servers.running([model], tmp_path, "--token-file", str(file)) as (server,):
        token = file.read_text().strip()
        serve.check(server.url, token)
        request = urllib.request.Request(f"{server.url}/openapi.json")
        request.add_header("Authorization", f"Bearer {token}")
        with urllib.request.urlopen(request, timeout=60) as reply:
            described = json.load(reply)["paths"]
        routes = {(m.upper(), p) for p, methods in described.items() for m in methods}
        assert {
            ("POST", "/collective_rpc"),
            ("POST", "/pause"),
            ("POST", "/v1/completions"),
        } < routes
        assert len(routes) > 30
        hidden = {
            ("GET", p) for p in ("/openapi.json", "/docs", "/metrics", "/", "/no/such", "//health")
        }
        allowed = {("GET", "/health")}
        for method, path in (routes | hidden) - allowed:
            for wrong in ("", "wrong", token[:-1], token + "x"):
                assert ask(server.url, method, path, wrong) == 401, (method, path)
            assert ask(server.url, "OPTIONS", path) == 401
            # A method that the routes do not have; it passes the guard and does nothing.
            assert ask(server.url, "PROPFIND", path, token) != 401, path
        assert ask(server.url, "GET", "/health") == 200
        for path in ("/version", "/v1/models", "/server_info", "/is_paused", "/metrics"):
            assert ask(server.url, "GET", path, token) == 200
        for path in ("/pause?mode=keep", "/resume", "/reset_prefix_cache"):
            assert ask(server.url, "POST", path, token) == 200
        for form in ("text", "json"):
            info = urllib.request.Request(f"{server.url}/server_info?config_format={form}")
            info.add_header("Authorization", f"Bearer {token}")
            with urllib.request.urlopen(info, timeout=60) as reply:
                assert token not in reply.read().decode()
        commands = [path.read_bytes() for path in pathlib.Path("/proc").glob("[0-9]*/cmdline")]
        assert not any(token.encode() in command for command in commands)
    assert token not in server.log.read_text()


def test_the_server_answers_on_its_port(vllm_server):
    serve.check(vllm_server.url)
    with urllib.request.urlopen(f"{vllm_server.url}/v1/models", timeout=10) as reply:
        assert reply.status == 200


def test_log_probabilities_are_of_the_whole_vocabulary_at_the_temperature(vllm_server):
    """Two of the three are what vLLM cannot do by itself; the sums over all tokens show it."""
    total = {}
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (0.5, 1e-6)):
        sampling = {"temperature": temperature, "top_p": top_p, "max_tokens": 1, "logprobs": 20}
        payload = {"token_ids": [5, 6], "sampling_params": sampling}
        reply = vllm_server.post("/inference/v1/generate", payload)
        (content,) = reply["choices"][0]["logprobs"]["content"]
        total[temperature, top_p] = {t["token_id"]: t["logprob"] for t in content["top_logprobs"]}
    wide, narrow = total[0.5, 1.0], total[0.5, 1e-6]
    best = max(narrow, key=narrow.get)
    assert narrow[best] == pytest.approx(wide[best], abs=1e-5)
    assert narrow[best] < -0.1, "alone in its nucleus, and still not certain"
    flat = total[1.0, 1.0]
    a, b = sorted(wide, key=wide.get)[-2:]
    assert wide[b] - wide[a] == pytest.approx(2 * (flat[b] - flat[a]), abs=1e-4)


V2 = """
import types
import torch
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, loader
(kind,) = loader._load_v2_logitsprocs_by_fqcns(["whole_vocabulary_v2:WholeVocabularyV2"])
processor = kind(None, types.SimpleNamespace(max_num_reqs=8, device=torch.device("cpu")))
temperatures = {5: 0.5, 2: 1.0, 7: 0.0, 0: 2.0}
for slot, temperature in {5: 9.0, **temperatures}.items():
    assert processor.add_request(slot, types.SimpleNamespace(temperature=temperature)) is True
processor.apply_staged_writes()
# A row for each token of a request; request 2 has two, as with drafts.
slots = [7, 2, 2, 5, 0]
logits = torch.randn(5, 1000, generator=torch.Generator().manual_seed(0)) * 8
rows = torch.tensor(slots)
nothing = dict.fromkeys(LogitsContext.__dataclass_fields__)
found = processor.apply(logits.clone(), LogitsContext(**nothing | {"expanded_idx_mapping": rows}))
for slot, own, before in zip(slots, found, logits):
    t = temperatures[slot] or 1.0
    torch.testing.assert_close(own / t, torch.log_softmax(before.double() / t, -1).float(),
                               atol=2e-5, rtol=0)
"""


def test_on_the_v2_model_runner_they_are_so_too():
    """Called as V2's sampler does (vLLM 0.33.0, v1/worker/gpu/sample/sampler.py:131, 244-265).

    Its interface and its loader (`sample/logits_processor/interface.py` and `loader.py`) are those
    of 0.32.0, whose own are used here. The sampler's kernels need a GPU.
    """
    plugin = pathlib.Path(serve.__file__).parent / "vllm_plugin"
    environment = os.environ | {"PYTHONPATH": str(plugin)}
    python = vllm_python.find_python().path
    done = subprocess.run(
        [python, "-c", V2], env=environment, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def info(mode, *processors):
    """Returns the part of a server's description that the check reads, in vLLM 0.33.0's form."""
    config = {
        "parallel_config": {"worker_extension_cls": capabilities.WORKERS},
        "model_config": {
            "logprobs_mode": mode, "logits_processors": list(processors) or None,
            "quantization": None, "dtype": "torch.bfloat16",
        },
        "cache_config": {"block_size": 16},
        "device_config": {"device": "cuda"},
        "scheduler_config": {"max_num_seqs": 256, "policy": "priority"},
    }  # fmt: skip
    return {"vllm_config": config, "vllm_env": {}, "system_env": {}}


def test_what_a_server_reports_decides_which_sampling_it_is_good_for():
    v1, v2 = capabilities.LOGPROBS[1], capabilities.V2_PROCESSOR
    model = {"root": "m", "max_model_len": 64}
    url = "http://host:1"
    for processor in (v1, v2):
        start = capabilities.check_start(url, info("processed_logits", processor), model)
        capabilities.check_sampling(url, start, 0.9, 50)
    start = capabilities.check_start(url, info("processed_logprobs"), model)
    capabilities.check_sampling(url, start, 1.0, 0)
    for top_p, top_k in ((0.95, 0), (1.0, 20)):
        with pytest.raises(ValueError, match=r"processed_logprobs, .*; set top_p=1 and top_k=0"):
            capabilities.check_sampling(url, start, top_p, top_k)
    for wrong in (
        info("processed_logits"),
        info("raw_logprobs", v1),
        info("raw_logprobs"),
        info("processed_logprobs", v2),
        info("processed_logprobs", "other:Processor"),
    ):
        with pytest.raises(ValueError, match="are not of the whole vocabulary"):
            capabilities.check_start(url, wrong, model)


def test_a_server_without_the_routes_is_refused_by_name():
    lost = ("/pause", "/collective_rpc")
    paths = dict.fromkeys(r for r in capabilities.ROUTES if r not in lost)
    with pytest.raises(ValueError, match=r"vLLM 0\.9.*lacks /pause, /collective_rpc; start it"):
        capabilities.check_routes("http://host:1", "0.9", paths)


def test_the_exit_code_and_signals_are_those_of_vllm(model, tmp_path):
    """A flag that vLLM does not know ends it with an error; a signal while it starts ends it."""
    lost = vllm_servers.launch(model, tmp_path / "lost.log", "--modle-len", "3")
    stopped = vllm_servers.launch(model, tmp_path / "stopped.log")
    wait = time.monotonic() + WAIT_SECS
    while not stopped.log.read_text() and time.monotonic() < wait:
        time.sleep(0.1)
    os.kill(stopped.process.pid, signal.SIGTERM)
    assert stopped.process.wait(60) != 0
    assert lost.process.wait(120) == 1
    assert "error: unrecognized arguments: --modle-len" in lost.log.read_text().splitlines()[-1]


def test_who_listens_is_found_among_the_descendants_with_either_protocol():
    code = (
        "import socket, sys\n"
        "server = socket.create_server(('', 0), family=getattr(socket, sys.argv[1]))\n"
        "print(server.getsockname()[1], flush=True); sys.stdin.read()"
    )
    for family in ("AF_INET", "AF_INET6") if socket.has_ipv6 else ("AF_INET",):
        with subprocess.Popen(
            ["sh", "-c", 'cat | "$0" -c "$1" "$2"', sys.executable, code, family],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        ) as process:  # fmt: skip
            port = int(process.stdout.readline())
            assert keeper.listens(os.getpid(), port)
            assert not keeper.listens(os.getpid(), port + 1)
            process.stdin.close()
