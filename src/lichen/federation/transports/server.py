"""Sites over gRPC: the coordinator's end, which fulfils :class:`lichen.engines.sites.Sites` in its own process.

A site dials out and holds one stream open, on which the server asks and the site answers. Who it is says its
certificate, which TLS has proved, and nothing else. Its first message names its instance, another one after each start:
while one is heard, another is refused. A site that sends what it must not is cut off with a reason. Other processes of
this machine's user ask at the door, as they do where NVFlare connects. Nothing here needs torch.
"""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, TypeGuard, final

from lichen.core.errors import LichenError
from lichen.engines.sites import Seen, SiteError
from lichen.federation.asking import cause_of
from lichen.federation.door import Bytes, Door, Head, error_of, refusal, socket_folder
from lichen.federation.kits.settle import BARRED
from lichen.federation.presence import Presence
from lichen.federation.processes import check_port, hold_kit
from lichen.federation.transports.credentials import PULSE, import_grpc, server_credentials, site_of
from lichen.federation.transports.messages import AT_ONCE, MESSAGE, Inbox, Outbox
from lichen.federation.transports.refusals import METHOD, SERVICE, reason

__all__ = ["StreamSites"]

_EVERY = 2.0
"""Seconds between two looks at a site, and at who is barred."""

_PATIENCE = 30.0
"""Seconds without a word of a site, over a link that is good, after which its stream ends; it may come again."""

_GREETING = 10.0
"""Seconds that a site has for its first message."""

_GRACE = 2.0
"""Seconds that a stream has to end after it was given its reason."""

_STREAMS, _OF_A_SITE = 512, 4
"""Streams at most, and those of one site: what it opens beyond is refused before it is read."""

_AT_THE_DOOR = 256
_WORDS = 64
"""Letters of a version's or an instance's name, and versions, at most."""


@final
class Stream:
    """A site's connection.

    Attributes:
        site: Whose, by its certificate.
        instance: Of its process.
        ends: When it is cancelled, in seconds of the monotonic clock, unless it has ended.
        last: When the site was read last, by the same clock.
        why: The details of the status with which it ends.
    """

    def __init__(self, site: str, context: Any) -> None:
        self.site, self.instance, self.why = site, "", ""
        self.ends: float | None = time.monotonic() + _GREETING
        self.last = time.monotonic()
        self.outbox = Outbox()
        self._context = context
        self._pending: dict[int, Future[tuple[Head, memoryview]]] = {}
        self._numbers, self._last = itertools.count(1), 0
        self._lock = threading.Lock()
        self._slots = threading.BoundedSemaphore(AT_ONCE)
        self._over = False

    def ask(self, head: Head, body: Bytes, within: float) -> tuple[Head, Bytes]:
        """One question to the process at the other end."""
        end = time.monotonic() + within
        late = LichenError(f"did not answer within {within:.0f} seconds", where=f"site {self.site}")
        if within <= 0 or not self._slots.acquire(timeout=within):
            return refusal("silent", late), b""
        answer: Future[tuple[Head, memoryview]] = Future()
        try:
            with self._lock:
                if self._over:
                    return self._gone()
                self._last = number = next(self._numbers)
                self._pending[number] = answer
            try:
                self.outbox.put(number, head, body)
                return answer.result(timeout=max(0.0, end - time.monotonic()))
            except TimeoutError:
                return refusal("silent", late), b""
            finally:
                with self._lock:
                    self._pending.pop(number, None)
                self.outbox.drop(number)
        finally:
            self._slots.release()

    def _gone(self) -> tuple[Head, Bytes]:
        return refusal("gone", LichenError("ended before it answered", where=f"site {self.site}")), b""

    def wants(self, number: int) -> bool:
        """Whether somebody waits for the answer of this number."""
        with self._lock:
            if number > self._last:
                raise LichenError("sent the answer to what nobody asked", where=f"site {self.site}")
            return number == 0 or number in self._pending

    def answered(self, number: int, head: Head, body: memoryview) -> None:
        """Give an answer to whoever waits for it."""
        with self._lock:
            waits = self._pending.get(number)
        if waits is not None and not waits.done():
            waits.set_result((head, body))

    def end(self, why: str) -> None:
        """End it, with a reason; one that does not end soon is cancelled."""
        self.why = self.why or why
        self.ends = time.monotonic() + _GRACE
        self.outbox.close()

    def cancel(self) -> None:
        """End it without a word."""
        self._context.cancel()

    def over(self) -> None:
        """It has ended: whoever waits for an answer learns so."""
        with self._lock:
            self._over = True
            waiting = list(self._pending.values())
        for one in waiting:
            with suppress(Exception):  # it has just been answered
                one.set_result(self._gone())  # type: ignore[arg-type]
        self.outbox.close()


@final
class StreamSites:
    """The sites of a federation, as its coordinator asks them; :class:`lichen.engines.sites.Sites`.

    Args:
        folder: The server's kit.
        say: Told who is cut off.

    Attributes:
        streams: Of those that were let in, by site.

    Raises:
        LichenError: if another process runs the kit, or the port is taken.
    """

    def __init__(self, folder: Path, *, say: Callable[[str], None]) -> None:
        self._say = say
        self._presence = Presence()
        self.streams: dict[str, Stream] = {}
        self._open: set[Stream] = set()
        self._barred: frozenset[str] = frozenset()
        self._lock = threading.Lock()
        self._closing, self._ended = threading.Event(), threading.Event()
        with ExitStack() as stack:
            self._kit = stack.enter_context(hold_kit(folder, say=say))
            if self._kit.kind != "server":
                raise LichenError("is a site's kit", where=str(folder), fix="name the server's")
            check_port(self._kit)
            self._barred = _names_in(folder / BARRED, self._barred)
            place = socket_folder(folder)
            door = Door(place / "door", self._at_the_door, at_once=_AT_THE_DOOR)
            stack.callback(door.close)
            self._serve(stack)
            self._stack = stack.pop_all()
        threading.Thread(target=self._watch, daemon=True).start()

    def _serve(self, stack: ExitStack) -> None:
        grpc = import_grpc()

        pool = ThreadPoolExecutor(_STREAMS)
        stack.callback(pool.shutdown, wait=False)
        options = [
            *PULSE,
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", MESSAGE),
            ("grpc.http2.min_ping_interval_without_data_ms", 1000),
        ]
        server = grpc.server(pool, options=options, maximum_concurrent_rpcs=_STREAMS)
        stack.callback(lambda: server.stop(None).wait(_GRACE))
        handler = grpc.stream_stream_rpc_method_handler(self._join)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler}),))
        try:
            server.add_secure_port(f"[::]:{self._kit.port}", server_credentials(self._kit))
        except RuntimeError:
            fix = "end what listens there; the port is part of every kit"
            where = f"port {self._kit.port}"
            raise LichenError("the port cannot be used", where=where, fix=fix) from None
        server.start()

    # --- a site's stream: gRPC gives it a thread, which sends; another one reads ------------------------------------

    def _join(self, requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        """A site's stream, from its first message to its end."""
        grpc = import_grpc()

        site = site_of(context.auth_context()) or self._kit.name
        if site == self._kit.name:
            context.abort(grpc.StatusCode.PERMISSION_DENIED, reason("name"))
        stream = Stream(site, context)
        with self._lock:
            many = Counter(one.site for one in self._open)[site] >= _OF_A_SITE
            if not many:
                self._open.add(stream)
        if many or not context.add_callback(lambda: self._over(stream)):
            self._over(stream)
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, reason("other"))
        threading.Thread(target=self._read, args=(stream, requests), daemon=True).start()
        yield from stream.outbox.messages()
        if stream.why:
            context.abort(grpc.StatusCode.ABORTED, stream.why)

    def _read(self, stream: Stream, requests: Iterator[bytes]) -> None:
        inbox = Inbox(stream.wants)
        try:
            for message in requests:
                stream.last = time.monotonic()
                if stream.instance:
                    self._presence.answered(stream.site, stream.instance, time.time())
                found = inbox.take(message)
                if found is None:
                    continue
                number, head, body = found
                if not stream.instance:
                    self._greet(stream, head)
                elif number:
                    stream.answered(number, head, body)
        except LichenError as error:
            self._say(f"site {stream.site} is cut off: {error.what}")
            stream.end(reason("cut", error.what))
        except Exception:  # gRPC's, where the connection ends; it has a class for each way
            stream.end("")
        else:  # the site has said all that it will
            stream.end("")

    def _greet(self, stream: Stream, head: Head) -> None:
        """Let a site in by its first message, or not."""
        instance, versions = head.get("instance"), head.get("versions")
        if not (isinstance(instance, str) and 0 < len(instance) <= _WORDS and _are_versions(versions)):
            raise LichenError("begins with something else", where=f"site {stream.site}")
        if head.get("federation") != self._kit.federation:
            return stream.end(reason("federation"))
        with self._lock:
            if stream.site in self._barred:
                return stream.end(reason("barred"))
            if not self._presence.confirm(stream.site, instance, versions, time.time()):
                return stream.end(reason("replaced" if self._presence.is_replaced(instance) else "other"))
            stream.instance, stream.ends = instance, None
            before = self.streams.get(stream.site)
            self.streams[stream.site] = stream
        if before is not None:  # the same process again, whose connection was lost, or one that was silent for long
            before.end(reason("replaced") if before.instance != instance else "")
        stream.outbox.say({"op": "welcome"})

    def _over(self, stream: Stream) -> None:
        """A stream has ended, whoever ended it."""
        with self._lock:
            self._open.discard(stream)
            if self.streams.get(stream.site) is stream:
                del self.streams[stream.site]
                self._presence.lost(stream.site, time.time())
        stream.over()

    def _watch(self) -> None:
        """Every few seconds: who is barred, who answers, and which streams should have ended."""
        while not self._closing.wait(_EVERY / 2):
            with self._lock:
                self._barred = _names_in(self._kit.folder / BARRED, self._barred)
                out = [one for site, one in self.streams.items() if site in self._barred]
                open_ = list(self._open)
            for one in out:
                one.end(reason("barred"))
                self._over(one)
            for one in open_:
                ends = one.last + _PATIENCE if one.ends is None else one.ends
                if time.monotonic() > ends:
                    one.cancel()
                elif one.ends is None:
                    one.outbox.say({"op": "look"})

    # --- what is asked of it ----------------------------------------------------------------------------------------

    def _at_the_door(self, head: Head, body: bytes) -> tuple[Head, Bytes]:
        if head.get("op") == "seen":
            return {"seen": self._presence.seen(time.time())}, b""
        if head.get("op") == "stop":
            self._ended.set()
            return {}, b""
        return self._ask(str(head["site"]), str(head["kind"]), body, float(head["within"]))

    def _ask(self, site: str, kind: str, body: bytes, within: float) -> tuple[Head, Bytes]:
        with self._lock:
            stream = self.streams.get(site)
        if stream is None:
            return refusal("gone", LichenError("is not connected", where=f"site {site}")), b""
        return stream.ask({"op": "ask", "kind": kind}, body, within)

    def start(self) -> None:
        """Nothing: sites come by themselves."""

    def seen(self) -> Mapping[str, Seen]:
        """Who is there now."""
        return {site: Seen(**one) for site, one in sorted(self._presence.seen(time.time()).items())}

    def ask(self, site: str, kind: str, body: bytes, within: float) -> bytes:
        """Ask one question and give its answer; see :meth:`lichen.federation.asking.DoorSites.ask`."""
        head, answer = self._ask(site, kind, body, within)
        if "cause" in head:
            raise SiteError(site, cause_of(head), error_of(head))
        return bytes(answer)

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until its person has stopped it; False when the time is up."""
        return self._ended.wait(seconds)

    def close(self) -> None:
        """End the server; sites go on and wait for the next one."""
        self._closing.set()
        self._ended.set()
        self._stack.close()

    def __enter__(self) -> StreamSites:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _are_versions(found: object) -> TypeGuard[dict[str, str]]:
    """Whether they are names and versions, and not too many or too long."""
    return (
        isinstance(found, dict)
        and len(found) <= _WORDS
        and all(isinstance(one, str) and len(one) <= _WORDS for pair in found.items() for one in pair)
    )


def _names_in(file: Path, before: frozenset[str]) -> frozenset[str]:
    """Who is barred, by a file that may be rewritten at any time; what is no file of ours changes nothing."""
    try:
        return frozenset(map(str, json.loads(file.read_text(encoding="utf-8"))["disabled_clients"]))
    except FileNotFoundError:
        return frozenset()
    except (OSError, ValueError, KeyError, TypeError):
        return before
