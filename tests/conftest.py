"""Shared by the tests: no network, a cache of their own, and one way to check a refusal."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # files run beside each other, in kernels too

import shutil
import tempfile
from contextlib import contextmanager, suppress
from importlib.util import find_spec

import psutil
import pytest
import torch
from torch.nn.parameter import is_lazy

from lora_course import claims
from lora_course.real_models import MINILM, SMOLLM2
from lora_lib.pretrained import load_pretrained

torch.set_num_threads(1)  # more of them crawl as soon as anything else runs on the machine

# Set here, not in a fixture: nbval's kernels and programs that a test starts inherit it.
CACHE = None
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers share that of the process that started them
    CACHE = tempfile.TemporaryDirectory(prefix="lora_lib_tests_")
    os.environ["LORA_LIB_CACHE"] = CACHE.name


def pytest_unconfigure():
    if CACHE:
        CACHE.cleanup()


MODELS = {"search_your_code": MINILM, "a_language_model": SMOLLM2}  # pages that want one


class Pages:
    """Puts the notebooks first, the longest files, so that no worker is left with one at the end.
    Skips pages whose public model is missing, but not on CI, where the tests of the models fail;
    and notes the CPU time of a notebook's kernel: on a busy machine the clock says little."""

    @staticmethod
    def pytest_collection_modifyitems(items):
        items.sort(key=lambda item: item.path.suffix == ".py")
        for item in items:
            model = MODELS.get(item.path.stem)
            if model and find_spec(model.package) is None and not os.environ.get("CI"):
                reason = f"{model.package} is missing: make real-models"
                item.add_marker(pytest.mark.skip(reason=reason))

    @staticmethod
    def pytest_runtest_makereport(item, call):
        kernel = getattr(item.parent, "kernel", None)
        if kernel is not None and call.when == "call":
            with suppress(psutil.NoSuchProcess):  # a kernel that died is reported by nbval
                cpu = psutil.Process(kernel.km.provisioner.pid).cpu_times()
                item.user_properties.append(("cpu", cpu.user + cpu.system))


def pytest_configure(config):
    config.pluginmanager.register(Pages())  # a hook of this folder sees no notebook
    config.option.loadscopereorder = False  # xdist would begin with files of many tests


def pytest_terminal_summary(terminalreporter):
    """How long each notebook took: the CPU time of its kernel."""
    cpu = {
        report.nodeid.split("::")[0]: dict(report.user_properties)["cpu"]  # the last cell's
        for report in terminalreporter.getreports("passed")
        if "cpu" in dict(report.user_properties)
    }
    for file, seconds in sorted(cpu.items()):
        terminalreporter.line(f"{seconds:7.1f} s of CPU time: {file}")


@pytest.fixture(scope="session")
def browser():
    """The system's Chromium, headless, driven by Playwright."""
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip(f"no Chromium is installed: none of {', '.join(names)} is on the PATH")
    from playwright.sync_api import sync_playwright

    as_root = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program, args=as_root)
        yield chromium
        chromium.close()


@pytest.fixture(autouse=True)
def one_line(monkeypatch):
    """Messages are compared as sentences, not as the lines they are broken into."""
    monkeypatch.setattr(claims, "LINE", 10**6)


@pytest.fixture
def base():
    """The shipped base, fresh."""
    return load_pretrained()[0]


@pytest.fixture(scope="session")
def tokenizer():
    return load_pretrained()[1]


@pytest.fixture
def ids():
    """Four sequences for `tiny_models.small`."""
    return torch.randint(20, (4, 8), generator=torch.Generator().manual_seed(0))


def _state(model):
    return {
        "modules": [(path, type(m), m.training) for path, m in model.named_modules()],
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "config": vars(model).get("_lora_injection"),
    }, {
        name: t.clone()
        for name, t in model.state_dict().items()
        if isinstance(t, torch.Tensor) and not (is_lazy(t) or t.is_meta)
    }


@pytest.fixture
def refuses():
    """`with refuses(model, ValueError, "this.*that"):` an error in which this pattern is found,
    and the model is afterwards as before."""

    @contextmanager
    def check(model, error, words):
        facts, tensors = _state(model)
        with pytest.raises(error, match=words):
            yield
        facts_after, tensors_after = _state(model)
        assert facts_after == facts and tensors_after.keys() == tensors.keys()
        assert all(torch.equal(tensors_after[name], tensors[name]) for name in tensors)

    return check
