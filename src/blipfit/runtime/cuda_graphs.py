"""CUDA graphs: the kernels of a function are recorded once for each shape of its inputs and then replayed.

A training step of one experiment launches thousands of small kernels, and the CPU takes longer to launch them than the
GPU takes to run them. A replay is a single launch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

WARM_UP = 2
"""Number of runs before a capture, so that libraries and the compiler have selected and allocated what they need."""


@dataclass(frozen=True, slots=True)
class _Capture:
    """A recorded graph with the tensors that it reads its inputs from and writes its output to."""

    graph: Any
    inputs: tuple[Tensor, ...]
    output: Tensor


class CapturedFunction:
    """A function of CUDA tensors that returns one tensor, captured once for every combination of input shapes.

    `state`: the tensors that the function changes in place, for example gradients that it adds to. A capture leaves
    them unchanged; a replay changes them as the function does. The function must not read tensor values on the CPU.
    Random numbers follow torch's generator, so a seed gives the same noise as without capture.
    """

    def __init__(self, function: Callable[..., Tensor], state: Sequence[Tensor]):
        self._function, self._state = function, list(state)
        self._captures: dict[tuple[Any, ...], _Capture] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Compute the function's output for these inputs; the returned tensor is a copy that later calls do not change.

        Inputs of any shape and dtype; a new combination of shapes and dtypes is captured first.
        """
        key = tuple((tensor.shape, tensor.dtype) for tensor in inputs)
        if key not in self._captures:
            self._captures[key] = self._capture(inputs)
        capture = self._captures[key]
        for static_input, tensor in zip(capture.inputs, inputs, strict=True):
            static_input.copy_(tensor, non_blocking=True)
        capture.graph.replay()
        return capture.output.clone()

    def _capture(self, inputs: Sequence[Tensor]) -> _Capture:
        """Record the function's kernels for inputs of these shapes; its state and torch's seed stay unchanged."""
        static_inputs = tuple(tensor.clone() for tensor in inputs)
        state_copy = [tensor.clone() for tensor in self._state]
        seed = torch.initial_seed()
        side_stream = torch.cuda.Stream()
        side_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side_stream):
            for _ in range(WARM_UP):
                self._function(*static_inputs)
        torch.cuda.current_stream().wait_stream(side_stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads, which load the next batch, may use CUDA during the capture.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = self._function(*static_inputs)
        for tensor, value in zip(self._state, state_copy, strict=True):
            tensor.copy_(value)
        torch.manual_seed(seed)
        return _Capture(graph, static_inputs, output)
