"""The site of :mod:`support.counting_site` over a network: ``python network_site.py FOLDER KIT``.

NVFlare's process comes up while torch is imported; what is asked before waits for it.
"""

from __future__ import annotations

import sys
from concurrent.futures import Future
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from lichen.federation.transports.choose import open_site

if __name__ == "__main__":
    folder, kit = map(Path, sys.argv[1:])
    made = Future()  # type: ignore[var-annotated]
    with open_site(kit, lambda kind, body: made.result().answer(kind, body), say=lambda line: print(line, flush=True)):
        from support.counting_site import Site

        site = Site(folder)
        made.set_result(site)
        site.work()
