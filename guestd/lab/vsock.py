"""The lab's vsock device. See `guestd.lab.vsock_device`."""

from guestd.lab.vsock_device import VsockDevice

__all__ = ["VsockDevice"]
