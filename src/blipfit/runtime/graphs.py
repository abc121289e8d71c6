"""CUDA graphs: the kernels of a function are recorded once for each shape of its inputs and replayed.

A step of one experiment launches thousands of small kernels, and the host takes longer to launch them than the GPU to
run them. A replay is one launch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

WARM_UP = 2
"""Runs before a capture, so that libraries and the compiler have chosen and allocated what they need."""


@dataclass(frozen=True, slots=True)
class _Capture:
    graph: Any
    inputs: tuple[Tensor, ...]
    output: Tensor


class CapturedFunction:
    """A function of CUDA tensors that returns a tensor, captured for every combination of input shapes.

    `state`: tensors that the function changes in place (gradients that it adds to). A capture leaves them as they were;
    a replay changes them as the function does. The function must not read values on the host. Random numbers follow
    torch's generator, so a seed gives the same noise as without capture.
    """

    def __init__(self, function: Callable[..., Tensor], state: Sequence[Tensor]):
        self._function, self._state = function, list(state)
        self._captures: dict[tuple[Any, ...], _Capture] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The function's output for these inputs; a copy, which later calls leave alone."""
        key = tuple((tensor.shape, tensor.dtype) for tensor in inputs)
        if key not in self._captures:
            self._captures[key] = self._capture(inputs)
        capture = self._captures[key]
        for static, tensor in zip(capture.inputs, inputs, strict=True):
            static.copy_(tensor, non_blocking=True)
        capture.graph.replay()
        return capture.output.clone()

    def _capture(self, inputs: Sequence[Tensor]) -> _Capture:
        static = tuple(tensor.clone() for tensor in inputs)
        before = [tensor.clone() for tensor in self._state]
        seed = torch.initial_seed()
        side_stream = torch.cuda.Stream()
        side_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side_stream):
            for _ in range(WARM_UP):
                self._function(*static)
        torch.cuda.current_stream().wait_stream(side_stream)
        graph = torch.cuda.CUDAGraph()
        # Threads that read the next batch go on meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = self._function(*static)
        for tensor, value in zip(self._state, before, strict=True):
            tensor.copy_(value)
        torch.manual_seed(seed)
        return _Capture(graph, static, output)
