"""The process in which llama.cpp computes: ``python -m lichen.serving.llama_child FILE SOCKET NAME CONTEXT THREADS``.

A damaged file can end the process that reads it, so it is one of its own. It answers at a socket of the file system
in a folder that nobody else may enter, says ``ready`` on standard output when the model is loaded, and ends when its
parent has gone. It writes nothing else anywhere.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence

from lichen.core.children import end_with_parent


def main(words: Sequence[str]) -> int:
    """Load the model and answer until the process is ended."""
    end_with_parent()
    file, socket, name, context, threads = words
    ready = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # llama.cpp may write prompts where it pleases
        os.dup2(nowhere, stream)
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = file
    settings.model_alias = {name}
    settings.hostnames = [socket]
    settings.n_ctx = int(context)
    settings.kv_unified = True
    settings.n_parallel = 4
    settings.cpuparams.n_threads = int(threads)
    settings.cpuparams_batch.n_threads = int(threads)
    settings.verbosity = -1
    settings.offline, settings.ui, settings.endpoint_slots, settings.endpoint_props = True, False, False, False
    settings.warmup, settings.cache_ram_mib = False, 0
    try:
        server = xllamacpp.Server(settings)
    except Exception as error:
        os.write(ready, f"{error}".encode())
        return 1
    os.write(ready, b"ready")
    os.close(ready)
    threading.Event().wait()
    del server
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
