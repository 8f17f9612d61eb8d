"""Everything that knows process groups. Importing this package makes megatron-core usable without a GPU."""

from megatron_sage.parallel.device import backend, device, install_cpu_backend

install_cpu_backend()  # has to precede the first `import megatron.core` of the process

__all__ = ["backend", "device", "install_cpu_backend"]
