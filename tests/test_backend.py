"""What both back ends make of memory that is too short."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest
import torch

from fedsim.backend import memory_told
from fedsim.errors import ClientError, DeviceMemoryError
from fedsim.simulator import guarded

CPU = "[enforce fail at alloc.cpp:128] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes. 12"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"), "CUDA out of memory"),
        (RuntimeError(CPU), "can't allocate memory: you tried to allocate 9 bytes"),
        (MemoryError(), "out of memory"),
        (MemoryError("Unable to allocate 9 GiB for an array"), "Unable to allocate 9 GiB for an array"),
    ],
)
@pytest.mark.parametrize("own_code", [True, False])
def test_a_block_too_large_for_the_memory_is_no_mistake_of_the_users(error, told, own_code):
    def work():
        raise error

    with pytest.raises(DeviceMemoryError) as caught, memory_told((3, 5)):
        guarded("train", 0, (3, 5), work) if own_code else work()
    assert str(caught.value) == f"2 clients in a block: {told}"


def test_any_other_error_is_told_as_it_is():
    with pytest.raises(RuntimeError, match="shapes differ"), memory_told((3,)):
        raise RuntimeError("shapes differ")
    with pytest.raises(ClientError, match="shapes differ"), memory_told((3,)):
        guarded("train", 0, (3,), lambda: (_ for _ in ()).throw(RuntimeError("shapes differ")))


def test_torchs_allocator_still_says_so():
    with pytest.raises(DeviceMemoryError, match="can't allocate memory"), memory_told((3,)):
        torch.empty(1 << 60, dtype=torch.uint8)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
@pytest.mark.parametrize("kept", [True, False])
def test_what_was_freed_is_taken_again_without_new_pages(kept):
    code = f"""
import resource, torch
from fedsim.backend import keep_freed_memory
if {kept}:
    keep_freed_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
seen = []
for _ in range(13):
    torch.ones(48 << 18)  # 48 MiB of float32: more than what glibc keeps by itself
    seen.append(faults())
print(seen[-1] - seen[2])  # the first take memory for the first time
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    pages = 10 * (48 << 20) // resource.getpagesize()
    assert int(told) < pages / 100 if kept else int(told) > pages / 100
