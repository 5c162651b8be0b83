"""The allocator is set once for a program of its own, and never against its user."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from lichen.allocator import keep_large_buffers

GLIBC = platform.libc_ver()[0] == "glibc"
FAULTS = """
import ctypes, resource, sys
from lichen.allocator import keep_large_buffers
done = sys.argv[1] == "on" and keep_large_buffers({})
c = ctypes.CDLL(None)
c.malloc.restype, c.malloc.argtypes, c.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
size, before = 64 << 20, 0  # more than glibc keeps by itself
for turn in range(5):
    block = c.malloc(size)
    ctypes.memset(block, 1, size)
    c.free(block)
    before = before or resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, done)
"""


@pytest.mark.skipif(not GLIBC, reason="another C library")
def test_a_large_buffer_is_handed_out_again() -> None:
    def faults(how: str) -> tuple[int, bool]:
        ran = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True)
        count, done = ran.stdout.split()
        return int(count), done == "True"

    mapped, kept = faults("off"), faults("on")
    assert (mapped[1], kept[1]) == (False, True)
    assert mapped[0] > 100 + 10 * kept[0]


@pytest.mark.parametrize("name", ["MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_what_the_user_set_stays(name: str) -> None:
    assert not keep_large_buffers({name: "1"})


def test_no_other_library_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not keep_large_buffers({})


BACK = """
import ctypes, resource, sys
from lichen.allocator import give_back, keep_large_buffers
def held():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() >> 20
keep_large_buffers({})
c = ctypes.CDLL(None)
c.malloc.restype, c.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
ctypes.memset(block := c.malloc(200 << 20), 1, 200 << 20)
small = c.malloc(100)  # above the block, which therefore is no end of the heap
c.free(block)
before = held()
print(give_back(), before - held())
"""


@pytest.mark.skipif(not GLIBC, reason="another C library")
def test_what_was_kept_is_given_back_when_asked() -> None:
    ran = subprocess.run([sys.executable, "-c", BACK], capture_output=True, text=True, check=True)
    done, fell = ran.stdout.split()
    assert done == "True"
    assert int(fell) > 150
