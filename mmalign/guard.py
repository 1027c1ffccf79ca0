"""A worker process that may hang, crash or be killed without harm.

Clips are decoded in one, and mathematics compared in another.
`python -m mmalign.guard SOCKET FILE MODULE:FUNCTION` is that process. It is a fresh
interpreter, so the caller may have threads, and unlike a process that multiprocessing spawns it
does not import the caller's main module again, which may import torch or lack a `__main__` guard.
"""

from __future__ import annotations

import contextlib
import importlib
import mmap
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

from mmalign.errors import MmalignError

# A child imports what it works with before its first task; a slow disk must not look like a hang.
START_SECONDS = 300.0
# Shared memory that is kept from one task to the next: to map and clear it anew takes a while.
KEPT_BYTES = 64 * 2**20
_LENGTH = struct.Struct("<Q")


class Channel:
    """Messages over a socket, and memory that both ends share for what is large.

    What is not done by `deadline`, a value of time.monotonic(), raises TimeoutError; EOFError or
    ConnectionError means that the other end is gone. Messages are pickled: both ends are ours.
    """

    def __init__(self, end: socket.socket, shared_file: int) -> None:
        self._socket, self._shared_file = end, shared_file
        self._mapped: mmap.mmap | None = None

    def send(self, message: object, deadline: float | None = None) -> None:
        """Send a message."""
        data = pickle.dumps(message)
        self._limit(deadline)
        self._socket.sendall(_LENGTH.pack(len(data)) + data)

    def receive(self, deadline: float | None = None) -> Any:
        """The next message."""
        length = self._receive(_LENGTH.size, deadline)
        return pickle.loads(self._receive(_LENGTH.unpack(length)[0], deadline))

    def shared(self, num_bytes: int) -> memoryview:
        """Shared memory, as either end left it."""
        if self._mapped is None or len(self._mapped) < num_bytes:
            if os.fstat(self._shared_file).st_size < num_bytes:
                os.ftruncate(self._shared_file, num_bytes)
            self._mapped = mmap.mmap(self._shared_file, num_bytes)
        return memoryview(self._mapped)[:num_bytes]

    def give_back_shared(self, *, truncate: bool) -> None:
        """Keep no more than KEPT_BYTES. Both ends must do so, the last one with `truncate`."""
        if os.fstat(self._shared_file).st_size > KEPT_BYTES:
            self._mapped = None
            if truncate:
                os.ftruncate(self._shared_file, 0)

    def close(self) -> None:
        """Close this end; the other one meets EOFError."""
        self._socket.close()
        os.close(self._shared_file)

    def _receive(self, num_bytes: int, deadline: float | None) -> bytearray:
        data = bytearray(num_bytes)
        view = memoryview(data)
        while view:
            self._limit(deadline)
            count = self._socket.recv_into(view)
            if not count:
                raise EOFError
            view = view[count:]
        return data

    def _limit(self, deadline: float | None) -> None:
        if deadline is None:
            self._socket.settimeout(None)
            return
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._socket.settimeout(left)


class Child:
    """A process that runs `entry` ("module:function") with one end of a channel."""

    def __init__(self, entry: str) -> None:
        ours, theirs = socket.socketpair()
        self.channel = Channel(ours, shared_file := _nameless_file())
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, f"{theirs.fileno()}", f"{shared_file}", entry],
                pass_fds=[theirs.fileno(), shared_file],
                stdin=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": paths},
            )
        self._parent_pid = os.getpid()
        # At the latest when the interpreter ends: no child outlives its parent.
        self._ending = weakref.finalize(self, _end, self._process, self.channel, self._parent_pid)

    def is_mine_and_alive(self) -> bool:
        """False in a fork of the process that started it, and when it has ended."""
        return os.getpid() == self._parent_pid and self._process.poll() is None

    def kill(self) -> None:
        """End the process at once, whatever it is doing."""
        self._process.kill()
        self._ending()

    def close(self) -> None:
        """Let the process end by itself, and kill it where it does not within a second."""
        self._ending()

    def ending(self) -> str:
        """How a process that closed its end of the channel ended."""
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "which does not end"
        if code >= 0:
            return f"exit code {code}"
        return f"killed by {signal.Signals(-code).name}"


class Hung(Exception):
    """A child did not answer in time and was killed."""


class Crashed(Exception):
    """A child ended in the middle of a task; the message says how."""


class Guarded:
    """A child that starts with the first task and serves until `close`, or until it must be killed.

    Then the next task gets a new one. `entry` ("module:function") is what the child runs: it is
    sent `settings` first and answers None when it is ready, or with the error that keeps it from
    being so. `what` names the child in messages. Threads may share it; they take turns.
    """

    def __init__(self, entry: str, settings: object, *, what: str) -> None:
        self._entry, self._settings, self._what = entry, settings, what
        self._child: Child | None = None
        self._turn = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        # In another process it starts a child of its own.
        return self.__dict__ | {"_child": None, "_turn": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state | {"_turn": threading.Lock()})

    @property
    def child(self) -> Child | None:
        """The child that serves now."""
        return self._child

    def ask(
        self,
        task: object,
        timeout_seconds: float,
        receive: Callable[[Channel, float], Any] | None = None,
    ) -> Any:
        """What the child answers to a task; `receive` reads that off the channel by a deadline.

        Raises Hung, Crashed, MmalignError where no child can be started, and the MmalignError that
        the child answers with.
        """
        with self._turn:
            child = self._child = self._running()
            deadline = time.monotonic() + timeout_seconds
            try:
                child.channel.send(task, deadline)
                answer = (receive or answer_of)(child.channel, deadline)
                child.channel.give_back_shared(truncate=True)
                return answer
            except MmalignError:
                # It comes from the child, which is ready for the next task.
                child.channel.give_back_shared(truncate=True)
                raise
            except TimeoutError:
                problem: Exception = Hung()
            except (EOFError, ConnectionError):
                problem = Crashed(child.ending())
            except BaseException:
                # Ctrl-C: the channel is in the middle of a task.
                self._end(child)
                raise
            self._end(child)
        raise problem

    def close(self) -> None:
        """End the child. One that is asked again starts another."""
        with self._turn:
            if self._child is not None:
                self._child.close()
                self._child = None

    def _running(self) -> Child:
        if self._child is not None and self._child.is_mine_and_alive():
            return self._child
        child = Child(self._entry)
        deadline = time.monotonic() + START_SECONDS
        try:
            child.channel.send(self._settings, deadline)
            answer_of(child.channel, deadline)
        except (EOFError, ConnectionError, TimeoutError) as error:
            late = f"it was not ready within {START_SECONDS:.0f} seconds"
            why = late if isinstance(error, TimeoutError) else child.ending()
            child.kill()
            raise MmalignError(f"the process that {self._what} did not start ({why})") from None
        except BaseException:
            child.kill()
            raise
        return child

    def _end(self, child: Child) -> None:
        child.kill()
        self._child = None


def answer_of(channel: Channel, deadline: float) -> Any:
    """The child's next message. Raises it where it is an error."""
    message = channel.receive(deadline)
    if isinstance(message, MmalignError):
        raise message
    return message


def end_after(seconds: float) -> None:
    """End this process in so many seconds, even inside foreign code; 0 calls it off."""
    signal.setitimer(signal.ITIMER_REAL, seconds)


def _nameless_file() -> int:
    """A descriptor of memory, or where there is no such thing of a file on disk."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("mmalign-guard")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _end(process: subprocess.Popen[bytes], channel: Channel, parent_pid: int) -> None:
    channel.close()
    if os.getpid() != parent_pid:
        return  # A fork of the parent: the child is not ours to end.
    try:
        process.wait(timeout=1)
    except subprocess.TimeoutExpired:
        process.kill()
        # One that waits for a disk or network that does not answer cannot be killed now.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=1)


def main(arguments: list[str]) -> None:
    """What the child runs."""
    descriptor, shared_file, entry = arguments
    # Ctrl-C reaches the whole group; the parent decides, and closes the channel.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    module, _, function = entry.partition(":")
    channel = Channel(socket.socket(fileno=int(descriptor)), int(shared_file))
    with contextlib.suppress(EOFError, ConnectionError):
        getattr(importlib.import_module(module), function)(channel)


if __name__ == "__main__":
    main(sys.argv[1:])
