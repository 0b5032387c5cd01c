"""An image's attack is the same wherever it runs: alone, in a batch, or in another process."""

import torch
from torch import nn

from backpass.attacks import PGD
from support.processes import in_processes

ATTACK = PGD(eps=0.1, step=0.02, steps=5, restarts=2, seed=3)


def network_and_images():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)).double()
    return model, torch.rand(24, 1, 8, 8, dtype=torch.float64), torch.randint(10, (24,))


def attack_share(rank: int) -> list[float]:
    model, x, y = network_and_images()
    mine = torch.arange(rank * 12, rank * 12 + 12)
    return ATTACK(model, x[mine], y[mine], indices=mine).x_adv.flatten().tolist()


def test_two_processes_find_the_same_images_as_one_to_the_bit():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole = ATTACK(*network_and_images()).x_adv
    finally:
        torch.set_num_threads(threads)
    shares = [torch.tensor(share, dtype=torch.float64).view(12, 1, 8, 8) for share in in_processes(2, attack_share)]
    assert torch.equal(torch.cat(shares), whole)
