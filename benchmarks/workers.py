"""A process for every measurement: a crash, or memory that runs out, costs that measurement alone.

The parent holds a :class:`Worker` per measurement and calls its subject's methods by name, one worker at a time: so
contenders take turns although each has a process of its own. Processes are forked from one that has imported the
libraries and touched no device.
"""

from __future__ import annotations

import gc
import multiprocessing
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks.measurements import MeasurementFailed, Unavailable
from fastvit.ops.backends import BackendUnavailable

LIMIT = 420.0  # seconds for one answer: torch.compile with max-autotune takes minutes, a stage of make gpu has 470 s


def _serve(connection: Connection, make: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    """The child: make the subject, then answer (method, arguments) until the pipe closes."""
    torch.backends.cudnn.allow_tf32 = False  # products in float32 are IEEE by default; so are convolutions here
    gc.freeze()  # what the server imported stays: to look through it on every collection takes longer than most answers
    subject: object | None = None
    while True:
        try:
            method, given = connection.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            if method == "__init__":
                subject = make(*arguments)
                answer = None
            else:
                answer = getattr(subject, method)(*given)
            connection.send(("ok", answer))
        except KeyboardInterrupt:
            return
        except Exception as error:
            kind = "unavailable" if isinstance(error, (Unavailable, BackendUnavailable)) else "failed"
            plain = isinstance(error, (Unavailable, BackendUnavailable, MeasurementFailed))
            text = str(error) if plain else f"{type(error).__name__}: {error}"
            connection.send((kind, " ".join(text.split("\n\n")[0].split())[:500]))
        gc.collect()


class Worker:
    """A process that makes ``make(*arguments)`` and calls its methods.

    Use as a context manager; leaving it ends the process.
    """

    def __init__(self, make: Callable[..., object], *arguments: Any, limit: float = LIMIT) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["benchmarks.suites"])
        self.limit = limit
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, make, arguments), daemon=True)
        self.process.start()
        theirs.close()
        self.connection.send(("__init__", ()))  # answered at the first call, so that workers start at the same time
        self.made = False

    def ready(self) -> None:
        """Wait until the subject is made, or has failed to be: :meth:`call` says which."""
        if not self.made:
            self.connection.poll(self.limit)

    def call(self, method: str, *arguments: Any) -> Any:
        """Return the answer of the subject's method.

        Raises:
            Unavailable: the subject can't run here.
            MeasurementFailed: it raised something else, died, or did not answer in time.
        """
        if not self.made:
            self._answer("its model")
            self.made = True
        try:
            self.connection.send((method, arguments))
        except OSError as error:
            raise MeasurementFailed(self._death()) from error
        return self._answer(method)

    def _answer(self, method: str) -> Any:
        try:
            if not self.connection.poll(self.limit):
                self.process.kill()
                raise MeasurementFailed(f"no answer to {method} within {self.limit:.0f} s")
            kind, answer = self.connection.recv()
        except (EOFError, ConnectionError) as error:
            raise MeasurementFailed(self._death()) from error
        if kind == "unavailable":
            raise Unavailable(answer)
        if kind == "failed":
            raise MeasurementFailed(answer)
        return answer

    def _death(self) -> str:
        self.process.join(10)
        code = self.process.exitcode
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            return f"its process was ended by {name}" + " (out of memory?)" * (name == "SIGKILL")
        return f"its process ended with exit status {code}"

    def close(self) -> None:
        """End the process."""
        self.connection.close()
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
