"""Which GPU the next call runs on, and which architecture's kernel that takes."""

import jax

from ouromamba_jax.pallas.tiles import Target


def default_device() -> jax.Device:
    """Where the next call runs. Under `jax.default_device` it may be one that this machine lacks, to compile for it."""
    chosen = jax.config.jax_default_device
    return jax.devices(chosen)[0] if chosen is None or isinstance(chosen, str) else chosen


def device_reason() -> str | None:
    """Why no kernel can run on the default device; None if one can."""
    device = default_device()
    if device.platform != "gpu":
        return f"it needs an NVIDIA GPU, and the default device is a {device.platform}"
    if jax.config.jax_enable_x64:
        return "jax_enable_x64 is on, and Mosaic counts in 32 bits"
    if len(jax.devices()) > 1:
        return "a kernel runs on one device, and this process sees several"
    capability = getattr(device, "compute_capability", "unknown")
    return None if target_of(capability) else f"there is no kernel for compute capability {capability}"


def int4_reason() -> str | None:
    """Why no kernel can multiply 4-bit integers on the default device; None if one can."""
    if reason := device_reason():
        return reason
    return "Hopper's tensor cores multiply no 4-bit integers" if device_target() == "sm90" else None


def device_target() -> Target:
    """The architecture of the default device.

    Raises:
      ValueError: if there is no kernel for it.
    """
    target = None if device_reason() else target_of(default_device().compute_capability)
    if target is None:
        raise ValueError(f"no GPU kernel can run: {device_reason()}")
    return target


def target_of(capability: str) -> Target | None:
    """The architecture whose kernels run on a compute capability like "8.0", if there is one."""
    targets: dict[str, Target] = {"8.0": "sm80", "8.6": "sm89", "8.9": "sm89", "9.0": "sm90"}
    return targets.get(capability)
