"""What a model holds and does, counted: parameters, the order and shapes of its layers, FLOPs.

Everything returned is a plain number or tuple. Nothing here knows of rank, and nothing here
leaves a trace in the model: flags, buffers, hooks and random state are as they were.
"""

from __future__ import annotations

from rankwise.accounting.counting import Parameters, flops, macs, parameters, running_statistics
from rankwise.accounting.machine import device_name, processor
from rankwise.accounting.memory import Memory, memory
from rankwise.accounting.running import Sample, Shape, call_arguments, device_of
from rankwise.accounting.tracing import Call, Trace, Watcher, trace, watch

__all__ = [
    "Call",
    "Memory",
    "Parameters",
    "Sample",
    "Shape",
    "Trace",
    "Watcher",
    "call_arguments",
    "device_name",
    "device_of",
    "flops",
    "macs",
    "memory",
    "parameters",
    "processor",
    "running_statistics",
    "trace",
    "watch",
]
