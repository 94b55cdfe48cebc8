"""How much memory of this machine, or of the container that odcft runs in, is free."""

from contextlib import suppress
from pathlib import Path

# Where Linux says how much memory a container may use and uses; and what of that it would give back, in memory.stat
_LIMITS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def free_host_memory() -> int | None:
    """Bytes that are free, files that the system merely keeps in memory included; None where it does not say."""
    found = []
    with suppress(OSError, ValueError, KeyError):
        found.append(_numbers("/proc/meminfo")["MemAvailable:"] * 1024)
    for folder, limit, used, kept in _LIMITS:
        with suppress(OSError, ValueError, KeyError):  # no container, or one without a limit
            most, now = (int(Path(folder, name).read_text()) for name in (limit, used))
            found.append(max(0, most - now + _numbers(f"{folder}/memory.stat")[kept]))
    return min(found, default=None)


def _numbers(path: str) -> dict[str, int]:
    """The first number of each line, by what stands before it."""
    lines = (line.split() for line in Path(path).read_text().splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) > 1}
