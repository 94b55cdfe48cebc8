"""The program behind `odcft doctor`: what this machine has, what usually makes trouble, and the command that fixes it.

`check_machine` looks at everything. `machine_line` has only what costs a few milliseconds, for the start of a run.
"""

import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from odcft import __version__
from odcft.cache_folder import cache_folder
from odcft.data.host_memory import free_host_memory
from odcft.errors import OdcftError
from odcft.text import count_of, printable

GB, MB = 1e9, 1e6
SMALL_SHARED = 1 * GB  # of shared memory, and
SMALL_DISK = 5 * GB  # of free disk: with less than this a run of usual size gets into trouble
SMALL_MEMORY = 2 * GB
SLOW_DISK = 30 * MB  # bytes a second: saving a state of 1 GB would take half a minute
FEW_CORES = 4  # for each GPU
FEW_FILES = 1024  # open at a time: loader processes send a batch as an open file
TRIAL = 64 << 20  # bytes written to try a disk
PATIENCE = 120  # seconds for importing all libraries
SHARED_MEMORY = "/dev/shm"
MORE_SHARED = "docker run --shm-size=8g … (Kubernetes: an emptyDir with medium: Memory at /dev/shm)"
LIBRARIES = {  # what is imported to see whether it works, and what installs it
    "torchvision": "torchvision",
    "timm": "timm",
    "simplejpeg": "simplejpeg",
    "faiss": "faiss-cpu",
    "onnxruntime": "odcft[onnx]",
}
_IMPORTER = """
import importlib, json, sys
import odcft
for name in sys.argv[1:]:
    print(json.dumps([name, "crashed"]), flush=True)
    try:
        module = importlib.import_module(name)
        print(json.dumps([name, None, hasattr(module, "StandardGpuResources")]), flush=True)
    except BaseException as error:
        print(json.dumps([name, f"{type(error).__name__}: {error}"]), flush=True)
"""


@dataclass(frozen=True)
class Check:
    """What one check found: "fail" means that odcft does not work, "warn" that it may be slow or get into trouble."""

    name: str
    status: Literal["ok", "warn", "fail"]
    found: str
    fix: str | None = None  # the command, or the setting, that changes it


def check_machine(folder: str | os.PathLike[str] = ".") -> dict[str, Any]:
    """Run every check; a check that breaks is itself reported, and the others go on.

    Args:
        folder: where RUN folders will be written; it need not exist yet. A file of 64 MB without a name tries its disk.

    Returns:
        odcft, python, platform; usable (nothing failed); and checks: name, status, found and fix of each.

    Raises:
        OdcftError: it is not a folder, or has no name; or no other process can be started.
    """
    if not os.fspath(folder) or (os.path.lexists(folder) and not os.path.isdir(folder)):
        raise OdcftError(
            f"{os.fspath(folder) or repr('')} is not a folder. Name the one that RUN folders go to, or leave it out."
        )
    libraries = _import_libraries([name for name in LIBRARIES if _installed(name)])
    steps: dict[str, Callable[[], Iterator[Check]]] = {
        "packages": _check_versions,
        "torch": _check_torch,
        "libraries": lambda: _check_time(libraries),
        "torchvision": lambda: _check_torchvision(libraries),
        "GPU": _check_gpus,
        "faiss": lambda: _check_faiss(libraries),
        "images": lambda: _check_images(libraries),
        "onnx": lambda: _check_onnx(libraries),
        SHARED_MEMORY: _check_shared_memory,
        "cores": _check_cores,
        "memory": _check_memory,
        "open files": _check_open_files,
        "disk": lambda: _check_disk(Path(folder)),
        "cache": _check_cache,
    }
    checks: list[Check] = []
    for name, step in steps.items():
        try:
            checks += step()
        except Exception as error:  # a broken driver or library may raise anything
            fix = "pip install --force-reinstall torch torchvision, if it is torch's; otherwise report it, please"
            checks.append(Check(name, "warn", f"cannot be checked: {_first_line(error)}", fix))
    return {
        **{"odcft": __version__, "python": platform.python_version(), "platform": platform.platform()},
        "usable": not any(check.status == "fail" for check in checks),
        "checks": [asdict(check) for check in checks],
    }


def describe(result: dict[str, Any]) -> list[str]:
    """What `check_machine` returned, as lines for the user."""
    lines = [f"odcft {result['odcft']} · Python {result['python']} · {result['platform']}"]
    for check in result["checks"]:
        lines.append(f"{check['status']:<5} {check['name']:<14} {check['found']}")
        if check["fix"]:
            lines.append(f"{'':<20} -> {check['fix']}")
    counts = {status: sum(check["status"] == status for check in result["checks"]) for status in ("fail", "warn")}
    if counts["fail"]:
        lines.append(f"odcft cannot work here yet: fix {count_of(counts['fail'], 'problem')} marked `fail`.")
    elif counts["warn"]:
        lines.append(f"odcft works here. {count_of(counts['warn'], 'warning')}: see the lines marked `warn`.")
    else:
        lines.append("odcft works here. Nothing to fix.")
    return lines


# ---------------------------------------------------------------- one line before a run


def machine_line(recipe: Any, out: Path) -> str:
    """One line on the machine, for the start of a run: what it has, and the worst of what would get into its way.

    Args:
        recipe: of the run, for how much shared memory its batches need.
        out: the RUN folder, which need not exist.
    """
    import torch

    from odcft.distributed import dist

    gpu, cores = dist.this_device().type == "cuda", usable_cores()
    parts = [f"torch {torch.__version__}", count_of(cores, "core")]
    if gpu:
        parts.insert(0, _gpu_names())
    else:
        parts.insert(0, "no GPU")
    folder = _nearest(out)
    with suppress(OSError):
        parts.append(f"{_size(shutil.disk_usage(folder).free)} of disk free")
    worst: list[Check] = []
    for find in (
        lambda: _shared_memory_for(recipe, gpu),
        _check_cores,
        _check_open_files,
        lambda: _check_space(folder),
    ):
        with suppress(Exception):  # whatever cannot be looked at must not stop a run that may work
            worst += [check for check in find() if check.status != "ok"]
    if not worst:
        return f"Machine     {' · '.join(parts)}"
    others = f" (`odcft doctor` shows {len(worst) - 1} more)" if len(worst) > 1 else ""
    return f"Machine     {' · '.join(parts)} · {worst[0].name}: {worst[0].found}. Fix: {worst[0].fix}{others}"


def _nearest(folder: Path) -> Path:
    """A folder, or the nearest one above it that exists."""
    return next((f for f in (folder, *folder.absolute().parents) if os.path.isdir(f)), Path("/"))


def _shared_memory_for(recipe: Any, gpu: bool) -> Iterator[Check]:
    """Whether the batches that loader processes read ahead fit into shared memory."""
    workers = recipe.data.workers if isinstance(recipe.data.workers, int) else min(16, usable_cores()) * gpu
    size = recipe.data.size if isinstance(recipe.data.size, int) else 224
    needed = 4 * 3 * size**2 * recipe.optim.batch_size * workers  # each reads 4 batches ahead
    with suppress(OSError):
        free = shutil.disk_usage(SHARED_MEMORY).free
        if needed > free:
            found = f"{_size(free)} free, and batches read ahead by data workers take up to {_size(needed)}"
            yield Check(SHARED_MEMORY, "warn", found, f"{MORE_SHARED}, or fewer --set data.workers=")


def _gpu_names() -> str:
    import torch

    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return " + ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))


# ---------------------------------------------------------------- libraries


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _import_libraries(names: list[str]) -> dict[str, dict[str, Any]]:
    """Import libraries in a process of its own, where one that was built for another machine may crash.

    Returns:
        For each: error (None if it works), gpu (whether it is a faiss with GPU support), and late if time ran out.
    """
    found = {name: {"error": "was not reached, because another one crashed", "gpu": False} for name in names}
    path = os.pathsep.join(dict.fromkeys([str(Path(__file__).parent.parent), *filter(None, sys.path)]))
    command, environment = [sys.executable, "-c", _IMPORTER, *names], {**os.environ, "PYTHONPATH": path}
    try:
        output = subprocess.run(command, capture_output=True, timeout=PATIENCE, env=environment).stdout
    except subprocess.TimeoutExpired as late:
        output = late.stdout or b""
        found = {name: {"error": None, "gpu": False, "late": True} for name in names}
    except OSError as failure:
        raise OdcftError(
            f"No process can be started to try the libraries in: {failure.strerror or failure}. "
            "`ulimit -n` (open files) and `ulimit -u` (processes) say what is allowed here."
        ) from None
    for line in output.decode(errors="replace").splitlines():
        with suppress(ValueError, KeyError, TypeError):
            name, error, *gpu = json.loads(line)
            if not (error == "crashed" and found[name].get("late")):
                found[name] = {"error": error, "gpu": any(gpu)}
    return found


def _check_time(libraries: dict[str, dict[str, Any]]) -> Iterator[Check]:
    if late := [name for name, about in libraries.items() if about.get("late")]:
        found = f"{', '.join(late)} could not be tried within {PATIENCE} s: the disk or the machine is very slow"
        yield Check("libraries", "warn", found, "a virtual environment on a local disk")


def _check_versions() -> Iterator[Check]:
    """Whether what is installed has the versions that odcft asks for."""
    from packaging.requirements import Requirement

    try:
        wanted = [Requirement(line) for line in importlib.metadata.requires("odcft") or []]
    except importlib.metadata.PackageNotFoundError:
        yield Check("packages", "ok", "odcft runs from a folder and is not installed, so versions were not compared")
        return
    wanted = [one for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]
    wrong = []
    for one in wanted:
        version = _version(one.name)
        if not version or not one.specifier.contains(version, prereleases=True):
            wrong.append((one, f"{one.name} {version or 'is not installed'} (needs {one.specifier})"))
    if wrong:
        optional = all(one.name == "simplejpeg" for one, _ in wrong)  # Pillow reads JPEGs, too
        fix = f"pip install {_quoted([f'{one.name}{one.specifier}' for one, _ in wrong])}"
        yield Check("packages", "warn" if optional else "fail", ", ".join(text for _, text in wrong), fix)
    else:
        yield Check("packages", "ok", f"all {len(wanted)} required")


def _check_torch() -> Iterator[Check]:
    try:
        import torch
    except Exception as error:
        fix = "pip install --force-reinstall torch torchvision"
        yield Check("torch", "fail", f"cannot be imported: {_first_line(error)}", fix)
        return
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip or ''}"
    if not torch.version.cuda and not torch.version.hip:
        build = "CPU build"
    yield Check("torch", "ok", f"{torch.__version__}, {build}")
    from odcft.distributed import dist
    from odcft.precision import has_bfloat16

    device = dist.this_device()
    used = "used by optim.precision=auto" if device.type == "cuda" else "finetune --dry-run says where it may be faster"
    yield Check(
        "bfloat16", "ok", f"yes, {used}" if has_bfloat16(device) else f"no: this {device.type} trains in float32"
    )


def _check_torchvision(libraries: dict[str, dict[str, Any]]) -> Iterator[Check]:
    for name in ("torchvision", "timm"):
        if name not in libraries:
            continue  # `_check_versions` reports it
        version, error = _version(name), libraries[name]["error"]
        if error:
            fix = "pip install --force-reinstall torch torchvision timm"
            yield Check(name, "fail", f"{version} cannot be imported: {_first_line(error)}", fix)
            continue
        wanted = _torch_of_torchvision() if name == "torchvision" else None
        have = _version("torch").partition("+")[0]
        if wanted and wanted != have:
            found = f"{version} was built for torch {wanted}, not {have}"
            yield Check(name, "warn", found, f"pip install torch=={have} torchvision")
        else:
            yield Check(name, "ok", version)


def _torch_of_torchvision() -> str | None:
    """The version of torch that the installed torchvision was built for."""
    for line in importlib.metadata.requires("torchvision") or []:
        if found := re.match(r"torch\s*\(?==\s*([\d.]+)", line):
            return found[1]
    return None


def _check_faiss(libraries: dict[str, dict[str, Any]]) -> Iterator[Check]:
    if "faiss" not in libraries:
        yield Check("faiss", "ok", "not installed, and only kmeans.engine=faiss needs it (pip install faiss-cpu)")
        return
    name = next((one for one in ("faiss-gpu", "faiss-cpu") if _version(one)), "faiss")
    version, about = f"{name} {_version(name)}".strip(), libraries["faiss"]
    if about["error"]:
        found = f"{version} cannot be imported: {_first_line(about['error'])}"
        yield Check("faiss", "warn", found, "pip uninstall faiss-gpu faiss-cpu; pip install faiss-cpu")
    else:
        yield Check("faiss", "ok", f"{version}, {'on GPUs' if about['gpu'] else 'on the CPU'}")


def _check_images(libraries: dict[str, dict[str, Any]]) -> Iterator[Check]:
    """Which kinds of images can be read."""
    from odcft.data.image_files import ENDINGS, OPTIONAL

    if libraries.get("simplejpeg", {"error": "is not installed"})["error"]:
        why = _first_line(libraries.get("simplejpeg", {"error": "is not installed"})["error"])
        found = f"by Pillow, which is slower for training crops: simplejpeg {why}"
        yield Check("jpeg", "warn", found, "pip install --force-reinstall simplejpeg")
    else:
        yield Check("jpeg", "ok", f"libjpeg-turbo (simplejpeg {_version('simplejpeg')})")
    kinds = ["jpeg", "png", "webp", "gif", "bmp", "tiff"] + [e[1:] for e in (".heic", ".avif", ".dcm") if e in ENDINGS]
    without = {OPTIONAL[e][1]: e[1:] for e in (".heic", ".avif", ".dcm") if e not in ENDINGS}
    if not _installed("imagecodecs"):
        without["odcft[tiff]"] = "compressed scientific tiff"
    found = ", ".join(kinds) + (f"; not {', '.join(without.values())}" if without else "")
    yield Check("images", "ok", found, f"pip install {_quoted(list(without))}" if without else None)


def _check_onnx(libraries: dict[str, dict[str, Any]]) -> Iterator[Check]:
    if "onnxruntime" in libraries and libraries["onnxruntime"]["error"]:
        found = f"onnxruntime cannot be imported: {_first_line(libraries['onnxruntime']['error'])}"
        yield Check("onnx", "warn", found, 'pip install --force-reinstall "odcft[onnx]"')
    else:
        missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if not _installed(name)]
        found = "not installed, and only `export --format onnx` needs it" if missing else _version("onnx")
        yield Check("onnx", "ok", found, 'pip install "odcft[onnx]"' if missing else None)


# ---------------------------------------------------------------- GPUs


def _check_gpus() -> Iterator[Check]:
    import torch

    driver = nvidia_driver()
    if not torch.cuda.is_available():
        yield _why_no_gpu(driver)
        return
    if driver:
        yield Check("driver", "ok", f"NVIDIA {driver}")
    known = torch.cuda.get_arch_list()
    for i in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(i)
        free, total = torch.cuda.mem_get_info(i)
        found = f"{about.name}, {_size(free)} of {_size(total)} free, capability {about.major}.{about.minor}"
        numbers = [int(name[3:]) for name in known if re.fullmatch(r"sm_\d+", name)]
        if not torch.version.hip and numbers and 10 * about.major + about.minor < min(numbers):
            found += f", which is older than what this torch was built for (sm_{min(numbers)})"
            yield Check(f"GPU {i}", "fail", found, "pip install a torch for an older CUDA: pytorch.org/get-started")
        elif free < total / 2:
            yield Check(f"GPU {i}", "warn", f"{found}: another process uses it", "nvidia-smi shows which one")
        else:
            yield Check(f"GPU {i}", "ok", found)
    from odcft.distributed import dist

    if version := dist.nccl_version():
        yield Check("NCCL", "ok", version)
    elif torch.cuda.device_count() > 1:
        fix = "pip install --force-reinstall torch torchvision"
        yield Check("NCCL", "fail", "missing, so several GPUs cannot work together", fix)


def _why_no_gpu(driver: str | None) -> Check:
    """Why torch finds no GPU, if the machine seems to have one."""
    import torch

    there = driver or Path("/dev/nvidia0").exists()
    if not there:
        found = "none: training runs on the CPU. In a container, a GPU must be passed in (docker run --gpus all)"
        return Check("GPU", "ok", found)
    if not torch.version.cuda and not torch.version.hip:
        found = f"this machine has an NVIDIA driver ({driver}), but torch is a CPU build"
        return Check("GPU", "fail", found, "pip install --force-reinstall torch torchvision")
    try:
        torch.cuda.init()
        why = "torch finds no GPU"
    except Exception as error:
        why = _first_line(error)
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
        return Check("GPU", "warn", "hidden by CUDA_VISIBLE_DEVICES, so the CPU trains", "unset CUDA_VISIBLE_DEVICES")
    found = f"driver {driver or '(none)'} and torch's CUDA {torch.version.cuda} do not work together: {why}"
    return Check("GPU", "fail", found, "install a newer NVIDIA driver, or a torch for an older CUDA (pytorch.org)")


def nvidia_driver() -> str | None:
    with suppress(OSError):
        text = Path("/proc/driver/nvidia/version").read_text()
        if found := re.search(r"\s(\d+\.\d+(\.\d+)?)\s", text):
            return found[1]
    return None


# ---------------------------------------------------------------- the machine


def _check_shared_memory() -> Iterator[Check]:
    if not os.path.isdir(SHARED_MEMORY):
        yield Check(SHARED_MEMORY, "ok", f"this system ({platform.system()}) does not use it")
        return
    space = shutil.disk_usage(SHARED_MEMORY)
    found = f"{_size(space.free)} of {_size(space.total)} free"
    if not os.access(SHARED_MEMORY, os.W_OK):
        yield Check(SHARED_MEMORY, "warn", "cannot be written, so no data workers can run", MORE_SHARED)
    elif space.free < SMALL_SHARED:
        yield Check(SHARED_MEMORY, "warn", f"{found}: too little for the batches of data workers", MORE_SHARED)
    else:
        yield Check(SHARED_MEMORY, "ok", found)


def usable_cores() -> int:
    """Processor cores that this process may use; a container's quota counts, rounded up."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = core_quota()
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def core_quota() -> float | None:
    """How many cores' time the container may use (cgroup v2, then v1); None for no limit."""
    with suppress(OSError, ValueError):
        most, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if most == "max" else int(most) / int(period)
    with suppress(OSError, ValueError):
        folder = Path("/sys/fs/cgroup/cpu")
        most, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return None if int(most) <= 0 else int(most) / int(period)
    return None


def _check_cores() -> Iterator[Check]:
    import torch

    seen = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores, gpus = usable_cores(), torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = count_of(cores, "core") + (f", {cores / gpus:.1f} a GPU" if gpus else "")
    if cores < seen:
        share = max(1, cores // max(1, gpus))
        fix = f"--set data.workers={share if gpus else 0} and OMP_NUM_THREADS={share}, or a higher quota"
        yield Check("cores", "warn", f"{found}: the container may use {cores} of the {seen} it sees", fix)
    elif gpus and cores / gpus < FEW_CORES:
        fix = "--cpus-per-task (Slurm), or smaller images stored in advance (docs/data.md)"
        yield Check("cores", "warn", f"{found}: too few to read and decode images as fast as a GPU trains", fix)
    else:
        yield Check("cores", "ok", found)


def _check_memory() -> Iterator[Check]:
    free = free_host_memory()
    if free is None:
        yield Check("memory", "ok", "this system does not say how much is free")
    elif free < SMALL_MEMORY:
        yield Check("memory", "warn", f"{_size(free)} free", "a smaller --set optim.batch_size=, fewer data.workers")
    else:
        yield Check("memory", "ok", f"{_size(free)} free")


def _check_open_files() -> Iterator[Check]:
    try:
        import resource
    except ModuleNotFoundError:  # not on Windows
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < FEW_FILES:
        fix = f"ulimit -n {65536 if hard == resource.RLIM_INFINITY else min(65536, hard)}"
        if 0 <= hard < FEW_FILES:
            fix = f"a hard limit above {hard:,}: docker run --ulimit nofile=65536, or /etc/security/limits.conf"
        yield Check("open files", "warn", f"at most {soft:,}, and data workers need one for each batch", fix)
    else:
        yield Check("open files", "ok", "no limit" if soft == resource.RLIM_INFINITY else f"at most {soft:,}")


def _check_space(folder: Path) -> Iterator[Check]:
    free = shutil.disk_usage(folder).free
    if free < SMALL_DISK:
        yield Check("disk", "warn", f"{_size(free)} free in {folder}", "make room, or another --out")


def _check_disk(folder: Path) -> Iterator[Check]:
    """How much is free where RUN folders go, and how fast that disk is."""
    is_new, folder = not os.path.isdir(folder), _nearest(folder)
    found = f"{_size(shutil.disk_usage(folder).free)} free in {folder.absolute()}"
    found += ", where the folder that you named will be made" if is_new else ""
    try:
        write, read = _disk_speed(folder)
    except OSError as error:
        yield Check("disk", "warn", f"{found}, and it cannot be written: {error.strerror}", "another folder for --out")
        return
    found += f", writes {_size(write)}/s, reads {_size(read)}/s"
    if low := list(_check_space(folder)):
        yield Check("disk", "warn", found, low[0].fix)
    elif write < SLOW_DISK:
        fix = "a local disk for --out, or --set log.snapshot_minutes=30"
        yield Check("disk", "warn", f"{found}: saving a state will take long", fix)
    else:
        yield Check("disk", "ok", found)


def _disk_speed(folder: Path) -> tuple[float, float]:
    """Bytes a second that are written and read, measured with a file without a name, which nothing leaves behind."""
    block = os.urandom(1 << 20)  # what compresses would look fast on some disks
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        began = time.monotonic()
        written = 0
        while written < TRIAL and time.monotonic() - began < 2:
            written += file.write(block)
        os.fsync(file.fileno())
        write = written / max(1e-6, time.monotonic() - began)
        if hasattr(os, "posix_fadvise"):  # else it comes from memory
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        began = time.monotonic()
        while file.read(1 << 20) and time.monotonic() - began < 2:
            pass
        return write, file.tell() / max(1e-6, time.monotonic() - began)


def _check_cache() -> Iterator[Check]:
    folder = cache_folder("features")
    if folder is not None:
        yield Check("cache", "ok", str(folder.parent))
    elif (os.environ.get("ODCFT_CACHE") or "").strip().lower() in ("0", "no", "off"):
        yield Check("cache", "ok", "off (ODCFT_CACHE)")
    else:
        found = "none: its folder cannot be written, or others can write to it, so nothing found before is used again"
        yield Check("cache", "warn", found, "export ODCFT_CACHE=/a/folder/of/yours (or off)")


# ---------------------------------------------------------------- text


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _first_line(error: object) -> str:
    text = str(error) or type(error).__name__
    return printable(text.strip().splitlines()[0][:200] if text.strip() else text).rstrip(".")


def _quoted(names: list[str]) -> str:
    return " ".join(f'"{name}"' if re.search(r"[\[<>]", name) else name for name in names)


def _size(count: float) -> str:
    return f"{count / GB:,.1f} GB" if count >= GB else f"{count / MB:,.0f} MB"
