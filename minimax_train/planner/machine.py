"""GPUs that a plan may be asked about."""

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One kind of GPU and the node it is in."""

    name: str
    memory: int
    """Bytes that the driver reports."""
    source: str
    reserve: int = 5 * GIB
    """Bytes that are not for tensors: CUDA context and loaded kernels (about 0.6 GiB), NCCL's buffers for some ten communicators (2 to 3),
    cuBLAS workspaces, and what the caching allocator cannot use. Ours: to be measured on the machine."""
    per_node: int = 8
    """GPUs that NVLink joins."""

    @property
    def usable(self) -> int:
        """Bytes for tensors."""
        return self.memory - self.reserve


_80 = 81_559 * 2**20
"""nvidia-smi's 81,559 MiB of the SXM boards with 80 GB of HBM3."""

MACHINES = {
    machine.name: machine
    for machine in (
        Machine(name="h800", memory=_80, source="H800 SXM: an H100 SXM with slower NVLink (NVIDIA's data sheet: 80 GB)"),
        Machine(name="h100", memory=_80, source="H100 SXM5 data sheet: 80 GB"),
        Machine(name="a100", memory=81_920 * 2**20, source="A100 SXM4 data sheet: 80 GB; nvidia-smi says 81,920 MiB"),
        Machine(name="h200", memory=143_771 * 2**20, source="H200 SXM data sheet: 141 GB; nvidia-smi says 143,771 MiB"),
    )
}


def find_machine(name: str) -> Machine:
    """The kind of that name. ValueError names those there are."""
    if name.lower() not in MACHINES:
        raise ValueError(f"--gpu is {name!r}; use one of {', '.join(sorted(MACHINES))}")
    return MACHINES[name.lower()]
