"""A program that stands for the interpreter of vLLM: the same processes, no model.

`write` makes it; `serve` takes it as `--python`. Its front end answers the routes that `serve` asks
for, holds shared memory, and starts an engine in a session of its own, and that one a worker that
does not mind SIGTERM. Nothing in their environment tells whose they are.
"""

from __future__ import annotations

import os
import pathlib
import sys

from atlas_jax.rollout import capabilities

_PROGRAM = """#!{python}
import http.server, json, os, pathlib, signal, subprocess, sys, tempfile, threading, time
from multiprocessing import resource_tracker, shared_memory

FOLDER = pathlib.Path(os.environ["STUB_FOLDER"])


def note(role, text=""):
    partial = FOLDER / f"partial_{{os.getpid()}}"
    partial.write_text(text)
    partial.rename(FOLDER / f"{{role}}_{{os.getpid()}}")


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        known = {{
            "/health": {{}},
            "/version": {{"version": "{version}"}},
            "/openapi.json": {{"paths": dict.fromkeys({routes})}},
        }}
        self.send_response(200 if self.path in known else 404)
        self.end_headers()
        self.wfile.write(json.dumps(known.get(self.path)).encode())

    def log_message(self, *_):
        pass


def front():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    flags = sys.argv[1:]
    host, port = (flags[flags.index(name) + 1] for name in ("--host", "--port"))
    print("INFO a line of the log", flush=True)
    print(os.environ.get("STUB_SAYS", ""), flush=True)
    if "STUB_CODE" in os.environ:
        sys.exit(int(os.environ["STUB_CODE"]))
    if "STUB_LATER" in os.environ and list(FOLDER.glob("front_*")):
        sys.exit(os.environ["STUB_LATER"])
    # Python's tracker frees it, when all that hold its pipe are gone.
    segment = shared_memory.SharedMemory(create=True, size=1)
    # Nobody frees the other: its name is that of a temporary file.
    meeting = pathlib.Path(tempfile.gettempdir(), "vllm_dist_" + segment.name)
    meeting.touch()
    memory = pathlib.Path("/dev/shm", meeting.name + "-tp:0-[0-1]-cpushm")
    memory.touch()
    engine = start("engine", resource_tracker._resource_tracker._fd)
    while "STUB_WAITS" in os.environ and not (FOLDER / "go").exists():
        time.sleep(0.05)
    server = http.server.ThreadingHTTPServer((host, int(port)), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    left = [f"/dev/shm/{{segment.name}}", str(meeting), str(memory), tempfile.gettempdir()]
    text = {{"flags": flags, "environment": dict(os.environ), "left": left}}
    note("front", json.dumps(text))
    engine.wait()  # without its engine vLLM ends, with 0


def start(role, pipe):
    environment = {{"STUB_FOLDER": str(FOLDER)}}
    command = [__file__, role, str(pipe)]
    return subprocess.Popen(command, env=environment, start_new_session=True, pass_fds=[pipe])


def engine():
    start("worker", int(sys.argv[2]))
    note("engine")
    time.sleep(3600)


def worker():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    note("worker")
    time.sleep(3600)


if sys.argv[1] == "-c":
    print(os.environ.get("STUB_WHEEL", "cpu 0.32.0 False"))
else:
    {{"-m": front, "engine": engine, "worker": worker}}[sys.argv[1]]()
"""


def write(folder: pathlib.Path) -> tuple[str, dict[str, str]]:
    """Returns the path of the program and the environment that it needs.

    Each of its processes leaves a file ROLE_PID in `folder`; that of the front end has its flags.
    Where the environment has STUB_WAITS, it serves when there is a file `go`. STUB_SAYS is printed,
    and STUB_CODE ends it. STUB_LATER ends every start but the first one, as its last line.
    STUB_WHEEL is what it says of itself: cpu, gpu or no, its version, and
    whether it has `vllm serve`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "python"
    routes, version = list(capabilities.ROUTES), capabilities.KNOWN_VERSIONS[0]
    path.write_text(_PROGRAM.format(python=sys.executable, routes=routes, version=version))
    path.chmod(0o755)
    return str(path), dict(os.environ) | {"STUB_FOLDER": str(folder)}
