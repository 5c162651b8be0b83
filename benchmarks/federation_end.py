"""The other ends of ``benchmarks/federation.py``, each a process: a site, a plain stream, a relay that counts.

=====================================  ===========================================================================
``site STATE KIT``                     a site whose one client has nothing to train; also echoes, short and long
``bare KIT -``                           an end of a kit, and nothing else
``stream STARTUP PORT``                takes a stream of bytes, and gives one back, over gRPC with mutual TLS
``relay PORT TO``                      passes connections on; told anything on stdin, prints the bytes so far
=====================================  ===========================================================================
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

CHUNK = 1 << 20
"""Bytes of a message of the plain stream."""

STREAM = "/plain/{}"
GRPC = [("grpc.max_receive_message_length", 2 * CHUNK)]


def site(state: Path, kit: Path) -> None:
    """Answer the server until the process is ended."""
    from lichen.federation.transports.choose import open_site

    made: Future[Any] = Future()
    with open_site(kit, lambda kind, body: made.result()(kind, body), say=lambda line: print(line, flush=True)):
        import torch

        from lichen.core.contracts.client import ClientTask
        from lichen.core.message import Job, Message
        from lichen.core.store import ClientStore
        from lichen.engines.remote.pieces import Pieces
        from lichen.engines.remote.talks import Talks
        from lichen.engines.remote.worker import SiteWorker

        class Nothing:
            """A work without batches, and its source."""

            def shape(self, client: int) -> int:
                return 0

            def batches(self, clients: Sequence[int], seed: int) -> Iterator[Any]:
                return iter(())

            def init(self, job: Job, clients: Sequence[int], own_C: Any) -> tuple[Job, Sequence[int]]:
                return job, clients

            def final(self, state: tuple[Job, Sequence[int]]) -> tuple[Message, None]:
                job, clients = state
                ids = torch.tensor(clients)
                one_C = torch.ones(len(clients), dtype=torch.float64)
                version_C = torch.full_like(ids, job.version)
                return Message(group="", client_C=ids, version_C=version_C, tensors={}, weight_C=one_C), None

        task: Any = ClientTask(work=Nothing(), source=Nothing())  # type: ignore[arg-type]
        torch.set_num_threads(1)
        long, talks = Pieces(lambda kind, body: body), Talks({"nothing": task}, ClientStore(state))
        worker = SiteWorker(lambda name: talks)
        echoes = {"echo": lambda kind, body: body, **dict.fromkeys(("long", "put", "get"), long.answer)}
        jobs = Pieces(worker.answer)
        made.set_result(lambda kind, body: echoes.get(kind, jobs.answer)(kind, body))
        worker.work()


def bare(kit: Path) -> None:
    """Run one end of either transport, without torch, until the process is ended."""
    from lichen.federation.kits.settle import open_kit
    from lichen.federation.transports.choose import open_server, open_site

    if open_kit(kit).kind == "site":
        with open_site(kit, lambda kind, body: body, say=print) as one:
            one.wait()
    with open_server(kit, say=print) as one:
        one.wait()


def stream(startup: Path, port: int) -> None:
    """Serve the plain stream until the process is ended."""
    import grpc

    def take(chunks: Iterable[bytes], context: Any) -> bytes:
        return sum(map(len, chunks)).to_bytes(8, "little")

    def give(size: bytes, context: Any) -> Iterator[bytes]:
        chunk = bytes(CHUNK)
        for _ in range(int.from_bytes(size, "little") // CHUNK):
            yield chunk

    handlers = {"take": grpc.stream_unary_rpc_method_handler(take), "give": grpc.unary_stream_rpc_method_handler(give)}
    server = grpc.server(ThreadPoolExecutor(4), options=GRPC)
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("plain", handlers)])
    key, chain, root = ((startup / name).read_bytes() for name in ("server.key", "server.crt", "rootCA.pem"))
    server.add_secure_port(f"localhost:{port}", grpc.ssl_server_credentials([(key, chain)], root, True))
    server.start()
    server.wait_for_termination()


def send_and_take(startup: Path, port: int, size: int) -> None:
    """So many bytes to the plain stream's end, and as many back, with a site's certificate."""
    import grpc

    key, chain, root = ((startup / name).read_bytes() for name in ("client.key", "client.crt", "rootCA.pem"))
    with grpc.secure_channel(f"localhost:{port}", grpc.ssl_channel_credentials(root, key, chain), options=GRPC) as line:
        chunk = bytes(CHUNK)
        up = line.stream_unary(STREAM.format("take"))(chunk for _ in range(size // CHUNK))
        down = line.unary_stream(STREAM.format("give"))(size.to_bytes(8, "little"))
        assert int.from_bytes(up, "little") == sum(map(len, down)) == size


def relay(port: int, to: int) -> None:
    """Pass bytes between ``port`` and ``to``, and count them."""
    counted = [0, 0]

    async def copy(way: int, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(1 << 16):
                counted[way] += len(data)
                sink.write(data)
                await sink.drain()
        except OSError:
            pass
        finally:
            sink.close()

    async def met(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            there, back = await asyncio.open_connection("localhost", to)
        except OSError:
            return sink.close()
        await asyncio.gather(copy(0, source, back), copy(1, there, sink))

    async def serve() -> None:
        async with await asyncio.start_server(met, "localhost", port) as server:
            await server.serve_forever()

    threading.Thread(target=asyncio.run, args=(serve(),), daemon=True).start()
    for _ in sys.stdin:
        print(*counted, flush=True)


if __name__ == "__main__":
    what, first, second = sys.argv[1:]
    if what == "site":
        site(Path(first), Path(second))
    elif what == "bare":
        bare(Path(first))
    elif what == "stream":
        stream(Path(first), int(second))
    else:
        relay(int(first), int(second))
