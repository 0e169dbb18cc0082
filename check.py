"""Is everything here that the course needs? One line for each finding, and what to do.

    make check                without make: python check.py; in a notebook: %run ../check.py

A line begins with ok, note (odd, and the course runs) or problem; with a problem the exit status
is 1. Nothing may keep this file from saying what is missing: it uses the standard library until
the rest is known to be there, and the grammar of Python 3.8.
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections import namedtuple
from pathlib import Path

ROOT = Path(__file__).resolve().parent
IN_A_KERNEL = "ipykernel" in sys.modules  # run by a notebook
OLDEST, NEWEST_TRIED = (3, 11), (3, 13)
SET_UP = "run `make lab` (without make: the README, section Start)"
MEND = "run `make -B lab` (without make: pip install -r requirements.txt -e .)"
GIGABYTE = 1e9
MEMORY = 1.2  # gigabytes; what a kernel takes at most, with the large build of torch
DISK, DISK_SMALL, DISK_LARGE = 0.2, 2, 8  # once set up; to set up with the small torch, the large
PYTHON_OF_VENV = (os.path.join("bin", "python"), os.path.join("Scripts", "python.exe"))
PORT = 8888  # JupyterLab's

Finding = namedtuple("Finding", "level text")


def ok(text):
    return Finding("ok", text)


def note(text):
    return Finding("note", text)


def problem(text):
    return Finding("problem", text)


# --- before the set-up ---------------------------------------------------------------------------


def python():
    version = "{}.{}.{}".format(*sys.version_info)
    if sys.version_info < OLDEST:
        return problem(
            f"Python 3.11 or newer is needed, and this is {version}: "
            "make lab PYTHON=/path/to/python3.11"
        )
    if sys.version_info[:2] > NEWEST_TRIED:
        return note(f"Python {version}: newer than any the course was tried with (3.11 to 3.13)")
    return ok(f"Python {version}")


def disk():
    free = shutil.disk_usage(str(ROOT)).free / GIGABYTE
    text = f"disk: {free:.1f} GB free"
    needed = DISK if set_up() else DISK_SMALL
    if free < needed:
        return problem(f"{text}, {needed} GB or more are needed: make room, or move the course")
    if not set_up() and free < DISK_LARGE and sys.platform == "linux":
        return note(f"{text}: enough for the small torch only, see the README's section Start")
    return ok(text)


def room_to_unpack():
    """pip unpacks in the folder for temporary files, which may be small."""
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free / GIGABYTE
    if not set_up() and free < DISK_SMALL:
        return note(
            f"{folder}, where pip unpacks: {free:.1f} GB free, which may be too little: "
            "TMPDIR=/path/to/a/larger/folder make lab"
        )
    return ok(f"folder for temporary files: {folder}")


def course_folder():
    for folder in (ROOT, ROOT / "notebooks"):
        error = why_not_writable(folder)
        if error:
            return problem(
                f"{folder} cannot be written to ({error}), so nothing you do is saved: copy the "
                "course's folder to one of your own, and start it there"
            )
    return ok("the course's folder can be written to")


def set_up():
    return (ROOT / ".venv" / "installed").exists()


def why_not_writable(folder):
    """None, or the reason of the system; a folder that is not there yet will have to be made."""
    try:
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        with tempfile.TemporaryFile(dir=str(folder)):
            return None
    except OSError as error:
        return error.strerror


# --- the environment -----------------------------------------------------------------------------


def environment():
    inside = Path(sys.prefix).resolve() == (ROOT / ".venv").resolve()
    library = library_of_a_kernel()
    if library is None and IN_A_KERNEL:
        return problem(
            f"this notebook's kernel is {sys.executable}, which has no lora_lib: in the menu, "
            "Kernel, Change Kernel, Python 3 (ipykernel); start JupyterLab by `make lab`"
        )
    if library is None and inside:
        return problem(f"the set-up of .venv was not finished: {MEND}")
    if library is None and any((ROOT / ".venv" / name).exists() for name in PYTHON_OF_VENV):
        return problem(
            f"this is {sys.executable}, not the Python of the course's environment .venv: use "
            "`make check`, or activate .venv first"
        )
    if library is None and (ROOT / ".venv").exists():
        return problem(
            "the Python that the environment .venv was made with is gone: remove the folder .venv "
            f"and {SET_UP}"
        )
    if library is None:
        return problem(f"the course is not set up yet: {SET_UP}")
    if library.parent.parent != ROOT:
        return note(f"lora_lib comes from {library.parent}, not from this folder")
    if not inside:
        return note(f"{sys.executable}, not the course's .venv: fine, if all below is ok")
    return ok("environment .venv")


def library_of_a_kernel():
    """Where a notebook finds lora_lib; a notebook does not start in the course's folder."""
    search = "import importlib.util as u; s = u.find_spec('lora_lib'); print(s.origin if s else '')"
    found = subprocess.run(
        [sys.executable, "-c", search], cwd=str(ROOT / "notebooks"), stdout=subprocess.PIPE
    ).stdout.decode()
    return Path(found.strip()).resolve() if found.strip() else None


def requirements():
    """(name, operator, version) of every line of requirements.txt."""
    import re

    for line in (ROOT / "requirements.txt").read_text("utf-8").splitlines():
        found = re.match(r"([\w-]+)(>=|==)([\d.]+)", line)
        if found:
            yield found.groups()


def pinned_requirement():
    [pinned] = [(name, version) for name, operator, version in requirements() if operator == "=="]
    return pinned


def installed(package):
    """The version, or None."""
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def older(version, than):
    import re

    def numbers(text):
        return [int(n) for n in re.findall(r"\d+", text.split("+")[0])[:3]]

    return numbers(version) < numbers(than)


def packages():
    wanted = list(requirements())
    versions = {name: installed(name) for name, _, _ in wanted}
    missing = [name for name, version in versions.items() if version is None]
    if missing:
        return problem(f"not installed: {', '.join(missing)}; {MEND}")
    old = [
        f"{name} {versions[name]} ({least} or newer is needed)"
        for name, operator, least in wanted
        if operator == ">=" and older(versions[name], least)
    ]
    if old:
        return problem(f"too old: {', '.join(old)}; {MEND}")
    return ok(f"packages: all {len(wanted)} of requirements.txt, JupyterLab among them")


def data_package():
    from importlib import metadata

    name, pinned = pinned_requirement()
    found = metadata.version(name)
    if found != pinned:
        return problem(
            f"{name} {found} is installed, and the course needs {pinned}: which towns are tested "
            f"on depends on it; {MEND}"
        )
    return ok(f"data package: {name} {found}, with which the splits were made")


# --- the machine ---------------------------------------------------------------------------------


def memory():
    import psutil  # ipykernel brings it

    free = psutil.virtual_memory().available / GIGABYTE
    limit = container_memory()
    text = f"memory: {free if limit is None else min(free, limit):.1f} GB free"
    if limit is not None and limit < free:
        text += " of what this container may use"
    if min(free, limit or free) < MEMORY:
        return problem(
            f"{text}, and a notebook may take {MEMORY} GB: close other programs, or in "
            "JupyterLab other notebooks (Kernel, Shut Down All Kernels)"
        )
    return ok(text)


def container_memory(folder=Path("/sys/fs/cgroup")):
    """Gigabytes left under a limit of a Linux control group, version 2 or 1; None without one."""
    for limit, used in (
        (folder / "memory.max", folder / "memory.current"),
        (folder / "memory" / "memory.limit_in_bytes", folder / "memory" / "memory.usage_in_bytes"),
    ):
        try:
            return (int(limit.read_text()) - int(used.read_text())) / GIGABYTE
        except (OSError, ValueError):  # no such file; or "max", no limit
            continue
    return None


def cores():
    number = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if number < 2:
        return note("one processor core: notebooks take about twice as long as the README says")
    return ok(f"{number} processor cores")


def user():
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        return note("you are root: JupyterLab then starts only with --allow-root; `make lab` does")
    return ok("not root")


def port():
    if IN_A_KERNEL:
        return ok(f"port {PORT}: not looked at, JupyterLab is running")
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", PORT))
        except OSError as error:
            return note(
                f"port {PORT} is taken ({error.strerror}), by a JupyterLab that still runs "
                "perhaps: a new one takes the next port and prints its address"
            )
    return ok(f"port {PORT} is free")


def jupyter_folder():
    from jupyter_core.paths import jupyter_runtime_dir

    folder = Path(jupyter_runtime_dir())
    error = why_not_writable(folder)
    if error:
        return problem(
            f"JupyterLab cannot start, because {folder} cannot be written to ({error}): "
            "HOME=/path/to/a/folder/of/yours make lab"
        )
    return ok("JupyterLab's folder can be written to")


def kernel():
    """The kernel that a notebook gets, which a kernel of the same name elsewhere may hide."""
    from jupyter_client.kernelspec import KernelSpecManager

    spec = KernelSpecManager().get_kernel_spec("python3")
    program = spec.argv[0]
    if os.path.isabs(program) and os.path.dirname(program) != os.path.dirname(sys.executable):
        return problem(
            f"notebooks start {program} instead of {sys.executable}: remove the folder "
            f"{spec.resource_dir}, which hides the right kernel"
        )
    return ok("kernel: that of this environment")


# --- torch and the library -----------------------------------------------------------------------


def torch():
    try:
        import torch
    except ModuleNotFoundError:
        raise
    except Exception as error:  # of any kind: a file is missing, a library does not fit
        return problem(
            f"torch cannot be imported ({error}): python -m pip install --force-reinstall torch"
        )
    version = torch.__version__.split("+")[0]
    cuda, hip = torch.version.cuda, getattr(torch.version, "hip", None)
    build = f"for CUDA {cuda}" if cuda else f"for ROCm {hip}" if hip else "for the CPU"
    return ok(f"torch {version} {build}, {torch.get_num_threads()} threads")


def library():
    try:
        import lora_lib
    except Exception as error:
        return problem(f"lora_lib cannot be imported ({error}): {MEND}")
    return ok(f"lora_lib, {len(lora_lib.__all__)} names")


def device():
    import torch

    from lora_lib import default_device

    chosen = default_device()
    try:
        torch.ones(2, 2, device=chosen).mm(torch.ones(2, 2, device=chosen)).sum().item()
    except Exception as error:
        return problem(
            f"the device {chosen} is there and does not work ({str(error).splitlines()[0]}): "
            "CUDA_VISIBLE_DEVICES= make lab uses the CPU"
        )
    if chosen.type == "cpu" and shutil.which("nvidia-smi"):
        return note("a driver for NVIDIA GPUs is there, and torch cannot use it: the CPU is used")
    return ok(f"device: {chosen}" + (", for which the course is made" * (chosen.type == "cpu")))


def names():
    from lora_lib import load_pairs

    try:
        pairs = load_pairs("georgian", "train")
    except Exception as error:
        return problem(
            f"the names cannot be read ({type(error).__name__}: {error}): "
            f"python -m pip install --force-reinstall {'=='.join(pinned_requirement())}"
        )
    return ok(f"names: {len(pairs):,} pairs to learn Georgian from")


def cache_folder():
    from lora_lib.names import cache_folder

    error = why_not_writable(cache_folder())
    if error:
        return note(
            f"{cache_folder()} cannot be written to ({error}): every notebook then prepares the "
            "names anew, in two seconds; LORA_LIB_CACHE=/path/to/a/folder names another one"
        )
    return ok("folder for prepared names can be written to")


def base():
    from lora_lib import count_parameters, load_pretrained

    try:
        model, _ = load_pretrained()
    except (OSError, ValueError) as error:
        return problem(f"the base: {error}")
    return ok(f"the base: {count_parameters(model):,} parameters")


def adapters():
    from lora_lib import SCRIPTS, load_adapter, load_pretrained
    from lora_lib.adapters import ADAPTERS

    for script in SCRIPTS:
        try:
            load_adapter(load_pretrained()[0], ADAPTERS / script)
        except (OSError, ValueError) as error:
            return problem(f"the adapter for {script}: {error}")
    return ok(f"adapters: all {len(SCRIPTS)}")


# --- all of them ---------------------------------------------------------------------------------

BEFORE_SET_UP = (python, course_folder, disk, room_to_unpack)
WITHOUT_LIBRARY = (
    *BEFORE_SET_UP,
    *(cores, user, port, environment, packages, data_package),
    *(memory, jupyter_folder, kernel, torch, library),
)
WITH_LIBRARY = (device, names, cache_folder, base, adapters)


def findings(checks):
    """One for each check; in a wrong environment, or without the library, no more of them."""
    for check in checks:
        try:
            finding = check()
        except ModuleNotFoundError:  # packages() says so
            continue
        except Exception as error:
            finding = problem(f"{check.__name__}: {type(error).__name__}: {error}")
        yield finding
        if finding.level == "problem" and check in (python, environment, library):
            return


def main(arguments):
    """The exit status: 1 if there is a problem."""
    before = "--before-set-up" in arguments
    problems = 0
    for finding in findings(BEFORE_SET_UP if before else WITHOUT_LIBRARY + WITH_LIBRARY):
        problems += finding.level == "problem"
        if not before or finding.level != "ok":
            print(f"{finding.level:8} {finding.text}", flush=True)
    if problems:
        print("docs/troubleshooting.md has more on each of them.")
    elif not before:
        print("Everything that the course needs is here.")
    return int(problems > 0)


if __name__ == "__main__":
    status = main(sys.argv[1:])
    if not IN_A_KERNEL:  # where it would be shown as an error
        sys.exit(status)
