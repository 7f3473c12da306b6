"""The HTTP client against a real server in this process."""

import asyncio
import contextlib
import math
import socket
import time
from email.utils import formatdate

import pytest
from aiohttp import web

from atlas_jax.llm_client import (
    Client,
    ClientOptions,
    Pace,
    RefusedError,
    Throttle,
    UnavailableError,
)

QUICK = ClientOptions(max_tries=3, timeout_secs=5.0, backoff_secs=0.01)


def talk(handler, use, options=QUICK, key=""):
    """Returns what `use(client)` returns while a server answers by `handler`."""

    async def run():
        app = web.Application()
        app.router.add_route("*", "/v1/{tail:.*}", handler)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        try:
            async with Client(f"http://{host}:{port}/v1/", key, options) as client:
                return await use(client)
        finally:
            await runner.cleanup()

    return asyncio.run(run())


def test_json_is_posted_and_returned_with_the_key():
    async def echo(request):
        body = await request.json() if request.can_read_body else None
        return web.json_response(
            [request.method, request.path, body, dict(request.query),
             request.headers.get("Authorization")]
        )  # fmt: skip

    async def use(client):
        return [await client.post("/a", {"x": 1}, {"q": "2"}), await client.get("/b")]

    assert talk(echo, use, key="secret") == [
        ["POST", "/v1/a", {"x": 1}, {"q": "2"}, "Bearer secret"],
        ["GET", "/v1/b", None, {}, "Bearer secret"],
    ]
    assert talk(echo, use)[0][4] is None


def test_an_empty_reply_is_none():
    async def empty(_):
        return web.Response()

    assert talk(empty, lambda client: client.post("/")) is None


@pytest.mark.parametrize(
    ("status", "text"),
    [*((status, "not yet") for status in (408, 429, 500, 503, 200)), (200, "[" * 100_000)],
    ids=lambda part: str(part)[:9],
)
def test_what_may_pass_is_tried_again(status, text):
    calls = []

    async def second_time(_):
        calls.append(time.monotonic())
        if len(calls) == 1:
            return web.Response(status=status, text=text)
        return web.json_response({"ok": True})

    async def use(client):
        return await client.post("/"), client.num_retries

    assert talk(second_time, use) == ({"ok": True}, 1)
    assert len(calls) == 2


def test_retry_after_is_heeded_up_to_a_limit():
    calls = []

    async def busy(_):
        calls.append(time.monotonic())
        waits = {1: "0.3", 2: "1000"}
        if len(calls) in waits:
            return web.Response(status=429, headers={"Retry-After": waits[len(calls)]})
        return web.json_response(1)

    assert talk(busy, lambda c: c.post("/"), QUICK._replace(max_backoff_secs=0.5)) == 1
    assert calls[1] - calls[0] >= 0.3
    assert 0.5 <= calls[2] - calls[1] < 500


def busy(headers, body="slow down"):
    """Answers: a refusal, and then only what comes `HOLD` seconds or more later."""
    calls = []

    async def answer(_):
        calls.append(time.monotonic())
        if len(calls) == 1:
            told = {name: tell() if callable(tell) else tell for name, tell in headers.items()}
            return web.Response(status=429, headers=told, text=body)
        return web.json_response(1)

    return calls, answer


HOLD = 0.6


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ({"Retry-After": "0.6"}, ""),
        ({"Retry-After": "1"}, ""),
        ({"retry-after-ms": "600", "Retry-After": "30"}, ""),
        ({"Retry-After": lambda: formatdate(math.ceil(time.time() + HOLD), usegmt=True)}, ""),
        (  # a server whose clock is an hour behind
            {"Date": lambda: formatdate(time.time() - 3600, usegmt=True),
             "Retry-After": lambda: formatdate(time.time() - 3599, usegmt=True)}, "",
        ),
        ({}, '[{"error": {"code": 429, "details": [{"retryDelay": "0.6s"}]}}]'),
        ({"Retry-After": "soon"}, '{"retryDelay": "0.6s"}'),
    ],
)  # fmt: skip
def test_a_busy_server_is_left_alone_by_all_requests_for_as_long_as_it_says(headers, body):
    """It costs no try, and the requests behind the refused one wait as well."""
    calls, answer = busy(headers, body)

    async def use(client):
        first = await asyncio.gather(*(client.post("/") for _ in range(3)))
        return first, client.num_retries

    options = QUICK._replace(max_tries=1, max_in_flight=1, timeout_secs=30.0)
    assert talk(answer, use, options) == ([1, 1, 1], 1)
    assert len(calls) == 4
    assert calls[1] - calls[0] >= HOLD - 0.05
    assert calls[1] - calls[0] < 25


def test_a_busy_server_is_not_down():
    calls = []

    async def every_second(_):
        calls.append(1)
        if len(calls) % 2:
            return web.Response(status=429, headers={"Retry-After": "0.01"})
        return web.json_response(1)

    async def use(client):
        return await asyncio.gather(*(client.post("/") for _ in range(20)))

    options = QUICK._replace(max_tries=1, max_failures_in_row=1, timeout_secs=60.0)
    assert talk(every_second, use, options) == [1] * 20


def test_a_server_that_stays_busy_is_given_up_by_all():
    calls = []

    async def ever(_):
        calls.append(1)
        return web.Response(status=529, headers={"Retry-After": "0.05"}, text="overloaded")

    async def use(client):
        return await asyncio.gather(*(client.post("/") for _ in range(50)), return_exceptions=True)

    results = talk(ever, use, QUICK._replace(timeout_secs=0.5, max_in_flight=8))
    assert all(isinstance(r, UnavailableError) for r in results)
    assert {r.status for r in results} <= {429, 529}
    assert "overloaded" in str(results[-1])


def test_fewer_requests_are_in_flight_after_a_refusal_and_more_again_later():
    now, most = 0, []

    async def limited(_):
        nonlocal now
        now += 1
        most.append(now)
        await asyncio.sleep(0.05)
        is_too_much = now > 6
        await asyncio.sleep(0.05)
        now -= 1
        if is_too_much:
            return web.Response(status=429, headers={"Retry-After": "0.05"})
        return web.json_response(1)

    async def use(client):
        return await asyncio.gather(*(client.post("/") for _ in range(60)))

    options = QUICK._replace(max_tries=1, max_in_flight=16, timeout_secs=60.0)
    assert talk(limited, use, options) == [1] * 60
    assert most[:16] == list(range(1, 17))
    assert max(most[16:]) <= 8
    assert max(most[-30:]) > 1


def test_clients_of_one_address_share_what_one_of_them_is_told():
    calls, answer = busy({"Retry-After": "0.6"})

    async def use(client):
        throttle = Throttle(4)
        url = client.base_url
        one, other = (Client(url, key, QUICK, throttle=throttle) for key in "ab")
        async with one, other:
            await one.post("/")
            await other.post("/")

    talk(answer, use)
    assert calls[1] - calls[0] >= HOLD - 0.05


def test_after_every_try_it_is_unavailable():
    calls = []

    async def ill(_):
        calls.append(1)
        return web.Response(status=500, text="out of order " * 100)

    with pytest.raises(UnavailableError, match="500: out of order") as error:
        talk(ill, lambda client: client.post("/"))
    assert len(calls) == 3
    assert error.value.status == 500
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_a_refusal_is_not_repeated(status):
    calls = []

    async def refuse(_):
        calls.append(1)
        return web.Response(status=status, text="no")

    with pytest.raises(RefusedError) as error:
        talk(refuse, lambda client: client.post("/"), key="secret")
    assert (error.value.status, error.value.body, len(calls)) == (status, "no", 1)
    assert "secret" not in str(error.value)


def test_no_answer_is_a_time_out():
    async def never(_):
        await asyncio.sleep(60)
        return web.json_response(1)

    with pytest.raises(UnavailableError, match=r"no reply within 0\.2 s"):
        talk(never, lambda c: c.post("/"), QUICK._replace(timeout_secs=0.2))


def test_a_time_out_is_final_where_it_is_asked_for():
    calls = []

    async def never(_):
        calls.append(1)
        await asyncio.sleep(60)
        return web.json_response(1)

    options = QUICK._replace(timeout_secs=0.2, retry_timeouts=False)
    with pytest.raises(UnavailableError, match=r"no reply within 0\.2 s"):
        talk(never, lambda c: c.post("/"), options)
    assert len(calls) == 1


def test_a_host_that_does_not_answer_is_given_up_before_the_time_of_a_reply():
    """A socket whose queue of connections is full lets no other one in, as a lost host does."""
    with socket.socket() as listener, contextlib.ExitStack() as stack:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())

        async def ask():
            options = QUICK._replace(timeout_secs=300.0, connect_timeout_secs=0.2, max_tries=1)
            async with Client(f"http://127.0.0.1:{listener.getsockname()[1]}", "", options) as c:
                await c.get("/health")

        start = time.monotonic()
        with pytest.raises(UnavailableError, match=r"no connection within 0\.2 s"):
            asyncio.run(ask())
        assert time.monotonic() - start < 250, "a reply may take 300 s"


PAUSED = (
    '{"error": {"message": "Generation is paused. Please retry after it resumes.", "code": 503}}'
)


def test_a_paused_server_is_waited_for_without_counting_tries():
    calls = []

    async def resumes(_):
        calls.append(1)
        if len(calls) <= 4:
            return web.Response(status=503, text=PAUSED)
        return web.json_response({"ok": True})

    async def use(client):
        return await client.post("/"), client.num_retries

    assert talk(resumes, use, QUICK._replace(max_tries=1, timeout_secs=60.0)) == ({"ok": True}, 0)
    assert len(calls) == 5


def test_a_server_that_stays_paused_is_unavailable_in_the_end():
    async def paused(_):
        return web.Response(status=503, text=PAUSED)

    with pytest.raises(UnavailableError, match=r"503.*Generation is paused"):
        talk(paused, lambda c: c.post("/"), QUICK._replace(timeout_secs=0.5))


def test_a_connection_that_breaks_or_is_refused_is_unavailable():
    async def half(request):
        response = web.StreamResponse(headers={"Content-Length": "100"})
        await response.prepare(request)
        await response.write(b'{"a":')
        request.transport.close()
        return response

    with pytest.raises(UnavailableError, match="no reply: Client"):
        talk(half, lambda client: client.post("/"))

    async def nobody():
        async with Client("http://127.0.0.1:9", options=QUICK) as client:
            await client.post("/")

    with pytest.raises(UnavailableError, match="no reply: Client"):
        asyncio.run(nobody())


def test_requests_in_flight_stay_within_the_limit():
    now, most = 0, 0

    async def count(_):
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.02)
        now -= 1
        return web.json_response(None)

    async def use(client):
        await asyncio.gather(*(client.post("/") for _ in range(20)))

    talk(count, use, QUICK._replace(max_in_flight=3))
    assert most == 3


def test_a_server_that_only_fails_counts_as_down():
    calls = []

    async def ill(_):
        calls.append(1)
        return web.Response(status=503)

    async def use(client):
        return await asyncio.gather(*(client.post("/") for _ in range(40)), return_exceptions=True)

    options = QUICK._replace(max_in_flight=2, max_failures_in_row=5)
    results = talk(ill, use, options)
    assert all(isinstance(r, UnavailableError) for r in results)
    assert 5 <= len(calls) <= 6
    assert "given up after" in str(results[-1])


def test_one_success_ends_the_row_of_failures():
    calls = []

    async def every_third(_):
        calls.append(1)
        return web.Response(status=500) if len(calls) % 3 else web.json_response(1)

    async def use(client):
        return [await client.post("/") for _ in range(10)]

    assert talk(every_third, use, QUICK._replace(max_failures_in_row=3)) == [1] * 10


def test_a_client_that_is_not_open_says_so():
    with pytest.raises(RuntimeError, match="use it in `async with`"):
        asyncio.run(Client("http://127.0.0.1:9").get("/"))


def test_a_pace_spreads_units_over_the_minute():
    async def spend(units):
        pace, start = Pace(1200.0), time.monotonic()  # 20 a second
        for _ in range(30):
            await pace.wait(units)
        return time.monotonic() - start

    assert 0.4 <= asyncio.run(spend(1.0)) < 60  # 20 at once, then 10 at 50 ms
    assert 1.9 <= asyncio.run(spend(2.0)) < 60

    async def corrected():
        pace, start = Pace(1200.0), time.monotonic()
        await pace.wait(1.0)
        pace.correct(39.0)
        await pace.wait(1.0)
        return time.monotonic() - start

    assert 0.9 <= asyncio.run(corrected()) < 60
