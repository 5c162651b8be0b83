"""The contracts: read :mod:`client`, :mod:`server` and :mod:`engine` first, then :mod:`lichen.core.rounds`.

The client is a fold over batches. The server is a fold over messages. A Message is all that crosses
between them. Alone is a cohort of one: the same client work runs C clients side by side over one
frozen model in simulation, and one client on its own machine, with the same numbers.
"""
