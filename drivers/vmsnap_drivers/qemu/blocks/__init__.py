"""QEMU's block layer as drivers share it: the graph, overlays over disks, and image files."""
