"""What listens while ranks run: as docs/slurm.md says, the rendezvous store on all addresses, gloo on its interface, and nothing else."""

import psutil
import pytest
import torch
import torch.distributed as dist

from parallel.testing import run_ranks
from parallel.world import Place, joined, meet


def listening() -> set[str]:
    """Addresses of this process."""
    return {one.laddr.ip for one in psutil.Process().net_connections("inet") if one.status == psutil.CONN_LISTEN}


def talk_and_look(place: Place) -> set[str]:
    with joined(place, "gloo", meet(place)):
        dist.all_reduce(torch.ones(1))
        found = listening()
        dist.barrier()
    return found


def test_ranks_listen_on_their_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert run_ranks(2, talk_and_look) == [{"127.0.0.1"}, {"127.0.0.1"}]


def test_the_store_listens_everywhere() -> None:
    """Whatever address it is given: only the network can keep strangers from it."""
    before = listening()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    assert listening() - before <= {"::", "0.0.0.0"} and store.port
