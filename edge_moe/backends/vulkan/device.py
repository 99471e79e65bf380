"""The device: which one, its buffers with their bytes counted, its shaders, what is sent to it and read back.

wgpu is imported when a device is asked for, not before.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np

from edge_moe.errors import DeviceError

PARAMS_BYTES = 256  # of one step's numbers: what any device can align to
MISSING = "wgpu is not installed: pip install 'edge-moe[vulkan]'"
_WRITE_BYTES = 32 << 20  # at a time: the library holds what was not submitted yet a second time
_LARGEST_BUFFER = (1 << 31) - 256  # bytes: shaders count them in 32 bits
_KINDS = ("DiscreteGPU", "IntegratedGPU", "VirtualGPU", "Unknown", "CPU")  # the better ones first


@dataclass(frozen=True)
class Adapter:
    """A device that could be used."""

    name: str
    is_software: bool  # runs on the CPU, slower than our own kernels do
    handle: Any


@dataclass
class DeviceStats:
    """What was sent, and the memory taken."""

    submissions: int = 0
    uploaded_bytes: int = 0
    allocated_bytes: int = 0
    peak_bytes: int = 0


def find_adapter() -> Adapter:
    """The best device that there is. Raises DeviceError, which says what is missing."""
    try:
        import wgpu
        from wgpu.backends.wgpu_native.extras import set_instance_extras
    except ImportError:
        raise DeviceError(MISSING) from None
    if (
        "XDG_RUNTIME_DIR" not in os.environ
    ):  # no desktop: Mesa's layer would look for a screen all the same, and complain
        os.environ.setdefault("NODEVICE_SELECT", "1")
    try:
        with suppress(RuntimeError):  # somebody has asked the library before us
            # without OpenGL, which has nothing that we want
            set_instance_extras(backends=["Primary"])
        found = [each for each in wgpu.gpu.enumerate_adapters_sync() if each.info["backend_type"] != "OpenGL"]
    except Exception as error:  # without a driver the library's errors have no common type
        raise DeviceError(f"wgpu finds no device: {_first_line(error)}") from None
    if not found:
        raise DeviceError("no Vulkan, Metal or DirectX device: install its driver (on Debian mesa-vulkan-drivers)")

    def rank(adapter: Any) -> int:
        kind = adapter.info["adapter_type"]
        return _KINDS.index(kind) if kind in _KINDS else _KINDS.index("Unknown")

    best = min(found, key=rank)
    info = best.info
    return Adapter(f"{info['device']} ({info['backend_type']})", info["adapter_type"] == "CPU", best)


class Device:
    """An open device; all of its memory is taken here, at most `limit_bytes`."""

    def __init__(self, adapter: Adapter, limit_bytes: int | None = None, max_binding_bytes: int | None = None) -> None:
        """max_binding_bytes: as if no shader could see more of a buffer. Raises DeviceError."""
        import wgpu

        self._wgpu = wgpu
        self.name = adapter.name
        self.limit_bytes = limit_bytes
        self.stats = DeviceStats()
        limits = {key: adapter.handle.limits[key] for key in ("max-buffer-size", "max-storage-buffer-binding-size")}
        with self.errors():
            self._device = adapter.handle.request_device_sync(required_limits=limits)
        self.max_binding_bytes = min(*limits.values(), _LARGEST_BUFFER, max_binding_bytes or _LARGEST_BUFFER) & ~255
        self._pipelines: dict[tuple[str, ...], Any] = {}
        self._readback: Any = None
        stage, types = wgpu.ShaderStage.COMPUTE, ("uniform", "storage", "storage", "read-only-storage", "storage")
        entries: list[dict[str, Any]] = [
            {"binding": i, "visibility": stage, "buffer": {"type": kind}} for i, kind in enumerate((*types, "uniform"))
        ]
        entries[0]["buffer"] |= {"has_dynamic_offset": True, "min_binding_size": PARAMS_BYTES}
        with self.errors():
            self._layout = self._device.create_bind_group_layout(entries=entries)
            self._pipeline_layout = self._device.create_pipeline_layout(bind_group_layouts=[self._layout])
            usage = wgpu.BufferUsage.STORAGE
            self._nothing = [self._create(PARAMS_BYTES, usage) for _ in range(2)]  # where a shader reads none

    @contextmanager
    def errors(self) -> Iterator[None]:
        """The library's errors as ours."""
        try:
            yield
        except (self._wgpu.GPUError, RuntimeError) as error:
            is_memory = isinstance(error, self._wgpu.GPUOutOfMemoryError) or "memory" in str(error).lower()
            advice = "--vram SIZE keeps fewer experts there" if is_memory else "--backend cpu needs no device"
            raise DeviceError(f"{self.name}: {_first_line(error)}; {advice}") from None

    # ---- memory

    def create(self, n_bytes: int) -> Any:
        """A new buffer for shaders. Raises DeviceError."""
        usage = self._wgpu.BufferUsage
        with self.errors():
            return self._create(n_bytes, usage.STORAGE | usage.COPY_DST | usage.COPY_SRC)

    def create_uniform(self, n_bytes: int) -> Any:
        """A new buffer for shaders' parameters. Raises DeviceError."""
        with self.errors():
            return self._create(n_bytes, self._wgpu.BufferUsage.UNIFORM | self._wgpu.BufferUsage.COPY_DST)

    def _create(self, n_bytes: int, usage: int) -> Any:
        size = buffer_bytes(n_bytes)
        total = self.stats.allocated_bytes + size
        if self.limit_bytes is not None and total > self.limit_bytes:
            raise DeviceError(
                f"--vram: {total} bytes wanted, {self.limit_bytes} given; a smaller context (-c) needs less"
            )
        buffer = self._device.create_buffer(size=size, usage=usage)
        self.stats.allocated_bytes = total
        self.stats.peak_bytes = max(self.stats.peak_bytes, total)
        return buffer

    def release(self, buffer: Any) -> None:
        """Give a buffer's memory back."""
        self.stats.allocated_bytes -= buffer.size
        buffer.destroy()

    def write(self, buffer: Any, offset: int, data: np.ndarray) -> None:
        """Send numbers to a buffer, from byte `offset` on; they are there for what is submitted after this."""
        flat = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        whole = flat.size & ~3  # the library takes whole words
        with self.errors():
            for first in range(0, whole, _WRITE_BYTES):
                part = flat[first : min(first + _WRITE_BYTES, whole)]
                self._device.queue.write_buffer(buffer, offset + first, part)
                if whole > _WRITE_BYTES:
                    self._device.queue.submit([])
            if whole < flat.size:
                tail = np.zeros(4, np.uint8)
                tail[: flat.size - whole] = flat[whole:]
                self._device.queue.write_buffer(buffer, offset + whole, tail)
        self.stats.uploaded_bytes += flat.size

    # ---- work

    def pipeline(self, *names: str) -> Any:
        """The shader of the files `names` one behind the other, or `NAME=VALUE` for a constant. Raises DeviceError."""
        if names not in self._pipelines:
            with self.errors():
                module = self._device.create_shader_module(label=" ".join(names), code=shader_source(names))
                self._pipelines[names] = self._device.create_compute_pipeline(
                    layout=self._pipeline_layout, compute={"module": module, "entry_point": "main"}
                )
        return self._pipelines[names]

    def bind_group(self, params: Any, arena: Any, state: Any, weights: Any, cache: Any, length: Any) -> Any:
        """Buffers as shaders see them; None where they look at none."""
        buffers = [params, arena, state, weights or self._nothing[0], cache or self._nothing[1], length]
        sizes = [PARAMS_BYTES, *(buffer.size for buffer in buffers[1:])]
        with self.errors():
            return self._device.create_bind_group(
                layout=self._layout,
                entries=[
                    {"binding": i, "resource": {"buffer": buffer, "offset": 0, "size": size}}
                    for i, (buffer, size) in enumerate(zip(buffers, sizes, strict=True))
                ],
            )

    def run(self, steps: Sequence[tuple[Any, Any, int, tuple[int, int, int]]], source: Any, at: int, n_bytes: int):
        """Run steps (pipeline, bind group, offset of parameters, workgroups) and read bytes of a buffer: u8[n_bytes].

        One submission. Raises DeviceError.
        """
        with self.errors():
            encoder = self._device.create_command_encoder()
            work = encoder.begin_compute_pass()
            for pipeline, group, offset, n_groups in steps:
                work.set_pipeline(pipeline)
                work.set_bind_group(0, group, [offset])
                work.dispatch_workgroups(*n_groups)
            work.end()
            readback = self._readback_of(n_bytes)
            encoder.copy_buffer_to_buffer(source, at, readback, 0, n_bytes)
            self._device.queue.submit([encoder.finish()])
            self.stats.submissions += 1
            self._readback = None  # until it was read: an interrupt leaves it mapped
            readback.map_sync(self._wgpu.MapMode.READ, 0, n_bytes)
            out = np.frombuffer(readback.read_mapped(0, n_bytes), np.uint8).copy()
            readback.unmap()
            self._readback = readback
        return out

    def _readback_of(self, n_bytes: int) -> Any:
        if self._readback is None or self._readback.size < n_bytes:
            if self._readback is not None:
                self.release(self._readback)
            usage = self._wgpu.BufferUsage
            self._readback = self._create(n_bytes, usage.COPY_DST | usage.MAP_READ)
        return self._readback


def buffer_bytes(n_bytes: int) -> int:
    """What a buffer for n_bytes takes: whole 256, and a word more, since shaders read blocks by whole words."""
    return (n_bytes + 4 + 255) & ~255


def shader_source(names: Sequence[str]) -> str:
    """The text of shader files one behind the other; `NAME=VALUE` is a constant."""
    parts = []
    for name in names:
        constant, _, value = name.partition("=")
        if value:
            parts.append(f"const {constant} = {value}u;\n")
        else:
            parts.append((resources.files("edge_moe.backends") / "shaders" / f"{name}.wgsl").read_text("utf-8"))
    return "\n".join(parts)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:4])[:300].rstrip(".") if lines else type(error).__name__
