"""One thread per test process, and fresh random inputs whose seed a failure prints."""

import os
import random

import pytest
from hypothesis import settings

settings.register_profile("jevons", deadline=None)  # shared, noisy machines: no test is timed
settings.register_profile("long", deadline=None, max_examples=3000)  # HYPOTHESIS_PROFILE=long looks for rare failures
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "jevons"))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch loads: see jevons/cli.py
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def fresh_seed(request):
    """Another seed every time; `JEVONS_TEST_SEED=n pytest ...` repeats one."""
    seed = int(os.environ.get("JEVONS_TEST_SEED") or random.SystemRandom().randrange(2**31))
    random.seed(seed)
    import torch

    torch.manual_seed(seed)
    request.node.user_properties.append(("seed", seed))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    report = outcome.get_result()
    seed = dict(item.user_properties).get("seed")
    if report.when == "call" and report.failed and seed is not None:
        report.sections.append(("seed", f"JEVONS_TEST_SEED={seed} repeats this test's inputs"))
