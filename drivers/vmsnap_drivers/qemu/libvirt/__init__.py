"""QEMU's monitor by way of libvirt, which stays in charge of the VM."""
