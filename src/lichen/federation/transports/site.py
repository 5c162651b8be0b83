"""A site's end of a federation over gRPC: it dials out, holds one stream open, and answers what the server asks.

A stream that ends is opened again, after pauses that grow; so is one on which the server is unheard. What cannot get
better by itself ends it, with what its person reads. Nothing here needs torch.
"""

from __future__ import annotations

import queue
import threading
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, final

from lichen.core.errors import LichenError
from lichen.federation.door import Door, Head, refusal, socket_folder
from lichen.federation.network import answer_question, own_versions
from lichen.federation.processes import hold_kit
from lichen.federation.reach import obstacle
from lichen.federation.transports.credentials import PULSE, import_grpc, site_credentials
from lichen.federation.transports.messages import MESSAGE, Inbox, Outbox
from lichen.federation.transports.refusals import METHOD, SERVICE, fault_of

__all__ = ["StreamSite"]

_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 20.0
"""Seconds before a site tries again: at first, and at most; each is double the one before, and a little its own."""

_PATIENCE = 15
"""Seconds without a word of the server after which a site connects anew; the server looks every second or two."""

_GOODBYE = 2.0
"""Seconds that a stream has to end when its site leaves."""

_WORKERS, _WAITING = 16, 64
"""Questions that are answered at a time, and those that wait; what comes beyond is refused."""


@final
class StreamSite:
    """A site's end of the network: answers what the server asks.

    Args:
        folder: The site's kit.
        answer: Gives the bytes that answer a question; see
            :func:`lichen.federation.network.answer_question`. Called by several threads at once.
        say: Told what keeps the site from the server.
        versions: What must agree at both ends, beside those of lichen, torch, numpy and Python.
        instance: Another one after every start of the process; empty: drawn.
        status: What the site is doing, as JSON can hold it, for its own person.

    Raises:
        LichenError: if another process runs the kit.
    """

    def __init__(
        self,
        folder: Path,
        answer: Callable[[str, bytes], bytes],
        *,
        say: Callable[[str], None],
        versions: Mapping[str, str] | None = None,
        instance: str = "",
        status: Callable[[], Head] = dict,
    ) -> None:
        self.joined = threading.Event()
        self.instance = instance or uuid.uuid4().hex
        self.fault: LichenError | None = None
        self._give, self._status, self._say = answer, status, say
        self._versions = {**own_versions(), **(versions or {})}
        self._closing, self._ended = threading.Event(), threading.Event()
        self._unheard, self._call, self._connected = 0, None, False
        self._questions: queue.Queue[tuple[int, Head, bytes, Outbox]] = queue.Queue(_WAITING)
        with ExitStack() as stack:
            self._kit = stack.enter_context(hold_kit(folder, say=say))
            if self._kit.kind != "site":
                raise LichenError("is the server's kit", where=str(folder), fix="name a site's")
            self.name = self._kit.name
            door = Door(socket_folder(folder) / "door", self._at_the_door, at_once=4)
            stack.callback(door.close)
            self._stack = stack.pop_all()
        for work in (*[self._work] * _WORKERS, self._watch):
            threading.Thread(target=work, daemon=True).start()
        self._thread = threading.Thread(target=self._supervise, daemon=True)
        self._thread.start()

    def _at_the_door(self, head: Head, body: bytes) -> tuple[Head, bytes]:
        if head.get("op") == "status":
            return {"joined": self._connected, **self._status()}, b""
        if head.get("op") == "stop":
            threading.Thread(target=self._leave, daemon=True).start()
        return {}, b""

    # --- the stream -------------------------------------------------------------------------------------------------

    def _supervise(self) -> None:
        try:
            pause = _FIRST_PAUSE
            own = 0.75 + zlib.crc32(self.instance.encode()) % 512 / 1024  # sites that lost one server come one by one
            while self._may_connect():
                self.fault = self._connect()
                if self._closing.is_set() or self.fault is not None:
                    return
                if self._connected:
                    self._connected, pause = False, _FIRST_PAUSE
                    self._say(f"{self.name}: the connection with the server has ended; connects anew")
                self._closing.wait(pause * own)
                pause = min(2 * pause, _LONGEST_PAUSE)
        except LichenError as error:
            self.fault = error
        finally:
            self._connected = False
            self._ended.set()

    def _may_connect(self) -> bool:
        """Wait until the server can be reached; False if this is over before."""
        shown, times, pause = "", 0, _FIRST_PAUSE
        while not self._closing.is_set():
            found = obstacle(self._kit)
            if found is None:
                return True
            times = times + 1 if str(found.error) == shown else 1
            if times == found.tries:
                self.fault = found.error
                return False
            if str(found.error) != shown:
                shown = str(found.error)
                self._say(shown)
            self._closing.wait(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        return False

    def _connect(self) -> LichenError | None:
        """One stream, to its end: why there can be no other, if so."""
        grpc = import_grpc()

        options = [
            *PULSE,
            ("grpc.max_receive_message_length", MESSAGE),
            ("grpc.use_local_subchannel_pool", 1),  # nothing of the stream before, its pauses least of all
            ("grpc.enable_http_proxy", 0),
        ]
        outbox = Outbox()
        hello = {"instance": self.instance, "versions": self._versions, "federation": self._kit.federation}
        outbox.put(0, hello)
        place = f"{self._kit.host}:{self._kit.port}"
        with grpc.secure_channel(place, site_credentials(self._kit), options=options) as channel:
            self._unheard = 0
            call = channel.stream_stream(f"/{SERVICE}/{METHOD}")(outbox.messages())
            self._call = call
            try:
                if not self._closing.is_set():
                    self._read(call, outbox)
                return None
            except grpc.RpcError:
                return fault_of(self._kit, call.code().name, call.details() or "")
            finally:
                self._call = None
                outbox.close()
                call.cancel()

    def _read(self, call: Iterator[bytes], outbox: Outbox) -> None:
        inbox = Inbox(lambda number: True)
        for message in call:
            self._unheard = 0
            found = inbox.take(message)
            if found is None:
                continue
            number, head, body = found
            if head.get("op") == "welcome":
                self._connected = True
                self.joined.set()
            elif number == 0:
                outbox.say({"op": "here"})
            else:
                try:
                    self._questions.put_nowait((number, head, bytes(body), outbox))
                except queue.Full:
                    error = LichenError("has too many questions before this one", where=f"site {self.name}")
                    outbox.put(number, refusal("silent", error))

    def _work(self) -> None:
        """Answer questions, one after another; several threads do."""
        while True:
            number, head, body, outbox = self._questions.get()
            answer = answer_question(self._give, str(head.get("kind")), body, site=self.name)
            try:
                outbox.put(number, *answer)
            except LichenError as error:  # a refusal of more words than a head may have
                outbox.put(number, refusal("failed", LichenError(error.what, where=f"site {self.name}")))
            del body, answer

    def _watch(self) -> None:
        """End a stream on which the server is unheard, by seconds of this process: those of a stop do not count."""
        while not self._ended.wait(1.0):
            self._unheard += 1
            call: Any = self._call
            if self._unheard >= _PATIENCE and call is not None:
                self._say(f"{self.name}: the server is unheard; connects anew")
                call.cancel()

    # --- its end ----------------------------------------------------------------------------------------------------

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until this site can no longer be of the federation.

        Args:
            seconds: At most; None: for ever.

        Returns:
            False when the time is up.

        Raises:
            LichenError: why it is over.
        """
        if not self._ended.wait(seconds):
            return False
        if self.fault is not None:
            raise self.fault
        return True

    def _leave(self) -> None:
        """End the stream, which says goodbye to the server."""
        self._closing.set()
        call: Any = self._call
        if call is not None:
            with suppress(Exception):
                call.cancel()
        self._thread.join()

    def close(self) -> None:
        """Say goodbye to the server, and leave."""
        self._leave()
        self._stack.close()

    def __enter__(self) -> StreamSite:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
