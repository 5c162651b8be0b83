"""Lichen's components in NVFlare's processes: bytes from a door to a site, and from a site to its door.

They are named in a kit's ``local/resources.json`` and live in NVFlare's parent processes; there is no NVFlare job. They
talk over a channel of their own, whose messages carry the name that certificates prove. A message goes as a whole: of
what NVFlare streams, it keeps every answer for a minute. Every start of a site's own process has an ``instance``: while
the server hears one, it refuses another of that name, and one that was silent for long and has been replaced must end.
A site that the server has not looked at for long ends, to connect anew. Nothing here needs torch.
"""

from __future__ import annotations

import json
import os
import threading
import time
import traceback
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, final

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_exception import NotAuthenticated
from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey, ReturnCode
from nvflare.fuel.f3.cellnet.utils import new_cell_message
from nvflare.fuel.f3.endpoint import Endpoint, EndpointMonitor, EndpointState

from lichen.core.errors import LichenError
from lichen.federation.door import LOOK, Bytes, Door, Head, call, open_parcel, parcel, refusal
from lichen.federation.kits.settle import BARRED, ENDED
from lichen.federation.presence import Presence

__all__ = ["Coordinator", "Site"]

CHANNEL = "lichen"
SERVER = "server"
"""The name of the server's end, whoever it is."""

INSTANCE = "lichen_instance"
EVERY = 2.0
"""Seconds between two looks at a site."""

AT_ONCE = 256
"""Questions at a time; each has at most a piece."""


_SET = time.time() - time.monotonic()


def _now() -> float:
    """Seconds of the epoch, by a clock that nobody sets while this process runs: presence depends on it."""
    return _SET + time.monotonic()


def _message(head: Head, body: Bytes = b"") -> Any:
    return new_cell_message({MessageHeaderKey.RETURN_CODE: ReturnCode.OK}, parcel(head, body))


@final
class _Hangups(EndpointMonitor):  # type: ignore[misc]
    """Sees a connection end at once: a site that was killed and started again is let in, and no second one of it."""

    def __init__(self, presence: Presence) -> None:
        self._presence = presence

    def state_change(self, endpoint: Endpoint) -> None:
        """NVFlare's."""
        if endpoint.state == EndpointState.DISCONNECTED:
            self._presence.lost(endpoint.name, _now())


@final
class Coordinator(FLComponent):  # type: ignore[misc]
    """At the server: knows who is there, and passes questions on."""

    def __init__(self) -> None:
        super().__init__()
        self._presence = Presence()
        self._looking: set[str] = set()
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(32)
        self._asks = ThreadPoolExecutor(AT_ONCE)

    def handle_event(self, event_type: str, fl_ctx: Any) -> None:
        """NVFlare's."""
        if event_type == EventType.SYSTEM_START:
            self._engine = fl_ctx.get_engine()
            self._clients = self._engine.client_manager
            self._clients.disabled_clients_file = None  # it was read, and from now on Lichen alone writes it
            try:
                self._door = Door(Path(os.environ["LICHEN_DOOR"]), self._answer, at_once=AT_ONCE)
            except (OSError, KeyError):  # NVFlare would go on, and nobody could talk with it
                traceback.print_exc()
                os._exit(1)
            threading.Thread(target=self._look, daemon=True).start()
            core = self._engine.get_cell().core_cell
            core.register_request_cb(channel=CHANNEL, topic="bye", cb=self._bye)
            core.communicator.register_monitor(_Hangups(self._presence))
        elif event_type == EventType.CLIENT_REGISTER_RECEIVED:
            self._check_instance(fl_ctx.get_peer_context())

    def _check_instance(self, peer: Any) -> None:
        """Refuse a second process of a site while the first one is there."""
        site, instance = peer.get_identity_name(), peer.get_prop(INSTANCE, "")
        if not self._presence.lets_in(site, instance, _now()):
            raise NotAuthenticated(f"another process is connected as {site}")

    def _answer(self, head: Head, body: bytes) -> tuple[Head, Bytes]:
        if head.get("op") == "seen":
            return {"seen": self._presence.seen(_now())}, b""
        if head.get("op") == "stop":
            threading.Timer(0.2, os._exit, [ENDED["stopped"]]).start()
            return {}, b""
        return self._ask(str(head["site"]), str(head["kind"]), body, float(head["within"]))

    def _ask(self, site: str, kind: str, body: bytes, within: float) -> tuple[Head, Bytes]:
        end = time.monotonic() + within
        while True:
            instance = self._presence.instance(site)
            if instance is None or self._clients.is_client_disabled(site):
                return refusal("gone", LichenError("is not connected", where=f"site {site}")), b""
            left = end - time.monotonic()
            question: Head = {"op": "ask", "kind": kind, "instance": instance, "within": left}
            head, answer = self._wait(site, instance, self._asks.submit(self._send, site, question, body, left))
            other = head.get("cause") == "other"  # a second process has its connection for a moment
            lost = head.get("cause") == "gone"
            if (other or (lost and not self._presence.lost(site, _now()))) and left > 1:
                time.sleep(0.5)
                continue
            if "cause" not in head:
                self._presence.answered(site, instance, _now())
            return head, answer

    def _wait(self, site: str, instance: str, question: Future[tuple[Head, Bytes]]) -> tuple[Head, Bytes]:
        """The answer, or that there will be none because the process is no more: NVFlare would wait on."""
        while True:
            try:
                return question.result(timeout=0.5)
            except TimeoutError:
                if not question.done() and self._presence.instance(site) != instance:
                    return refusal("gone", LichenError("ended before it answered", where=f"site {site}")), b""

    def _send(self, site: str, head: Head, body: bytes, within: float) -> tuple[Head, Bytes]:
        """One question to whatever process has a site's connection."""
        where = f"site {site}"
        if within <= 0:
            return refusal("silent", LichenError("did not answer in time", where=where)), b""
        got = self._engine.get_cell().core_cell.send_request(
            channel=CHANNEL,
            topic=head["op"],
            target=site,
            request=_message(head, body),
            timeout=within,
            optional=True,
        )
        code = got.get_header(MessageHeaderKey.RETURN_CODE)
        if code == ReturnCode.OK and isinstance(got.payload, bytes | bytearray | memoryview):
            try:
                return open_parcel(bytes(got.payload))
            except LichenError as error:
                return refusal("failed", error), b""
        if code == ReturnCode.TIMEOUT:
            return refusal("silent", LichenError(f"did not answer within {within:.0f} seconds", where=where)), b""
        if code in (ReturnCode.COMM_ERROR, ReturnCode.TARGET_UNREACHABLE, ReturnCode.INVALID_TARGET):
            return refusal("gone", LichenError("is not connected", where=where)), b""
        return refusal("failed", LichenError(f"could not be asked: {code}", where=where)), b""

    def _bye(self, message: Any) -> Any:
        """A site's person has ended it."""
        with suppress(LichenError, TypeError):
            head, _ = open_parcel(bytes(message.payload))
            self._presence.left(str(message.get_header(MessageHeaderKey.ORIGIN)), str(head.get("instance")))
        return _message({})

    def _look(self) -> None:
        """Every few seconds: who is barred, and who is there."""
        while True:
            self._bar()
            for client in self._engine.get_clients():
                with self._lock:
                    if client.name in self._looking:
                        continue
                    self._looking.add(client.name)
                self._pool.submit(self._look_at, client.name)
            time.sleep(EVERY)

    def _look_at(self, site: str) -> None:
        try:
            head, _ = self._send(site, {"op": "who"}, b"", EVERY)
            if head.get("cause") == "gone":
                self._presence.lost(site, _now())
            elif isinstance(instance := head.get("instance"), str):
                versions = head["versions"] if isinstance(head.get("versions"), dict) else {}
                if not self._presence.confirm(site, instance, versions, _now()):
                    self._send(site, {"op": "end", "why": "replaced", "instance": instance}, b"", EVERY)
        finally:
            with self._lock:
                self._looking.discard(site)

    def _bar(self) -> None:
        """Close out those that Lichen's file names, and no others."""
        try:
            names = set(map(str, json.loads(Path(BARRED).read_text(encoding="utf-8"))["disabled_clients"]))
        except FileNotFoundError:
            names = set()
        except (OSError, ValueError, KeyError, TypeError):  # half of a file that is no file of ours
            return
        for site in names - self._clients.disabled_clients:
            self._clients.disable_client(site)  # first of all, or its next process would slip in
            self._presence.lost(site, _now())
            self._send(site, {"op": "end", "why": "barred"}, b"", EVERY)
        for site in self._clients.disabled_clients - names:
            self._clients.enable_client(site)


@final
class Site(FLComponent):  # type: ignore[misc]
    """At a site: answers the server, and nobody else."""

    def __init__(self) -> None:
        super().__init__()
        self._door = Path(os.environ["LICHEN_DOOR"])
        self._instance = os.environ["LICHEN_INSTANCE"]
        self._versions: dict[str, str] = json.loads(os.environ["LICHEN_VERSIONS"])
        self._patience = int(os.environ["LICHEN_PATIENCE"])
        self._unheard = 0  # seconds of this process: those in which it was stopped do not count
        self._joined = False
        self._pool = ThreadPoolExecutor(16)

    def handle_event(self, event_type: str, fl_ctx: Any) -> None:
        """NVFlare's."""
        if event_type == EventType.SYSTEM_BOOTSTRAP:
            fl_ctx.set_prop(INSTANCE, self._instance, private=False, sticky=True)
            self._cell = fl_ctx.get_engine().get_cell().core_cell
            self._cell.register_request_cb(channel=CHANNEL, topic="*", cb=self._answer)
        elif event_type == EventType.AFTER_CLIENT_REGISTER and fl_ctx.get_prop(FLContextKey.CLIENT_TOKEN):
            self._joined = True
            call(self._door, {"op": "joined"}, within=10)
            threading.Thread(target=self._leave, daemon=True).start()
            threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        """End where the server is unheard: NVFlare may think a connection good that the server has lost.

        A second process of a kit can bring that about: where it goes just as the first one connects again, the server
        forgets the first one's new connection, and neither end looks again.
        """
        while self._unheard < self._patience:
            time.sleep(1.0)
            self._unheard += 1
        os._exit(ENDED["unheard"])

    def _leave(self) -> None:
        """Wait until Lichen's process ends; say goodbye, and end with it."""
        with suppress(OSError, LichenError):
            while not call(self._door, {"op": "leave"}, within=LOOK)[0].get("leave"):
                pass
            bye = _message({"instance": self._instance})
            self._cell.send_request(
                channel=CHANNEL, topic="bye", target=SERVER, request=bye, timeout=2.0, optional=True
            )
        os._exit(0)

    def _answer(self, message: Any) -> Any:
        """A message, or None if it comes later: NVFlare's threads wait for nobody."""
        if message.get_header(MessageHeaderKey.ORIGIN) != SERVER:
            return _message(refusal("refused", LichenError("answers the server only", where="site")))
        self._unheard = 0
        try:
            head, body = open_parcel(bytes(message.payload))
        except (LichenError, TypeError) as error:
            return _message(refusal("failed", LichenError(str(error), where="site")))
        if head.get("op") == "end" and head.get("instance", self._instance) == self._instance:
            os._exit(ENDED.get(str(head.get("why")), 1))
        if not self._joined or head.get("instance", self._instance) != self._instance:
            return _message({"cause": "other"})
        if head.get("op") == "who":
            return _message({"instance": self._instance, "versions": self._versions})
        self._pool.submit(self._reply, message.get_header(MessageHeaderKey.REQ_ID), head, body)
        return None

    def _reply(self, request: str, head: Head, body: Bytes) -> None:
        self._cell.send_reply(self._ask(head, body), SERVER, [request], optional=True)

    def _ask(self, head: Head, body: Bytes) -> Any:
        try:
            within = max(0.1, float(head["within"]))
            return _message(*call(self._door, {"op": "ask", "kind": head["kind"]}, body, within=within))
        except TimeoutError:
            return _message(refusal("silent", LichenError("did not answer in time", where="site")))
        except OSError:
            return _message(refusal("gone", LichenError("its own process is not there", where="site")))
        except LichenError as error:
            return _message(refusal("failed", error))
        except Exception as error:  # never its words: they may be somebody's rows
            return _message(refusal("failed", LichenError(f"met a fault: {type(error).__name__}", where="site")))
