"""The layers of a frozen model distributed over all processes (FSDP), for a model that does not fit into one GPU.

Every process holds its share of each layer's weights. A layer is gathered for its forward and its backward pass and
freed after each, so all processes must run the same layers in the same order.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from blipfit.runtime import distributed


def create_mesh(device: torch.device) -> Any:
    """The mesh of all processes, for `shard_layers`; all of them must call this together."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device.type, (distributed.state().num_processes,))


def shard_layers(layers: Sequence[nn.Module], mesh: Any) -> None:
    """Move each layer to its device and keep this process's share of its weights, one layer after the other.

    The device then never holds more than the shares and one whole layer. Needs no other process.
    """
    from torch.distributed.fsdp import fully_shard

    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)


def local_tensor(tensor: Tensor) -> Tensor:
    """This process's share of a sharded tensor; any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
