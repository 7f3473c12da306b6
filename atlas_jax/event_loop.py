"""An asyncio event loop in a thread of its own, for users' async functions and calls of judges."""

from __future__ import annotations

import asyncio
import concurrent.futures
import selectors
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

_CANCEL_SECS = 5.0  # that cancelled tasks have to end


class EventLoopThread:
    """An event loop that runs in a daemon thread, which no end of a program waits for."""

    def __init__(self, name: str) -> None:
        """Starts the thread.

        Args:
            name: name of the thread.
        """
        self._selector = _Settling()
        self._loop = asyncio.SelectorEventLoop(self._selector)
        self._lock = threading.Lock()  # between the last piece of work and the end
        self._is_closed = False
        self._thread = threading.Thread(target=self._serve, daemon=True, name=name)
        self._thread.start()

    def submit(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Returns the future of a coroutine, which the loop begins at once.

        Raises:
            RuntimeError: if the loop has been closed.
        """
        with self._lock:
            if not self._is_closed:
                return asyncio.run_coroutine_threadsafe(work, self._loop)
        work.close()
        raise RuntimeError(f"the event loop of {self._thread.name} is closed")

    def settle(self, function: Callable[[], None]) -> None:
        """Calls a function on the loop, and returns when all that follows from it waits.

        Only one thread may use it, on a loop on which nothing waits for time or for other threads.

        Raises:
            RuntimeError: if the loop has been closed.
        """
        settled: concurrent.futures.Future[None] = concurrent.futures.Future()

        def begin() -> None:
            self._selector.waiting = settled
            function()

        with self._lock:
            if self._is_closed:
                raise RuntimeError(f"the event loop of {self._thread.name} is closed")
            self._loop.call_soon_threadsafe(begin)
        settled.result()

    def close(self, wait_secs: float = _CANCEL_SECS) -> None:
        """Cancels what runs on the loop and ends its thread; any thread may call it, repeatedly.

        Args:
            wait_secs: longest wait for the thread. A function that blocks the loop keeps it.
        """
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(wait_secs)

    def _serve(self) -> None:
        """Runs the loop until it is stopped, and then what its cancelled tasks still have to do."""
        self._loop.run_forever()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            if not task.cancelling():  # a second time would interrupt its cleaning up
                task.cancel()
        if tasks:
            last: Coroutine[Any, Any, Any] = asyncio.wait(tasks, timeout=_CANCEL_SECS)
            self._loop.run_until_complete(last)
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()


class _Settling(selectors.DefaultSelector):
    """A selector that tells when its event loop has run all that was ready."""

    waiting: concurrent.futures.Future[None] | None = None

    def select(self, timeout: Any = None) -> Any:  # seconds, as int or float, or None
        # A loop that has something to run asks without a wait.
        if self.waiting and (timeout is None or timeout > 0):
            self.waiting.set_result(None)
            self.waiting = None
        return super().select(timeout)
