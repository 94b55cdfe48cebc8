"""Measure how long it takes to find many images, the first time and again, and what their names cost loader processes.

    python benchmarks/image_index.py [--images 1000000] [--folder /dev/shm] [--names 10000000] [--workers 8] [--json]

Writes that many small files into a folder that it makes in --folder, and removes it again. Memory is what
/proc/PID/smaps_rollup calls Pss: each page is shared out among the processes that map it. `names_bytes_one` is what the
names add to one loader process, `names_bytes_all` what they add to all of them together: the difference to a set of
1,000 images after each loader has asked for a share of the names. `with_main` counts the training process as well.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from odcft.data.images import Images
from odcft.data.names import Names
from odcft.data.sources import find_images

FEW = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_000_000, help="files to write")
    parser.add_argument("--names", type=int, default=10_000_000, help="names to make in memory")
    parser.add_argument("--workers", type=int, default=8, help="loader processes")
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"), help="where to write, best a tmpfs")
    parser.add_argument("--json", action="store_true", help="no effect: the output is always JSON")
    args = parser.parse_args()
    free = shutil.disk_usage(args.folder).free
    if free < args.images * 5000 + (1 << 30):
        sys.exit(f"{args.folder} has only {free:,} bytes free. Choose another --folder, or fewer --images.")
    top = Path(tempfile.mkdtemp(prefix="odcft-index-", dir=args.folder))
    os.environ["ODCFT_CACHE"] = str(top / "cache")
    try:
        print(json.dumps(measure(top, args.images, args.names, args.workers), indent=2))
    finally:
        shutil.rmtree(top)


def measure(top: Path, images: int, names: int, workers: int) -> dict[str, float]:
    """Times in seconds, memory in bytes."""
    write_files(top / "many", images)
    write_files(top / "few", FEW)
    time.sleep(2.5)  # an index of what changed in the last two seconds is not trusted
    result: dict[str, float] = {"images": images, "workers": workers}
    for name in ("first_index_s", "reload_s"):
        began = time.monotonic()
        found = find_images(top / "many")
        result[name] = round(time.monotonic() - began, 3)
        assert len(found) == images
    few = find_images(top / "few")
    result |= memory_of_names(found, few, workers)
    del found
    made = Images(top, top, Names(f"folder-{i // 1000:05d}/image-{i:08d}.jpg" for i in range(names)))
    result |= {f"in_memory_{name}": value for name, value in memory_of_names(made, few, workers).items()}
    return {**result, "in_memory_names": names}


def write_files(folder: Path, count: int) -> None:
    """Empty files, a thousand in each folder."""

    def write(start: int) -> None:
        inner = folder / f"folder-{start // 1000:05d}"
        inner.mkdir(parents=True)
        for i in range(start, min(start + 1000, count)):
            os.close(os.open(inner / f"image-{i:08d}.jpg", os.O_CREAT | os.O_WRONLY, 0o644))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(0, count, 1000)))


def memory_of_names(many: Images, few: Images, workers: int) -> dict[str, float]:
    """What the names of a set add to one loader process, and to several together."""
    sums = {}
    for count in (1, workers):
        loaders, main = (np.array(pss(many, count)) - pss(few, count)).tolist()
        sums[count] = (loaders, loaders + main)
    return {
        "names_bytes_one": sums[1][0],
        "names_bytes_all": sums[workers][0],
        "ratio": round(sums[workers][0] / sums[1][0], 3),
        "with_main_bytes_one": sums[1][1],
        "with_main_bytes_all": sums[workers][1],
        "with_main_ratio": round(sums[workers][1] / sums[1][1], 3),
    }


def pss(images: Images, workers: int) -> tuple[int, int]:
    """Bytes of all loader processes together, and of this process, once each loader has read its share of the names.

    A random order means that every loader soon has touched every page, so each asks for one name in each 4 KB.
    """
    context = multiprocessing.get_context("fork")
    ready, done = context.Semaphore(0), context.Event()

    def load() -> None:
        for row in range(0, len(images), 64):
            images.path(row)
        ready.release()
        done.wait()

    processes = [context.Process(target=load) for _ in range(workers)]
    for process in processes:
        process.start()
    for _ in processes:
        ready.acquire()
    found = sum(pss_of(process.pid) for process in processes), pss_of(os.getpid())
    done.set()
    for process in processes:
        process.join()
    return found


def pss_of(pid: int | None) -> int:
    """The proportional set size of a process, in bytes: shared memory, and files of the cache.

    Names are in nothing else, and the share of all other memory changes with what the machine does beside this.
    """
    total, counted = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        name, _, value = line.partition(" ")
        if not name.endswith(":"):  # the head of a mapping: addresses, …, file
            counted = "/dev/zero" in line or os.environ["ODCFT_CACHE"] in line
        elif name == "Pss:" and counted:
            total += int(value.split()[0]) << 10
    return total


if __name__ == "__main__":
    main()
