"""Measuring on one thread leaves the number of threads as it was."""

import pytest
import torch

from backpass.experiments.experiment import Context
from backpass.experiments.long_run import LongRun, run_long
from backpass.experiments.optimal_rate import Quadratic, compare_schedules
from backpass.experiments.robustness import Paired, run_paths
from backpass.experiments.weak_orders import Orders, weak_errors
from backpass.lab.threads import one_thread


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_one_inside_and_as_many_as_before_afterwards(threads):
    with pytest.raises(ZeroDivisionError), one_thread():
        assert torch.get_num_threads() == 1
        raise ZeroDivisionError
    assert torch.get_num_threads() == 3


def test_the_studies_of_the_sde_leave_it(threads):
    weak_errors(Orders(t=0.04, halvings=1), 0, Context())
    compare_schedules(Quadratic(t=1.0))
    run_long(LongRun(dimension=1, paths=8, relaxations=2.0, eta=0.1), 0, Context())
    run_paths(Paired(paths=2, t=0.3, records=3), 0, Context())
    assert torch.get_num_threads() == 3
