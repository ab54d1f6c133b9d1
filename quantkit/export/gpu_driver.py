"""The GPU driver through ctypes: load a binary, launch a kernel. NVIDIA's libcuda and AMD's libamdhip64.

The two have the same functions under other names. torch's primary context is used as it is: binaries are
loaded once per device and launches go to torch's current stream.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

from quantkit.errors import QuantkitError

_LIBRARIES = {"cuda": ("libcuda.so.1", "cu"), "hip": ("libamdhip64.so", "hip")}
_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


class Driver:
    """Calls of the driver that launching needs. `kind` is "cuda" or "hip"; `library` another file than usual.

    QuantkitError when the library is missing or a call fails, with the driver's words.
    """

    def __init__(self, kind: str = "cuda", library: str | None = None) -> None:
        self.kind = kind
        name, self.prefix = _LIBRARIES[kind]
        try:
            self.library: Any = ctypes.CDLL(library or name)
        except OSError as missing:
            raise QuantkitError(f"the GPU driver's {name} is not here ({missing})") from missing
        launch = self._function("LaunchKernel", "ModuleLaunchKernel")
        launch.argtypes = [ctypes.c_void_p, *[ctypes.c_uint] * 7, *[ctypes.c_void_p] * 3]
        launch.restype = ctypes.c_int
        self._launch = launch

    def _function(self, cuda: str, hip: str | None = None) -> Any:
        return getattr(self.library, self.prefix + (cuda if self.kind == "cuda" else hip or cuda))

    def _check(self, code: int, what: str) -> None:
        if code == 0:
            return
        text = ctypes.c_char_p()
        if self.kind == "cuda":
            self.library.cuGetErrorString(code, ctypes.byref(text))
        else:
            self.library.hipGetErrorString.restype = ctypes.c_char_p
            text.value = self.library.hipGetErrorString(code)
        words = (text.value or b"unknown error").decode()
        raise QuantkitError(f"{what}: the GPU driver says {words!r} ({code})")

    def load(self, file: Path, symbol: str, shared: int) -> int:
        """Handle of a kernel of a binary, allowed `shared` bytes of dynamic shared memory. Needs a context."""
        image = file.read_bytes()
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        load = self._function("ModuleLoadData")
        self._check(load(ctypes.byref(module), ctypes.c_char_p(image)), f"loading {file.name}")
        get = self._function("ModuleGetFunction")
        self._check(get(ctypes.byref(function), module, symbol.encode()), f"{file.name}, kernel {symbol}")
        if self.kind == "cuda":
            code = self.library.cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED, ctypes.c_int(shared))
            self._check(code, f"{file.name}: {shared} bytes of shared memory")
        return int(function.value or 0)

    def launch(
        self, function: int, grid: tuple[int, int, int], threads: int, shared: int, stream: int, values: Any
    ) -> None:
        """Launch; `values` is a ctypes array of pointers to the parameters."""
        code = self._launch(function, *grid, threads, 1, 1, shared, stream, values, None)
        if code:
            self._check(code, "launch")
