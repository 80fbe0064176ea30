"""Kernels on NVIDIA devices, by the driver alone: `from sapper.runtime import cuda`.

    x = cuda.array(host)                 device memory; `x.numpy()` copies back, DLPack shares it with PyTorch
    kernel(x, y, out)                    runs on the device where its tensors lie, on the current stream
    call = sapper.prepare(kernel, x, y, out)
    with cuda.Stream() as stream:        current until the end of the block
        graph = cuda.capture(lambda: (call(), call()))
        graph()
    cuda.load(ptx_text)["name"](grid, block, [x, 3])

Needs the package cuda-bindings (extra `cuda`) and NVIDIA's driver. What has never run on hardware: docs/cuda.md.
"""

from __future__ import annotations

from .driver import CudaError, Device, device, device_count
from .memory import DeviceArray, array, empty
from .module import Function, Module, TensorMap, load
from .streams import Event, Graph, Stream, capture, current_stream

__all__ = ["CudaError", "Device", "DeviceArray", "Event", "Function", "Graph", "Module", "Stream", "TensorMap", "array",
           "capture", "current_stream", "device", "device_count", "empty", "load"]
