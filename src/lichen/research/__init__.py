"""Methods that no recipe and no public name reaches yet; nothing in the house imports them.

They are tested and described in ``docs/methods.md`` like all others, and are used from Python by their own modules.
"""
