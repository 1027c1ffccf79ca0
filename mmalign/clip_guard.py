"""A worker process that may hang, crash or be killed without harm: clips are decoded in one.

`python -m mmalign.clip_guard SOCKET FILE MODULE:FUNCTION` is that process. It is a fresh
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
import time
import weakref
from typing import Any

# Shared memory that is kept from one clip to the next: to map and clear it anew takes a while.
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


def end_after(seconds: float) -> None:
    """End this process in so many seconds, even inside foreign code; 0 calls it off."""
    signal.setitimer(signal.ITIMER_REAL, seconds)


def _nameless_file() -> int:
    """A descriptor of memory, or where there is no such thing of a file on disk."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("mmalign-clip")
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
