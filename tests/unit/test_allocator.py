"""What torch frees stays with the process, where the allocator can be told so."""

import platform
import resource

import torch

from backpass.allocator import keep_freed_memory


def page_faults(run):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    run()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_freed_memory_is_used_again_without_the_kernel():
    def step():
        for _ in range(20):
            torch.ones(2**20)  # 4 MiB: 1,024 pages each

    if platform.libc_ver()[0] != "glibc":
        assert not keep_freed_memory()
        return
    assert keep_freed_memory()
    step()
    assert page_faults(step) < 1024


def test_another_system_is_left_alone(monkeypatch):
    monkeypatch.setattr("sys.platform", "darwin")
    assert not keep_freed_memory()
