"""How threads of OpenMP wait, in processes of their own: each asks for it once, when it starts."""

import os
import subprocess
import sys

import pytest

from qat.waiting import THREAD, VARIABLES
from tests.quick import slow_but

ASKED = "import os; print(os.environ.get('OMP_WAIT_POLICY'), [t.name for t in threading.enumerate()][1:])"


def printed(code: str, **variables: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    environment |= {"OMP_NUM_THREADS": "2"} | variables
    command = [sys.executable, "-c", f"import threading\n{code}"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return done.stdout.strip()


def test_before_pytorch_the_environment_says_it_and_no_thread_is_made() -> None:
    assert printed(f"import qat, torch; {ASKED}") == "passive []"


def test_after_pytorch_a_second_pool_is_held() -> None:
    assert printed(f"import torch, qat; {ASKED}") == f"passive ['{THREAD}']"


@pytest.mark.parametrize("name", slow_but({"OMP_WAIT_POLICY"}, sorted(VARIABLES)))
def test_what_the_user_has_said_stays(name: str) -> None:
    said = {name: "active" if name == "OMP_WAIT_POLICY" else "5"}
    assert printed(f"import torch, qat; {ASKED}", **said) == f"{said.get('OMP_WAIT_POLICY')} []"


ONE_CORE = """
import os, time, torch
{imports}
os.sched_setaffinity(0, {{min(os.sched_getaffinity(0))}})  # after OpenMP has counted them: as if others were busy
x = torch.ones(1 << 17)
began = time.process_time()
for region in range(100):
    x.neg_()
print((time.process_time() - began) / 100)
"""


@pytest.mark.skipif(
    len(getattr(os, "sched_getaffinity", lambda pid: [])(0)) < 2, reason="needs Linux and two cores, one to take away"
)
def test_a_thread_without_a_core_costs_no_time_of_the_other() -> None:
    """It is milliseconds of processor time where threads spin until the scheduler takes their core away."""
    awake = float(printed(ONE_CORE.format(imports="")))
    asleep = float(printed(ONE_CORE.format(imports="import qat")))
    assert asleep < max(awake / 10, 1e-3)
